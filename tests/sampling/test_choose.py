"""From logits to a token: each filter against a slow reference, and at the edges where filters go wrong."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sampling.choose import ChooseConfig, Filter, choose, keep_min_p, keep_top_k, keep_top_p
from sampling.option_facts import facts_of_kind
from tests.helpers.artefacts import noise_of

B, V = 5, 12
EDGES = [0.0, 1e-300, 0.25, 0.5, 0.75, math.nextafter(1.0, 0.0)]


def logits_of(seed: int = 0, batch: int = B, spread: float = 3.0) -> Tensor:
    return torch.randn(batch, V, generator=torch.Generator().manual_seed(seed)) * spread


def reference(logits: list[float], config: ChooseConfig) -> list[float]:
    """Probabilities after temperature, top-k, top-p and min-p, in plain numbers; for logits without ties."""
    scaled = [value / config.temperature for value in logits]
    ranked = sorted(range(len(scaled)), key=lambda token: -scaled[token])[: config.top_k]
    weights = {token: math.exp(scaled[token] - scaled[ranked[0]]) for token in ranked}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    mass = 0.0
    for token in ranked:
        if kept and mass >= config.top_p:
            break
        kept[token] = weights[token] / total
        mass += kept[token]
    kept = {token: share for token, share in kept.items() if share >= config.min_p * kept[ranked[0]]}
    mass = sum(kept.values())
    return [kept.get(token, 0.0) / mass for token in range(len(logits))]


def chosen_share(logits: Tensor, config: ChooseConfig, n: int = 5_000) -> Tensor:
    """The distribution (V,) of what is chosen from one row of logits: evenly spread noise, which has no luck."""
    noise = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = choose(logits.expand(n, -1), noise, 0.0, config)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, V + 3])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_the_filters_are_those_of_the_reference(
    temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    """Traps 29 and 33: temperature, top-k, top-p of what that left, min-p; any other order draws otherwise."""
    config = ChooseConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for row in logits_of():
        wanted = torch.tensor(reference(row.tolist(), config))
        share = chosen_share(row, config)
        assert ((share > 0) <= (wanted > 0)).all()
        assert torch.allclose(share, wanted, atol=5e-4)


def test_the_order_of_the_filters_shows() -> None:
    """Trap 29: the logits of the test above tell the orders apart, or it would prove nothing."""
    wrong = 0
    for row in logits_of():
        hot = reference(row.tolist(), ChooseConfig(temperature=2.0, top_p=0.9))
        cold = reference(row.tolist(), ChooseConfig(top_p=0.9))
        wrong += sum(p > 0 for p in hot) != sum(p > 0 for p in cold)
        both = reference(row.tolist(), ChooseConfig(top_k=5, top_p=0.9))
        wrong += sum(p > 0 for p in both) != min(5, sum(p > 0 for p in cold))
    assert wrong > B


def kept_by(probabilities: list[float], **options: Any) -> set[int]:
    """The codes that can be chosen from these probabilities."""
    share = chosen_share(torch.tensor(probabilities, dtype=torch.float64).log(), ChooseConfig(**options))
    return set(share.nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("probabilities", "options", "wanted"),
    [
        # Top-p of the five likeliest alone needs two of them; of all ten codes it would need four.
        pytest.param([0.3, 0.2, 0.1, 0.1, 0.05] + [0.05] * 5, {"top_k": 5, "top_p": 0.65}, {0, 1}, id="k then p"),
        # At temperature 2 these are 4:2:1:1, so 0.2 of the largest is below all; at 1, 16:4:1:1, it would drop two.
        pytest.param(
            [16 / 22, 4 / 22, 1 / 22, 1 / 22], {"temperature": 2, "min_p": 0.2}, {0, 1, 2, 3}, id="t then min"
        ),
        pytest.param([16 / 22, 4 / 22, 1 / 22, 1 / 22], {"temperature": 2, "top_p": 0.7}, {0, 1}, id="t then p"),
        # Top-p sees all four: 0.4 + 0.3 < 0.75, so three. After min-p, renormalised, 0.4 + 0.3 of 0.9 would do.
        pytest.param([0.4, 0.3, 0.2, 0.1], {"top_p": 0.75, "min_p": 0.4}, {0, 1, 2}, id="p then min"),
    ],
)
def test_the_order_where_another_would_keep_other_codes(
    probabilities: list[float], options: dict[str, Any], wanted: set[int]
) -> None:
    """Traps 29 and 33: by hand, sets that come out of the documented order alone."""
    assert kept_by(probabilities, **options) == wanted


def test_nothing_is_filtered_by_default() -> None:
    """Trap 29: x-transformers keeps the top tenth of the vocabulary unasked; here the histogram is the softmax's."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    n = 50_000
    counts = torch.bincount(choose(logits.expand(n, -1), noise_of(n, 1)[:, 0], 0.0, ChooseConfig()), minlength=40)
    expected = logits[0].double().softmax(-1) * n
    assert expected.min() > 20, "chi-square wants more than a few expected in each cell"
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 85, "39 degrees of freedom: more than 85 happens once in 30,000 times"


