"""How a command ends: what its main function raises becomes a message and an exit code."""

import sys
from collections.abc import Callable
from contextlib import suppress

from stage1_tokenizer.checkpoint import NO_SPACE
from stage1_tokenizer.errors import InterruptionError, StorageError, UserError
from stage1_tokenizer.lock import unlock_folders
from stage1_tokenizer.signals import die_with_launcher, interruptible


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main function; end the process with the exit code of its UserError, if it raises one."""
    try:
        with interruptible():
            die_with_launcher()
            main()
    except UserError as error:
        kind = "Interrupted" if isinstance(error, InterruptionError) else type(error).__name__
        _end(error.exit_code, f"{kind}: {error}")
    except KeyboardInterrupt:
        _end(130, "\nInterrupted. Nothing is lost: the same command continues from what is on disk.")
    except OSError as error:
        # Whatever was being written, be it the console's output into a file on the same disk.
        if error.errno not in NO_SPACE:
            raise
        _end(
            StorageError.exit_code, f"StorageError: no space left ({error}); make room, and give the same command again"
        )
    finally:
        unlock_folders()


def _end(code: int, message: str) -> None:
    with suppress(OSError):  # the console may be a file on a full disk
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
