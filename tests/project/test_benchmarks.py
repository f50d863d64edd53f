"""The benchmarks run, and compare only ways with equal results. Nothing is timed here."""

import json
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks import gpt_decoding
from benchmarks.measure import Floors, Seconds
from benchmarks.memory import CLEAR, peak_of
from benchmarks.peers import Size
from benchmarks.run import NAMES, benchmark, main, table
from stage2_prior.fast_linear import Precision

WRITTEN = [name for name in NAMES if find_spec(f"benchmarks.{name}")]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of a small run of the benchmark of that name, once for all tests."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    main([name, "--small", "--cpu", "--out", str(folder)])
    return {"name": name, **json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))}


@pytest.mark.slow
@pytest.mark.parametrize("results", WRITTEN, indirect=True)
def test_runs_small(results: dict[str, Any]) -> None:
    assert results["machine"]["threads"] >= 1
    assert results["floors"]["float32_gflops"] > 0
    assert results["took_s"] >= 0
    assert "|---" in benchmark(results["name"]).table(results)


@pytest.mark.slow
@pytest.mark.parametrize("results", ["gpt_decoding", "prior_training"], indirect=True)
def test_a_second_size_has_a_table(results: dict[str, Any]) -> None:
    name = results["name"]
    one = table(name, results)
    assert table(name, results | {"second": results}) == f"{one}\n\n{one}"


@pytest.mark.slow
@pytest.mark.parametrize("results", ["gpt_decoding", "pixelcnn", "quantizer"], indirect=True)
def test_only_equal_ways_are_timed(results: dict[str, Any]) -> None:
    assert results["equal"] is True
    assert results["rows"]


@pytest.mark.parametrize("name", list(gpt_decoding.PEERS))
def test_peers_choose_the_same_with_and_without_cache(name: str) -> None:
    if name.startswith("GPT-2"):
        pytest.importorskip("transformers")
    assert gpt_decoding.cache_changes_nothing(name, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [gpt_decoding.OURS, *gpt_decoding.PEERS])
def test_every_way_samples_codes_in_both_precisions(name: str, precision: Precision) -> None:
    if name.startswith("GPT-2"):
        pytest.importorskip("transformers")
    run = gpt_decoding.build(gpt_decoding.Way(name, precision), gpt_decoding.SMALL, torch.device("cpu"))
    for tokens in (3, gpt_decoding.SMALL.tokens):
        ids = run(torch.tensor([0, 7, 9]), tokens).flatten(1)
        assert ids.shape == (3, tokens)
        assert ids.min() >= 0
        assert ids.max() < gpt_decoding.SMALL.vocabulary + gpt_decoding.SMALL.classes


def test_peers_have_as_many_weights_as_ours() -> None:
    size, device = Size(layers=2, width=192, heads=4, vocabulary=16), torch.device("cpu")
    counts = {}
    for name, build in gpt_decoding.PEERS.items():
        if not name.startswith("GPT-2") or find_spec("transformers"):
            counts[name] = matrices(build(size))
    counts["ours"] = matrices(gpt_decoding.our_prior(size, device))
    assert max(counts.values()) < 1.02 * min(counts.values()), counts


def matrices(model: torch.nn.Module) -> int:
    """Count the weights of the matrices that every token is multiplied with."""
    gpt2 = "Conv1D"  # a linear layer under another name
    found = {
        each.weight for each in model.modules() if isinstance(each, torch.nn.Linear) or type(each).__name__ == gpt2
    }
    return sum(cast(Tensor, weight).numel() for weight in found)


def test_floor_of_decoding_is_its_slower_part() -> None:
    size = Size(layers=1, width=64, heads=4, side=2, vocabulary=64)
    weights = size.matrix_weights
    slow_memory = Floors(float32=1e18, bfloat16=None, memory=1.0)
    kept = 2 * 1 * 64 * 2.5 * 4  # bytes of keys and values at the mean of 1..4 positions
    assert gpt_decoding.floor_s(size, 1, slow_memory, "float32") == pytest.approx(4 * (4 * weights + kept))
    slow_products = Floors(float32=1.0, bfloat16=None, memory=1e18)
    assert gpt_decoding.floor_s(size, 3, slow_products, "float32") == pytest.approx(4 * 3 * 2 * weights)


def test_spread_is_half_the_quartiles_range() -> None:
    times = Seconds([1.0, 2.0, 3.0, 4.0, 100.0])
    assert times.median == 3.0
    assert times.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)


def ones(mebibytes: int) -> Tensor:
    return torch.ones(mebibytes << 18)


def prepare_ones(mebibytes: int) -> "Ones":
    ones(1)
    return Ones(mebibytes)


class Ones:
    def __init__(self, mebibytes: int) -> None:
        self.mebibytes = mebibytes

    def __call__(self) -> Tensor:
        return ones(self.mebibytes)


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="the system does not report peak memory")
def test_peak_is_what_a_call_takes() -> None:
    peak = peak_of(torch.device("cpu"), prepare_ones, 64)
    assert peak == pytest.approx(64, abs=8)
