"""Training steps of a GPT: ours against a textbook GPT (as in nanoGPT) and x-transformers with its defaults.

Each has 12 layers of 512 with 8 heads over 256 codes of 1,024, or in the second table 4 layers of 128 with 4 heads over
64 codes of 256, and about the same number of weights (our feed-forward networks have three matrices) and of operations;
both are recorded. A step: forward, cross entropy, backward, AdamW (torch's default for the peers, fused for ours),
without clipping or logging. In bfloat16 all are timed compiled too, ours and the textbook's by regions (Accelerate's
compile_regions); on a GPU in bfloat16 only. On a CPU ours is timed with dropout too, which real trainings need. Before
anything is timed, bfloat16 must not change our gradients more than twice as much as the textbook's.

The floor is a step's operations at the rate of a large matrix product. Memory: the rise of the peak in the first step,
in a separate process.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Seconds, compare, measure_floors, synchronise
from benchmarks.memory import peak_of
from benchmarks.peers import SECOND, Size
from benchmarks.peers.libraries import XTransformers
from benchmarks.peers.textbook import TextbookGpt
from benchmarks.record import Results
from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.likelihood import token_loss

FULL, SMALL = Size(), Size(layers=1, width=64, heads=2, side=4, vocabulary=32)
RATE = 1e-4


class Way(NamedTuple):
    """A model to train, with its precision and form."""

    name: str
    flash: bool = False
    bfloat16: bool = False
    compiled: bool = False
    dropout: float = 0.0

    @property
    def label(self) -> str:
        """Name, precision and form."""
        precision = "bfloat16" if self.bfloat16 else "float32"
        options = f"{', flash' if self.flash else ''}{f', dropout {self.dropout}' if self.dropout else ''}"
        return f"{self.name}{options}, {precision}{', compiled' if self.compiled else ''}"

    def is_like(self, other: "Way") -> bool:
        """True if both are in the same precision, and both compiled or neither."""
        return (self.bfloat16, self.compiled) == (other.bfloat16, other.compiled)


TEXTBOOK, LIBRARY, OURS = Way("textbook"), Way("x-transformers"), Way("ours")
DROPOUT = 0.1
FLASH = LIBRARY._replace(flash=True)


def ways(device: torch.device) -> list[Way]:
    """Return the ways to time on this device."""
    if device.type == "cuda":  # whose time is limited
        group = [way._replace(bfloat16=True) for way in (OURS, TEXTBOOK, FLASH)]
        return [*group, *(way._replace(compiled=True) for way in group)]
    entrants = [TEXTBOOK, LIBRARY, FLASH, OURS, OURS._replace(dropout=DROPOUT)]
    if processor.takes_fast_path("bfloat16", device):
        group = [way._replace(bfloat16=True) for way in entrants]
        return [*entrants, *group, *(way._replace(compiled=True) for way in group)]
    print("bfloat16 is not timed: this processor emulates it")
    return entrants


def build(way: Way, size: Size, batch: int, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Build a model with random weights, and a function that returns its loss of one batch, the same for all ways."""
    regions: Callable[[nn.Module], nn.Module] = compile_regions if way.compiled else lambda module: module
    # The compiler reads the gradients of its inputs, which need not be leaves.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (batch, size.tokens), generator=generator).to(device)
    torch.manual_seed(0)
    if way.name == OURS.name:
        gated = round(size.gated / 8) * 8  # a multiple of 8, so that rows consist of whole vectors
        config = GptConfig(
            layers=size.layers, width=size.width, heads=size.heads, feed_forward=gated, dropout=way.dropout
        )
        prior = Gpt(config, TokenShape(size.side, size.side, 1, size.vocabulary), classes=0).to(device)
        codes, labels = ids.view(batch, size.side, size.side, 1), ids.new_zeros(batch)
        ours = regions(prior)
        return prior, lambda: token_loss(ours(codes, labels), codes)
    if way.name == "x-transformers":
        options = {"attn_flash": True} if way.flash else {}
        wrapper = XTransformers(replace(size, classes=0), options).wrapper.to(device)
        theirs = torch.compile(wrapper) if way.compiled else wrapper
        return wrapper, lambda: theirs(ids)  # it computes all positions, and drops the last logits
    model = TextbookGpt(size).to(device)
    before, textbook = ids.roll(1, dims=1), regions(model)
    return model, lambda: F.cross_entropy(textbook(before).flatten(0, 1), ids.flatten())


