"""Errors that the user can mend, each with the exit code of the command that raises it.

`command.run_command` turns a UserError into one message on stderr and an exit code. Any other exception is a bug of
this project and keeps its traceback.
"""

LONGEST_QUOTE = 300
"""Characters of a quoted text in a message. A file of somebody else may contain text of any length."""


class UserError(Exception):
    """Base of the errors that are shown without a traceback."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """Wrong usage or configuration: an unknown key, a value out of range, a path that does not exist."""

    exit_code = 2


class BadFileError(UserError):
    """A file that cannot be used: damaged, of another kind, made by or for something else."""

    exit_code = 3


class DivergedError(UserError):
    """Training stopped after too many steps in a row with losses that are not finite. The last state is intact."""

    exit_code = 4


class StorageError(UserError):
    """The disk is full or cannot be written to, or the memory of the machine is used up."""

    exit_code = 5


class InterruptionError(UserError):
    """The command was stopped by SIGTERM or Ctrl-C. Its work is on disk, and the same command continues it.

    The exit code is EX_TEMPFAIL, so that a scheduler can tell a stop from a failure and queue the job again.
    """

    exit_code = 75


def shorten(text: object, longest: int = LONGEST_QUOTE) -> str:
    """Return a text of at most `longest` characters for a message; a text that was cut ends in three dots."""
    text = str(text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
