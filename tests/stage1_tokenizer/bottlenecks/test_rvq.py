"""Residual and grouped residual quantization, against slow references and the library."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from stage1_tokenizer.bottlenecks.grouped_rvq import GroupedResidualQuantizer, GroupedRvqConfig
from stage1_tokenizer.bottlenecks.rvq import ResidualQuantizer, RvqConfig
from stage1_tokenizer.engine.errors import ConfigError
from tests.helpers.quantizers import D, V, latents, step


def rvq(**options: Any) -> ResidualQuantizer:
    """Three codebooks of 16 random codes, each with codes of about the length of what it is given."""
    torch.manual_seed(0)
    options = {"codebook_size": V, "depth": 3, "kmeans_init": False, "revive_below": 0.0, **options}
    return ResidualQuantizer(RvqConfig(**options), latent_channels=D)


def reference(z: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 2 to 8 of Lee et al. in float64: ids (N, K), the sum of codes (N, D), and the sum of squared errors."""
    vectors = rearrange(z, "B d h w -> (B h w) d").double()
    total, ids, errors = torch.zeros_like(vectors), [], torch.zeros(()).double()
    for codebook in codebooks:
        distances = torch.cdist(vectors - total, codebook.double())
        ids.append(distances.argmin(dim=1))
        total = total + codebook.double()[ids[-1]]
        errors = errors + (vectors - total).square().mean()
    return torch.stack(ids, dim=1), total, errors


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_each_codebook_quantizes_what_is_left(shared: bool, training: bool) -> None:
    """Trap 3: the codes, their sum and the loss of the paper's equations 2 to 8, which sum over all partial sums."""
    made = rvq(shared=shared, beta=0.25).train(training)
    z = latents()
    out = made(z)
    ids, total, errors = reference(z, made.codebooks())
    assert out.codes is not None
    assert torch.equal(rearrange(out.codes, "B h w K -> (B h w) K"), ids)
    assert torch.allclose(rearrange(out.z_q, "B d h w -> (B h w) d").double(), total, atol=1e-5)
    assert torch.allclose(out.loss.double(), 0.25 * errors, rtol=1e-5)


def test_the_codes_are_the_librarys() -> None:
    """The library's ResidualVQ with the same codebooks gives the same ids and the same sums."""
    made = rvq().eval()
    library = ResidualVQ(dim=D, num_quantizers=3, codebook_size=V, kmeans_init=False).eval()
    for layer, codebook in zip(library.layers, made.codebooks(), strict=True):
        layer._codebook.embed.data.copy_(codebook[None])
    z = latents()
    out = made(z)
    theirs, ids, _ = library(rearrange(z, "B d h w -> B (h w) d"))
    assert torch.equal(rearrange(out.codes, "B h w K -> B (h w) K"), ids)
    assert torch.allclose(rearrange(out.z_q, "B d h w -> B (h w) d"), theirs, atol=1e-5)


def test_beta_weighs_the_commitment_of_every_depth_alone() -> None:
    """Trap 1: and the codebook's term pulls each codebook to its own residual, whatever beta is."""
    grads = {}
    for beta in (0.0, 0.5):
        made = rvq(update="gradient", beta=beta)
        z = latents().requires_grad_()
        made(z).loss.backward()
        assert z.grad is not None
        grads[beta] = z.grad, [parameter.grad for parameter in made.parameters()]
    assert torch.equal(grads[0.0][0], torch.zeros_like(grads[0.0][0]))
    assert grads[0.5][0].abs().max() > 0
    for without, with_beta in zip(grads[0.0][1], grads[0.5][1], strict=True):
        assert without is not None
        assert torch.equal(without, with_beta)  # type: ignore[arg-type]
        assert without.abs().max() > 0


def test_straight_through_goes_past_all_depths_at_once() -> None:
    """Trap 2: per depth, the gradient at z would be the decoder's times the depth, or nothing after the first."""
    made = rvq()
    z = latents().requires_grad_()
    gradient = torch.randn_like(z)
    made(z).z_q.backward(gradient)
    assert z.grad is not None
    assert torch.equal(z.grad, gradient)


