"""What SIGTERM and Ctrl-C do to a command, and what becomes of it when its launcher dies.

most of the time      SIGTERM raises InterruptionError at once (exit code 75), Ctrl-C KeyboardInterrupt
in a training loop    both are noted; the loop finishes its step, saves, and then raises InterruptionError
after it              either raises InterruptionError at once, and only the first one does
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from stage1_tokenizer.engine.errors import InterruptionError

SECOND_AFTER = 1.0
"""Seconds. A Ctrl-C that follows another within this time is the same one: torchrun hands on what the terminal has
already sent to every process."""
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")
"""What the command line of a process says that starts trainings and waits for them."""
PR_SET_PDEATHSIG = 1


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises InterruptionError, so that files under temporary names are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a command called from somebody's thread; only the main one may ask for signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it was not Python's to give back
                signal.signal(number, handler)


def die_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies. `accelerate launch` of one process hands on no signal: stopped by
    a scheduler it would leave the training running, unseen, for ever.

    Raises:
        InterruptionError: it is dead already.
    """
    launcher = os.getppid()
    if sys.platform != "linux" or not _is_launcher(launcher):
        return  # a shell, whose end ends no command that is to outlive it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died just now
        raise InterruptionError("the launcher that started this process is gone; start the same command again")


class StopRequest:
    """From its making on, SIGTERM and the first Ctrl-C only set `asked`; another Ctrl-C stops at once.

    `interruptible` ends that too.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first_key = float("inf")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._first_key > SECOND_AFTER:
                raise KeyboardInterrupt
            self._first_key = min(self._first_key, now)
        first, self.asked = not self.asked, True
        if first:
            with suppress(OSError):  # a console that is gone is no reason not to save
                # Not print, which may be in the middle of printing when the signal comes.
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def stop_at_once(message: str) -> None:
    """From now on the first SIGTERM or Ctrl-C raises InterruptionError, and others do nothing: there is no more step
    to finish, and a launcher hands on what the terminal has sent already. `interruptible` ends that too."""

    def stop(_: int, __: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise InterruptionError(message)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)


def _raise(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a launcher may send it twice, and the way out removes temporary files
    raise InterruptionError("stopped by SIGTERM; the same command continues from what is on disk")


def _is_launcher(process: int) -> bool:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            command = file.read(4096)
    except OSError:
        return False
    return any(name in command for name in LAUNCHERS)
