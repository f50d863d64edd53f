"""LlamaGen's class-conditional GPT as its formulas say, slowly, and its fixture."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.engine.foreign_files import read_foreign_file
from stage1_tokenizer.tokenizer import LoadedTokenizer
from tests.helpers.artefacts import shapes, write_tokenizer
from tests.helpers.commands import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "foreign" / "llamagen_gpt"
CHECKPOINT, CONFIG = FIXTURE / "gpt.pt", FIXTURE / "config.yaml"
HEADS, NO_CLASS = 4, 10


class Expected(NamedTuple):
    """Inputs of LlamaGen's own code, and its logits."""

    codes: Tensor
    """(3, 8, 8, 1)."""
    labels: Tensor
    """(3,): two classes, and "no class"."""
    logits: Tensor
    """(3, 64, 128)."""


def expected() -> Expected:
    """Read the fixture's inputs and outputs."""
    found = load_file(FIXTURE / "expected.safetensors")
    return Expected(found["codes"].view(-1, 8, 8, 1), found["labels"], found["logits"])


def checkpoint() -> dict[str, Tensor]:
    """Read the fixture's weights."""
    return read_foreign_file(CHECKPOINT).read_state_dict(("model",))


def write_fitting_tokenizer(folder: Path, size: int = 32, codes: int = 128) -> LoadedTokenizer:
    """Write a tokenizer of random weights with 8x8 codes of 128, as the fixture's prior has them."""
    bottleneck = VqConfig(codebook_size=codes, kmeans_init=False)
    return write_tokenizer(folder, bottleneck=bottleneck, data=shapes(image_size=(size, size)))


def slow_logits(weights: Mapping[str, Tensor], codes: Tensor, labels: Tensor, side: int = 8) -> Tensor:
    """Compute the logits (B, n + 1, V) of the codes (B, n) and of the one after them, on a grid of side x side."""
    x = F.embedding(labels, weights["cls_embedding.embedding_table.weight"])[:, None]
    x = torch.cat([x, F.embedding(codes, weights["tok_embeddings.weight"])], dim=1)  # (B, n + 1, width)
    B, n, width = x.shape
    half = width // HEADS // 2
    frequencies = 10_000.0 ** -(torch.arange(0, half, 2) / half)  # (half / 2,)
    angles = torch.arange(side)[:, None] * frequencies  # (side, half / 2)
    by_row, by_column = (part.expand(side, side, -1) for part in (angles[:, None], angles[None]))
    table = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # (side * side, half)
    turns = torch.cat([torch.zeros(1, half), torch.polar(torch.ones_like(table), table)])[:n]  # complex; the start: 0

    def normalise(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * gain

    def turn(x: Tensor) -> Tensor:  # (B, n, H, d)
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns[:, None]).flatten(-2)

    layer = 0
    while f"layers.{layer}.ffn_norm.weight" in weights:
        own = {name.split(".", 2)[2]: part for name, part in weights.items() if name.startswith(f"layers.{layer}.")}
        joined = normalise(x, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T
        q, k, v = (part.reshape(B, n, HEADS, -1) for part in joined.chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (turn(q), turn(k), v))  # (B, H, n, d)
        scores = (q @ k.transpose(2, 3)) * (2 * half) ** -0.5
        attended = scores.masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf).softmax(dim=-1) @ v
        x = x + attended.transpose(1, 2).flatten(2) @ own["attention.wo.weight"].T
        hidden = normalise(x, own["ffn_norm.weight"])
        gated = F.silu(hidden @ own["feed_forward.w1.weight"].T) * (hidden @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
        layer += 1
    return normalise(x, weights["norm.weight"]) @ weights["output.weight"].T
