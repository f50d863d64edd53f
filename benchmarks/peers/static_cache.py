"""A GPT with a static cache, as in gpt-fast and LlamaGen.

Keys and values are allocated for the longest sequence, and each step attends to all of them under a mask. Those
projects also copy the cache for grouped heads; here no heads are grouped. The architecture is Llama's: RMSNorm, rotary
positions, SwiGLU, one product for query, key and value.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.peers import Size


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, inner = size.width, size.gated
        self.heads = size.heads
        self.norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.cache: Tensor | None = None  # (2, B, heads, positions, width / heads)

    def forward(self, x: Tensor, places: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the block to x (B, n, width) at the positions `places` (n,), with rotation (n, width / heads / 2).

        mask: (n, positions), true for the positions in the cache to attend to; None: earlier ones in x, no cache.
        """
        parts = self.query_key_value(self.norm(x))
        query, key, value = rearrange(parts, "B n (three H d) -> three B H n d", three=3, H=self.heads)
        query, key = turn(query, rotation), turn(key, rotation)
        if mask is not None:
            assert self.cache is not None
            self.cache[0][:, :, places], self.cache[1][:, :, places] = key, value
            key, value = self.cache
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(rearrange(seen, "B H n d -> B n (H d)"))
        normalised = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(normalised)) * self.up(normalised))


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x (B, H, n, d) by complex numbers (n, d / 2)."""
    pairs = torch.view_as_complex(rearrange(x.float(), "B H n (d two) -> B H n d two", two=2).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


class StaticCacheGpt(nn.Module):
    """A GPT with a static cache, a Peer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.start = nn.Embedding(size.classes, size.width)
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.output = nn.Linear(size.width, size.vocabulary, bias=False)
        self.longest = -(-(size.tokens + 1) // 8) * 8  # rounded up to a multiple of 8, as in gpt-fast

    def forward(self, x: Tensor, places: Tensor, rotations: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings (B, n, width) -> logits (B, n, V). rotations and mask are those of all positions."""
        rows = None if mask is None else mask[places]
        for block in self.blocks:
            x = block(x, places, rotations[places], rows)
        logits: Tensor = self.output(self.norm(x)).float()
        return logits

    @torch.inference_mode()
    def generate(self, labels: Tensor, tokens: int, greedy: bool = False, cached: bool = True) -> Tensor:
        """Sample codes (B, tokens), as Peer says."""
        size, device, dtype = self.size, labels.device, self.output.weight.dtype
        rotations = self._rotations(device)
        mask = torch.ones(self.longest, self.longest, dtype=torch.bool, device=device).tril() if cached else None
        if cached:
            shape = (2, len(labels), size.heads, self.longest, size.width // size.heads)
            for block in self.blocks:
                block.cache = torch.zeros(shape, dtype=dtype, device=device)
        x, places = self.start(labels)[:, None], torch.zeros(1, dtype=torch.int64, device=device)
        ids = []
        for _ in range(tokens):
            ids.append(self._choose(self(x, places, rotations, mask)[:, -1], greedy))
            new = self.embedding(ids[-1])
            x, places = (
                (new, places + 1)
                if cached
                else (torch.cat([x, new], dim=1), torch.arange(x.shape[1] + 1, device=device))
            )
        return torch.cat(ids, dim=1)

    def _choose(self, logits: Tensor, greedy: bool) -> Tensor:
        """Choose codes (B, 1) from logits (B, V)."""
        if greedy:
            return logits.argmax(dim=-1, keepdim=True)
        least = logits.topk(min(self.size.top_k, logits.shape[-1])).values[:, -1:]
        probabilities = logits.masked_fill(logits < least, float("-inf")).softmax(dim=-1)
        return torch.multinomial(probabilities, num_samples=1)

    def _rotations(self, device: torch.device) -> Tensor:
        """Return the rotations: complex (positions, width / heads / 2)."""
        half = self.size.width // self.size.heads // 2
        frequencies = 10_000.0 ** -(torch.arange(half, device=device) / half)
        angles = torch.outer(torch.arange(self.longest, device=device).float(), frequencies)
        return torch.polar(torch.ones_like(angles), angles)
