"""The two vector quantizers, ours and the library's: losses and gradients, the lookup, and the way back from codes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.bottlenecks.vq_library import LibraryVectorQuantizer
from tests.helpers.quantizers import VARIANTS, VQ_KINDS, D, V, VqKind, book, latents, quantizer, step

kinds = pytest.mark.parametrize("kind", VQ_KINDS)
variants = pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)


def backward(vq: VectorQuantizer | LibraryVectorQuantizer, z: Tensor) -> tuple[Bottlenecked, Tensor]:
    """The forward pass, and the gradient of its loss at z."""
    leaf = z.clone().requires_grad_()
    out = vq(leaf)
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


def nearest(z: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Brute force in float64: (B, h, w, 1), where no position has two codes that are equally near."""
    vectors = rearrange(z, "B d h w -> B h w 1 d").double()
    codes = codebook.detach().double()
    score = F.cosine_similarity(vectors, codes, dim=-1) if cosine else -(vectors - codes).square().sum(-1)
    best = score.topk(2, dim=-1).values
    assert ((best[..., 0] - best[..., 1]) > 1e-4).all(), "a tie: choose other numbers"
    return score.argmax(-1, keepdim=True)


@kinds
def test_beta_weighs_the_commitment_alone(kind: VqKind) -> None:
    """Trap 1: beta scales the pull on the encoder and never that on the codebook, which many implementations swap."""
    z, grads = latents(), {}
    for beta in (0.0, 0.25, 1.0):
        vq = quantizer(kind, update="gradient", beta=beta)
        _, at_z = backward(vq, z)
        (codebook,) = vq.parameters()
        assert codebook.grad is not None
        grads[beta] = at_z, codebook.grad
    assert grads[0.25][0].abs().max() > 0
    assert torch.equal(grads[0.0][0], torch.zeros_like(z))
    assert torch.allclose(grads[1.0][0], 4 * grads[0.25][0])
    assert all(torch.equal(grad, grads[0.25][1]) for _, grad in grads.values())


@kinds
def test_the_loss_has_the_gradients_of_the_paper(kind: VqKind) -> None:
    """Traps 1 and 2: both terms are taken from the raw code vectors, so the gradients are those of equation 3."""
    z = latents()
    vq = quantizer(kind, update="gradient", beta=0.25)
    codebook = book(vq).codes.clone()
    out, at_z = backward(vq, z)
    assert out.codes is not None
    vectors = rearrange(z, "B d h w -> (B h w) d")
    ids = out.codes.flatten()
    apart = vectors - codebook[ids]
    assert torch.allclose(out.loss, 1.25 * apart.square().mean())
    assert torch.allclose(rearrange(at_z, "B d h w -> (B h w) d"), 0.25 * 2 * apart / z.numel(), atol=1e-8)
    expected = torch.zeros_like(codebook).index_add(0, ids, -2 * apart / z.numel())
    (parameter,) = vq.parameters()
    assert parameter.grad is not None
    assert torch.allclose(parameter.grad.reshape(V, D), expected, atol=1e-8)


@kinds
def test_an_ema_codebook_has_no_gradient_and_no_codebook_loss(kind: VqKind) -> None:
    """Trap 1: with running means the loss is beta times the commitment, and trains nothing of the codebook."""
    z = latents()
    vq = quantizer(kind, beta=0.25)
    codebook = book(vq).codes.clone()
    out, at_z = backward(vq, z)
    assert out.codes is not None
    apart = rearrange(z, "B d h w -> (B h w) d") - codebook[out.codes.flatten()]
    assert not list(vq.parameters())
    assert torch.allclose(out.loss, 0.25 * apart.square().mean())
    assert torch.allclose(rearrange(at_z, "B d h w -> (B h w) d"), 0.25 * 2 * apart / z.numel(), atol=1e-8)


@kinds
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("training", [True, False])
def test_straight_through_passes_the_gradient_as_it_is(kind: VqKind, update: str, training: bool) -> None:
    """Trap 2: the decoder's gradient at z_q reaches z unchanged, neither rotated nor mixed, and not the codebook."""
    vq = quantizer(kind, update=update).train(training)
    z = latents().requires_grad_()
    gradient = torch.randn_like(z)
    vq(z).z_q.backward(gradient)
    assert z.grad is not None
    assert torch.equal(z.grad, gradient)
    assert all(parameter.grad is None for parameter in vq.parameters())


@variants
def test_the_forward_value_is_exactly_the_code(kind: VqKind, options: dict[str, Any]) -> None:
    """Trap 2: x + (code - x) is only nearly the code in floating point; what is decoded must be the code itself."""
    vq = quantizer(kind, **options)
    (codebook,) = vq.codebooks()
    out = vq(1e4 * latents())
    assert out.codes is not None
    assert torch.equal(out.z_q, rearrange(codebook[out.codes[..., 0]], "B h w d -> B d h w"))


