"""The GPT of nanoGPT: learned positions, LayerNorm, GELU, torch's attention.

Embedding and output have separate weights, as in ours and in x-transformers.
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
        width = size.width
        self.heads = size.heads
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (B, n, width)."""
        parts = self.query_key_value(self.norm(x))
        query, key, value = rearrange(parts, "B n (three H d) -> three B H n d", three=3, H=self.heads)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(rearrange(seen, "B H n d -> B n (H d)"))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class TextbookGpt(nn.Module):
    """A textbook GPT."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.tokens, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.output = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Codes (B, n) -> logits (B, n, V) of the next code after each."""
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x))
        return logits