@pytest.mark.parametrize("k", [1, 2, 5, V - 1, V, V + 1, 10**9])
def test_top_k_keeps_exactly_k_among_ties(k: int) -> None:
    """Trap 33: a threshold at the k-th value would keep every tied token; a k beyond V is no filter and no error."""
    logits = torch.tensor(
        [[1.0] * V, [3.0, 1.0] * (V // 2), [float(i // 4) for i in range(V)], [float("-inf")] * 6 + [0.0] * 6]
    )
    kept = keep_top_k(logits, k)
    finite = logits.isfinite()
    assert torch.equal(kept.isfinite().sum(-1), finite.sum(-1).clamp_max(k))
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])
    dropped = torch.where(kept.isfinite(), float("-inf"), logits).amax(-1)
    assert (torch.where(kept.isfinite(), logits, float("inf")).amin(-1) >= dropped).all(), "a likelier one was dropped"


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 0.5, 0.7, 0.95, 0.999999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float) -> None:
    """Trap 33: one token fewer would not reach p, one more is not needed, and at least one is always left."""
    probabilities = logits_of(seed=4, batch=50).softmax(-1)
    kept = keep_top_p(probabilities, p)
    for before, after in zip(probabilities.double().tolist(), kept.double().tolist(), strict=True):
        held = sorted((value for value in after if value > 0), reverse=True)
        assert held, "no token is left"
        assert held == sorted(before, reverse=True)[: len(held)], "not the likeliest ones, or not as they were"
        assert sum(held) >= p - 1e-6
        assert sum(held[:-1]) < p + 1e-6 or len(held) == 1


@pytest.mark.parametrize("p", [0.0, 0.2, 0.25, 0.5])
def test_top_p_among_ties(p: float) -> None:
    """Trap 33: of equally likely tokens as many stay as p needs, neither all nor none; which sums are exact here."""
    kept = keep_top_p(torch.full((2, 8), 0.125), p)
    assert torch.equal((kept > 0).sum(-1), torch.full((2,), max(1, math.ceil(p * 8))))


@pytest.mark.parametrize("p", [0.0, 1e-300, 0.1, 0.5, 0.9, 1.0])
def test_min_p_keeps_exactly_what_reaches_p_times_the_largest(p: float) -> None:
    """Trap 33: of float32 and float64 rows; 0 is no filter, ties with the limit stay, 1 leaves the maxima."""
    rows = torch.cat([logits_of(seed=5, batch=20).softmax(-1), torch.tensor([[0.2, 0.1, 0.02, 0.18] * 3])]).double()
    for probabilities in (rows, rows.float()):
        kept = keep_min_p(probabilities, p)
        for before, after in zip(probabilities.tolist(), kept.tolist(), strict=True):
            assert after[before.index(max(before))] == max(before)
            for old, new in zip(before, after, strict=True):
                assert new in {0.0, old}
                assert (new == old) == (old >= p * max(before) - 1e-9) or abs(old - p * max(before)) < 1e-7


@pytest.mark.parametrize(("p", "left"), [(0.5, 4), (0.25, 8), (math.nextafter(0.5, 1.0), 2), (1.0, 2), (0.125, 12)])
def test_min_p_among_ties(p: float, left: int) -> None:
    """Trap 33: codes just at the limit all stay, unlike top-k's; 1 keeps all the likeliest; these ratios are exact."""
    probabilities = torch.tensor([[4.0] * 2 + [2.0] * 2 + [1.0] * 4 + [0.5] * 4]).double() / 18
    assert int((keep_min_p(probabilities, p) > 0).sum()) == left
    assert kept_by([4 / 18] * 2 + [2 / 18] * 2, min_p=1) == {0, 1}


ADVERSARIAL = torch.tensor(
    [
        [0.0] * V,
        [100.0] + [0.0] * (V - 1),
        [float("-inf")] * (V - 1) + [0.0],
        [float("-inf")] * 6 + [1.0] * 6,
        [-1e38] * V,
        [3e38, 2.9e38] + [-3e38] * (V - 2),
    ]
)


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("top_p", [0.0, 1e-300, 0.5, 1.0])
def test_one_code_always_remains(temperature: float, top_k: int | None, top_p: float) -> None:
    """Trap 33: in no combination is a row left empty, nor a code chosen that was filtered or had probability 0."""
    for min_p in (0.0, 1e-300, 0.5, 1.0):
        config = ChooseConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for noise in EDGES:
            codes = choose(ADVERSARIAL, torch.full((len(ADVERSARIAL),), noise, dtype=torch.float64), 0.0, config)
            assert ADVERSARIAL.gather(1, codes[:, None]).isfinite().all()
            assert codes[1] == 0 or temperature == 1e9
            assert codes[2] == V - 1
            if top_p <= 1e-300 or top_k == 1:  # filters that keep just one, the first among equals
                assert codes.tolist() == ADVERSARIAL.argmax(-1).tolist()


