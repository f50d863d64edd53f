"""Finite scalar quantization: the paper's formula and gradient, and that every code is reached, told and decoded."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load, save
from torch import Tensor

from stage1_tokenizer.bottlenecks.fsq import FiniteScalarQuantizer, FsqConfig
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import load_strict
from stage1_tokenizer.engine.errors import ConfigError

LEVELS = (8, 5, 5, 5)
MANY_LEVELS = [(8, 5, 5, 5), (3,), (4,), (7, 6), (3, 4, 5, 6, 7), (8, 8, 8, 6, 5), (4,) * 8, (998, 97), (999, 64)]


def quantizer(levels: tuple[int, ...] = LEVELS, latent_channels: int | None = None) -> FiniteScalarQuantizer:
    """Build a quantizer; it has projections only if the latent's channels differ from the number of levels."""
    torch.manual_seed(0)
    return FiniteScalarQuantizer(FsqConfig(levels=levels), latent_channels or len(levels))


def latents(B: int = 4, h: int = 5, w: int = 3, D: int = len(LEVELS), seed: int = 1) -> Tensor:
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def as_latents(vectors: Tensor) -> Tensor:
    """(N, d) -> (1, d, N, 1)."""
    return rearrange(vectors, "N d -> 1 d N 1")


def bounded(z: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The paper's f (its appendix A.1) for vectors (..., d), in the type of z: level i of L lies at i - L // 2."""
    L = torch.tensor(levels)
    half = (L - 1).to(z) * (1 + 1e-3) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).to(z)
    return torch.tanh(z + torch.atanh(offset / half)) * half - offset


