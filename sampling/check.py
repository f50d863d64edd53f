"""Check whether files are undamaged and belong together.   python sampling/check.py PATH [PATH ...]

A path is a run's folder of either stage, or a folder of runs; a state, a safetensors file, a folder of tokens; a folder
of samples, a folder of images, or one image. Nothing is changed, and nothing is unpickled. Prints one line for each
thing that it checks,

    ok   runs/stage1/shapes_vq/state/step-00001500: whole by its checksums, format 2; a resume takes this one

that begins with ok, bad, or note (harmless, or not something that can be judged), and at the end the number of each.
Exit code 0: nothing is bad; 3: something is bad; 2: a path is nothing that can be checked.
"""

import io
import sys
from collections import Counter

from pydantic import Field
from pydantic_settings import CliPositionalArg

from sampling.checks.paths import checks_of
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.pretrained import resolve_path


class CheckConfig(CommandConfig):
    """Check whether files and folders are undamaged and belong together. Nothing is changed."""

    paths: CliPositionalArg[tuple[str, ...]] = Field(min_length=1)
    """Runs of either stage, or folders of runs; pretrained:NAME; states, safetensors files, folders of tokens; folders
    of samples, folders of images, images."""


def main() -> None:
    """Print the findings of all paths, and exit with code 3 if one is bad."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    # A wrong path is an error before the first check begins, because a check may take an hour.
    paths = [resolve_path(path, "PATH") for path in parse_command_line(CheckConfig).paths]
    checks = [check for path in paths for check in checks_of(path)]
    count: Counter[str] = Counter()
    for check in checks:
        for finding in check.findings():
            count[finding.verdict] += 1
            say(str(finding))
    print(", ".join(f"{count[verdict]:,} {verdict}" for verdict in ("ok", "bad", "note")))
    if count["bad"]:
        sys.exit(BadFileError.exit_code)


if __name__ == "__main__":
    run_command(main)
