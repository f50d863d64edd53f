"""The effect of SIGTERM, of Ctrl-C and of a launcher's death on a command.

by default            SIGTERM raises InterruptionError at once (exit code 75), Ctrl-C KeyboardInterrupt
in a training loop    StopRequest notes both; the loop finishes its step, saves, and raises InterruptionError
after the loop        the first of either raises InterruptionError at once, later ones do nothing
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
"""Seconds. A second Ctrl-C within this time counts as the first one: the terminal sends it to every process, and
torchrun sends it again."""
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")
"""Words in the command line of a process that starts trainings and waits for them."""
PR_SET_PDEATHSIG = 1


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise InterruptionError within a block, so that temporary files are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: another library had set it, and Python cannot restore it
                signal.signal(number, handler)


def die_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies.

    `accelerate launch` of one process does not forward signals. A scheduler that stops it would leave the training
    running.

    Raises:
        InterruptionError: the launcher is dead already.
    """
    launcher = os.getppid()
    if sys.platform != "linux" or not _is_launcher(launcher):
        return  # a shell: a command may outlive it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it has just died
        raise InterruptionError("the launcher that started this process is gone. Start the same command again")


class StopRequest:
    """A flag `asked` that SIGTERM or the first Ctrl-C sets; a second Ctrl-C stops the command at once.

    The end of the `interruptible` block restores the former handlers.
    """

    def __init__(self) -> None:
        """Handle both signals from now on."""
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
            with suppress(OSError):  # without a console the run still saves
                # print() must not be called within print(), where the signal may have come.
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def stop_at_once(message: str) -> None:
    """Let the first SIGTERM or Ctrl-C raise InterruptionError from now on; later ones do nothing.

    For the time after the loop, which has no step to finish. A launcher may send a signal again that the terminal has
    sent already. The end of the `interruptible` block restores the former handlers.
    """

    def stop(_: int, __: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise InterruptionError(message)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)


def _raise(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the removal of temporary files
    raise InterruptionError("stopped by SIGTERM; the same command continues from what is on disk")


def _is_launcher(process: int) -> bool:
    """Return True if the command line of a process is that of a launcher."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            command = file.read(4096)
    except OSError:
        return False
    return any(name in command for name in LAUNCHERS)