@pytest.mark.parametrize("levels", MANY_LEVELS, ids=str)
def test_every_code_is_reached_told_and_decoded(levels: tuple[int, ...]) -> None:
    """All V codes, odd and even levels: a latent in the code's cell gets its number, and the number gives it back."""
    fsq = quantizer(levels).eval()
    V = math.prod(levels)
    numbers = torch.arange(V)
    assert fsq.codebook_size == V
    (codebook,) = fsq.codebooks()
    assert torch.equal(fsq.codes_to_latents(numbers.view(1, V, 1, 1)), as_latents(codebook))

    # The first coordinate's level is the fastest: number = i0 + L0 (i1 + L1 (...)).
    strides = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    L = torch.tensor(levels)
    level = numbers[:, None] // strides % L - L // 2  # (V, d)
    assert torch.allclose(codebook, level / (L // 2), atol=1e-7)
    # Back through f: a latent which f sends to the code itself, in the middle of its cell.
    half, offset = (L - 1).double() * (1 + 1e-3) / 2, torch.where(L % 2 == 0, 0.5, 0.0).double()
    z = torch.atanh((level + offset) / half) - torch.atanh(offset / half)
    out = fsq(as_latents(z.float()))
    assert torch.equal(out.codes.flatten(), numbers)
    assert torch.equal(out.z_q, as_latents(codebook))


@pytest.mark.parametrize("levels", MANY_LEVELS[:6], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_the_nearest_to_the_bounded_latent(levels: tuple[int, ...], training: bool) -> None:
    """Trap 3: by brute force over all V codes in float64, in the space where the levels are one apart."""
    fsq = quantizer(levels).train(training)
    z = latents(D=len(levels))
    grid = fsq.codebooks()[0].double() * (torch.tensor(levels) // 2)  # (V, d)
    vectors = bounded(rearrange(z, "B d h w -> (B h w) d").double(), levels)
    distances = torch.cdist(vectors, grid)
    closest = distances.topk(2, largest=False).values
    assert (closest[:, 1] - closest[:, 0] > 1e-5).all(), "a tie: choose other numbers"
    codes = fsq(z).codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes.flatten(), distances.argmin(1))


def test_the_gradient_is_that_of_the_bound() -> None:
    """Trap 2: rounding passes the gradient straight through and tanh does not: what arrives is g * d f / d z."""
    z = latents().requires_grad_()
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    quantizer()(z).z_q.backward(gradient)
    reference = z.detach().double().requires_grad_()
    scaled = bounded(rearrange(reference, "B d h w -> B h w d"), LEVELS) / (torch.tensor(LEVELS) // 2)
    scaled.backward(rearrange(gradient, "B d h w -> B h w d").double())  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert reference.grad is not None
    assert torch.allclose(z.grad, reference.grad.float(), atol=1e-6)


@pytest.mark.parametrize("latent_channels", [len(LEVELS), 9], ids=["plain", "projected"])
@pytest.mark.parametrize("size", [(4, 5, 3), (1, 1, 1), (1, 1, 7), (3, 8, 1), (5, 1, 1)], ids=str)
def test_codes_give_back_exactly_what_forward_decodes(latent_channels: int, size: tuple[int, int, int]) -> None:
    """Trap 5: ids -> vectors equals the forward pass bit for bit, or samples are not what was trained."""
    fsq = quantizer(latent_channels=latent_channels).eval()
    out = fsq(latents(*size, D=latent_channels))
    assert torch.equal(fsq.codes_to_latents(out.codes), out.z_q)
    assert out.z_q.shape == (size[0], latent_channels, *size[1:])
    assert out.codes.shape == (size[0], *size[1:], 1)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_change_codes(training: bool) -> None:
    """Trap 6: under bf16 autocast latents near a border would fall on its other side (the library minds CUDA alone)."""
    fsq = quantizer().train(training)
    z = latents(B=16, h=8, w=8)
    exact, rough = fsq(z), fsq(z.bfloat16().float())
    assert (rough.codes != exact.codes).any(), "the inputs must be such that bf16 would show"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fsq(z)
    assert torch.equal(out.codes, exact.codes)
    assert torch.equal(out.z_q, exact.z_q)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (999,), (998, 3)], ids=str)
def test_extreme_latents_stay_on_the_grid(levels: tuple[int, ...]) -> None:
    """The bound is 0.1 % wider than the grid: rounded beyond the last level, a code would get another code's number."""
    fsq = quantizer(levels)
    lowest, highest = fsq.codebooks()[0][[0, -1]]
    ends = torch.tensor([-1e4, 0.0, 1e4]).view(1, 1, 3, 1).expand(1, len(levels), 3, 1).clone().requires_grad_()
    out = fsq(ends)
    out.z_q.sum().backward()
    middle = sum(L // 2 * math.prod(levels[:i]) for i, L in enumerate(levels))
    assert out.codes.flatten().tolist() == [0, middle, math.prod(levels) - 1]
    assert torch.equal(out.z_q[0, :, :, 0].T, torch.stack([lowest, torch.zeros_like(lowest), highest]))
    assert ends.grad is not None
    assert ends.grad.isfinite().all()


def test_it_has_no_loss_and_learns_nothing_itself() -> None:
    """The paper's point: without a codebook there is nothing to pull, to revive or to save."""
    fsq = quantizer()
    out = fsq(latents().requires_grad_())
    assert float(out.loss) == 0.0
    assert out.loss.shape == ()
    assert not fsq.state_dict()
    assert not list(fsq.parameters())


def test_saturation_is_the_share_that_hardly_moves() -> None:
    """The number to look at where training stalls: tanh passes almost no gradient beyond 2."""
    z = torch.zeros(1, 4, 2, 1)
    assert float(quantizer()(z).stats["saturation"]) == 0.0
    z[:, 0], z[:, 1, 0] = 5.0, -2.5
    assert float(quantizer()(z).stats["saturation"]) == 3 / 8


def test_a_loaded_quantizer_has_the_same_codes() -> None:
    """The projections are all that a checkpoint needs; the grid follows from the config."""
    fsq, other = quantizer(latent_channels=9), FiniteScalarQuantizer(FsqConfig(levels=LEVELS), 9)
    load_strict(other, load(save(fsq.state_dict())), "test")
    z = latents(D=9)
    assert set(fsq.state_dict()) == {
        f"space.project_{way}.{part}" for way in ("in", "out") for part in ("weight", "bias")
    }
    assert torch.equal(fsq(z).codes, other(z).codes)
    assert torch.equal(fsq(z).z_q, other(z).z_q)


def test_the_resolved_library_quantizer() -> None:
    """Trap 12: every option that matters is ours and not the library's default, also after an update of the library."""
    library = quantizer(latent_channels=9).library
    assert FsqConfig().tree() == {"kind": "fsq", "levels": [8, 5, 5, 5]}
    assert {
        "levels": library._levels.tolist(),
        "scale": library.scale,
        "preserve_symmetry": library.preserve_symmetry,
        "noise_dropout": library.noise_dropout,
        "codebooks": library.num_codebooks,
        "projections": library.has_projections,
        "hard clamp": library.bound_hard_clamp,
        "rotation": library.orthogonal_rotation,
        "own autocast": library.force_quantization_f32,
    } == {
        "levels": [8, 5, 5, 5],
        "scale": None,
        "preserve_symmetry": False,
        "noise_dropout": 0.0,
        "codebooks": 1,
        "projections": False,
        "hard clamp": False,
        "rotation": False,
        "own autocast": False,
    }


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "one or more"),
        ([8, 2], "from 3 to 999.*got 8,2.*lfq"),
        ([1000], "from 3 to 999"),
        ([8] * 7, "V = 2097152; .*at most 1048576"),
    ],
    ids=str,
)
def test_levels_that_cannot_be(levels: list[int], message: str) -> None:
    """Two levels need another formula; with too many the library's float32 gives two codes one number."""

    class Outer(Config):
        bottleneck: FsqConfig

    tree: dict[str, Any] = {"bottleneck": {"levels": levels}}
    with pytest.raises(ConfigError, match=message):
        Outer.from_tree(tree)
