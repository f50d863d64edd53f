"""The output head of a prior: it turns the context of a position into the logits of its K codes.

For K = 1 it is a linear map. For K > 1 the code at depth k also depends on the codes at depths below k of the same
position: a small transformer runs over the depths (Lee et al., "Autoregressive Image Generation using Residual
Quantization", 2022, equations 9 to 11):

    input       context   e(c_0)   e(c_0) + e(c_1)  ...    each plus a vector of its depth    (B, h*w, K, width)
    logits of   c_0       c_1      c_2              ...                                       (B, h*w, K, V)

e(c) is the embedding of a code. The sums mirror the sums of codebook vectors in residual quantization.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.fast_linear import Precision, prepare
from stage2_prior.gpt.layer import build_layer

StepLogits = Callable[[Tensor, Tensor], Tensor]
"""The logits of one code: (context (B, width), embedded codes at depths below k (B, k, width)) -> (B, V) at depth k."""

HEAD_WIDTH = 64
"""Approximate channels of an attention head; the prior's width need not be a multiple."""


class LinearHead(nn.Module):
    """The output head for one code per position: a linear map."""

    def __init__(self, width: int, shape: TokenShape) -> None:
        super().__init__()
        self.output = nn.Linear(width, shape.V, bias=False)

    def forward(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """Compute the logits: contexts (B, n, width), embedded codes (B, n, 1, width) -> (B, n, 1, V)."""
        del embedded  # the only code of a position depends on the context only
        return self.output(contexts)[:, :, None]

    def prepare(self, precision: Precision) -> StepLogits:
        """Return the head for one position in this precision; see StepLogits."""
        product = prepare(self.output.weight, None, precision)
        return lambda context, chosen: product(context)


class DepthTransformerHead(nn.Module):
    """The output head for K > 1 codes per position: a transformer over the depths."""

    def __init__(self, width: int, layers: int, shape: TokenShape) -> None:
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        self.depths = nn.Parameter(torch.randn(shape.K, width) * width**-0.5)
        self.layers = nn.ModuleList(build_layer(width, heads, width // heads, 4 * width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        # One linear map per depth, since each depth of a residual quantizer has its own codebook.
        self.outputs = nn.ModuleList(nn.Linear(width, shape.V, bias=False) for _ in range(shape.K))

    def forward(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """Compute the logits: contexts (B, n, width), embedded codes (B, n, K, width) -> (B, n, K, V)."""
        hidden = self._hidden(
            rearrange(contexts, "B n D -> (B n) D"), rearrange(embedded[:, :, :-1], "B n k D -> (B n) k D")
        )  # (B n, K, width)
        logits = torch.stack([output(hidden[:, k]) for k, output in enumerate(self.outputs)], dim=1)
        return rearrange(logits, "(B n) K V -> B n K V", B=len(contexts))

    def prepare(self, precision: Precision) -> StepLogits:
        """Return the head for one position, in float32 for any `precision`; see StepLogits."""
        del precision  # the sequence of K depths is so short that a lower precision saves no time
        return self._next

    def _next(self, context: Tensor, chosen: Tensor) -> Tensor:
        """Compute the logits (B, V) at depth k: context (B, width), embedded codes at depths below k (B, k, width)."""
        logits: Tensor = self.outputs[chosen.shape[1]](self._hidden(context, chosen)[:, -1])
        return logits

    def _hidden(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """Run the transformer: contexts (b, width), embedded codes (b, k, width) -> (b, k + 1, width)."""
        x = torch.cat([contexts[:, None], embedded.cumsum(dim=1)], dim=1)
        x = x + self.depths[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def build_head(width: int, layers: int, shape: TokenShape) -> LinearHead | DepthTransformerHead:
    """Build the output head for the shape's K codes per position; `layers` is the depth transformer's number of
    layers."""
    return LinearHead(width, shape) if shape.K == 1 else DepthTransformerHead(width, layers, shape)
