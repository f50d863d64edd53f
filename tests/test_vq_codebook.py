"""How the vector quantizer's codebook lives: start, running means, revival, and what survives a save."""

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.checkpoint import load_strict

V, D = 16, 8


def quantizer(processes: int = 1, **options: Any) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(VqConfig(**{"codebook_size": V, **options}), latent_channels=D, processes=processes)


def latents(seed: int, B: int = 4, h: int = 5, w: int = 3) -> Tensor:
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def reloaded(vq: VectorQuantizer) -> VectorQuantizer:
    """Another quantizer of the same config, with the weights of this one by way of a safetensors file's bytes."""
    other = VectorQuantizer(vq.config, latent_channels=D)
    load_strict(other, load(save(vq.state_dict())), "test")
    return other


@pytest.mark.parametrize("options", [{}, {"update": "gradient"}, {"cosine": True}], ids=str)
def test_kmeans_does_not_run_again_after_a_load(options: dict[str, Any]) -> None:
    """Trap 11: a loaded codebook is bit-identical and is trained on from there; k-means again would throw it away."""
    vq = quantizer(**options)
    vq(latents(0))
    again = reloaded(vq)
    assert bool(again.library._codebook.initted)
    assert torch.equal(again.codebook, vq.codebook)
    for step in range(1, 4):
        torch.manual_seed(step)  # revival draws
        vq(latents(step))
        torch.manual_seed(step)
        again(latents(step))
    for name, tensor in vq.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_kmeans_runs_once() -> None:
    """Trap 11: the second batch moves the codes by a hundredth; k-means on it would move them to another place."""
    vq = quantizer(revive_below=0.0)
    vq(latents(0))
    first = vq.codebook.clone()
    vq(100.0 + latents(1))
    assert (vq.codebook - first).norm(dim=-1).median() < 1e-3


def test_an_empty_codebook_refuses_to_evaluate() -> None:
    """Trap 11: k-means over a validation batch would be training on it; the library does just that."""
    vq = quantizer().eval()
    with pytest.raises(ValueError, match="k-means"):
        vq(latents(0))
    assert not bool(vq.library._codebook.initted)
    assert not vq.codebook.any()


def test_kmeans_puts_the_whole_codebook_to_use() -> None:
    """Codes drawn around zero for vectors that lie elsewhere leave most of them dead from the start."""
    z = 5.0 + latents(0, B=8, h=8, w=8)

    def used(**options: Any) -> int:
        vq = quantizer(**options)
        vq(z)
        return len(vq.eval()(z).codes.unique())

    assert used(kmeans_init=True) == V
    assert used(kmeans_init=False, revive_below=0.0) < V // 2


def test_the_resolved_library_quantizer() -> None:
    """Trap 12: every option that matters is ours and not the library's default, also after an update of the library."""
    library = quantizer().library
    codebook = library._codebook
    look_up = codebook.gumbel_sample.keywords
    assert VqConfig(codebook_size=V).tree() == {
        "kind": "vq",
        "codebook_size": V,
        "code_dim": None,
        "update": "ema",
        "beta": 0.25,
        "decay": 0.99,
        "cosine": False,
        "kmeans_init": True,
        "kmeans_iterations": 10,
        "revive_below": 0.05,
    }
    assert {
        "rotation_trick": library.rotation_trick,
        "route_gradients_to_input": library.route_gradients_to_input,
        "directional_reparam": library.directional_reparam,
        "commitment": library.commitment_weight,
        "orthogonal": library.orthogonal_reg_weight,
        "diversity": library.has_codebook_diversity_loss,
        "sync_update_v": library.sync_update_v,
        "heads": library.heads,
        "projections": library.has_projections,
        "frozen": library.freeze_codebook,
        "own optimizer": library.in_place_codebook_optimizer,
        "learnable": codebook.learnable_codebook,
        "ema_update": codebook.ema_update,
        "manual_ema_update": codebook.manual_ema_update,
        "decay": codebook.decay,
        "eps": codebook.eps,
        "revive_below": codebook.threshold_ema_dead_code,
        "revived_count": codebook.reset_cluster_size,
        "kmeans_iterations": codebook.kmeans_iters,
        "cosine": codebook.use_cosine_sim,
        "affine": codebook.affine_param,
        "bridge": codebook.vq_bridge,
        "random lookup": look_up["stochastic"] or look_up["straight_through"],
        "synchronised": codebook.use_ddp,
    } == {
        "rotation_trick": False,
        "route_gradients_to_input": False,
        "directional_reparam": False,
        "commitment": 0.0,
        "orthogonal": 0.0,
        "diversity": False,
        "sync_update_v": 0.0,
        "heads": 1,
        "projections": False,
        "frozen": False,
        "own optimizer": None,
        "learnable": False,
        "ema_update": True,
        "manual_ema_update": False,
        "decay": 0.99,
        "eps": 1e-5,
        "revive_below": 0.05,
        "revived_count": 0.05,
        "kmeans_iterations": 10,
        "cosine": False,
        "affine": False,
        "bridge": None,
        "random lookup": False,
        "synchronised": False,
    }


