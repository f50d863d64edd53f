"""Lookup-free quantization: signs, and entropy terms that are exact however large the codebook."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load, save
from torch import Tensor, nn
from vector_quantize_pytorch import LFQ

from stage1_tokenizer.bottlenecks.lfq import LfqConfig, LookupFreeQuantizer
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import load_strict
from stage1_tokenizer.engine.errors import ConfigError
from tests.helpers.largest import LargestTensor

BITS = 5
SIZES = [(4, 5, 3), (1, 1, 1), (1, 1, 7), (3, 8, 1), (5, 1, 1)]


def quantizer(bits: int = BITS, latent_channels: int | None = None, **options: Any) -> LookupFreeQuantizer:
    """Build a quantizer; it has projections only if the latent's channels differ from the number of bits."""
    torch.manual_seed(0)
    return LookupFreeQuantizer(LfqConfig(**{"codebook_size": 2**bits, **options}), latent_channels or bits)


def latents(B: int = 4, h: int = 5, w: int = 3, D: int = BITS, seed: int = 1) -> Tensor:
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def slow_entropies(z: Tensor, codebook: Tensor, inverse_temperature: float, spherical: bool) -> tuple[Tensor, Tensor]:
    """The paper's two terms in nats, by a softmax over all codes in the type of z: z (B, d, h, w), codebook (V, d)."""
    vectors = rearrange(z, "B d h w -> (B h w) 1 d")
    if spherical:
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    log_q = (-inverse_temperature * (vectors - codebook.to(z)).square().sum(-1)).log_softmax(-1)  # (N, V)
    mean = log_q.exp().mean(0)
    return -(log_q.exp() * log_q).sum(-1).mean(), -(mean * mean.log()).sum()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_the_nearest(spherical: bool, bits: int, training: bool) -> None:
    """Trap 3: signs are the nearest of all V codes, by brute force in float64, and every number is its own code's."""
    lfq = quantizer(bits, spherical=spherical).train(training)
    (codebook,) = lfq.codebooks()
    assert codebook.shape == (2**bits, bits) == torch.unique(codebook, dim=0).shape
    z = latents(D=bits)
    vectors = rearrange(z, "B d h w -> (B h w) d").double()
    if spherical:
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        assert torch.allclose(codebook.norm(dim=-1), torch.ones(2**bits))
    codes = lfq(z).codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes.flatten(), torch.cdist(vectors, codebook.double()).argmin(1))
    numbers = torch.arange(2**bits)
    assert torch.equal(lfq(rearrange(codebook, "V d -> 1 d V 1")).codes.flatten(), numbers)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("inverse_temperature", [0.3, 2.0, 100.0])
