"""The former place of the command sampling/check.py; it only prints the new one."""

import sys

from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError


def main() -> None:
    """Raise ConfigError with the command to type instead."""
    raise ConfigError(f"this command has moved; type: python sampling/check.py {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    run_command(main)