def test_two_processes_synchronise() -> None:
    """Trap 9: the library decides by whether a process group exists when it is built; we tell it."""
    codebook = quantizer(processes=2).library._codebook
    assert codebook.use_ddp
    assert codebook.all_reduce_fn is torch.distributed.all_reduce
    assert codebook.kmeans_all_reduce_fn is torch.distributed.all_reduce


def test_running_means_follow_the_closed_form() -> None:
    """Trap 4: n steps equal a slow float64 reference, so the smoothing of counts is not written back into them."""
    vq = quantizer(kmeans_init=False, revive_below=0.0, decay=0.8)
    codes: NDArray[np.float64] = vq.codebook.double().numpy()
    counts, sums = np.ones(V), codes.copy()
    for step in range(6):
        z = latents(step)
        vectors = rearrange(z, "B d h w -> (B h w) d").double().numpy()
        ids = np.square(vectors[:, None] - codes[None]).sum(-1).argmin(-1)
        one_hot = np.eye(V)[ids]
        counts = 0.8 * counts + 0.2 * one_hot.sum(0)
        sums = 0.8 * sums + 0.2 * one_hot.T @ vectors
        smoothed = (counts + 1e-5) / (counts.sum() + V * 1e-5) * counts.sum()
        codes = sums / smoothed[:, None]
        assert np.array_equal(vq(z).codes.flatten().numpy(), ids)
        assert np.allclose(vq.codebook.numpy(), codes, atol=1e-4)
        assert np.allclose(vq.library._codebook.cluster_size.numpy(), counts, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"update": "gradient"}, {"cosine": True}], ids=str)
def test_tensors_keep_their_identity(options: dict[str, Any]) -> None:
    """Trap 4: an optimizer, an EMA and DDP hold on to the tensors; one that is made anew is lost to them."""
    vq = quantizer(**options)

    def tensors() -> dict[str, tuple[int, int]]:
        named = [*vq.named_parameters(), *vq.named_buffers()]
        return {name: (id(tensor), tensor.data_ptr()) for name, tensor in named}

    before = tensors()
    for step in range(4):  # k-means, running means and revival
        vq(latents(step) * 2.0**step)
    assert tensors() == before


def test_a_dead_code_moves_to_a_badly_served_vector_and_lives() -> None:
    """Trap 7: code, sum and count are reset together, so the revived code is used and alive after the next step."""
    vq = quantizer(codebook_size=4, kmeans_init=False, revive_below=0.05)
    book = vq.library._codebook
    background, bad = torch.full((D,), 1.0), torch.full((D,), -3.0)
    corners = torch.stack([background, 20 * torch.eye(D)[0], 20 * torch.eye(D)[1], torch.full((D,), 50.0)])
    counts = torch.tensor([5.0, 5.0, 5.0, 0.001])
    book.embed.copy_(corners)
    book.embed_avg.copy_(corners * counts[:, None])
    book.cluster_size.copy_(counts)
    vectors = torch.cat([background.expand(58, D), bad.expand(2, D)])
    z = rearrange(vectors, "(B h w) d -> B d h w", B=4, h=5)

    vq(z)
    assert torch.equal(vq.codebook[3], bad), "58 of 60 vectors are the background, and serve nobody"
    assert torch.allclose(book.embed_avg[0, 3], bad * 0.05)
    assert torch.allclose(book.cluster_size[0, 3], torch.tensor(0.05))

    codes = vq(z).codes.flatten()
    assert (codes[-2:] == 3).all()
    assert torch.allclose(vq.codebook[3], bad, rtol=1e-3)
    assert book.cluster_size[0, 3] > 0.05
