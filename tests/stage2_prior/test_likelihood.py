"""Likelihoods, and the bigram that a prior must beat: by hand, by Bayes, and by slow counting."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior import likelihood
from stage2_prior.likelihood import (
    bigram_bits,
    class_log_probabilities,
    image_nats,
    nats_by_class,
    nats_to_bits,
    token_loss,
    token_nats,
)
from stage2_prior.tokens import TokenSet
from tests.helpers.artefacts import MAKERS

SHAPE = TokenShape(2, 3, 2, 11)
V, L = SHAPE.V, SHAPE.length
KINDS = pytest.mark.parametrize("kind", MAKERS)


def codes_of(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, *SHAPE[:3]), generator=torch.Generator().manual_seed(seed))


def token_set(codes: Tensor, views: int = 1) -> TokenSet:
    """Codes (N, h, w, K) as view 0; other views hold the code 0 alone, which would be noticed."""
    every = torch.stack([codes] + [torch.zeros_like(codes)] * (views - 1), dim=1)
    return TokenSet(every.int(), torch.zeros(len(codes), dtype=torch.int32), ("a",))


def chain(transitions: Tensor, n: int, length: int, seed: int) -> Tensor:
    """Codes (n, length) of a Markov chain that starts at an even chance of every code."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(len(transitions), (n,), generator=generator)]
    while len(steps) < length:
        steps.append(torch.multinomial(transitions[steps[-1]], 1, generator=generator)[:, 0])
    return torch.stack(steps, dim=1)


def entropy(probabilities: Tensor) -> float:
    return float(-(probabilities * probabilities.clamp_min(1e-300).log2()).sum())


