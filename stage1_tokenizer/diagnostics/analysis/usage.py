"""How evenly the codebook is used."""

import numpy as np
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from stage1_tokenizer.diagnostics.analysis.encoded import code_use
from stage1_tokenizer.diagnostics.analysis.sheet import COLOURS, INK, MARGIN, TOP, WIDTH, Sheet


def draw_usage(codes: Tensor, codebook_size: int, footer: str) -> Sheet:
    """codes (N, h, w, K) of all images."""
    use = code_use(codes, codebook_size)
    tokens, K = codes[..., 0].numel(), codes.shape[-1]
    dead = (use.counts == 0).sum(dim=1).tolist()
    one = f"{dead[0]} dead codes" if K == 1 else f"{sum(dead)} of {K}x{codebook_size} codes dead"
    bits = float(np.log2(codebook_size))
    sheet = Sheet(
        TOP + 3.9,
        f"Use of the codebook: perplexity {use.perplexity:.1f} of {codebook_size}, {one}",
        f"{use.usage:.1%} of the codes occur in {len(codes)} validation images ({tokens:,} positions); entropy "
        f"{use.entropy_bits:.2f} of {bits:.2f} bits.\nFrom the most used code to the least, then the dead ones. "
        "Dashed: all used alike.",
        footer,
    )
    with sheet:
        axes = sheet.plot(MARGIN + 0.5, TOP + 0.15, WIDTH - 2 * MARGIN - 0.6, 3.2)
        for k, counts in enumerate(use.counts):
            ordered = counts.sort(descending=True).values
            used = int((ordered > 0).sum())
            colour = COLOURS[k % len(COLOURS)]
            label = f"code {k + 1} of {K}" if K > 1 else "uses of a code"
            edges = np.arange(used + 1) + 0.5
            if K == 1:
                axes.stairs(ordered[:used].numpy(), edges, baseline=0.5, fill=True, color=colour, alpha=0.25)
            axes.stairs(ordered[:used].numpy(), edges, baseline=0.5, color=colour, lw=1.4, label=label)
        if K == 1 and dead[0]:
            axes.axvspan(codebook_size - dead[0] + 0.5, codebook_size + 0.5, color="#f3f4f6", lw=0)
        axes.axhline(tokens / codebook_size, color=INK, lw=1, ls="--", label=f"uniform: {tokens / codebook_size:,.1f}")
        axes.set_yscale("log")
        axes.set(xlabel="codes, the most used first", xlim=(0.5, codebook_size + 0.5), ylim=(0.5, None))
        axes.set_ylabel("uses")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right")
    return sheet
