"""Sampling from a GPT: `stage2_prior.generation.generate` against the `generate` of x-transformers, of Hugging Face's
GPT-2, and of a textbook GPT with a static cache, as gpt-fast and LlamaGen have it.

Each model has 12 layers of 512 with 8 heads, or in the second table 4 of 128 with 4 heads, and about the same number of
weights (feed-forward networks of two matrices 4 times as wide, or of three narrower ones). A sequence is a class, then
16x16 codes of 1,024 (8x8 of 256), drawn from the likeliest 100. All weights are random, nothing is compiled, and all
sequences are sampled to their end. Before anything is timed, our logits must equal those of a forward pass at every
position, and a peer's cache must not change its codes. Of a library's variants, only the fastest takes part in further
rounds and in the largest batch. Our ways run first and last in each round.

The floor of a step: its matrix products or the reading of its weights, whichever takes longer, plus the reading of keys
and values (half of them on average). Memory: the peak at the second batch size, including the weights.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Floors, Seconds, compare, measure_floors, seconds
from benchmarks.memory import peak_of
from benchmarks.peers import SECOND, Size
from benchmarks.peers.libraries import Gpt2, XTransformers, options_of_ours
from benchmarks.peers.static_cache import StaticCacheGpt
from benchmarks.record import Results
from sampling.choose import ChooseConfig, choose
from stage1_tokenizer.engine import processor
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.fast_linear import Precision
from stage2_prior.generation import generate
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.windows import Canvas

SMALL = Size(layers=2, width=64, heads=4, side=4, vocabulary=32, top_k=5)
BATCHES = {"cpu": {1: 100.0, 16: 260.0, 64: 480.0}, "cuda": {1: 0.0, 16: 0.0, 64: 0.0, 256: 0.0}}
"""Batch size -> seconds from the start until which further rounds may end, up to ROUNDS. On a GPU there is one round,
because peers take seconds in it, and ours are timed twice."""
ROUNDS = 5
OURS = "ours"
PEERS: dict[str, Callable[[Size], nn.Module]] = {
    "x-transformers": lambda size: XTransformers(size, {}),
    "x-transformers, flash": lambda size: XTransformers(size, {"attn_flash": True}),
    "x-transformers, options of ours": lambda size: XTransformers(
        size, {**options_of_ours(size), "attn_flash": torch.cuda.is_available()}
    ),
    "GPT-2 of transformers": lambda size: Gpt2(size, "dynamic"),
    "GPT-2 of transformers, static cache": lambda size: Gpt2(size, "static"),
    "textbook, static cache": StaticCacheGpt,
}
Run = Callable[[Tensor, int], Tensor]
"""Labels (B,), number of tokens -> codes with that many tokens for each label."""


@dataclass(frozen=True)
class Way:
    """A model with its `generate`, in one precision."""

    name: str
    precision: Precision

    @property
    def label(self) -> str:
        """Name and precision."""
        return f"{self.name}, {self.precision}"

    @property
    def group(self) -> tuple[str, Precision]:
        """Key of the variants of which only the fastest counts."""
        return self.name.split(",")[0], self.precision


def our_prior(size: Size, device: torch.device) -> Gpt:
    """Build our prior with random weights."""
    torch.manual_seed(0)
    config = GptConfig(layers=size.layers, width=size.width, heads=size.heads, feed_forward=size.gated)
    shape = TokenShape(size.side, size.side, 1, size.vocabulary)
    return Gpt(config, shape, size.classes).to(device).eval().requires_grad_(False)


def build(way: Way, size: Size, device: torch.device) -> Run:
    """Build a model with random weights, and return its `generate`."""
    torch.manual_seed(0)
    if way.name != OURS:
        model: Any = PEERS[way.name](size).to(device).eval().requires_grad_(False)
        if way.precision == "bfloat16":
            model.bfloat16()
        return partial(model.generate)
    prior = our_prior(size, device)
    prepared = cache(lambda: prior.prepare(way.precision))  # in the first call, whose extra time is reported
    pick = partial(choose, config=ChooseConfig(top_k=size.top_k))

    def run(labels: Tensor, tokens: int) -> Tensor:
        rows, columns = (tokens // size.side, size.side) if tokens >= size.side else (1, tokens)
        noise = torch.rand(len(labels), tokens, dtype=torch.float64).to(device)
        return generate(prior, labels, noise, pick, canvas=Canvas((rows, columns)), prepared=prepared())

    return run


def ways(device: torch.device) -> list[Way]:
    """Return the ways for this machine. On a GPU, whose time is limited, only the two peers that were fastest on an
    H200 at batch 1 (docs/performance.md has all of them)."""
    has_gpt2 = find_spec("transformers") is not None
    if not has_gpt2:
        print("GPT-2 is left out: `transformers` is not installed")
    peers = [name for name in PEERS if has_gpt2 or not name.startswith("GPT-2")]
    if device.type == "cuda":
        peers = ["x-transformers, flash", "textbook, static cache"]
    precisions: list[Precision] = ["float32"]
    if processor.takes_fast_path("bfloat16", device):
        precisions.append("bfloat16")
    quantized: list[Precision] = [] if device.type == "cuda" else ["int8"]
    ours = [Way(OURS, precision) for precision in [*precisions, *quantized]]
    return [*ours, *(Way(name, precision) for precision in precisions for name in peers)]


@torch.inference_mode()
def logits_apart(precision: Precision, size: Size, device: torch.device) -> dict[str, float]:
    """Compare the logits of step-by-step generation with those of one forward pass over the generated codes."""
    prior, labels, steps = our_prior(size, device), torch.arange(2, device=device), []

    def pick(logits: Tensor, noise: Tensor, progress: float) -> Tensor:
        steps.append(logits.clone())
        return choose(logits, noise, progress, ChooseConfig(top_k=size.top_k))

    noise = torch.rand(2, size.tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    codes = generate(prior, labels, noise, pick, prepared=prior.prepare(precision))
    found, wanted = torch.stack(steps, dim=1), prior(codes, labels)  # (2, tokens, V)
    return {
        "largest_difference": float((found - wanted).abs().max()),
        "deviation": float(wanted.std()),
        "relative": float((found - wanted).norm() / wanted.norm()),
        "same_likeliest": float((found.argmax(dim=-1) == wanted.argmax(dim=-1)).double().mean()),
    }


@torch.no_grad()
def cache_changes_nothing(name: str, device: torch.device) -> bool:
    """Return True if a small peer chooses the same codes with its cache and without."""
    torch.manual_seed(0)
    peer: Any = PEERS[name](SMALL).to(device).eval()
    for parameter in peer.parameters():
        if parameter.ndim == 2:
            parameter.mul_(3.0)  # so that codes depend on earlier codes
    labels = torch.arange(3, device=device)
    both = [peer.generate(labels, SMALL.tokens, greedy=True, cached=cached) for cached in (True, False)]
    return torch.equal(both[0], both[1])


def floor_s(size: Size, batch: int, floors: Floors, precision: Precision) -> float:
    """Return the least seconds for a batch of sequences; the module's docstring defines this floor."""
    width, rate = (2, floors.bfloat16) if precision == "bfloat16" else (4, floors.float32)
    products = floors.seconds(2.0 * size.matrix_weights * batch, width * size.matrix_weights, rate)
    kept = 2.0 * size.layers * size.width * batch * (size.tokens + 1) / 2 * width  # bytes of keys and values
    return size.tokens * (products + kept / floors.memory)


