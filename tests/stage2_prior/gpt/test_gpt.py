"""The GPT: what a position depends on, its position information, its logits, and activation checkpointing."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from x_transformers.x_transformers import apply_rotary_pos_emb

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.likelihood import token_loss
from tests.helpers.artefacts import gpt

SHAPE = TokenShape(2, 3, 2, 11)  # not square, and two codes at each position
B, L, V, CLASSES = 3, SHAPE.length, SHAPE.V, 2
POSITIONS = ["rotary", "learned", "both"]
LARGE = TokenShape(5, 7, 1, 11)


def codes_of(seed: int = 1, batch: int = B) -> Tensor:
    return torch.randint(V, (batch, *SHAPE[:3]), generator=torch.Generator().manual_seed(seed))


def labels_of(*labels: int) -> Tensor:
    return torch.tensor(labels)


def at(codes: Tensor, t: int) -> tuple[slice, int, int, int]:
    """The place of the sequence's token t in codes (B, h, w, K), counted by hand: rows, then columns, then depth."""
    return slice(None), t // (SHAPE.w * SHAPE.K), t // SHAPE.K % SHAPE.w, t % SHAPE.K


def angles_of(model: Gpt) -> Tensor:
    """(1 + h*w, head width / 2): the angles of the start and of each position but the last."""
    return model.rotary_angles((model.shape.h, model.shape.w), torch.device("cpu"))


def place(row: int, column: int) -> int:
    """Return the index of a position of the large grid among the inputs; the start is input 0."""
    return 1 + row * LARGE.w + column


def count(calls: list[int], index: int, *_: object) -> None:
    calls[index] += 1


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_position_sees_just_the_tokens_before_it(positions: str) -> None:
    """Traps 28 and 37: token t, in row-major order, changes the logits of each later position and of no other."""
    model, codes, labels = gpt(SHAPE, CLASSES, positions=positions), codes_of(), labels_of(0, 1, 2)
    before = model(codes, labels)
    for t in range(L):
        changed = codes.clone()
        changed[at(codes, t)] = (changed[at(codes, t)] + 1) % V
        apart = (model(changed, labels) - before).abs().amax(dim=-1)  # (B, L)
        assert (apart[:, : t + 1] <= 1e-6).all(), f"a position up to {t} sees token {t}"
        assert (apart[:, t + 1 :] > 1e-4).all(), f"a position after {t} does not see token {t}"