@variants
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_the_nearest(kind: VqKind, options: dict[str, Any], training: bool) -> None:
    """Trap 3: the smallest distance, or greatest cosine, by brute force in float64; in training before the update."""
    vq = quantizer(kind, **options).train(training)
    z = latents(B=8)
    expected = nearest(z, vq.codebooks()[0], vq.config.cosine)
    codes = vq(z).codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > V // 2


@kinds
def test_cosine_ignores_length(kind: VqKind) -> None:
    """Trap 3: on the sphere a vector and its multiple have the same code; by distance they would not."""
    vq = quantizer(kind, cosine=True).eval()
    z = latents()
    assert torch.equal(vq(z).codes, vq(100 * z).codes)
    plain = quantizer(kind).eval()
    assert not torch.equal(plain(z).codes, plain(100 * z).codes)


@pytest.mark.parametrize("code_dim", [None, 3], ids=["plain", "projected"])
@variants
@pytest.mark.parametrize("size", [(4, 5, 3), (1, 1, 1), (1, 1, 7), (3, 8, 1)], ids=str)
def test_codes_give_back_exactly_what_forward_decodes(
    kind: VqKind, code_dim: int | None, options: dict[str, Any], size: tuple[int, int, int]
) -> None:
    """Trap 5: in eval mode ids -> vectors equals the forward pass bit for bit, or samples are not what was trained."""
    vq = quantizer(kind, code_dim=code_dim, kmeans_init=True, **options)
    vq.start(latents(seed=0))
    for seed in range(3):  # so that the codebook has moved since
        step(vq, latents(seed=seed))
    vq.eval()
    (before,) = vq.codebooks()
    before = before.clone()
    out = step(vq, latents(*size))
    assert out.codes is not None
    assert torch.equal(vq.codes_to_latents(out.codes), out.z_q)
    assert out.z_q.shape == (size[0], D, *size[1:])
    assert out.codes.shape == (size[0], *size[1:], 1)
    assert torch.equal(vq.codebooks()[0], before), "eval must not train"


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_change_codes(kind: VqKind, training: bool) -> None:
    """Trap 6: distances are taken in float32 under bf16 autocast, where near codes would all look equally near."""
    vq = quantizer(kind, codebook_size=512).train(training)
    (codebook,) = vq.codebooks()
    z = latents(B=8, h=8, w=8)
    vectors = rearrange(z, "B d h w -> (B h w) d")
    rough = torch.cdist(vectors.bfloat16().float(), codebook.bfloat16().float()).argmin(-1)
    exact = torch.cdist(vectors.double(), codebook.double()).argmin(-1)
    assert (rough != exact).any(), "the inputs must be such that bf16 would show"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(z)
    assert torch.equal(out.codes.flatten(), exact)
    assert out.loss.dtype == torch.float32


def test_the_rotation_trick_turns_the_gradient_as_it_turns_the_vector() -> None:
    """Fifty et al. 2024, section 4.2, by an explicit matrix: R is the rotation of z to q, scaled, and is held constant.
    The forward value is the code itself, and where z and q are parallel the gradient is scaled alone."""
    vq = quantizer(rotation=True)
    (codebook,) = vq.codebooks()
    z = latents().requires_grad_()
    out = vq(z)
    gradient = torch.randn_like(z)
    out.z_q.backward(gradient)
    assert z.grad is not None
    assert torch.equal(out.z_q, rearrange(codebook[out.codes[..., 0]], "B h w d -> B d h w"))
    rows = [rearrange(part, "B d h w -> (B h w) d").double() for part in (z.detach(), gradient, z.grad)]
    for vector, at_code, at_vector, code in zip(*rows, codebook[out.codes.flatten()].double(), strict=True):
        a, b = vector / vector.norm(), code / code.norm()
        r = (a + b) / (a + b).norm()
        R = torch.eye(D).double() - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        scaled = code.norm() / vector.norm() * R
        assert torch.allclose(R @ R.T, torch.eye(D).double(), atol=1e-6), "a rotation"
        assert torch.allclose(scaled @ vector, code, atol=1e-5), "from the vector to the code"
        assert torch.allclose(scaled.T @ at_code, at_vector, atol=1e-4)


def test_the_rotation_trick_is_finite_where_a_vector_or_a_code_is_zero() -> None:
    """A dead ReLU in the encoder gives zero vectors: a gradient of nan there would end the run."""
    vq = quantizer(rotation=True)
    book(vq).codes[3] = 0.0
    z = torch.zeros(1, D, 2, 2, requires_grad=True)
    out = vq(z)
    assert (out.codes == 3).all()
    (out.loss + out.z_q.sum()).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
