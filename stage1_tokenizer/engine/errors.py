"""Errors that are the user's to mend, and the exit code that each of them ends a command with.

A command wraps its main function in `command.run_command`: such an error becomes one message on stderr and an exit
code; anything else is our own bug and keeps its traceback.
"""


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
    """Training produced losses that are not finite, step after step; the last checkpoint is intact."""

    exit_code = 4


class StorageError(UserError):
    """The disk is full or cannot be written to, or the machine's memory is spent."""

    exit_code = 5


class InterruptionError(UserError):
    """The command was asked to stop, by SIGTERM or Ctrl-C; what it has done is on disk and the same command goes on.

    The code is EX_TEMPFAIL: schedulers can tell it from failure, and queue the job again.
    """

    exit_code = 75
