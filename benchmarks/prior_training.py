"""Training steps of a GPT: ours against a textbook GPT (as in nanoGPT) and x-transformers with its defaults.

Each has 12 layers of 512 with 8 heads over 256 codes of 1,024, and about the same number of weights (our feed-forward
networks have three matrices) and of operations; both are recorded. A step: forward, cross entropy, backward, AdamW
(torch's default for the peers, fused for ours), without clipping or logging. On a GPU all are timed compiled too, in
bfloat16 only; ours and the textbook's by regions (Accelerate's compile_regions). On a CPU our model with x-transformers'
own forward of its layers ("ours by its forward": equal options, only the arithmetic differs) is timed too, without
dropout and with, and so is ours compiled. Before anything is timed, ours must have the loss and the gradients of
x-transformers' layers with the same weights.

The floor is a step's operations at the rate of a large matrix product. Memory: the rise of the peak in the first step,
in a separate process.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Seconds, compare, measure_floors, synchronise
from benchmarks.memory import peak_of
from benchmarks.peers import Size
from benchmarks.peers.libraries import XTransformers
from benchmarks.peers.textbook import TextbookGpt
from benchmarks.record import Results
from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.gpt.layer import DecoderLayer
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.likelihood import token_loss

FULL, SMALL = Size(), Size(layers=1, width=64, heads=2, side=4, vocabulary=32)
RATE = 1e-4
SAME = {"cpu": 1e-5, "cuda": 1e-4}
"""Largest relative difference of losses and gradients that counts as equal; a GPU sums in no fixed order."""


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
BY_FORWARD = Way("ours by its forward")
DROPOUT = 0.1
FLASH = LIBRARY._replace(flash=True)


def ways(device: torch.device) -> list[Way]:
    """Return the ways to time on this device."""
    if device.type == "cuda":  # whose time is limited
        group = [way._replace(bfloat16=True) for way in (OURS, TEXTBOOK, FLASH)]
        return [*group, *(way._replace(compiled=True) for way in group)]
    entrants = [TEXTBOOK, LIBRARY, FLASH, OURS, BY_FORWARD]
    entrants += [way._replace(dropout=DROPOUT) for way in (OURS, BY_FORWARD)]
    if processor.takes_fast_path("bfloat16", device):
        group = [way._replace(bfloat16=True) for way in entrants]
        ours = group[entrants.index(OURS)]
        return [*entrants, *group, *(ours._replace(compiled=True, dropout=share) for share in (0.0, DROPOUT))]
    print("bfloat16 is not timed: this processor emulates it")
    return entrants


def build(way: Way, size: Size, batch: int, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Build a model with random weights, and a function that returns its loss of one batch, the same for all ways."""
    regions: Callable[[nn.Module], nn.Module] = compile_regions if way.compiled else lambda module: module
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (batch, size.tokens), generator=generator).to(device)
    torch.manual_seed(0)
    if way.name in (OURS.name, BY_FORWARD.name):
        gated = round(size.gated / 8) * 8  # a multiple of 8, so that rows consist of whole vectors
        config = GptConfig(
            layers=size.layers, width=size.width, heads=size.heads, feed_forward=gated, dropout=way.dropout
        )
        prior = Gpt(config, TokenShape(size.side, size.side, 1, size.vocabulary), classes=0).to(device)
        codes, labels = ids.view(batch, size.side, size.side, 1), ids.new_zeros(batch)
        ours = regions(prior)
        forward = library_forward if way.name == BY_FORWARD.name else DecoderLayer.forward

        def loss() -> Tensor:
            with patch.object(DecoderLayer, "forward", forward):
                return token_loss(ours(codes, labels), codes)

        return prior, loss
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
        if way.name in (OURS.name, BY_FORWARD.name)
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


def library_forward(layer: DecoderLayer, x: Tensor, turns: Tensor) -> Tensor:
    """Compute a layer of ours by x-transformers' forward, which takes the rotation as an angle per channel."""
    angles = torch.view_as_complex(turns).angle().repeat_interleave(2, dim=-1)  # (n, head width)
    y: Tensor = super(DecoderLayer, layer).forward(x, rotary_pos_emb=(angles[None], 1.0))
    return y


def difference_to_library(size: Size, device: torch.device) -> float:
    """Return the largest relative difference between our layers and x-transformers', of the loss and each gradient."""
    model, loss = build(OURS, size, 2, device)
    found = []
    for forward in (DecoderLayer.forward, library_forward):
        with patch.object(DecoderLayer, "forward", forward):
            value = loss()
            found.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    return max(float((one - other).norm() / other.norm()) for one, other in zip(*found, strict=True) if other.any())


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
    """Check our gradients, time the ways, and return the results."""
    size, repeats = (SMALL, 1) if small else (FULL, 5)
    batch = 2 if small else 64 if device.type == "cuda" else 8
    apart = difference_to_library(size, device)
    assert apart < SAME[device.type], f"{apart:.1e} apart from x-transformers' layers, so times would say nothing"
    print(f"loss and gradients {apart:.1e} apart from x-transformers' layers", flush=True)
    amounts = {way.name: count_amounts(way, size) for way in (TEXTBOOK, LIBRARY, OURS, BY_FORWARD)}
    entrants = ways(device)
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
            if any(other.name == name and other.is_like(way) for other in entrants)
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
        "equal": apart < SAME[device.type],
        "apart": apart,
        "size": asdict(size),
        "batch": batch,
        "amounts": amounts,
        "rows": rows,
    }


def table(results: Results) -> str:
    """Return the results as Markdown."""
    size = results["size"]
    lines = [
        "| a training step | tokens/s | times textbook | times x-transformers | time over floor | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        times = " | ".join(
            f"{row['times'][name]:.2f}" if name in row["times"] else "" for name in (TEXTBOOK.name, LIBRARY.name)
        )
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
            '"times" compare with the same precision, and compiled with compiled. Loss and gradients of our layers and '
            f"of x-transformers' own differ by {results['apart']:.0e} (relative).",
        ]
    )
