"""The use of the codebook: a histogram of the codes sorted by use, dead codes, perplexity and entropy."""

import math
from typing import NamedTuple

from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.report.charts import Chart, Series, chart_html
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    description_list,
    format_number,
    format_percent,
    join,
    tag,
)  # fmt: skip
from stage1_tokenizer.diagnostics.views.base import Subject, View, code_use, codes_of, encoded_images, once
from stage1_tokenizer.diagnostics.views.sheet import MARGIN, TOP, WIDTH, Sheet
from stage1_tokenizer.engine.log_file import Curve
from stage1_tokenizer.metrics import CodeUse

MOST_CODEBOOKS = 8
"""Codebooks in the chart, at most: there are as many colours."""


class Usage(NamedTuple):
    """The use of a codebook, or of the K codebooks of a position."""

    use: CodeUse
    dead: list[int]
    """(K,), numbers of codes that do not occur."""
    positions: int
    """Number of positions, N h w."""
    chart: Chart
    """The count of each code, the most used first."""


@once
def usage_of(subject: Subject) -> Usage:
    """Count the codes of the validation images."""
    encoded = encoded_images(subject)
    codes, size = codes_of(encoded), encoded.tokenizer.bottleneck.codebook_size
    K, positions = codes.shape[-1], codes[..., 0].numel()
    use = code_use(codes, size)
    dead = (use.counts == 0).sum(dim=1).tolist()
    series = []
    for k, counts in enumerate(use.counts[:MOST_CODEBOOKS]):
        ordered = counts.sort(descending=True).values
        ordered = ordered[ordered > 0].tolist()
        name = f"code {k + 1} of {K}" if K > 1 else "uses of a code"
        series.append(Series(name, Curve(list(range(1, len(ordered) + 1)), [float(count) for count in ordered])))
    chart = Chart(
        "Uses of each code, the most used first",
        "uses, on a logarithmic axis",
        series,
        log=True,
        x_name="rank of the code",
        level=("all used equally", positions / size),
        fill=K == 1,
        shade=(f"{format_count(dead[0], 'dead code')}", size - dead[0]) if K == 1 and dead[0] else None,
        extent=(1, max(2, size)),
    )
    return Usage(use, dead, positions, chart)


def draw_usage(subject: Subject) -> Sheet:
    """Draw the histogram of the codes, the most used first."""
    encoded, (use, dead, positions, chart) = encoded_images(subject), usage_of(subject)
    size = use.counts.shape[1]
    dead_codes = f"{dead[0]} dead codes" if len(dead) == 1 else f"{sum(dead)} of {len(dead)}x{size} codes dead"
    sheet = Sheet(
        TOP + 3.9,
        f"Use of the codebook: perplexity {use.perplexity:.1f} of {size}, {dead_codes}",
        f"{use.usage:.1%} of the codes occur in {encoded.count} validation images ({positions:,} positions); "
        f"entropy {use.entropy_bits:.2f} of {math.log2(size):.2f} bits.\nFrom the most used code to the least used, "
        f"then the dead codes. Dashed: all codes used equally, {positions / size:,.1f} times each.",
        encoded.footer,
    )
    sheet.chart(MARGIN + 0.5, TOP + 0.3, WIDTH - 2 * MARGIN - 0.6, 3.05, chart)
    return sheet


def show_usage(subject: Subject) -> Child:
    """Return the numbers of used and dead codes, perplexity, entropy and the histogram."""
    encoded, (use, dead, positions, chart) = encoded_images(subject), usage_of(subject)
    K, size = use.counts.shape
    dead_per_codebook = f" ({', '.join(map(str, dead))})" if K > 1 else ""
    facts: list[tuple[Child, Child]] = [
        ("Codes in use", f"{format_percent(use.usage)} of {size:,}{f', in {K} codebooks' if K > 1 else ''}"),
        ("Dead codes", f"{sum(dead):,}{dead_per_codebook}"),
        ("Perplexity", f"{format_number(use.perplexity)}; as hard to predict as this many equally frequent codes"),
        ("Entropy", f"{format_number(use.entropy_bits, 3)} of {format_number(math.log2(size), 3)} bits a code"),
    ]
    is_too_few = positions < 10 * size
    few = f" {positions:,} positions are too few to judge {size:,} codes: rare codes look dead." if is_too_few else ""
    words = tag("p", f"Counted in {encoded.description}, at {positions:,} positions.{few}")
    return join(words, description_list(facts), chart_html(chart))


VIEW = View("usage", "Codes in use", draw_usage, show_usage, address="codes")
