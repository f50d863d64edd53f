"""A GPT over code sequences, on x-transformers' decoder.

The sequence of an image is its codes in row-major order, (h w K). It is preceded by a start token that says the class
(or that there is none), whose id lies behind the V codes; the output has V logits, so a start token is never sampled.

    input    start  t_0  t_1 ... t_{L-2}      (B, L)
    logits   t_0    t_1  t_2 ... t_{L-1}      (B, L, V)
"""

import warnings
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from stage1_tokenizer.config import Config
from stage1_tokenizer.tokenizer import TokenShape

with warnings.catch_warnings():  # x-transformers 2.31 calls torch.jit.script at import, deprecated in torch 2.15
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    from x_transformers import Decoder, TransformerWrapper
    from x_transformers.x_transformers import LayerIntermediates


class GptConfig(Config):
    """Decoder-only transformer with RMSNorm, SwiGLU, rotary positions and normalised queries and keys."""

    kind: Literal["gpt"] = "gpt"
    layers: PositiveInt = 4
    width: PositiveInt = 128
    """Must be a multiple of heads."""
    heads: PositiveInt = 4
    positions: Literal["rotary", "learned", "both"] = "both"
    """How a position is told: by rotating queries and keys, by a learned vector for each place, or both."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout of embeddings, attention and feed-forward."""
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the training images whose class is withheld, so that guidance can compare; 0: no guidance."""

    @model_validator(mode="after")
    def _check(self) -> "GptConfig":
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width ({self.width}) must be an even multiple of heads ({self.heads})")
        return self


class Gpt(nn.Module):
    """Prior over codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    def __init__(self, config: GptConfig, shape: TokenShape, classes: int) -> None:
        super().__init__()
        self.config, self.shape, self.classes = config, shape, classes
        head = config.width // config.heads
        self.transformer = TransformerWrapper(
            num_tokens=shape.V + classes + 1,  # codes, one start token per class, and the one that says no class
            logits_dim=shape.V,
            max_seq_len=shape.length,
            emb_dropout=config.dropout,
            input_not_include_cache=True,  # while decoding, the input is the newest token alone
            attn_layers=Decoder(
                dim=config.width,
                depth=config.layers,
                heads=config.heads,
                attn_dim_head=head,
                rotary_pos_emb=config.positions != "learned",
                rotary_emb_dim=head,
                disable_abs_pos_emb=config.positions == "rotary",
                use_rmsnorm=True,
                ff_swish=True,
                ff_glu=True,
                attn_qk_norm=True,
                attn_qk_norm_dim_scale=True,
                # On CPU the plain product is faster at these lengths: 172 ms a step of the quickstart, 249 fused.
                attn_flash=torch.cuda.is_available(),
                attn_dropout=config.dropout,
                ff_dropout=config.dropout,
                verbose=False,
            ),
        )

    @property
    def null_label(self) -> int:
        """The label that stands for "no class given"."""
        return self.classes

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """codes (B, h, w, K) in 0..V-1, labels (B,) in 0..classes -> logits (B, L, V)."""
        tokens = rearrange(codes, "B h w K -> B (h w K)")
        logits: Tensor = self.transformer(torch.cat([self._start(labels), tokens[:, :-1]], dim=1))
        return logits

    def begin(self, labels: Tensor) -> "GptDecoding":
        """Start to decode sequences of these labels (B,)."""
        return GptDecoding(self, self._start(labels))

    def _start(self, labels: Tensor) -> Tensor:
        """labels (B,) -> ids of the start tokens (B, 1)."""
        return (self.shape.V + labels)[:, None]


class GptDecoding:
    """Decoding with a key-value cache: each step feeds one token and gives the logits of the next."""

    def __init__(self, gpt: Gpt, start: Tensor) -> None:
        self._gpt, self._last = gpt, start
        self._cache: LayerIntermediates | None = None

    def logits(self) -> Tensor:
        """(B, V) float32 for the next position."""
        logits, self._cache = self._gpt.transformer(self._last, cache=self._cache, return_intermediates=True)
        return logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        """The tokens (B,) chosen at this position."""
        self._last = tokens[:, None]
