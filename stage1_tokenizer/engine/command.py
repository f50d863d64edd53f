"""The end of every command: exceptions of its main function become a message and an exit code."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from torch import distributed

from stage1_tokenizer.engine.errors import InterruptionError, StorageError, UserError
from stage1_tokenizer.engine.files import NO_SPACE
from stage1_tokenizer.engine.lock import unlock_folders
from stage1_tokenizer.engine.processor import check_fast_paths
from stage1_tokenizer.engine.signals import die_with_launcher, interruptible

PIPE_CLOSED = 141
"""Exit code that a shell reports when the reader of a command's output, e.g. `head`, has ended."""


def run_command(main: Callable[[], None]) -> None:
    """Run the main function of a script, and end the process with a message and an exit code if it fails.

    The exit code is that of the UserError, 130 after Ctrl-C, 141 if the reader of the output has ended, and 5 if the
    disk is full. Any other exception is a bug and keeps its traceback.
    """
    with interruptible():  # until the last message is printed
        try:
            die_with_launcher()
            check_fast_paths()
            main()
            leave_process_group()
            sys.stdout.flush()  # here, where a full disk can still be reported
        except UserError as error:
            kind = "Interrupted" if isinstance(error, InterruptionError) else type(error).__name__
            _exit(error.exit_code, f"{kind}: {error}")
        except KeyboardInterrupt:
            _exit(130, "\nInterrupted. Nothing is lost: the same command continues from what is on disk.")
        except BrokenPipeError:
            _exit(PIPE_CLOSED, "")
        except OSError as error:
            # Any write can fail on a full disk, also that of the console's output to a file.
            if error.errno not in NO_SPACE:
                raise
            _exit(
                StorageError.exit_code,
                f"StorageError: no space left ({error}). Make room, then give the same command again",
            )
        finally:
            unlock_folders()


def leave_process_group() -> None:
    """Leave the group of processes, if this process is in one. Call it after the training function has returned.

    A DistributedDataParallel module owns the group too. If it is the last owner, it waits for the threads of the group
    while it holds the interpreter's lock. In torch 2.11 a thread of gloo may wait for that lock to free a tensor, and
    both wait for ever. So the modules are freed first, those in reference cycles too, and the group last.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def _exit(code: int, message: str) -> None:
    with suppress(OSError):  # the console may be a file on a full disk
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    if code in (PIPE_CLOSED, StorageError.exit_code):
        # Python would try at its end to write the buffered output again, and fail again.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
