"""Training steps of a GPT: stage two's, against a textbook GPT (nanoGPT's form) and x-transformers as they come.

12 layers of 512 with 8 heads over 256 codes of 1,024; equal numbers of weights (the feed-forward networks of ours have
three matrices) and of operations, both recorded. A step: forward, cross entropy, backward, AdamW, in torch's own form
for the peers and fused for ours; nothing is clipped or logged. On a GPU, where each small kernel has to be launched,
all are timed compiled as well, ours and the textbook's by regions (Accelerate's compile_regions), in bfloat16 alone.
First, ours must have the loss and the gradients of x-transformers' own layers with the same weights.

The floor is a step's operations at the rate of a large matrix product. Memory: what the first step adds, in a process
of its own.
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
"""Losses and gradients nearer to each other are equal; a GPU sums in no fixed order."""


class Way(NamedTuple):
    """What is trained, and how."""

    name: str
    flash: bool = False
    bfloat16: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        precision = "bfloat16" if self.bfloat16 else "float32"
        return f"{self.name}{', flash' if self.flash else ''}, {precision}{', compiled' if self.compiled else ''}"

    def is_like(self, other: "Way") -> bool:
        """True if both are in the same precision, and both compiled or neither."""
        return (self.bfloat16, self.compiled) == (other.bfloat16, other.compiled)


TEXTBOOK, LIBRARY, OURS = Way("textbook"), Way("x-transformers"), Way("ours")
FLASH = LIBRARY._replace(flash=True)


def ways(device: torch.device) -> list[Way]:
    """Those that mean something on this device."""
    if device.type == "cuda":  # borrowed by the minute
        group = [way._replace(bfloat16=True) for way in (OURS, TEXTBOOK, FLASH)]
        return [*group, *(way._replace(compiled=True) for way in group)]
    entrants = [TEXTBOOK, LIBRARY, FLASH, OURS]
    if processor.takes("bfloat16", device):
        return [*entrants, *(way._replace(bfloat16=True) for way in entrants)]
    print("bfloat16 is emulated here and left out")
    return entrants


def build(way: Way, size: Size, batch: int, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model of random weights, and its loss of one batch, which is the same for all."""
    regions: Callable[[nn.Module], nn.Module] = compile_regions if way.compiled else lambda module: module
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (batch, size.tokens), generator=generator).to(device)
    torch.manual_seed(0)
    if way.name == "ours":
        gated = round(size.gated / 8) * 8  # rows of whole vectors
        config = GptConfig(layers=size.layers, width=size.width, heads=size.heads, feed_forward=gated)
        prior = Gpt(config, TokenShape(size.side, size.side, 1, size.vocabulary), classes=0).to(device)
        codes, labels = ids.view(batch, size.side, size.side, 1), ids.new_zeros(batch)
        ours = regions(prior)
        return prior, lambda: token_loss(ours(codes, labels), codes)
    if way.name == "x-transformers":
        options = {"attn_flash": True} if way.flash else {}
        wrapper = XTransformers(replace(size, classes=0), options).wrapper.to(device)
        theirs = torch.compile(wrapper) if way.compiled else wrapper
        return wrapper, lambda: theirs(ids)  # computes all positions, and drops the last one's logits
    model = TextbookGpt(size).to(device)
    before, textbook = ids.roll(1, dims=1), regions(model)
    return model, lambda: F.cross_entropy(textbook(before).flatten(0, 1), ids.flatten())


def stepping(way: Way, size: Size, batch: int, device: torch.device) -> Callable[[], None]:
    """A training step."""
    model, loss = build(way, size, batch, device)
    optimizer: torch.optim.Optimizer = (
        build_optimizer(model, OptimConfig(lr=RATE))
        if way.name == "ours"
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


def alone(way: Way, size: Size, batch: int, device: torch.device) -> Callable[[], None]:
    """For a process of its own, in which memory is measured."""
    stepping(way, SMALL, 1, device)()  # so that code and thread pools are there
    return stepping(way, size, batch, device)


def library(layer: DecoderLayer, x: Tensor, turns: Tensor) -> Tensor:
    """x-transformers' own way through a layer of ours: it wants the angle of each channel."""
    angles = torch.view_as_complex(turns).angle().repeat_interleave(2, dim=-1)  # (n, head width)
    y: Tensor = super(DecoderLayer, layer).forward(x, rotary_pos_emb=(angles[None], 1.0))
    return y


def apart_from_library(size: Size, device: torch.device) -> float:
    """The largest distance between ours and x-transformers' own layers, of the loss or a parameter's gradient, as a
    share of its norm."""
    model, loss = build(OURS, size, 2, device)
    found = []
    for forward in (DecoderLayer.forward, library):
        with patch.object(DecoderLayer, "forward", forward):
            value = loss()
            found.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    return max(float((one - other).norm() / other.norm()) for one, other in zip(*found, strict=True) if other.any())


def amount(way: Way, size: Size) -> dict[str, int]:
    """Weights, and operations for each token of a step, as torch counts them (attention without regard to the mask)."""
    with FlopCounterMode(display=False) as counter:
        model, loss = build(way, size, 1, torch.device("cpu"))
        loss().backward()  # type: ignore[no-untyped-call]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations_per_token": counter.get_total_flops() // size.tokens,
    }


def measure(device: torch.device, small: bool) -> Results:
    size, repeats = (SMALL, 1) if small else (FULL, 5)
    batch = 2 if small else 64 if device.type == "cuda" else 8
    apart = apart_from_library(size, device)
    assert apart < SAME[device.type], f"{apart:.1e} apart from x-transformers' layers, so times would say nothing"
    print(f"loss and gradients {apart:.1e} apart from x-transformers' layers", flush=True)
    amounts = {way.name: amount(way, size) for way in (TEXTBOOK, LIBRARY, OURS)}
    entrants = ways(device)
    floors = measure_floors(device, small)
    tokens = batch * size.tokens
    rows: list[dict[str, Any]] = []
    took: dict[str, Seconds] = {}
    for way in entrants:
        if way.label not in took:  # all that are not compiled in turn
            group = [way] if way.compiled else [other for other in entrants if not other.compiled]
            took |= compare({other.label: stepping(other, size, batch, device) for other in group}, repeats, warmups=3)
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
                "peak_mib": None if small or way.compiled else peak_of(device, alone, way, size, batch, device),
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
            f"{results['batch']}. Millions of weights, and of operations for each token: {amounts}. Times: over the "
            "peer in the same precision, compiled or not as it is itself. Ours and x-transformers' own layers are "
            f"{results['apart']:.0e} apart "
            "(relative, loss and gradients).",
        ]
    )
