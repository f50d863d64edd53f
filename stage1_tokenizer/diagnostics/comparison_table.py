"""The table of a comparison: on the console, as Markdown and as JSON."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.diagnostics.comparison import Failure, Row

COLUMNS = (
    "preset",
    "parameters",
    "NMSE",
    "PSNR, dB",
    "LPIPS",
    "usage",
    "perplexity",
    "per image",
    "images/s",
    "training, s",
)


def cells(row: Row) -> list[str]:
    """A row as text, "-" for what it does not have."""
    return [
        row.preset,
        f"{row.parameters:,}",
        f"{row.nmse:.4f}",
        f"{row.psnr:.2f}",
        "-" if row.lpips is None else f"{row.lpips:.4f}",
        "-" if row.usage is None else f"{row.usage:.1%}",
        "-" if row.perplexity is None else f"{row.perplexity:,.1f}",
        f"{row.floats:,} f32" if row.bits is None else f"{row.bits:,.0f} bits",
        f"{row.images_per_second:,.3g}" if row.images_per_second < 100 else f"{row.images_per_second:,.0f}",
        f"{row.seconds:,.1f}" if row.seconds < 100 else f"{row.seconds:,.0f}",
    ]


def aligned(rows: Sequence[Row | Failure]) -> str:
    """For the console: names on the left, numbers under each other; what failed says so in place of its numbers."""
    lines = [list(COLUMNS), *(cells(row) for row in rows if isinstance(row, Row))]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    widths[0] = max(widths[0], *(len(row.preset) for row in rows))

    def line(words: Sequence[str]) -> str:
        padded = [word.rjust(width) for word, width in zip(words, widths, strict=True)]
        return "  ".join([words[0].ljust(widths[0]), *padded[1:]])

    return "\n".join(
        [
            line(COLUMNS),
            *(
                line(cells(row)) if isinstance(row, Row) else f"{row.preset.ljust(widths[0])}  {row.message}"
                for row in rows
            ),
        ]
    )


def markdown(rows: Sequence[Row | Failure], caption: str) -> str:
    """The table, and the caption under it."""
    head = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:]))]
    body = [
        cells(row)
        if isinstance(row, Row)
        else [row.preset, row.message.replace("|", "\\|"), *("" for _ in COLUMNS[2:])]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(words) + " |" for words in [*head, *body]) + f"\n\n{caption}\n"


def as_json(rows: Sequence[Row | Failure], settings: Tree) -> str:
    """All figures in full, the settings and the machine."""
    tree = {"settings": settings, "machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(tree, indent=2) + "\n"


def machine() -> dict[str, str]:
    """Where and with what the figures were made."""
    facts = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as far as the system tells it."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
