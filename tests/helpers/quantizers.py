"""Small quantizers with one interface for tests: codebook, counts, sums, and a training step."""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from stage1_tokenizer.bottlenecks import BottleneckConfig, build_bottleneck
from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.bottlenecks.vq_library import LibraryVectorQuantizer, VqLibraryConfig

V, D = 16, 8
VqKind = Literal["vq", "vq_library"]
VQ_KINDS: tuple[VqKind, ...] = ("vq", "vq_library")
VARIANTS: list[tuple[VqKind, dict[str, Any]]] = [
    ("vq", {}),
    ("vq", {"update": "gradient"}),
    ("vq", {"cosine": True}),
    ("vq", {"cosine": True, "update": "gradient"}),
    ("vq_library", {}),
    ("vq_library", {"update": "gradient"}),
    ("vq_library", {"cosine": True}),
]


class Book(NamedTuple):
    """Tensors of a codebook, to read and to write in place."""

    codes: Tensor
    counts: Tensor
    sums: Tensor


def quantizer(kind: VqKind = "vq", processes: int = 1, **options: Any) -> VectorQuantizer | LibraryVectorQuantizer:
    """Build a quantizer with 16 random codebook vectors, by default without k-means and revival."""
    torch.manual_seed(0)
    options = {"codebook_size": V, "kmeans_init": False, "revive_below": 0.0, **options}
    made = (
        VectorQuantizer(VqConfig(**options), D, processes)
        if kind == "vq"
        else LibraryVectorQuantizer(VqLibraryConfig(**options), D, processes)
    )
    if not made.config.cosine:
        weight = book(made).codes
        weight.mul_(1.0 / weight.std())
        if made.config.update == "ema":
            book(made).sums.copy_(weight)
    return made


def book(vq: VectorQuantizer | LibraryVectorQuantizer) -> Book:
    """Return the codebook, and the counts and sums that an EMA updates. (Without an EMA, ours has no sums.)"""
    if isinstance(vq, VectorQuantizer):
        codebook = vq.codebook
        return Book(codebook.weight.detach(), codebook.counts, getattr(codebook, "sums", codebook.counts))
    library = vq.library._codebook
    return Book(library.embed.detach()[0], library.cluster_size[0], library.embed_avg[0])


def latents(B: int = 4, h: int = 5, w: int = 3, seed: int = 1) -> Tensor:
    """Draw normal latents (B, D, h, w)."""
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def step(bottleneck: Bottleneck, *micro_batches: Tensor) -> Bottlenecked:
    """Make a training step: a forward pass per micro-batch, then the update. Returns the last output."""
    for z in micro_batches:
        out = bottleneck(z)
    bottleneck.finish_step()
    return out


Tree = dict[str, Any]
EVERY_KIND: list[Tree] = [
    {"kind": "none"},
    {"kind": "kl", "warmup_steps": 3},
    {"kind": "kl", "channels": 3},
    {"kind": "vq", "codebook_size": V},
    {"kind": "vq", "codebook_size": V, "update": "gradient", "rotation": True},
    {"kind": "vq", "codebook_size": V, "cosine": True, "code_dim": 4},
    {"kind": "vq", "codebook_size": V, "cosine": True, "code_dim": 4, "update": "gradient"},
    {"kind": "vq_library", "codebook_size": V},
    {"kind": "vq_library", "codebook_size": V, "update": "gradient", "code_dim": 4},
    {"kind": "vq_library", "codebook_size": V, "cosine": True},
    {"kind": "rvq", "codebook_size": V, "depth": 3},
    {"kind": "rvq", "codebook_size": V, "depth": 3, "shared": True, "code_dim": 4},
    {"kind": "rvq", "codebook_size": V, "depth": 2, "update": "gradient", "rotation": True},
    {"kind": "rvq", "codebook_size": V, "depth": 2, "temperature": 0.5},
    {"kind": "grouped_rvq", "codebook_size": V, "depth": 2, "groups": 2},
    {"kind": "grouped_rvq", "codebook_size": V, "depth": 2, "groups": 2, "shared": True, "code_dim": 4},
    {"kind": "fsq", "levels": [4, 3, 5]},
    {"kind": "lfq", "codebook_size": V},
    {"kind": "lfq", "codebook_size": V, "spherical": True},
    {"kind": "simvq", "codebook_size": V},
    {"kind": "simvq", "codebook_size": V, "code_dim": 4, "rotation": True},
    {"kind": "dictionary", "atoms": 24, "top": 5},
    {"kind": "dictionary", "atoms": 24, "top": 5, "code": "ista"},
]
"""Every kind, in every variant with code of its own; codebooks have the default k-means and revival."""


def bottleneck(tree: Tree, processes: int = 1, channels: int = D) -> Bottleneck:
    """Build the bottleneck of a config tree."""
    torch.manual_seed(0)
    return build_bottleneck(TypeAdapter(BottleneckConfig).validate_python(tree), channels, processes)


def name_of(tree: Tree) -> str:
    """Return a name for a config tree, for the names of tests."""
    return "-".join(str(value) if key == "kind" else f"{key}={value}" for key, value in tree.items())
