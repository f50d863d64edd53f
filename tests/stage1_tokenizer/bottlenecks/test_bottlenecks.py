"""The contract of all bottlenecks, tested for every kind."""

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import Tensor

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.base import Bottleneck
from stage1_tokenizer.engine.checkpoint import load_strict
from tests.helpers.processes import run_processes
from tests.helpers.quantizers import EVERY_KIND, D, Tree, bottleneck, latents, name_of, step

every_kind = pytest.mark.parametrize("tree", EVERY_KIND, ids=name_of)
with_codes = pytest.mark.parametrize("tree", [tree for tree in EVERY_KIND if bottleneck(tree).depth], ids=name_of)
# These draw noise of their own in training, as dropout does: other noise on another number of processes.
EXACT = [tree for tree in EVERY_KIND if "temperature" not in tree and tree["kind"] != "kl"]
exact = pytest.mark.parametrize("tree", EXACT, ids=name_of)


def trained(tree: Tree, steps: int = 3) -> Bottleneck:
    """Started and trained a little, so that nothing is as it was built."""
    made = bottleneck(tree)
    made.start(latents(seed=0))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05) if list(made.parameters()) else None
    for seed in range(steps):
        out = made(latents(seed=seed))
        if optimizer is not None:
            (out.loss + out.z_q.square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        made.finish_step()
    return made


def state_of(made: Bottleneck) -> dict[str, Tensor]:
    return copy.deepcopy(dict(made.state_dict()))


def test_every_kind_is_here() -> None:
    """A kind that is added to the union and not to the list would be held to nothing."""
    union = get_args(BottleneckConfig)[0]
    assert {member.model_fields["kind"].default for member in get_args(union)} == {tree["kind"] for tree in EVERY_KIND}


@with_codes
@pytest.mark.parametrize("size", [(4, 5, 3), (1, 1, 1), (1, 1, 7), (3, 8, 1)], ids=str)
def test_codes_give_back_exactly_what_forward_decodes(tree: Tree, size: tuple[int, int, int]) -> None:
    """Trap 5: in eval mode ids -> vectors equals the forward pass bit for bit, or samples are not what was trained."""
    made = trained(tree).eval()
    out = made(latents(*size))
    assert out.codes is not None
    assert out.codes.shape == (size[0], *size[1:], made.depth)
    assert out.codes.dtype == torch.int64
    assert 0 <= int(out.codes.min()) <= int(out.codes.max()) < made.codebook_size
    vectors = made.codes_to_latents(out.codes)
    assert vectors.shape == out.z_q.shape == (size[0], D, *size[1:])
    assert torch.equal(vectors, out.z_q)


@with_codes
def test_each_code_book_has_a_vector_per_code(tree: Tree) -> None:
    """analyze.py and an atlas read the code vectors without knowing the kind."""
    made = trained(tree)
    books = made.codebooks()
    assert len(books) == made.depth
    assert all(len(book) == made.codebook_size and not book.requires_grad for book in books)
    assert all(len({*map(tuple, book.tolist())}) == made.codebook_size for book in books)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_learns_nothing(tree: Tree, training: bool) -> None:
    """Trap 10: what is not learned by gradient is learned in `finish_step`, once a step and after the step was found to
    be finite; and an evaluation changes nothing at all."""
    made = trained(tree).train(training)
    before = state_of(made)
    made(latents(seed=9))
    if training:
        made(latents(seed=9) * float("nan"))
    else:
        made.finish_step()
    for name, tensor in made.state_dict().items():
        if not (name == "finished_steps" and not training):
            assert torch.equal(before[name], tensor), name


@exact
def test_two_micro_batches_are_one_batch(tree: Tree) -> None:
    """Trap 10: an EMA codebook, its counts and its revival see the whole batch once, however it is cut."""
    whole, cut = trained(tree), trained(tree)
    for seed in range(4):
        z = latents(B=6, seed=seed) * (1 + seed)
        step(whole, z)
        step(cut, *z.chunk(3))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(cut.state_dict()[name].double(), tensor.double(), atol=1e-5), name


def learn(accelerator: Accelerator, synchronised: bool = True) -> dict[str, dict[str, Any]]:
    """Every kind: k-means, then four steps on this rank's share of 8 images' latents; codes and the final state."""
    rank, n = accelerator.process_index, accelerator.num_processes
    result = {}
    for tree in EXACT:
        options = {"decay": 0.8, "revive_below": 0.5} if "vq" in tree["kind"] and tree["kind"] != "simvq" else {}
        made = bottleneck({**tree, **options}, processes=n if synchronised else 1)
        codes, losses = [], []
        for number in range(4):
            z = latents(B=8, seed=number) * (1 + number)
            mine = z.chunk(n)[rank]
            torch.manual_seed(100 * number + rank)  # as in train.py, each rank has random numbers of its own
            if number == 0:
                made.start(mine)
            out = step(made, mine)
            losses.append(float(out.loss.detach()))
            codes.append(np.zeros(0) if out.codes is None else out.codes.numpy())
        state = {name: tensor.numpy() for name, tensor in made.state_dict().items()}
        result[name_of(tree)] = {"codes": codes, "losses": losses, "state": state}
    return result


def test_two_processes_are_one_with_the_joint_batch() -> None:
    """Traps 7, 8 and 9: k-means, running means and revival see the batch of all processes, so that two of B have the
    codes and the codebook of one of 2B, and agree with each other to the last bit. (No DDP here, whose broadcast of
    buffers would hide a missing sum; and without the sums the ranks do drift apart.)"""
    (one,) = run_processes(1, learn)
    first, second = run_processes(2, learn)
    apart = run_processes(2, learn, False)
    drifted = 0
    for kind, alone in one.items():
        for number in range(4):
            joint = np.concatenate([rank[kind]["codes"][number] for rank in (first, second)])
            assert np.array_equal(joint, alone["codes"][number]), kind
            together = (first[kind]["losses"][number] + second[kind]["losses"][number]) / 2
            assert together == pytest.approx(alone["losses"][number], rel=1e-4, abs=1e-6), kind
        for name, tensor in alone["state"].items():
            assert np.array_equal(first[kind]["state"][name], second[kind]["state"][name]), (kind, name)
            assert np.allclose(first[kind]["state"][name], tensor, rtol=1e-4, atol=1e-4), (kind, name)
            drifted += not np.allclose(apart[0][kind]["state"][name], apart[1][kind]["state"][name], atol=1e-2)
    assert drifted > 10


@every_kind
def test_a_reloaded_bottleneck_goes_on_alike(tree: Tree) -> None:
    """Traps 11 and 41: all that it has learned is in its state, by way of a file's bytes."""
    made, fresh = trained(tree), bottleneck(tree)
    load_strict(fresh, load(save(made.state_dict())), "test")
    for seed in range(5, 8):
        for each in (made, fresh):
            torch.manual_seed(seed)
            step(each, latents(seed=seed))
    for name, tensor in made.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    left, right = made.eval()(latents()), fresh.eval()(latents())
    assert torch.equal(left.z_q, right.z_q)


@every_kind
def test_tensors_keep_their_identity(tree: Tree) -> None:
    """Trap 4: an optimizer, an EMA and DDP hold on to the tensors; one that is made anew is lost to them."""
    made = bottleneck(tree)

    def tensors() -> dict[str, tuple[int, int]]:
        return {name: (id(t), t.data_ptr()) for name, t in [*made.named_parameters(), *made.named_buffers()]}

    before = tensors()
    made.start(latents(seed=0))
    for seed in range(4):
        step(made, latents(seed=seed) * 2.0**seed)
    assert tensors() == before


@with_codes
def test_autocast_does_not_change_codes(tree: Tree) -> None:
    """Trap 6: distances and roundings are taken in float32 under bf16 autocast, where near codes would all look equally
    near. (A projection is a convolution, and is meant to run in bf16: so here there is none.)"""
    codes = {"fsq": 3, "lfq": 4}.get(tree["kind"], D)
    made = bottleneck({key: value for key, value in tree.items() if key != "code_dim"}, channels=codes)
    z = torch.randn(4, codes, 8, 8, generator=torch.Generator().manual_seed(0))
    made.start(z)
    made.eval()
    exact_codes = made(z).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(z)
    assert out.codes is not None
    assert torch.equal(out.codes, exact_codes)
    assert out.loss.dtype == torch.float32


@every_kind
def test_gradients_reach_the_encoder_and_every_parameter(tree: Tree) -> None:
    """Trap 2: a bottleneck that cuts the gradient trains a decoder for a random encoder, and its loss falls all the
    same; a parameter without one makes DistributedDataParallel stop."""
    made = trained(tree)
    z = latents().requires_grad_()
    out = made(z)
    (out.loss + (out.z_q * torch.randn_like(z)).sum()).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad != 0).float().mean() > 0.9
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every_kind
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_latents_of_one_value_are_survived(tree: Tree, value: float) -> None:
    """An image of one colour, or an encoder gone wild: everything stays finite, also what is learned from it."""
    made = trained(tree)
    z = torch.full((2, D, 3, 3), value, requires_grad=True)
    out = step(made, z)
    torch.autograd.backward(out.loss + out.z_q.sum())
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert out.z_q.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())


@every_kind
def test_statistics_are_scalars_without_gradient(tree: Tree) -> None:
    """They are logged, averaged over processes and plotted; one that holds on to the graph holds on to its memory."""
    for mode in (True, False):
        out = trained(tree).train(mode)(latents())
        assert out.loss.shape == ()
        for name, value in out.stats.items():
            assert value.shape == (), name
            assert not value.requires_grad, name
            assert value.isfinite(), name
