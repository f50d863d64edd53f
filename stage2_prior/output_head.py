"""From the context of a position to the logits of its K codes.

With one code per position that is a linear map. With several, code k also depends on the position's codes before it: a
small transformer runs over the depth, as in the RQ-Transformer (Lee et al. 2022, equations 9 to 11):

    input    context   e(c_0)   e(c_0) + e(c_1)  ...    each plus a vector for its depth      (B, h*w, K, width)
    logits   c_0       c_1      c_2              ...                                          (B, h*w, K, V)

The sums are what residual quantization has decoded so far.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.fast_linear import OneDnnLinear, Precision, prepare
from stage2_prior.gpt.layer import build_layer

StepLogits = Callable[[Tensor, Tensor], Tensor]
"""(context (B, width), the k codes that were chosen at its position, embedded (B, k, width)) -> logits (B, V)."""

HEAD_WIDTH = 64
"""Of an attention head, about: the width of the prior need not be a multiple of it."""


class LinearHead(nn.Module):
    """One code per position."""

    def __init__(self, width: int, shape: TokenShape) -> None:
        super().__init__()
        self.output = OneDnnLinear(width, shape.V, bias=False)

    def forward(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """contexts (B, n, width), the codes embedded (B, n, 1, width) -> logits (B, n, 1, V)."""
        del embedded  # the only code of a position depends on the context alone
        return self.output(contexts)[:, :, None]

    def prepare(self, precision: Precision) -> StepLogits:
        """The same for one position: its context (B, width) and no code of it yet (B, 0, width) -> logits (B, V)."""
        product = prepare(self.output.weight, None, precision)
        return lambda context, chosen: product(context)


class DepthTransformerHead(nn.Module):
    """K codes per position."""

    def __init__(self, width: int, layers: int, shape: TokenShape) -> None:
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        self.depths = nn.Parameter(torch.randn(shape.K, width) * width**-0.5)
        self.layers = nn.ModuleList(build_layer(width, heads, width // heads, 4 * width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        # One for each depth: the code books of a residual quantizer are different ones.
        self.outputs = nn.ModuleList(OneDnnLinear(width, shape.V, bias=False) for _ in range(shape.K))

    def forward(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """contexts (B, n, width), the codes embedded (B, n, K, width) -> logits (B, n, K, V)."""
        hidden = self._hidden(
            rearrange(contexts, "B n D -> (B n) D"), rearrange(embedded[:, :, :-1], "B n k D -> (B n) k D")
        )  # (B n, K, width)
        logits = torch.stack([output(hidden[:, k]) for k, output in enumerate(self.outputs)], dim=1)
        return rearrange(logits, "(B n) K V -> B n K V", B=len(contexts))

    def prepare(self, precision: Precision) -> StepLogits:
        """The same for code k of one position. In float32 whatever the precision: K is small."""
        del precision
        return self._next

    def _next(self, context: Tensor, chosen: Tensor) -> Tensor:
        """context (B, width), the k codes chosen so far, embedded (B, k, width) -> logits (B, V) of code k."""
        logits: Tensor = self.outputs[chosen.shape[1]](self._hidden(context, chosen)[:, -1])
        return logits

    def _hidden(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """contexts (b, width), k codes (b, k, width) -> (b, k+1, width); the last one knows all of them."""
        x = torch.cat([contexts[:, None], embedded.cumsum(dim=1)], dim=1)
        x = x + self.depths[: x.shape[1]]
        for each in self.layers:
            x = each(x)
        return self.norm(x)


def build_head(width: int, layers: int, shape: TokenShape) -> LinearHead | DepthTransformerHead:
    """The head for a shape's K."""
    return LinearHead(width, shape) if shape.K == 1 else DepthTransformerHead(width, layers, shape)
