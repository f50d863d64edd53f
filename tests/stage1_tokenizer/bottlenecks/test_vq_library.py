"""Behaviour of vector_quantize_pytorch that we rely on, and our quantizer and the library's against each other."""

from typing import Any

import pytest
import torch

from stage1_tokenizer.bottlenecks.vq_library import LibraryVectorQuantizer, VqLibraryConfig
from tests.helpers.quantizers import VQ_KINDS, V, book, latents, quantizer, step


def made(processes: int = 1, **options: Any) -> LibraryVectorQuantizer:
    quantized = quantizer("vq_library", processes, **options)
    assert isinstance(quantized, LibraryVectorQuantizer)
    return quantized


@pytest.mark.parametrize(
    "options",
    [{}, {"cosine": True}, {"update": "gradient"}, {"revive_below": 0.6}, {"cosine": True, "revive_below": 0.6}],
    ids=str,
)
def test_both_quantizers_learn_the_same_codebook(options: dict[str, Any]) -> None:
    """The same ids, losses, gradients and, after ten updates, the same codebook, counts and sums, revival included: two
    implementations by two teams that agree are more than two that each pass their own tests."""
    ours, library = (quantizer(kind, decay=0.8, codebook_size=64, **options) for kind in VQ_KINDS)
    book(library).codes.copy_(book(ours).codes)
    if ours.config.update == "ema":
        book(library).sums.copy_(book(ours).sums)
    optimizers = [torch.optim.SGD(vq.parameters(), lr=5.0) for vq in (ours, library) if list(vq.parameters())]
    moved = 0
    for number in range(10):
        z = [latents(B=4, h=6, seed=number).requires_grad_() for _ in VQ_KINDS]
        before = book(ours).codes.clone()
        mine, theirs = ours(z[0]), library(z[1])
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.allclose(mine.z_q, theirs.z_q, atol=1e-6)
        for out in (mine, theirs):
            (out.loss + out.z_q.square().sum()).backward()
        assert torch.allclose(mine.loss, theirs.loss)
        assert z[0].grad is not None
        assert z[1].grad is not None
        assert torch.allclose(z[0].grad, z[1].grad, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ours.finish_step()
        library.finish_step()
        tensors = 3 if ours.config.update == "ema" else 1  # the library counts no uses that it has no need for
        for left, right in list(zip(book(ours), book(library), strict=True))[:tensors]:
            assert torch.allclose(left, right, atol=1e-5)
        moved += int(((book(ours).codes - before).norm(dim=1) > 0.5).sum())
    if "revive_below" in options:
        assert moved > 0, "no code was revived, so nothing was compared"


def test_the_library_starts_from_k_means_as_we_do() -> None:
    """Any k-means finds the same means of well separated clusters: here ours and the library's, with their counts."""
    centres = 20 * torch.randn(V, 8, generator=torch.Generator().manual_seed(0))
    z = (centres.repeat(20, 1) + 0.1 * latents(B=V * 20, h=1, w=1)[:, :, 0, 0]).reshape(V * 20, 8, 1, 1)
    for kind in VQ_KINDS:
        vq = quantizer(kind, kmeans_init=True)
        vq.start(z)
        codes = book(vq).codes
        apart = torch.cdist(codes, centres)
        found = apart.min(dim=0).values < 1.0
        assert found.float().mean() > (0.9 if kind == "vq" else 0.5), kind  # the library draws its first means blindly
        assert torch.allclose(book(vq).counts.sum(), torch.tensor(0.01 * V * 20)), "as after one step from nothing"
        assert torch.allclose(book(vq).sums, codes * book(vq).counts[:, None])


def test_the_resolved_library_quantizer() -> None:
    """Trap 12: every option that matters is ours and not the library's default, also after an update of the library."""
    library = made(revive_below=0.05, kmeans_init=True).library
    codebook = library._codebook
    look_up = codebook.gumbel_sample.keywords
    assert VqLibraryConfig(codebook_size=V).tree() == {
        "kind": "vq_library",
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
    codebook = made(processes=2).library._codebook
    assert codebook.use_ddp
    assert codebook.all_reduce_fn is torch.distributed.all_reduce
    assert codebook.kmeans_all_reduce_fn is torch.distributed.all_reduce


def test_an_empty_codebook_refuses_to_be_used() -> None:
    """Trap 11: the library runs k-means in the first forward pass, over a validation batch if that comes first."""
    vq = made(kmeans_init=True).eval()
    with pytest.raises(ValueError, match="k-means"):
        vq(latents())
    assert not bool(vq.library._codebook.initted)


def test_the_library_learns_once_per_step() -> None:
    """Trap 10: by itself it updates in every forward pass, so that micro-batches would be steps of their own."""
    vq = made()
    before = vq.codebooks()[0].clone()
    vq(latents())
    assert torch.equal(vq.codebooks()[0], before)
    step(vq, latents())
    assert not torch.equal(vq.codebooks()[0], before)
