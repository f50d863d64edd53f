"""Small quantizers, alike in what tests need: the codebook, its counts and sums, and a step of training."""

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
    """The tensors of a codebook, to read and to write in place."""

    codes: Tensor
    counts: Tensor
    sums: Tensor


def quantizer(kind: VqKind = "vq", processes: int = 1, **options: Any) -> VectorQuantizer | LibraryVectorQuantizer:
    """A codebook of 16 random vectors of about the latent's length, without k-means and revival unless asked for."""
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
    """What the quantizer learns otherwise than by gradient. (Without an EMA there are no sums of ours.)"""
    if isinstance(vq, VectorQuantizer):
        codebook = vq.codebook
        return Book(codebook.weight.detach(), codebook.counts, getattr(codebook, "sums", codebook.counts))
    library = vq.library._codebook
    return Book(library.embed.detach()[0], library.cluster_size[0], library.embed_avg[0])


def latents(B: int = 4, h: int = 5, w: int = 3, seed: int = 1) -> Tensor:
    """(B, D, h, w) of normal numbers."""
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def step(bottleneck: Bottleneck, *micro_batches: Tensor) -> Bottlenecked:
    """A step of training: a forward pass for each micro-batch, then what is learned from all; returns the last."""
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
"""Every kind, in every variant whose code is another; codebooks have k-means and revival as by default."""


def bottleneck(tree: Tree, processes: int = 1, channels: int = D) -> Bottleneck:
    torch.manual_seed(0)
    return build_bottleneck(TypeAdapter(BottleneckConfig).validate_python(tree), channels, processes)


def name_of(tree: Tree) -> str:
    return "-".join(str(value) if key == "kind" else f"{key}={value}" for key, value in tree.items())
