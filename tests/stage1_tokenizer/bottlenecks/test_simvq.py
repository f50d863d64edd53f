"""SimVQ: one learned linear map under all codes, against the library's own, and the way there and back."""

from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load, save
from torch import Tensor
from vector_quantize_pytorch import SimVQ as LibrarySimVQ

from stage1_tokenizer.bottlenecks.simvq import SimVq, SimVqConfig
from stage1_tokenizer.engine.checkpoint import load_strict
from tests.helpers.largest import LargestTensor

V, D = 32, 8


def quantizer(**options: Any) -> SimVq:
    torch.manual_seed(0)
    return SimVq(SimVqConfig(**{"codebook_size": V, **options}), latent_channels=D)


def latents(B: int = 4, h: int = 5, w: int = 3, seed: int = 1) -> Tensor:
    return 0.5 * torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rotation", [False, True])
def test_it_is_the_librarys(rotation: bool) -> None:
    """Same codes, loss and gradients at latents and linear map as vector_quantize_pytorch's, whose map has no bias."""
    ours = quantizer(rotation=rotation)
    torch.nn.init.zeros_(ours.transform.bias)
    theirs = LibrarySimVQ(dim=D, codebook_size=V, channel_first=True, rotation_trick=rotation)
    theirs.frozen_codebook.copy_(ours.frozen)
    theirs.code_transform.load_state_dict({"weight": ours.transform.weight})
    gradient = torch.randn(latents().shape, generator=torch.Generator().manual_seed(2))

    z, z_theirs = latents().requires_grad_(), latents().requires_grad_()
    out = ours(z)
    z_q, ids, loss = theirs(z_theirs)
    ((out.z_q * gradient).sum() + out.loss).backward()
    ((z_q * gradient).sum() + loss).backward()
    assert z.grad is not None
    assert z_theirs.grad is not None
    assert torch.equal(out.codes[..., 0], ids)
    assert torch.allclose(out.z_q, z_q, atol=1e-5)
    assert torch.allclose(out.loss, loss)
    assert torch.allclose(z.grad, z_theirs.grad, atol=1e-5)
    assert ours.transform.weight.grad is not None
    assert torch.allclose(ours.transform.weight.grad, theirs.code_transform.weight.grad, atol=1e-7)


def test_beta_weighs_the_commitment_alone() -> None:
    """Trap 1: beta scales the pull on the encoder and never that on the codebook's linear map."""
    grads = {}
    for beta in (0.0, 0.25, 1.0):
        vq, z = quantizer(beta=beta), latents().requires_grad_()
        vq(z).loss.backward()
        assert z.grad is not None
        assert vq.transform.weight.grad is not None
        grads[beta] = z.grad, vq.transform.weight.grad
    assert grads[0.25][0].abs().max() > 0
    assert not grads[0.0][0].any()
    assert torch.allclose(grads[1.0][0], 4 * grads[0.25][0])
    assert torch.equal(grads[1.0][1], grads[0.25][1])
    assert torch.equal(grads[0.0][1], grads[0.25][1])


@pytest.mark.parametrize("rotation", [False, True])
def test_the_gradient_goes_past_the_lookup(rotation: bool) -> None:
    """Trap 2: straight-through it arrives as it is; with the rotation trick at the angle to the latent which it had to
    the code, and scaled by their lengths (Fifty et al. 2024, section 4). The linear map learns from the loss alone."""
    vq, z = quantizer(rotation=rotation), latents().requires_grad_()
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    z_q = vq(z).z_q
    z_q.backward(gradient)
    assert z.grad is not None
    assert vq.transform.weight.grad is None
    if rotation:
        scale = z_q.norm(dim=1) / z.norm(dim=1)
        assert torch.allclose(z.grad.norm(dim=1), scale * gradient.norm(dim=1), rtol=1e-4)
        assert torch.allclose(
            (z.grad * z).sum(1) / z.norm(dim=1), scale * (gradient * z_q).sum(1) / z_q.norm(dim=1), atol=1e-4
        )
    else:
        assert torch.equal(z.grad, gradient)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_codes_are_the_nearest(training: bool, scale: float) -> None:
    """Trap 3: the smallest distance to the transformed (not the frozen) codes, by brute force in float64."""
    vq = quantizer().train(training)
    vectors = scale * rearrange(latents(B=8), "B d h w -> (B h w) d").double()
    distances = torch.cdist(vectors, vq.codebooks()[0].double())
    closest = distances.topk(2, largest=False).values
    assert (closest[:, 1] - closest[:, 0] > 1e-5).all(), "a tie: choose other numbers"
    codes = vq(scale * latents(B=8)).codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes.flatten(), distances.argmin(1))