@pytest.mark.parametrize("noise", EDGES)
@pytest.mark.parametrize(
    "config",
    [
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"top_p": 1e-300},
        {"top_k": 1},
        {"temperature": 0.0},
        {"temperature": 1e-4},
        {"temperature": 1e-40},
    ],
    ids=str,
)
def test_all_narrow_settings_take_the_likeliest(config: dict[str, Any], noise: float) -> None:
    """Trap 33: p = 0, k = 1 and a temperature near 0 are greedy and never leave a row empty, NaN or overflown."""
    logits = torch.cat([logits_of(), logits_of(seed=1) * 1e30, torch.tensor([[float("-inf")] * (V - 1) + [-1e38]])])
    tokens = choose(logits, torch.full((len(logits),), noise, dtype=torch.float64), 0.0, ChooseConfig(**config))
    assert torch.equal(tokens, logits.argmax(-1))


def test_the_tiniest_temperature_takes_the_likeliest() -> None:
    """Trap 33: 1e-300 is a legal temperature, and it is not a float32; no temperature may give a row of NaN."""
    tokens = choose(logits_of(), torch.full((B,), 0.5), 0.0, ChooseConfig(temperature=1e-300))
    assert torch.equal(tokens, logits_of().argmax(-1))


def test_a_huge_temperature_is_uniform() -> None:
    """Trap 33: at the other end all tokens become equally likely, and those of probability 0 stay out."""
    row = torch.cat([logits_of()[0], torch.tensor([float("-inf")])])
    share = chosen_share(row, ChooseConfig(temperature=1e30))
    assert torch.allclose(share, torch.tensor([1 / V] * V + [0.0]), atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "temperature_end": 0.2},
    ],
    ids=str,
)
def test_the_logits_are_not_edited(config: dict[str, Any]) -> None:
    """Trap 33: the caller mixes or logs its logits afterwards; a filter in place would have spoilt them."""
    logits, noise = logits_of(), noise_of(B, 1)[:, 0]
    before = logits.clone(), noise.clone()
    choose(logits, noise, 0.5, ChooseConfig(**config))
    assert torch.equal(logits, before[0])
    assert torch.equal(noise, before[1])
    keep_top_k(logits, 2)
    assert torch.equal(logits, before[0])
    probabilities = logits.softmax(-1)
    keep_top_p(probabilities, 0.1)
    keep_min_p(probabilities, 0.9)
    assert torch.equal(probabilities, logits.softmax(-1))


def test_a_row_is_chosen_by_itself() -> None:
    """Trap 36: what else is in the batch does not matter to a row."""
    config = ChooseConfig(temperature=0.8, temperature_end=1.5, top_k=6, top_p=0.9, min_p=0.01)
    logits, noise = logits_of(batch=64), noise_of(64, 1)[:, 0]
    together = choose(logits, noise, 0.5, config)
    alone = torch.cat([choose(logits[i : i + 1], noise[i : i + 1], 0.5, config) for i in range(64)])
    assert torch.equal(together, alone)
    assert len(Counter(together.tolist())) > 3


@pytest.mark.parametrize(
    "bad",
    [
        {"top_k": -1},
        {"temperature": -0.1},
        {"temperature_end": -0.1},
        {"temperature_schedule": "step"},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 1.1},
        {"min_p": -0.1},
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(bad: dict[str, Any]) -> None:
    """Trap 33: k = 0 would leave nothing to draw from, so the config does not take it."""
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ChooseConfig(**bad)


STRICTEST: dict[str, float] = {"top_k": 1, "top_p": 1e-12, "min_p": 1.0}
"""The value of each filter that leaves fewest codes."""


@pytest.mark.parametrize("name", facts_of_kind(ChooseConfig, Filter))
def test_a_filter_leaves_at_least_one_code(name: str) -> None:
    """Of every row, also of one with equal logits and of one that another filter has cut: a row without codes would
    silently draw the last one."""
    logits = torch.stack([torch.randn(9, generator=torch.Generator().manual_seed(0)), torch.zeros(9), torch.zeros(9)])
    logits[2, 1:] = -torch.inf
    chosen = choose(logits, torch.full((3,), 0.999), 0.0, ChooseConfig(**{"top_p": 1.0, name: STRICTEST[name]}))
    assert chosen[0] == logits[0].argmax()
    assert chosen[2] == 0
    assert logits.gather(1, chosen[:, None]).isfinite().all()
