"""How a command ends: what its main function raises becomes a message and an exit code."""

import sys
from collections.abc import Callable

from stage1_tokenizer.errors import InterruptionError, UserError
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
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing is lost: the same command continues from what is on disk.", file=sys.stderr)
        sys.exit(130)
    finally:
        unlock_folders()
