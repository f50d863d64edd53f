"""What SIGTERM and Ctrl-C do to a command, and what becomes of it when its launcher dies.

most of the time      SIGTERM raises InterruptionError at once (exit code 75), Ctrl-C KeyboardInterrupt
in a training loop    both are noted; the loop finishes its step, saves, and then raises InterruptionError
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stage1_tokenizer.errors import InterruptionError

SECOND_AFTER = 1.0
"""Seconds. A Ctrl-C that follows another within this time is the same one: torchrun hands on what the terminal has
already sent to every process."""
LAUNCHED_BY = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
"""Variables that `accelerate launch` and `torchrun` set for what they start."""
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
            signal.signal(number, handler)


def die_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies. `accelerate launch` of one process hands on no signal: stopped by
    a scheduler it would leave the training running, unseen, for ever.

    Raises:
        InterruptionError: it is dead already.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in LAUNCHED_BY):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1 and not _is_launcher(1):  # it died while this process was still importing
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
        if not self.asked:  # not print, which may be in the middle of printing when the signal comes
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        self.asked = True


def _raise(number: int, _: FrameType | None) -> None:
    raise InterruptionError("stopped by SIGTERM; the same command continues from what is on disk")


def _is_launcher(process: int) -> bool:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            command = file.read(4096)
    except OSError:
        return False
    return any(name in command for name in (b"accelerate", b"torchrun", b"torch.distributed"))
