"""The vector quantizer: its losses and gradients, the lookup, and the straight way back from codes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig

V, D = 16, 8
KINDS: list[dict[str, Any]] = [{"update": "ema"}, {"update": "gradient"}, {"cosine": True}]


def quantizer(**options: Any) -> VectorQuantizer:
    """A codebook of random vectors of about the latent's length, without k-means and revival unless asked for."""
    torch.manual_seed(0)
    config = VqConfig(**{"codebook_size": V, "kmeans_init": False, "revive_below": 0.0, **options})
    made = VectorQuantizer(config, latent_channels=D)
    if not config.cosine:
        made.codebook.data.mul_(torch.randn_like(made.codebook).std() / made.codebook.data.std())
    return made


def latents(B: int = 4, h: int = 5, w: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def backward(vq: VectorQuantizer, z: Tensor) -> tuple[Bottlenecked, Tensor]:
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


def test_beta_weighs_the_commitment_alone() -> None:
    """Trap 1: beta scales the pull on the encoder and never that on the codebook, which many implementations swap."""
    z, grads = latents(), {}
    for beta in (0.0, 0.25, 1.0):
        vq = quantizer(update="gradient", beta=beta)
        _, at_z = backward(vq, z)
        (codebook,) = vq.library.parameters()
        grads[beta] = at_z, codebook.grad
    assert grads[0.25][0].abs().max() > 0
    assert torch.equal(grads[0.0][0], torch.zeros_like(z))
    assert torch.allclose(grads[1.0][0], 4 * grads[0.25][0])
    assert torch.equal(grads[1.0][1], grads[0.25][1])
    assert torch.equal(grads[0.0][1], grads[0.25][1])


def test_the_loss_has_the_gradients_of_the_paper() -> None:
    """Traps 1 and 2: both terms are taken from the raw code vectors, so the gradients are those of equation 3."""
    z = latents()
    vq = quantizer(update="gradient", beta=0.25)
    codebook = vq.codebook.detach().clone()
    out, at_z = backward(vq, z)
    assert out.codes is not None
    vectors = rearrange(z, "B d h w -> (B h w) d")
    ids = out.codes.flatten()
    apart = vectors - codebook[ids]
    assert torch.allclose(out.loss, 1.25 * apart.square().mean())
    assert torch.allclose(rearrange(at_z, "B d h w -> (B h w) d"), 0.25 * 2 * apart / z.numel(), atol=1e-8)
    expected = torch.zeros_like(codebook).index_add(0, ids, -2 * apart / z.numel())
    (parameter,) = vq.library.parameters()
    assert torch.allclose(parameter.grad[0], expected, atol=1e-8)


def test_an_ema_codebook_has_no_gradient_and_no_codebook_loss() -> None:
    """Trap 1: with running means the loss is beta times the commitment, and trains nothing of the codebook."""
    z = latents()
    vq = quantizer(beta=0.25)
    codebook = vq.codebook.clone()
    out, at_z = backward(vq, z)
    assert out.codes is not None
    apart = rearrange(z, "B d h w -> (B h w) d") - codebook[out.codes.flatten()]
    assert not list(vq.library.parameters())
    assert torch.allclose(out.loss, 0.25 * apart.square().mean())
    assert torch.allclose(rearrange(at_z, "B d h w -> (B h w) d"), 0.25 * 2 * apart / z.numel(), atol=1e-8)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("training", [True, False])
def test_straight_through_passes_the_gradient_as_it_is(update: str, training: bool) -> None:
    """Trap 2: the decoder's gradient at z_q reaches z unchanged, neither rotated nor mixed, and not the codebook."""
    vq = quantizer(update=update).train(training)
    z = latents().requires_grad_()
    gradient = torch.randn_like(z)
    vq(z).z_q.backward(gradient)
    assert z.grad is not None
    assert torch.equal(z.grad, gradient)
    assert all(parameter.grad is None for parameter in vq.parameters())


def test_the_forward_value_is_exactly_the_code() -> None:
    """Trap 2: x + (code - x) is only nearly the code in floating point; what is decoded must be the code itself."""
    vq = quantizer()
    codebook = vq.codebook.clone()
    out = vq(1e4 * latents())
    assert out.codes is not None
    assert torch.equal(out.z_q, rearrange(codebook[out.codes[..., 0]], "B h w d -> B d h w"))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_the_nearest(options: dict[str, Any], training: bool) -> None:
    """Trap 3: the smallest distance, or greatest cosine, by brute force in float64; in training before the update."""
    vq = quantizer(**options).train(training)
    z = latents(B=8)
    expected = nearest(z, vq.codebook.clone(), vq.config.cosine)
    codes = vq(z).codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > V // 2


def test_cosine_ignores_length() -> None:
    """Trap 3: on the sphere a vector and its multiple have the same code; by distance they would not."""
    vq = quantizer(cosine=True).eval()
    z = latents()
    assert torch.equal(vq(z).codes, vq(100 * z).codes)
    plain = quantizer().eval()
    assert not torch.equal(plain(z).codes, plain(100 * z).codes)


@pytest.mark.parametrize("code_dim", [None, 3], ids=["plain", "projected"])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("size", [(4, 5, 3), (1, 1, 1), (1, 1, 7), (3, 8, 1)], ids=str)
def test_codes_give_back_exactly_what_forward_decodes(
    code_dim: int | None, options: dict[str, Any], size: tuple[int, int, int]
) -> None:
    """Trap 5: in eval mode ids -> vectors equals the forward pass bit for bit, or samples are not what was trained."""
    vq = quantizer(code_dim=code_dim, kmeans_init=True, **options)
    for seed in range(3):  # so that the codebook has moved since it was drawn
        vq(latents(seed=seed))
    vq.eval()
    before = vq.codebook.clone()
    out = vq(latents(*size))
    assert torch.equal(vq.vectors(out.codes), out.z_q)
    assert out.z_q.shape == (size[0], D, *size[1:])
    assert out.codes.shape == (size[0], *size[1:], 1)
    assert torch.equal(vq.codebook, before), "eval must not train"


@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_change_codes(training: bool) -> None:
    """Trap 6: distances are taken in float32 under bf16 autocast, where near codes would all look equally near."""
    vq = quantizer(codebook_size=512).train(training)
    z = latents(B=8, h=8, w=8)
    vectors = rearrange(z, "B d h w -> (B h w) d")
    rough = torch.cdist(vectors.bfloat16().float(), vq.codebook.bfloat16().float()).argmin(-1)
    exact = torch.cdist(vectors.double(), vq.codebook.double()).argmin(-1)
    assert (rough != exact).any(), "the inputs must be such that bf16 would show"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(z)
    assert torch.equal(out.codes.flatten(), exact)
    assert out.loss.dtype == torch.float32