def test_every_position_knows_the_label() -> None:
    """Trap 28: the class, or that none is given, must reach the first token as well as the last."""
    model, codes = gpt(SHAPE, CLASSES), codes_of()
    logits = [model(codes, torch.full((B,), label)) for label in (0, 1, model.null_label)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert ((logits[one] - logits[other]).abs().amax(dim=-1) > 1e-4).all()


def test_start_vectors_are_no_codes() -> None:
    """Trap 27: what a code's embedding is does not matter to the first token, so no start is a code."""
    model, codes, labels = gpt(SHAPE, CLASSES), codes_of(), labels_of(0, 1, 2)
    before = model(codes, labels)
    model.embedding.weight += torch.randn_like(model.embedding.weight)
    after = model(codes, labels)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.isclose(after[:, 1:], before[:, 1:]).all(dim=-1).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("K", [1, 2])
def test_only_codes_are_ever_sampled(seed: int, K: int) -> None:
    """Trap 27: there are V logits for V codes, so even wild weights have nothing else to say."""
    model = gpt(SHAPE._replace(K=K), CLASSES, seed)
    for weight in (model.start.weight, *model.head.parameters()):
        weight.mul_(1e3)
    labels = labels_of(0, 1, 2)
    assert model(codes_of()[..., :K], labels).shape == (B, SHAPE.h * SHAPE.w * K, V)
    assert model.begin(labels).logits().shape == (B, V)
    codes = generate(model, labels, torch.rand(B, SHAPE.h * SHAPE.w * K))
    assert codes.shape == (B, SHAPE.h, SHAPE.w, K)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < V


def test_rotations_tell_rows_and_columns() -> None:
    """Half of the channels turn with the row alone and half with the column alone, each by equal steps; else a
    position would lie nearer to the one at the other end of the former row than to the one above it."""
    angles = angles_of(gpt(LARGE, heads=2))
    by_row, by_column = angles.chunk(2, dim=1)
    for row in range(LARGE.h):
        for column in range(LARGE.w - (row == LARGE.h - 1)):
            assert torch.allclose(by_row[place(row, column)], row * by_row[place(1, 0)])
            assert torch.allclose(by_column[place(row, column)], column * by_column[place(0, 1)])
    assert torch.allclose(by_row[0], 0 * by_row[0])
    assert torch.allclose(by_column[0], -by_column[place(0, 1)]), "the start stands left of the first position"
    steps = by_row[place(1, 0)]
    assert torch.allclose(steps, by_column[place(0, 1)])
    assert float(steps[0]) == 1.0
    assert (steps[1:] < steps[:-1]).all()


@pytest.mark.parametrize("grid", [(2, 3), (5, 2), (1, 7)], ids=str)
def test_a_smaller_grid_has_the_places_of_its_own_rows(grid: tuple[int, int]) -> None:
    """A window is shorter than a trained row: what stands below a position must still be one row away from it."""
    model = gpt(LARGE, heads=2)
    angles, large = model.rotary_angles(grid, torch.device("cpu")), angles_of(model)
    assert len(angles) == grid[0] * grid[1]
    assert torch.equal(angles[0], large[0])
    for t in range(1, len(angles)):
        assert torch.equal(angles[t], large[place((t - 1) // grid[1], (t - 1) % grid[1])])


def test_attention_depends_on_differences_of_rows_and_columns() -> None:
    """Two places as far apart along both axes must relate alike wherever they are, and others must not."""
    angles = angles_of(gpt(LARGE, heads=2)).repeat_interleave(2, dim=-1)  # as the library has them
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, angles.shape[1], generator=generator).double()
    queries, keys = (apply_rotary_pos_emb(x.expand(1, len(angles), -1), angles[None].double())[0] for x in (query, key))
    scores = queries @ keys.T
    found: dict[tuple[int, int], float] = {}
    places = [(row, column) for row in range(LARGE.h) for column in range(LARGE.w)][:-1]
    for one in places:
        for other in places:
            score = float(scores[place(*one), place(*other)])
            difference = one[0] - other[0], one[1] - other[1]
            assert found.setdefault(difference, score) == pytest.approx(score, abs=1e-5)
    assert len({round(score, 3) for score in found.values()}) > 0.95 * len(found)


def test_a_window_of_content_may_move() -> None:
    """A layer that knows places by rotation alone says the same about a 2x3 block of inputs anywhere in the grid, and
    something else about the same inputs as a block of 3x2."""
    model = gpt(LARGE, heads=2, positions="rotary")
    angles = angles_of(model)
    x = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0))

    def output(top: int, left: int, rows: int, columns: int) -> Tensor:
        index = [place(top + row, left + column) for row in range(rows) for column in range(columns)]
        return model.layers[0](x, angles[index])

    for top, left in ((0, 2), (1, 0), (2, 4)):
        assert torch.allclose(output(top, left, 2, 3), output(0, 0, 2, 3), atol=1e-4)
        assert not torch.allclose(output(top, left, 3, 2), output(0, 0, 2, 3), atol=0.05)


@pytest.mark.parametrize("positions", POSITIONS)
def test_only_the_positions_that_were_asked_for_are_there(positions: str) -> None:
    """A row and a column that are never trained would be noise, and so would a rotation that nobody asked for."""
    model = gpt(LARGE, positions=positions)
    learned, rotation = model.position_tables((2, 3), torch.device("cpu"))
    assert (learned is None) == (positions == "rotary")
    assert (rotation is None) == (positions == "learned")
    assert any(name.startswith(("rows", "columns")) for name in model.state_dict()) == (positions != "rotary")
    if model.rows is not None and model.columns is not None and learned is not None:
        for t in range(6):
            assert torch.equal(learned[t], model.rows.weight[t // 3] + model.columns.weight[t % 3])


def test_a_start_that_is_turned_to_zero_has_the_logit_0() -> None:
    """Only its query and key are lost: all later positions still read its value, which holds the class."""
    model = gpt(LARGE, CLASSES, positions="rotary", start_rotation="zero", qk_norm=False)
    _, turns = model.position_tables((LARGE.h, LARGE.w), torch.device("cpu"))
    _, left = gpt(LARGE, positions="rotary").position_tables((LARGE.h, LARGE.w), torch.device("cpu"))
    assert turns is not None
    assert left is not None
    assert not turns[0].any()
    assert torch.equal(turns[1:], left[1:])
    ((_, *_), attention, _), _ = model.layers[0].layers  # type: ignore[misc]
    codes = torch.randint(V, (1, LARGE.h, LARGE.w, 1), generator=torch.Generator().manual_seed(1))
    before = [model(codes, labels_of(label)) for label in (0, 1)]
    attention.to_q.weight.mul_(3.0)
    after = [model(codes, labels_of(label)) for label in (0, 1)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, 0], other[:, 0]), "the start attends to itself alone"
        assert not torch.allclose(one[:, 2:], other[:, 2:], atol=1e-4)
    assert ((before[0] - before[1]).abs().amax(dim=-1) > 1e-4).all()


def test_the_base_sets_the_slowest_turn() -> None:
    """Pair i of n turns by base^(-i / n) per row or column (RoPE, equation 15)."""
    for base in (100.0, 10_000.0):
        model = gpt(LARGE, width=32, heads=2, rotary_base=base)
        steps = angles_of(model).chunk(2, dim=1)[0][place(1, 0)]
        assert torch.allclose(steps, torch.tensor([base ** (-i / 4) for i in range(4)]))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_changes_neither_loss_nor_gradients(dropout: float) -> None:
    """The backward pass computes each layer a second time, with the same dropout, and nothing else is different."""
    codes, labels = codes_of(), labels_of(0, 1, 2)
    found = []
    for checkpoint in (False, True):
        model = gpt(SHAPE, CLASSES, dropout=dropout, checkpoint=checkpoint).train().requires_grad_(True)
        calls = [0] * len(model.layers)
        for index, each in enumerate(model.layers):
            each.register_forward_pre_hook(partial(count, calls, index))
        torch.manual_seed(7)
        loss = token_loss(model(codes, labels), codes)
        loss.backward()  # type: ignore[no-untyped-call]
        assert calls == [1 + checkpoint] * len(model.layers)
        calls[:] = [0] * len(calls)
        model.eval()(codes, labels)
        assert calls == [1] * len(calls)
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    (loss, gradients), (again, recomputed) = found
    assert torch.equal(loss, again)
    for one, other in zip(gradients, recomputed, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_loss_counts_every_token() -> None:
    """Trap 28: the first token is scored like all others (x-transformers' own wrapper never scores it)."""
    logits = torch.randn(B, L, V).requires_grad_()
    codes = codes_of()
    token_loss(logits, codes).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    wanted = torch.zeros(B, L, V)
    for t in range(L):  # d loss / d logits = (softmax - one-hot) / number of tokens
        for b in range(B):
            wanted[b, t] = logits[b, t].detach().softmax(-1)
            wanted[b, t, codes[at(codes, t)][b]] -= 1
    assert torch.allclose(logits.grad, wanted / (B * L), atol=1e-7)


def test_uniform_logits_cost_ln_v() -> None:
    """Trap 28: a prior that knows nothing pays exactly ln V nats for each of the L tokens."""
    model = gpt(SHAPE, CLASSES)
    for output in model.head.get_submodule("outputs").parameters():
        output.zero_()
    assert float(token_loss(model(codes_of(), labels_of(0, 1, 2)), codes_of())) == pytest.approx(math.log(V), abs=1e-6)


def test_eval_has_no_dropout() -> None:
    """Trap 25: samples and validation come from the whole network; only training drops parts of it, as was asked."""
    codes, labels = codes_of(), labels_of(0, 1, 2)
    model = gpt(SHAPE, CLASSES, dropout=0.5)
    assert torch.equal(model(codes, labels), model(codes, labels))
    assert torch.equal(model(codes, labels), gpt(SHAPE, CLASSES, dropout=0.0)(codes, labels))
    model.train()
    assert not torch.allclose(model(codes, labels), model(codes, labels))


@pytest.mark.parametrize("options", [{"width": 25, "heads": 2}, {"width": 12, "heads": 2}], ids=str)
def test_a_width_that_heads_do_not_divide_is_refused(options: dict[str, Any]) -> None:
    """Rotary positions turn pairs of channels along two axes, so a head's width is a multiple of four; the error has
    both figures."""
    with pytest.raises(ValueError, match=rf"width \({options['width']}\).*heads \(2\)"):
        GptConfig(**options)