@pytest.mark.parametrize(
    "options", [{}, {"code_dim": 3}, {"rotation": True}, {"code_dim": 3, "rotation": True}], ids=str
)
@pytest.mark.parametrize("size", [(4, 5, 3), (1, 1, 1), (1, 1, 7), (3, 8, 1), (5, 1, 1)], ids=str)
def test_codes_give_back_exactly_what_forward_decodes(options: dict[str, Any], size: tuple[int, int, int]) -> None:
    """Traps 2 and 5: the forward value is exactly the code, so ids -> vectors equals the forward pass bit for bit."""
    vq = quantizer(**options).eval()
    out = vq(latents(*size))
    assert torch.equal(vq.codes_to_latents(out.codes), out.z_q)
    assert out.z_q.shape == (size[0], D, *size[1:])
    assert out.codes.shape == (size[0], *size[1:], 1)
    if "code_dim" not in options:
        assert torch.equal(out.z_q, rearrange(vq.codebooks()[0][out.codes[..., 0]], "B h w d -> B d h w"))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_change_codes(training: bool) -> None:
    """Trap 6: the linear map and the distances stay float32 under bf16 autocast, in both directions."""
    vq = quantizer(codebook_size=512).train(training)
    z = latents(B=8, h=8, w=8)
    vectors, codebook = rearrange(z, "B d h w -> (B h w) d"), vq.codebooks()[0]
    rough = torch.cdist(vectors.bfloat16().float(), codebook.bfloat16().float()).argmin(-1)
    exact = vq(z)
    assert (rough != exact.codes.flatten()).any(), "the inputs must be such that bf16 would show"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(z)
        assert torch.equal(vq.codebooks()[0], codebook)
        assert torch.equal(vq.codes_to_latents(out.codes), out.z_q)
    assert torch.equal(out.codes, exact.codes)
    assert out.loss.dtype == torch.float32


def test_a_step_moves_every_code() -> None:
    """The paper's point: the gradient of one used code moves all of them, so that none is left behind and dies."""
    vq = quantizer()
    before, frozen = vq.codebooks()[0], vq.frozen.clone()
    out = vq(latents(B=1, h=1, w=1))
    out.loss.backward()
    torch.optim.SGD(vq.parameters(), lr=1.0).step()
    assert [name for name, _ in vq.named_parameters()] == ["transform.weight", "transform.bias"]
    assert ((vq.codebooks()[0] - before).abs().amax(1) > 0).all()
    assert torch.equal(vq.frozen, frozen)


def test_training_puts_a_codebook_in_the_wrong_place_to_use() -> None:
    """A codebook ten times too short uses few codes; learning the linear map brings the others into use."""
    vq = quantizer(codebook_size=64)
    with torch.no_grad():
        vq.transform.weight.mul_(0.1)
    z = latents(B=8, h=8, w=8)
    before = len(vq(z).codes.unique())
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        out = vq(z)
        losses.append(float(out.loss.detach()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert len(vq(z).codes.unique()) > 1.1 * before


def test_a_loaded_codebook_is_the_saved_one() -> None:
    """Trap 11: the frozen codes are random, so a checkpoint must carry them; and loading must not draw again."""
    vq = quantizer(code_dim=3)
    torch.manual_seed(1)
    other = SimVq(vq.config, latent_channels=D)
    assert not torch.equal(other.frozen, vq.frozen)
    load_strict(other, load(save(vq.state_dict())), "test")
    assert torch.equal(other.codebooks()[0], vq.codebooks()[0])
    assert torch.equal(other(latents()).z_q, vq(latents()).z_q)


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e4])
def test_extreme_latents_stay_finite(rotation: bool, size: float) -> None:
    """A latent of zeros has no direction to turn from, and a huge one must not overflow: one NaN ends a training."""
    vq, z = quantizer(rotation=rotation), (size * latents()).requires_grad_()
    out = vq(z)
    (out.z_q.sum() + out.loss).backward()
    assert z.grad is not None
    assert vq.transform.weight.grad is not None
    assert out.z_q.isfinite().all()
    assert out.loss.isfinite()
    assert z.grad.isfinite().all()
    assert vq.transform.weight.grad.isfinite().all()


def test_memory_does_not_grow_with_vectors_times_codes() -> None:
    """Trap 14: no matrix of N vectors by V codes, forward or backward; here it would have 2^26 numbers."""
    vq, z = quantizer(codebook_size=2**15), latents(B=2, h=32, w=32)
    with LargestTensor() as largest:
        vq(z.requires_grad_()).loss.backward()
    assert largest.numel <= 2**21


def test_the_defaults() -> None:
    """Trap 12: the library's rotation trick is on by default, and its loss has two weights; ours are stated."""
    assert SimVqConfig().tree() == {
        "kind": "simvq",
        "codebook_size": 1024,
        "code_dim": None,
        "beta": 0.25,
        "rotation": False,
        "batch_init": True,
    }


@pytest.mark.parametrize("options", [{}, {"code_dim": 3}], ids=str)
def test_it_starts_where_the_latents_are(options: dict[str, Any]) -> None:
    """Latents far from 0, a hundred times wider in one direction than in another: the codebook has their mean and
    covariance, and most codes are used; without the start, few are."""
    z = latents(B=64, h=8, w=8) * torch.logspace(-1.5, 0.5, D)[:, None, None] + 3.0
    used = {}
    for batch_init in (False, True):
        vq = quantizer(codebook_size=2000, batch_init=batch_init, **options)
        before = vq.codebooks()[0]
        vq.start(z)
        used[batch_init] = len(vq(z).codes.unique())
        if not batch_init:
            assert torch.equal(vq.codebooks()[0], before)
    vectors, codebook = vq.space.to_vectors(z).detach(), vq.codebooks()[0]
    spread = vectors.std(dim=0)
    assert ((codebook.mean(dim=0) - vectors.mean(dim=0)).abs() < 0.1 * spread).all()
    apart = (codebook.T.cov() - vectors.T.cov()).abs() / (spread[:, None] * spread)
    assert (apart < 0.15).all()
    assert used[True] > 3 * used[False]


def test_a_start_from_equal_latents_is_finite() -> None:
    """One latent has no covariance; the map can still learn."""
    vq, z = quantizer(), torch.ones(2, D, 3, 3)
    vq.start(z)
    out = vq(z)
    out.loss.backward()
    assert torch.allclose(out.z_q, z)
    assert vq.transform.weight.grad is not None
    assert out.loss.isfinite()
