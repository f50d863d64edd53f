"""The codebook's start, running means, revival and saved state; ours and the library's."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors.torch import load, save

from stage1_tokenizer.bottlenecks.process_group import draw_indices
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.bottlenecks.vq_library import LibraryVectorQuantizer
from stage1_tokenizer.engine.checkpoint import load_strict
from tests.helpers.quantizers import VARIANTS, VQ_KINDS, D, V, VqKind, book, latents, quantizer, step

kinds = pytest.mark.parametrize("kind", VQ_KINDS)
variants = pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)
Quantizer = VectorQuantizer | LibraryVectorQuantizer
ALIVE: dict[str, Any] = {"kmeans_init": True, "revive_below": 0.05}


def reloaded(vq: Quantizer) -> Quantizer:
    """A new quantizer of the same config, with the weights of this one by way of a safetensors file's bytes."""
    options = vq.config.model_dump()
    other = quantizer(options.pop("kind"), **options)
    load_strict(other, load(save(vq.state_dict())), "test")
    return other


@variants
def test_kmeans_does_not_run_again_after_a_load(kind: VqKind, options: dict[str, Any]) -> None:
    """Trap 11: a loaded codebook is bit-identical and is trained on from there; k-means again would throw it away."""
    vq = quantizer(kind, **ALIVE, **options)
    vq.start(latents(seed=0))
    step(vq, latents(seed=0))
    again = reloaded(vq)
    assert torch.equal(again.codebooks()[0], vq.codebooks()[0])
    for seed in range(1, 4):
        step(vq, latents(seed=seed))
        step(again, latents(seed=seed))
    for name, tensor in vq.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@variants
def test_a_forward_pass_changes_nothing(kind: VqKind, options: dict[str, Any]) -> None:
    """Training learns in `finish_step`, after the step was found to be finite: a single nan in a batch would otherwise
    be in every running mean for good before anybody could look at the loss."""
    vq = quantizer(kind, **options, revive_below=0.05)
    before = copy.deepcopy(vq.state_dict())
    vq(latents() * float("nan"))
    vq(latents())
    for name, tensor in vq.state_dict().items():
        assert torch.equal(before[name], tensor), name


@kinds
def test_kmeans_puts_the_whole_codebook_to_use(kind: VqKind) -> None:
    """Codes drawn around zero for vectors that lie elsewhere leave most of them dead from the start."""
    z = 5.0 + latents(B=8, h=8, w=8)

    def used(**options: Any) -> int:
        vq = quantizer(kind, **options)
        vq.start(z)
        return len(vq.eval()(z).codes.unique())

    assert used(kmeans_init=True) == V
    assert used(kmeans_init=False) < V // 2


def test_kmeans_starts_apart_where_most_vectors_are_background() -> None:
    """Drawn blindly, nearly all first means are copies of the background, and their clusters are empty ever after."""
    z = torch.zeros(16, D, 8, 8)
    z[:, :, 0, 0] = 3 * latents(B=16, h=1, w=1)[:, :, 0, 0]  # one vector in 64 is something
    vq = quantizer(kmeans_init=True)
    vq.start(z)
    assert len(vq.eval()(z).codes.unique()) == V


@pytest.mark.parametrize("n", [1, 3, V - 1])
def test_kmeans_with_fewer_vectors_than_codes(n: int) -> None:
    """A tiny first batch, or one of a single colour: finite codes, those there are in use, the rest revived later."""
    z = latents(B=n, h=1, w=1)
    vq = quantizer(kmeans_init=True, revive_below=0.05)
    vq.start(z)
    (codes,) = vq.codebooks()
    assert codes.isfinite().all()
    assert len({*map(tuple, codes.tolist())}) == V
    assert len(vq.eval()(z).codes.unique()) == n
    vq.train()
    for seed in range(600):  # counts fall below the limit
        step(vq, latents(seed=seed))
    assert len(vq.eval()(latents(B=64)).codes.unique()) == V


@kinds
def test_running_means_follow_the_closed_form(kind: VqKind) -> None:
    """Trap 4: n steps equal a slow float64 reference, so the smoothing of counts is not written back into them."""
    vq = quantizer(kind, decay=0.8)
    codes: NDArray[np.float64] = book(vq).codes.double().numpy()
    counts, sums = np.ones(V), codes.copy()
    for seed in range(6):
        z = latents(seed=seed)
        vectors = rearrange(z, "B d h w -> (B h w) d").double().numpy()
        ids = np.square(vectors[:, None] - codes[None]).sum(-1).argmin(-1)
        one_hot = np.eye(V)[ids]
        counts = 0.8 * counts + 0.2 * one_hot.sum(0)
        sums = 0.8 * sums + 0.2 * one_hot.T @ vectors
        smoothed = (counts + 1e-5) / (counts.sum() + V * 1e-5) * counts.sum()
        codes = sums / smoothed[:, None]
        assert np.array_equal(step(vq, z).codes.flatten().numpy(), ids)  # type: ignore[union-attr]
        assert np.allclose(book(vq).codes.numpy(), codes, atol=1e-4)
        assert np.allclose(book(vq).counts.numpy(), counts, atol=1e-4)


