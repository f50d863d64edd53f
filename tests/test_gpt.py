"""The GPT: what a position may see, what it may say, and that decoding with a cache says the same."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.gpt import Gpt, GptConfig
from stage2_prior.prior import generate
from tests.artefacts import gpt
from tests.commands import names_of

SHAPE = TokenShape(2, 3, 2, 11)  # not square, and two codes at each position
B, L, V, CLASSES = 3, SHAPE.length, SHAPE.V, 2
POSITIONS = ["rotary", "learned", "both"]


def codes_of(seed: int = 1, batch: int = B) -> Tensor:
    return torch.randint(V, (batch, *SHAPE[:3]), generator=torch.Generator().manual_seed(seed))


def labels_of(*labels: int) -> Tensor:
    return torch.tensor(labels)


def at(codes: Tensor, t: int) -> tuple[slice, int, int, int]:
    """The place of the sequence's token t in codes (B, h, w, K), counted by hand: rows, then columns, then depth."""
    return slice(None), t // (SHAPE.w * SHAPE.K), t // SHAPE.K % SHAPE.w, t % SHAPE.K


def decoded_logits(model: Gpt, codes: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, L, V) by decoding step by step with the cache, fed with these codes."""
    decoding = model.begin(labels)
    steps = []
    for t in range(L):
        steps.append(decoding.logits())
        decoding.append(codes[at(codes, t)])
    return torch.stack(steps, dim=1)


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


def test_start_tokens_are_no_codes() -> None:
    """Trap 27: what a code's embedding is does not matter to the first position, so no start id is a code's id."""
    model, codes, labels = gpt(SHAPE, CLASSES), codes_of(), labels_of(0, 1, 2)
    before = model(codes, labels)
    embedding = model.transformer.token_emb.emb.weight
    embedding[:V] += torch.randn_like(embedding[:V])
    after = model(codes, labels)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.isclose(after[:, 1:], before[:, 1:]).all(dim=-1).any()


@pytest.mark.parametrize("seed", range(3))
def test_only_codes_are_ever_sampled(seed: int) -> None:
    """Trap 27: there are V logits, so even wild weights, which love the start tokens, cannot sample one of them."""
    model = gpt(SHAPE, CLASSES, seed)
    model.transformer.token_emb.emb.weight[V:] *= 1e3
    model.transformer.to_logits.weight *= 1e3
    labels = labels_of(0, 1, 2)
    assert model(codes_of(), labels).shape == (B, L, V)
    assert model.begin(labels).logits().shape == (B, V)
    codes = generate(model, labels, torch.rand(B, L))
    assert codes.shape == (B, *SHAPE[:3])
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < V


def test_the_loss_counts_every_token() -> None:
    """Trap 28: the first token is scored like all others (x-transformers' own wrapper never scores it)."""
    token_loss = names_of("stage2_prior/train.py")["token_loss"]
    logits = torch.randn(B, L, V).requires_grad_()
    codes = codes_of()
    token_loss(logits, codes).backward()
    assert logits.grad is not None
    wanted = torch.zeros(B, L, V)
    for t in range(L):  # d loss / d logits = (softmax - one-hot) / number of tokens
        for b in range(B):
            wanted[b, t] = logits[b, t].detach().softmax(-1)
            wanted[b, t, codes[at(codes, t)][b]] -= 1
    assert torch.allclose(logits.grad, wanted / (B * L), atol=1e-7)


def test_uniform_logits_cost_ln_v() -> None:
    """Trap 28: a prior that knows nothing pays exactly ln V nats for each of the L tokens."""
    token_loss = names_of("stage2_prior/train.py")["token_loss"]
    model = gpt(SHAPE, CLASSES)
    model.transformer.to_logits.weight.zero_()
    assert float(token_loss(model(codes_of(), labels_of(0, 1, 2)), codes_of())) == pytest.approx(math.log(V), abs=1e-6)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_cache_changes_no_logits(positions: str) -> None:
    """Trap 30: decoding with the cache gives the training-time logits at each position, also for a guidance pair."""
    model, codes = gpt(SHAPE, CLASSES, positions=positions), codes_of(batch=2)
    labels = labels_of(0, 1)
    pair = torch.cat([codes, codes]), torch.cat([labels, torch.full_like(labels, model.null_label)])
    for given in ((codes, labels), pair):
        wanted = model(*given)
        assert wanted.std() > 0.5, "the logits must be such that an error would show"
        assert torch.allclose(decoded_logits(model, *given), wanted, rtol=1e-5, atol=1e-5)


def test_generated_codes_are_in_row_major_order() -> None:
    """Trap 37: the t-th token that is chosen lands at row-major place t of the grid, as `forward` reads it."""
    noise = ((torch.arange(L) + 0.5) / V)[None].expand(B, L).double()  # token t has the noise of code t
    shape = TokenShape(SHAPE.h, SHAPE.w, SHAPE.K, L)
    codes = generate(gpt(shape, CLASSES), labels_of(0, 1, 2), noise, choose=lambda _, noise: (noise * V).long())
    assert torch.equal(codes, rearrange(torch.arange(L), "(h w K) -> 1 h w K", h=SHAPE.h, w=SHAPE.w).expand_as(codes))
    for t in range(L):
        assert (codes[at(codes, t)] == t).all()


def test_generation_follows_what_was_chosen() -> None:
    """Trap 30: the logits given to `choose` are those of `forward` for the codes that it has chosen so far."""
    model, labels, seen = gpt(SHAPE, CLASSES), labels_of(0, 1, 2), []

    def greedy(logits: Tensor, _: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(dim=-1)

    codes = generate(model, labels, torch.zeros(B, L), greedy)
    assert torch.allclose(torch.stack(seen, dim=1), model(codes, labels), rtol=1e-5, atol=1e-5)


def test_eval_has_no_dropout() -> None:
    """Trap 25: samples and validation come from the whole network; only training drops parts of it, as was asked."""
    codes, labels = codes_of(), labels_of(0, 1, 2)
    model = gpt(SHAPE, CLASSES, dropout=0.5)
    assert torch.equal(model(codes, labels), model(codes, labels))
    assert torch.equal(model(codes, labels), gpt(SHAPE, CLASSES, dropout=0.0)(codes, labels))
    model.train()
    assert not torch.allclose(model(codes, labels), model(codes, labels))


@pytest.mark.parametrize("options", [{"width": 25, "heads": 2}, {"width": 6, "heads": 2}], ids=str)
def test_a_width_that_heads_do_not_divide_is_refused(options: dict[str, Any]) -> None:
    """Rotary positions turn pairs of channels, so each head needs an even number; the error has both figures."""
    with pytest.raises(ValueError, match=rf"width \({options['width']}\).*heads \(2\)"):
        GptConfig(**options)