@KINDS
def test_the_nats_of_a_picture_are_the_sum_over_its_codes(kind: str) -> None:
    """Trap 28: of all codes, the first included, each read at its own row-major place."""
    model, codes, labels = MAKERS[kind](SHAPE), codes_of(4), torch.tensor([0, 1, 2, 0])
    logits, found = model(codes, labels).double(), image_nats(model, codes, labels)
    assert found.dtype == torch.float64
    for b in range(4):
        total = 0.0
        for t in range(L):
            code = codes[b, t // (SHAPE.w * SHAPE.K), t // SHAPE.K % SHAPE.w, t % SHAPE.K]
            total -= math.log(float(logits[b, t, code].exp() / logits[b, t].exp().sum()))
        assert float(found[b]) == pytest.approx(total, rel=1e-6)
    assert float(token_loss(logits, codes)) * L == pytest.approx(float(found.mean()), rel=1e-5)


def test_uniform_logits_cost_ln_v() -> None:
    """Traps 28 and 35: a prior that knows nothing pays ln V nats, log2 V bits, for each code."""
    nats = token_nats(torch.full((3, L, V), 7.0), codes_of(3))
    assert nats.shape == (3, L)
    assert torch.allclose(nats, torch.full((3, L), math.log(V)))
    assert nats_to_bits(float(nats.mean())) == pytest.approx(math.log2(V), abs=1e-6)


def test_nats_are_counted_in_float32() -> None:
    """Under autocast logits come in bfloat16, whose three digits are not enough to compare two priors."""
    logits = torch.randn(3, L, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert token_nats(logits, codes_of(3)).dtype == torch.float32
    assert torch.equal(token_nats(logits, codes_of(3)), token_nats(logits.float(), codes_of(3)))


@KINDS
def test_every_class_is_scored(kind: str) -> None:
    """Columns are labels in their order, and "no class" is none of them."""
    model, codes = MAKERS[kind](SHAPE, 3), codes_of(4)
    found = nats_by_class(model, codes)
    assert found.shape == (4, 3)
    for label in range(3):
        assert torch.allclose(found[:, label], image_nats(model, codes, torch.full((4,), label)))
    assert not torch.isclose(found[:, :1], found[:, 1:]).any()


def test_class_probabilities_are_bayes() -> None:
    """p(c | codes) = p(codes | c) / sum of them, also where the likelihoods themselves are too small for a float."""
    nats = torch.tensor([[1.0, 2.0, 0.5], [3.0, 3.0, 3.0]], dtype=torch.float64)
    likelihood = (-nats).exp()
    wanted = likelihood / likelihood.sum(dim=1, keepdim=True)
    assert torch.allclose(class_log_probabilities(nats).exp(), wanted)
    assert torch.allclose(class_log_probabilities(nats + 5_000).exp(), wanted)


def slow_bigram(train: Tensor, validation: Tensor, size: int) -> float:
    """The formula of the docstring with dictionaries, a symbol being (depth, code) and None the start."""
    K = train.shape[-1]

    def pairs(codes: Tensor) -> list[tuple[tuple[int, int] | None, tuple[int, int]]]:
        found: list[tuple[tuple[int, int] | None, tuple[int, int]]] = []
        for image in codes.flatten(1).tolist():
            before = None
            for t, code in enumerate(image):
                found.append((before, (t % K, code)))
                before = (t % K, code)
        return found

    shown = pairs(train)
    together, follows, singles = Counter(shown), Counter(a for a, _ in shown), Counter(b for _, b in shown)
    tokens = len(shown) / K  # of each depth
    best = math.inf
    for power in range(9):
        total, alpha = 0.0, 4.0**power
        for a, b in pairs(validation):
            single = (singles[b] + 0.5) / (tokens + 0.5 * size)
            total -= math.log2((together[a, b] + alpha * single) / (follows[a] + alpha))
        best = min(best, total / len(pairs(validation)))
    return best


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("size", [4, 40])
def test_the_bigram_is_that_of_slow_counting(K: int, size: int) -> None:
    """The smoothing, the start symbol, the depths and the choice of alpha, on seen pairs and on unseen ones."""
    codes = torch.randint(size, (40, 2, 3, K), generator=torch.Generator().manual_seed(0))
    codes = torch.where(torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < 0.5, codes, codes % 3)
    train, validation = codes[:25], codes[25:]
    found = bigram_bits(token_set(train, views=3), token_set(validation, views=2), size)
    assert found == pytest.approx(slow_bigram(train, validation, size), abs=1e-9)


def test_a_markov_chain_costs_its_conditional_entropy() -> None:
    """A bigram is the true model of such a source, so it must find its entropy, which no unigram does."""
    transitions = torch.full((5, 5), 0.05) + 0.75 * torch.eye(5).roll(1, dims=1)  # doubly stochastic
    codes = chain(transitions, 1_200, 24, seed=0).view(-1, 4, 6, 1)
    found = bigram_bits(token_set(codes[:1_000]), token_set(codes[1_000:]), 5)
    wanted = (math.log2(5) + 23 * entropy(transitions[0])) / 24  # the first code is uniform
    assert found == pytest.approx(wanted, abs=0.05)
    assert found < math.log2(5) - 0.5


def test_an_independent_source_costs_its_entropy() -> None:
    """Pairs say nothing there, and the smoothing must not pay for counting them."""
    probabilities = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    draws = torch.multinomial(probabilities, 30_000, replacement=True, generator=torch.Generator().manual_seed(0))
    codes = draws.view(-1, 4, 6, 1)
    found = bigram_bits(token_set(codes[:1_000]), token_set(codes[1_000:]), 5)
    frequencies = torch.bincount(codes[1_000:].flatten(), minlength=5) / codes[1_000:].numel()
    assert found == pytest.approx(float(-(frequencies * probabilities.log2()).sum()), abs=0.01)


def test_depths_are_sources_of_their_own() -> None:
    """Residual codes: the second is told by the first, and its numbers mean nothing at the first's depth."""
    first = torch.randint(6, (1_000, 2, 3), generator=torch.Generator().manual_seed(0))
    codes = torch.stack([first, (first + 1) % 6], dim=-1)
    found = bigram_bits(token_set(codes[:800]), token_set(codes[800:]), 6)
    assert found == pytest.approx(math.log2(6) / 2, abs=0.03)


def test_unseen_codes_are_finite() -> None:
    """A code that training never used is unlikely, not impossible: an infinite baseline would be beaten by anything."""
    train, validation = torch.zeros(5, 2, 3, 2, dtype=torch.int64), torch.full((4, 2, 3, 2), 99)
    found = bigram_bits(token_set(train), token_set(validation), 100)
    assert math.log2(100) - 1 < found < 20
    assert bigram_bits(token_set(train), token_set(train), 100) < 1.5


def test_a_large_set_is_counted_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third image, from all over the set: its beginning may be one class alone."""
    codes = torch.randint(5, (31, 2, 3, 1), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(likelihood, "MOST_TOKENS", 60)
    found = bigram_bits(token_set(codes), token_set(codes), 5)
    assert found == pytest.approx(slow_bigram(codes[::3], codes, 5), abs=1e-9)
