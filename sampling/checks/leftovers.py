"""What a killed process had not finished writing. It bears a name under which nothing is looked for."""

from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, note
from stage1_tokenizer.engine.state import TEMPORARY


def check_leftovers(folder: Path, holder: str | None) -> Iterator[Finding]:
    """Directly in a folder, which `holder` has, if anybody."""
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        if holder is None:
            yield note(path, "is left over from a write that was cut off; harmless")
        else:
            yield note(path, "is being written, or is left over from a write that was cut off; harmless")