@variants
def test_tensors_keep_their_identity(kind: VqKind, options: dict[str, Any]) -> None:
    """Trap 4: an optimizer, an EMA and DDP hold on to the tensors; one that is made anew is lost to them."""
    vq = quantizer(kind, **ALIVE, **options)

    def tensors() -> dict[str, tuple[int, int]]:
        named = [*vq.named_parameters(), *vq.named_buffers()]
        return {name: (id(tensor), tensor.data_ptr()) for name, tensor in named}

    before = tensors()
    vq.start(latents(seed=0))
    for seed in range(4):  # running means and revival
        step(vq, latents(seed=seed) * 2.0**seed)
    assert tensors() == before


@kinds
def test_a_dead_code_moves_to_a_badly_served_vector_and_lives(kind: VqKind) -> None:
    """Trap 7: code, sum and count are reset together, so the revived code is used and alive after the next step."""
    vq = quantizer(kind, codebook_size=4, revive_below=0.05)
    codes, counts, sums = book(vq)
    background, bad = torch.full((D,), 1.0), torch.full((D,), -3.0)
    codes.copy_(torch.stack([background, 20 * torch.eye(D)[0], 20 * torch.eye(D)[1], torch.full((D,), 50.0)]))
    counts.copy_(torch.tensor([5.0, 5.0, 5.0, 0.001]))
    sums.copy_(codes * counts[:, None])
    vectors = torch.cat([background.expand(58, D), bad.expand(2, D)])
    z = rearrange(vectors, "(B h w) d -> B d h w", B=4, h=5)

    step(vq, z)
    codes, counts, sums = book(vq)
    assert torch.equal(codes[3], bad), "58 of 60 vectors are the background, and serve nobody"
    assert torch.allclose(sums[3], bad * 0.05)
    assert torch.allclose(counts[3], torch.tensor(0.05))

    assert (step(vq, z).codes.flatten()[-2:] == 3).all()  # type: ignore[union-attr]
    assert torch.allclose(book(vq).codes[3], bad, rtol=1e-3)
    assert book(vq).counts[3] > 0.05


def test_a_gradient_codebook_revives_too() -> None:
    """Trap 7: its counts are kept although nothing else of the running means is."""
    vq = quantizer(update="gradient", codebook_size=4, revive_below=0.05, decay=0.5)
    book(vq).codes[1:] = 100.0
    for seed in range(8):
        step(vq, latents(seed=seed))
    assert (book(vq).codes.abs() < 10).all()
    assert len(vq.eval()(latents(B=16)).codes.unique()) == 4


def test_more_dead_codes_than_vectors_to_move_them_to() -> None:
    """Two codes at the same place would be one code and a dead one; what is left over waits for the next step."""
    vq = quantizer(codebook_size=32, revive_below=0.5, decay=0.5)
    codes, counts, sums = book(vq)
    counts.fill_(0.1)
    codes.fill_(50.0)
    sums.fill_(5.0)
    step(vq, latents(B=2, h=1, w=3))
    near = book(vq).codes[book(vq).codes.abs().amax(dim=1) < 10]
    assert len(near) == len({*map(tuple, near.tolist())}) == 7, "six vectors, and the code that had them all"


def test_draws_are_in_proportion_to_their_weights() -> None:
    """The first of n draws by weights 1, 2, 0 and 5 of 8: frequencies within four standard deviations."""
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0])
    drawn = torch.tensor([int(draw_indices(weights, 1, seed)[0]) for seed in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, weights / 8, atol=4 * 0.5 / 4000**0.5)
    assert share[2] == 0
    assert sorted(draw_indices(weights, 9, 0).tolist()) == [0, 1, 3], "without replacement, and never those of weight 0"


def test_kmeans_looks_at_vectors_from_everywhere() -> None:
    """k-means uses only some vectors of a large first batch; every eighth of a grid of eight would be one column."""
    z = torch.zeros(64, D, 8, 8)
    z += 10.0 * torch.arange(8)  # each column is a cluster of its own
    vq = quantizer(kmeans_init=True, codebook_size=8)
    vq.start(z + 0.01 * latents(B=64, h=8, w=8))
    assert len(vq.eval()(z).codes.unique()) == 8
    assert torch.allclose(book(vq).counts, torch.full((8,), 0.01 * 64 * 8), rtol=0.3)
