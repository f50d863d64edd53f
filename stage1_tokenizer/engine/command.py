"""How a command ends: what its main function raises becomes a message and an exit code."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from torch import distributed

from stage1_tokenizer.engine.checkpoint import NO_SPACE
from stage1_tokenizer.engine.errors import InterruptionError, StorageError, UserError
from stage1_tokenizer.engine.lock import unlock_folders
from stage1_tokenizer.engine.processor import check_fast_paths
from stage1_tokenizer.engine.signals import die_with_launcher, interruptible

PIPE_CLOSED = 141
"""What a shell says of a command whose reader, e.g. `head`, has gone."""


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main function; end the process with the exit code of its UserError, if it raises one."""
    with interruptible():  # until the last word is said
        try:
            die_with_launcher()
            check_fast_paths()
            main()
            leave_group()
            sys.stdout.flush()  # here, where it can still be told that the disk is full
        except UserError as error:
            kind = "Interrupted" if isinstance(error, InterruptionError) else type(error).__name__
            _end(error.exit_code, f"{kind}: {error}")
        except KeyboardInterrupt:
            _end(130, "\nInterrupted. Nothing is lost: the same command continues from what is on disk.")
        except BrokenPipeError:
            _end(PIPE_CLOSED, "")
        except OSError as error:
            # Whatever was being written, be it the console's output into a file on the same disk.
            if error.errno not in NO_SPACE:
                raise
            _end(
                StorageError.exit_code, f"StorageError: no space left ({error}); make room, then the same command again"
            )
        finally:
            unlock_folders()


def leave_group() -> None:
    """Leave the group of processes, if this one is in any. To be called after the function that trained has returned.

    A DistributedDataParallel owns the group too. If it is the last owner, it waits for the group's threads while it
    holds the interpreter's lock; in torch 2.11 a thread of gloo may be waiting for that lock to free a tensor, and
    neither ever goes on. So these modules go first, those in reference cycles too, and the group last.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def _end(code: int, message: str) -> None:
    with suppress(OSError):  # the console may be a file on a full disk
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    if code in (PIPE_CLOSED, StorageError.exit_code):
        # What could not be written is still waiting to be, and would be tried again at the interpreter's end.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