def in_process(way: Way, size: Size, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """Prepare a call for `peak_of`, after a tiny call that loads code and starts thread pools."""
    build(way, SMALL, device)(torch.zeros(1, dtype=torch.int64, device=device), SMALL.tokens)
    return lambda: build(way, size, device)(torch.zeros(batch, dtype=torch.int64, device=device), size.tokens)


def fastest(took: dict[Way, list[float]]) -> list[Way]:
    """Return the ways, but of a library's variants only the one that was fastest in the first round."""
    groups: dict[object, list[Way]] = {}
    for way in took:
        groups.setdefault(way.group, []).append(way)
    return [min(variants, key=lambda way: took[way][0]) for variants in groups.values()]


def rounds(
    runs: dict[Way, Run], entrants: list[Way], labels: Tensor, tokens: int, until: float
) -> dict[Way, list[float]]:
    """Time rounds while they end before `until`; after the first, only the fastest variants remain. Returns seconds."""
    took: dict[Way, list[float]] = {way: [] for way in entrants}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        ours = [way for way in entrants if way.name == OURS]
        for turn in (entrants, ours):
            calls = {way.label: partial(runs[way], labels, tokens) for way in turn}
            for way, one in zip(turn, compare(calls, repeats=1, warmups=0).values(), strict=True):
                took[way] += one.all
        entrants = fastest(took)
        now = time.perf_counter()
        if now + (now - began) > until:
            break
    return took


def _first_calls(run: Run, way: Way, labels: Tensor, tokens: int) -> list[float]:
    """Return the seconds of the first and the second call, with a few tokens.

    On a GPU our calls have all tokens, because our CUDA graph is made for one length.
    """
    few = tokens if labels.is_cuda and way.name == OURS else 4
    return [seconds(partial(run, labels, few)) for _ in range(2)]


def result_rows(
    size: Size, batch: int, took: dict[Way, list[float]], firsts: dict[Way, list[float]], floors: Floors
) -> list[dict[str, Any]]:
    """Return a row of results for each way."""
    best = {way: Seconds(taken).median for way, taken in took.items()}
    rows = []
    for way, taken in took.items():
        # No peer has int8, so int8 is compared with the fastest peer in any precision.
        rivals = [best[other] for other in took if other.name != OURS and way.precision in ("int8", other.precision)]
        own = None if way.precision == "int8" else best[way] / floor_s(size, batch, floors, way.precision)
        rows.append(
            {
                "way": way.name,
                "precision": way.precision,
                "batch": batch,
                **Seconds(taken).row(),
                "tokens_per_s": batch * size.tokens / best[way],
                "first_call_s": max(firsts[way][0] - firsts[way][1], 0.0),
                "times_best_peer": min(rivals) / best[way],
                "over_float32_floor": best[way] / floor_s(size, batch, floors, "float32"),
                "over_floor": own,
                "floors": floors.row(),
            }
        )
        print(f"batch {batch}: {way.label}: {rows[-1]['tokens_per_s']:,.0f} tokens/s (of {len(taken)})", flush=True)
    return rows


def measure(device: torch.device, small: bool) -> Results:
    """Return the results of both sizes; `small`: those of one tiny size."""
    if small:
        return measure_size(SMALL, {1: 0.0, 2: 0.0}, device, small)
    batches = BATCHES[device.type]
    return measure_size(Size(), batches, device, small) | {"second": measure_size(SECOND, batches, device, small)}


def measure_size(size: Size, batches: dict[int, float], device: torch.device, small: bool) -> Results:
    """Check the logits and caches, time all ways at each batch size (as in BATCHES), and return the results."""
    began = time.perf_counter()
    entrants = ways(device)
    apart = {way.precision: logits_apart(way.precision, size, device) for way in entrants if way.name == OURS}
    exact = apart["float32"]["largest_difference"] <= 1e-4
    assert exact, f"our logits are not a forward pass's, so times would say nothing: {apart['float32']}"
    names = dict.fromkeys(way.name for way in entrants if way.name != OURS)
    equal = {name: cache_changes_nothing(name, device) for name in names}
    assert all(equal.values()), f"a cache changes what is chosen: {equal}"
    runs = {way: build(way, size, device) for way in entrants}
    rows: list[dict[str, Any]] = []
    for batch, until in batches.items():
        labels = torch.arange(batch, device=device) % size.classes
        firsts = {way: _first_calls(runs[way], way, labels, size.tokens) for way in entrants}
        floors = measure_floors(device, small)
        took = rounds(runs, entrants, labels, size.tokens, began + until)
        rows += result_rows(size, batch, took, firsts, floors)
        if batch > 1:
            entrants = fastest(took)
    middle = list(batches)[1]
    peaks = {} if small else {way.label: peak_of(device, in_process, way, size, middle, device) for way in entrants}
    return {
        "equal": exact and all(equal.values()),
        "size": asdict(size),
        "logits_apart": apart,
        "cache_changes_nothing": equal,
        "rows": rows,
        "memory": {"batch": middle, "MiB": peaks},
    }


def table(results: Results) -> str:
    """Return the results of one size as Markdown."""
    size = results["size"]
    batches = list(dict.fromkeys(row["batch"] for row in results["rows"]))
    memory = results["memory"]
    lines = [
        f"{size['layers']} layers of {size['width']}, {size['side'] ** 2} codes of {size['vocabulary']:,}. Tokens per "
        "second, and in brackets the time divided by the float32 floor. A dash: not measured.",
        "",
        f"| | {' | '.join(f'batch {batch}' for batch in batches)} | first call, s | peak at {memory['batch']}, MiB |",
        f"|---|{'---|' * (len(batches) + 2)}",
    ]
    by_way: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        by_way.setdefault((row["way"], row["precision"]), {})[row["batch"]] = row
    for (name, precision), rows in by_way.items():
        cells = [f"{name}, {precision}"]
        for batch in batches:
            row = rows.get(batch)
            cells.append(_speed(row) if row else "-")
        cells.append(f"{rows[batches[0]]['first_call_s']:.1f}")
        peak = memory["MiB"].get(cells[0])
        cells.append("-" if peak is None else f"{peak:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Speed of ours divided by that of the fastest other program in the same precision (int8: in any), at "
        f"batch {_listed(batches)}: ",
    ]
    for (name, precision), rows in by_way.items():
        if name == OURS:
            apart = results["logits_apart"][precision]
            times = [f"{rows[batch]['times_best_peer']:.2f}" for batch in batches]
            lines.append(
                f"- {precision}: {_listed(times)}; the logits differ from those of a forward pass by "
                f"{apart['relative']:.1e} (relative norm), and {apart['same_likeliest']:.1%} of the most "
                "likely codes are the same"
            )
    return "\n".join(lines)


def _speed(row: dict[str, Any]) -> str:
    spread = f" ± {row['spread']:.0%}" if len(row["all_s"]) > 1 else ""
    return f"{row['tokens_per_s']:,.0f}{spread} ({row['over_float32_floor']:.1f}x)"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