def test_entropy_terms_are_exact(spherical: bool, bits: int, inverse_temperature: float) -> None:
    """Both terms and their gradients equal the softmax over all codes in float64, though no such matrix is built."""
    options: dict[str, Any] = {"spherical": spherical, "inverse_temperature": inverse_temperature}
    lfq = quantizer(bits, entropy_weight=0.7, diversity_gamma=1.3, beta=0.0, **options)
    z = (0.2 * latents(D=bits)).requires_grad_()
    out = lfq(z)
    out.loss.backward()
    reference = z.detach().double().requires_grad_()
    sample, codebook = slow_entropies(reference, lfq.codebooks()[0], inverse_temperature, spherical)
    (0.7 * (sample - 1.3 * codebook)).backward()  # type: ignore[no-untyped-call]
    sample, codebook = sample.detach(), codebook.detach()
    assert z.grad is not None
    assert reference.grad is not None
    assert float(out.stats["sample_entropy_bits"]) == pytest.approx(float(sample) / math.log(2), rel=1e-4, abs=1e-5)
    assert float(out.stats["codebook_entropy_bits"]) == pytest.approx(float(codebook) / math.log(2), rel=1e-4)
    atol = 1e-7 + 1e-5 * float(reference.grad.abs().max())
    assert torch.allclose(z.grad, reference.grad.float(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("spherical", [False, True])
def test_it_is_the_librarys(spherical: bool) -> None:
    """Same codes, loss and gradients as the library's, where its cut of logarithms at 1e-5 does not show."""
    ours = quantizer(spherical=spherical, inverse_temperature=1.0)
    theirs = LFQ(
        codebook_size=2**BITS,
        entropy_loss_weight=0.1,
        commitment_loss_weight=0.25,
        diversity_gamma=1.0,
        spherical=spherical,
        codebook_scale=1.0,
    )
    gradient = torch.randn(latents().shape, generator=torch.Generator().manual_seed(2))
    z, z_theirs = (0.5 * latents()).requires_grad_(), (0.5 * latents()).requires_grad_()
    out = ours(z)
    z_q, ids, loss = theirs(z_theirs, inv_temperature=1.0)
    ((out.z_q * gradient).sum() + out.loss).backward()
    ((z_q * gradient).sum() + loss).backward()
    assert z.grad is not None
    assert z_theirs.grad is not None
    assert torch.equal(out.codes[..., 0], ids.long())
    assert torch.allclose(out.z_q, z_q, atol=1e-6)
    assert torch.allclose(out.loss, loss, atol=1e-4)
    assert torch.allclose(z.grad, z_theirs.grad, atol=1e-5)


def test_a_large_codebook_needs_no_large_matrix() -> None:
    """Trap 14: with V = 2^18 the entropies of 2048 vectors would be a matrix of 2^29 numbers, forward and backward; and
    latents of zero are 18 bits, which a logarithm cut off at 1e-5 (the library's) makes 16.6."""
    lfq, z = quantizer(18), torch.zeros(2, 18, 32, 32)
    with LargestTensor() as largest:
        out = lfq(z.requires_grad_())
        out.loss.backward()
    assert largest.numel <= 2048 * 2**9
    assert float(out.stats["sample_entropy_bits"]) == pytest.approx(18, abs=1e-3)
    assert float(out.stats["codebook_entropy_bits"]) == pytest.approx(18, abs=1e-3)


def test_entropies_of_known_distributions() -> None:
    """Sure, and equally many of four codes: no entropy per sample, two bits over the codebook, which gamma rewards."""
    z = torch.full((1, BITS, 8, 1), 3.0)
    z[0, 1, 4:] = -3.0
    z[0, 3, ::2] = -3.0
    out = quantizer(beta=0.0)(z)
    assert float(out.stats["sample_entropy_bits"]) == pytest.approx(0, abs=1e-6)
    assert float(out.stats["codebook_entropy_bits"]) == pytest.approx(2, abs=1e-5)
    assert float(out.loss) == pytest.approx(-0.1 * 2 * math.log(2), abs=1e-5)
    together = z.clone()
    together[0, 3] = together[0, 1]  # two bits that always agree are one: the product of their means would say two
    assert float(quantizer()(together).stats["codebook_entropy_bits"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_the_commitment_is_weighed_by_beta(spherical: bool) -> None:
    """Trap 1: it is the mean squared distance to the code, its gradient proportional to beta."""
    grads = {}
    for beta in (0.0, 0.25, 1.0):
        lfq, z = quantizer(beta=beta, entropy_weight=0.0, spherical=spherical), latents().requires_grad_()
        out = lfq(z)
        out.loss.backward()
        vectors = nn.functional.normalize(z, dim=1) if spherical else z
        assert torch.allclose(out.loss, beta * (vectors - out.z_q).square().mean(), atol=1e-7)
        assert z.grad is not None
        grads[beta] = z.grad
    assert not grads[0.0].any()
    assert grads[0.25].any()
    assert torch.allclose(grads[1.0], 4 * grads[0.25], atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_passes_the_gradient_as_it_is(training: bool) -> None:
    """Trap 2: the decoder's gradient at the code reaches the latent unchanged."""
    z = latents().requires_grad_()
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    quantizer().train(training)(z).z_q.backward(gradient)
    assert z.grad is not None
    assert torch.equal(z.grad, gradient)


@pytest.mark.parametrize("latent_channels", [BITS, 9], ids=["plain", "projected"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_give_back_exactly_what_forward_decodes(
    latent_channels: int, spherical: bool, size: tuple[int, int, int]
) -> None:
    """Traps 2 and 5: the forward value is exactly the code, so ids -> vectors equals the forward pass bit for bit."""
    lfq = quantizer(latent_channels=latent_channels, spherical=spherical).eval()
    out = lfq(latents(*size, D=latent_channels))
    assert torch.equal(lfq.codes_to_latents(out.codes), out.z_q)
    assert out.z_q.shape == (size[0], latent_channels, *size[1:])
    assert out.codes.shape == (size[0], *size[1:], 1)


@pytest.mark.parametrize("spherical", [False, True])
def test_autocast_changes_nothing(spherical: bool) -> None:
    """Trap 6: signs survive bf16, but logits of 100 z and entropies, sums of many small numbers, would not."""
    lfq, z = quantizer(spherical=spherical), latents(B=8, h=8, w=8)
    exact = lfq(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lfq(z)
    assert torch.equal(out.codes, exact.codes)
    assert torch.equal(out.z_q, exact.z_q)
    assert torch.equal(out.loss, exact.loss)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e4])
def test_extreme_latents_stay_finite(spherical: bool, size: float) -> None:
    """Probabilities of exactly 0 have infinite logarithms, and a vector of zeros no direction: one NaN ends a run."""
    lfq, z = quantizer(spherical=spherical), (size * latents()).requires_grad_()
    out = lfq(z)
    (out.z_q.sum() + out.loss).backward()
    assert z.grad is not None
    assert out.loss.isfinite()
    assert out.z_q.isfinite().all()
    assert z.grad.isfinite().all()
    assert all(stat.isfinite() for stat in out.stats.values())
    assert size != 0.0 or not out.codes.any(), "zero is not above zero"


def test_a_loaded_quantizer_has_the_same_codes() -> None:
    """The projections are all that a checkpoint needs; the codes follow from the config."""
    lfq = quantizer(latent_channels=9)
    torch.manual_seed(1)
    other = LookupFreeQuantizer(lfq.config, 9)
    load_strict(other, load(save(lfq.state_dict())), "test")
    z = latents(D=9)
    assert not quantizer().state_dict()
    assert torch.equal(lfq(z).codes, other(z).codes)
    assert torch.equal(lfq(z).z_q, other(z).z_q)


def test_the_defaults() -> None:
    """Trap 12: the library's own have no commitment."""
    assert LfqConfig().tree() == {
        "kind": "lfq",
        "codebook_size": 1024,
        "spherical": False,
        "entropy_weight": 0.1,
        "diversity_gamma": 1.0,
        "beta": 0.25,
        "inverse_temperature": 100.0,
    }


@pytest.mark.parametrize(
    ("size", "message"), [(1, "from 2 on, got 1"), (1000, "got 1000; the nearest are 512 and 1024"), (3, "2 and 4")]
)
def test_sizes_that_cannot_be(size: int, message: str) -> None:
    """A codebook of signs has 2^bits codes; the message names the two sizes between which the given one lies."""

    class Outer(Config):
        bottleneck: LfqConfig

    tree: dict[str, Any] = {"bottleneck": {"codebook_size": size}}
    with pytest.raises(ConfigError, match=message):
        Outer.from_tree(tree)