def build_step(way: Way, size: Size, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a training step."""
    model, loss = build(way, size, batch, device)
    optimizer: torch.optim.Optimizer = (
        build_optimizer(model, OptimConfig(lr=RATE))
        if way.name == OURS.name
        else torch.optim.AdamW(model.parameters(), lr=RATE)
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.bfloat16):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        synchronise()

    return step


def prepare_step(way: Way, size: Size, batch: int, device: torch.device) -> Callable[[], None]:
    """Prepare a step for `peak_of`, after a tiny step that loads code and starts thread pools."""
    build_step(way, SMALL, 1, device)()
    return build_step(way, size, batch, device)


def rounding_error(way: Way, size: Size, device: torch.device) -> float:
    """Return how far a model's gradients in bfloat16 are from those in float32, relative to their norm."""
    found = []
    for bfloat16 in (False, True):
        model, loss = build(way, size, 2, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            value = loss()
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def count_amounts(way: Way, size: Size) -> dict[str, int]:
    """Count the weights, and a step's operations per token as torch counts them (attention as if without a mask)."""
    with FlopCounterMode(display=False) as counter:
        model, loss = build(way, size, 1, torch.device("cpu"))
        loss().backward()  # type: ignore[no-untyped-call]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations_per_token": counter.get_total_flops() // size.tokens,
    }


def measure(device: torch.device, small: bool) -> Results:
    """Return the results of both sizes; `small`: those of one tiny size."""
    if small:
        return measure_size(SMALL, 2, 1, device, small)
    full = measure_size(FULL, 64 if device.type == "cuda" else 8, 5, device, small)
    return full | {"second": measure_size(SECOND, 64, 9, device, small)}


def measure_size(size: Size, batch: int, repeats: int, device: torch.device, small: bool) -> Results:
    """Time the ways, and return the results."""
    errors = {way.name: rounding_error(way, size, device) for way in (TEXTBOOK, OURS)}
    assert errors[OURS.name] < 2 * errors[TEXTBOOK.name], f"bfloat16 rounds too much, so times say nothing: {errors}"
    print(f"gradients in bfloat16 against float32: {errors}", flush=True)
    amounts = {way.name: count_amounts(way, size) for way in (TEXTBOOK, LIBRARY, OURS)}
    entrants = [way for way in ways(device) if not (small and way.compiled)]  # compiling takes a minute
    floors = measure_floors(device, small)
    tokens = batch * size.tokens
    rows: list[dict[str, Any]] = []
    took: dict[str, Seconds] = {}
    for way in entrants:
        if way.label not in took:  # all ways that are not compiled take turns
            group = [way] if way.compiled else [other for other in entrants if not other.compiled]
            took |= compare(
                {other.label: build_step(other, size, batch, device) for other in group}, repeats, warmups=3
            )
            for other in group:
                print(f"{other.label}: {took[other.label].median * 1e3:.1f} ms", flush=True)
    for way in entrants:
        rate = floors.bfloat16 if way.bfloat16 else floors.float32
        floor_s = floors.seconds(amounts[way.name]["operations_per_token"] * tokens, 0.0, rate)
        peers = {
            name: min(took[other.label].median for other in entrants if other.name == name and other.is_like(way))
            for name in (TEXTBOOK.name, LIBRARY.name)
        }
        each = took[way.label]
        rows.append(
            {
                "way": way.label,
                **each.row(),
                "tokens_per_s": tokens / each.median,
                "times": {name: seconds / each.median for name, seconds in peers.items()},
                "over_floor": each.median / floor_s,
                "peak_mib": None if small or way.compiled else peak_of(device, prepare_step, way, size, batch, device),
            }
        )
    return {
        "equal": errors[OURS.name] < 2 * errors[TEXTBOOK.name],
        "rounding_errors": errors,
        "size": asdict(size),
        "batch": batch,
        "amounts": amounts,
        "rows": rows,
    }


def table(results: Results) -> str:
    """Return the results of one size as Markdown."""
    size = results["size"]
    lines = [
        "| a training step | tokens/s | times textbook | times x-transformers | time over floor | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        times = " | ".join(f"{row['times'][name]:.2f}" for name in (TEXTBOOK.name, LIBRARY.name))
        lines.append(
            f"| {row['way']} | {row['tokens_per_s']:,.0f} ± {row['spread']:.0%} | {times} | {row['over_floor']:.2f} "
            f"| {memory} |"
        )
    amounts = ", ".join(
        f"{name} {each['parameters'] / 1e6:.1f} and {each['operations_per_token'] / 1e6:.0f}"
        for name, each in results["amounts"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{size['layers']} layers of {size['width']}, {size['side'] ** 2} codes of {size['vocabulary']:,}, batch "
            f"{results['batch']}. Millions of weights, and of operations for each token: {amounts}. The columns "
            '"times" compare with the same precision, and compiled with compiled.',
        ]
    )