@pytest.mark.parametrize("shared", [False, True])
def test_more_depth_leaves_less(shared: bool) -> None:
    """Each depth lowers the error; also with a shared codebook, which serves coarse and fine codes at once."""
    errors = []
    for depth in (1, 2, 4):
        made = rvq(depth=depth, shared=shared, kmeans_init=True, revive_below=0.05, decay=0.9)
        made.start(latents(B=32, seed=0))
        for seed in range(30):
            step(made, latents(B=32, seed=seed))
        z = latents(B=32, seed=99)
        errors.append(float((made.eval()(z).z_q - z).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_a_shared_codebook_learns_from_every_depth() -> None:
    """One codebook, moved by the vectors and by all residuals of a step, in closed form; and it is saved once."""
    made = rvq(depth=2, shared=True, decay=0.8)
    (book,) = {id(codebook): codebook for codebook in made.residual.levels()}.values()
    z = latents()
    codes = book.weight.double().clone()
    vectors = rearrange(z, "B d h w -> (B h w) d").double()
    first = torch.cdist(vectors, codes).argmin(dim=1)
    residual = vectors - codes[first]
    second = torch.cdist(residual, codes).argmin(dim=1)
    uses = torch.bincount(torch.cat([first, second]), minlength=V).double()
    sums = torch.zeros_like(codes).index_add(0, first, vectors).index_add(0, second, residual)
    counts, means = 0.8 + 0.2 * uses, 0.8 * codes + 0.2 * sums
    smoothed = (counts + 1e-5) / (counts.sum() + V * 1e-5) * counts.sum()
    step(made, z)
    assert torch.allclose(book.weight.double(), means / smoothed[:, None], atol=1e-5)
    assert len([name for name in made.state_dict() if name.endswith("weight")]) == 1
    assert int(book.steps) == 1, "one step, and not one per depth"


def test_codes_are_drawn_in_training_alone() -> None:
    """RQ-VAE's stochastic sampling would otherwise give other tokens for the same image each time it is extracted."""
    made = rvq(temperature=2.0)
    z = latents()
    torch.manual_seed(0)
    first, second = made(z).codes, made(z).codes
    assert not torch.equal(first, second)
    made.eval()
    assert torch.equal(made(z).codes, made(z).codes)
    assert torch.equal(rearrange(made(z).codes, "B h w K -> (B h w) K"), reference(z, made.codebooks())[0])


def grouped(**options: Any) -> GroupedResidualQuantizer:
    torch.manual_seed(0)
    options = {"codebook_size": V, "kmeans_init": False, "revive_below": 0.0, **options}
    return GroupedResidualQuantizer(GroupedRvqConfig(**options), latent_channels=D)


def test_groups_are_quantized_apart_and_coarse_codes_come_first() -> None:
    """Each group is a residual quantizer of its own channels; a prior that predicts the codes in order gets the coarse
    ones of all groups before any fine one."""
    made = grouped(groups=2, depth=3).eval()
    z = latents()
    out = made(z)
    books = made.codebooks()  # in the order of the codes
    for group in range(2):
        ids, total, _ = reference(z[:, 4 * group : 4 * group + 4], books[group::2])
        assert torch.equal(rearrange(out.codes, "B h w K -> (B h w) K")[:, group::2], ids)
        part = rearrange(out.z_q, "B d h w -> (B h w) d")[:, 4 * group : 4 * group + 4]
        assert torch.allclose(part.double(), total, atol=1e-5)


@pytest.mark.parametrize("options", [{"groups": 3}, {"groups": 4, "code_dim": 6}], ids=str)
def test_groups_that_do_not_divide_the_channels_are_refused(options: dict[str, Any]) -> None:
    """The message says both numbers and which keys to change."""
    with pytest.raises((ConfigError, ValueError), match=r"groups"):
        grouped(**options)
