"""What a prior costs before one is made: parameters, memory and arithmetic.

    python -m stage2_prior.plan --config configs/stage2/imagenet256_llamagen_xxl.yaml \
        --shape 16,16,1,16384 --classes 1000

The model is built, and a training step is taken, on fake tensors, which have a shape and lie on torch's `meta` device,
without contents: so the figures are counted on the real code and not on a formula beside it, and any size fits any
machine.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.errors import ConfigError, run_command
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape
from stage2_prior.base import Prior
from stage2_prior.gpt import Gpt, GptConfig
from stage2_prior.likelihood import token_loss
from stage2_prior.prior import PriorConfig, build_prior, parameters_of

BYTES = 4
"""Of a number in float32."""


class PlanConfig(CommandConfig):
    """Count what a prior costs. Reads the config files of stage2_prior/train.py; what it does not need, it leaves."""

    model_config = ConfigDict(extra="ignore")

    prior: PriorConfig = GptConfig()
    tokenizer: str | None = None
    """A stage-one run's folder, or its tokenizer.safetensors, which says the shape."""
    shape: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] | None = None
    """The shape without a tokenizer: rows, columns, codes per position, codebook size."""
    classes: NonNegativeInt = 0
    """Number of classes; 0: unconditional."""
    batch_size: PositiveInt = 64
    """Images per optimizer step."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step; activations are those of one."""


class Plan(NamedTuple):
    """Counts."""

    parameters: int
    training_flops: int
    """Multiplications and additions of a training step, forward and backward."""
    forward_flops: int
    """Of a forward pass over one image."""
    activation_bytes: int
    """What a micro-batch's forward pass keeps for the backward pass, in float32."""
    autocast_activation_bytes: int
    """The same under bfloat16 autocast, with its copies of the weights."""
    state_bytes: int
    """Weights, gradients, Adam's two means and the running mean of the weights."""
    cache_bytes: int
    """What decoding keeps per image beside the weights."""


def main() -> None:
    config = parse_command_line(PlanConfig)
    shape = shape_of(config)
    counted = plan(config.prior, shape, config.classes, config.batch_size // config.accumulation, config.accumulation)
    report(config, shape, counted)


def shape_of(config: PlanConfig) -> TokenShape:
    """Raises ConfigError where neither a shape nor a tokenizer that is there is given."""
    if config.shape is not None:
        return TokenShape(*config.shape)
    if config.tokenizer is None:
        raise ConfigError("give the codes' shape: --shape ROWS,COLUMNS,CODES_PER_POSITION,CODEBOOK, or --tokenizer RUN")
    try:
        return LoadedTokenizer.load(config.tokenizer).tokenizer.shape
    except ConfigError as error:
        raise ConfigError(f"{error}; or give --shape ROWS,COLUMNS,CODES_PER_POSITION,CODEBOOK instead") from None


def plan(config: PriorConfig, shape: TokenShape, classes: int, micro_batch: int, accumulation: int = 1) -> Plan:
    """Count for a prior of this kind, shape and number of classes."""
    with FakeTensorMode():
        prior = build_prior(config, shape, classes)
        one = step_inputs(shape, 1)
        batch = step_inputs(shape, micro_batch)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            prior.eval()(*one)
        prior.train()
        kept, kept_by_autocast = Kept(prior), Kept(prior)
        with FlopCounterMode(display=False) as training:
            with kept.counting():
                loss = token_loss(prior(*batch), batch[0])
            loss.backward()  # type: ignore[no-untyped-call]
        with kept_by_autocast.counting(), torch.autocast("cpu", dtype=torch.bfloat16):
            token_loss(prior(*batch), batch[0])
    parameters = parameters_of(prior)
    return Plan(
        parameters,
        training.get_total_flops() * accumulation,
        forward.get_total_flops(),
        kept.bytes,
        kept_by_autocast.bytes,
        5 * BYTES * parameters,
        cache_bytes(prior),
    )


def step_inputs(shape: TokenShape, batch: int) -> tuple[Tensor, Tensor]:
    """Codes (B, h, w, K) and labels (B,), on the present device."""
    return torch.zeros(batch, *shape[:3], dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)


class Kept:
    """Adds up the tensors that autograd keeps, each storage once, and no parameter."""

    def __init__(self, prior: Prior) -> None:
        # What a forward pass keeps of the weights is there anyway.
        self._seen = {parameter.untyped_storage()._cdata for parameter in prior.parameters()}
        self._held: list[Tensor] = []  # alive, so that no later tensor gets the same address
        self.bytes = 0

    def counting(self) -> AbstractContextManager[None]:
        """Counts what a forward pass in this context keeps."""
        hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept)
        return hooks

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def cache_bytes(prior: Prior) -> int:
    """What decoding one image keeps, in float32: keys and values, or the stacks' features."""
    shape, width = prior.shape, prior.config.width
    layers = len(prior.layers)  # type: ignore[arg-type]  # every kind has layers
    positions = shape.h * shape.w
    if isinstance(prior, Gpt):
        return 2 * layers * positions * width * BYTES
    return layers * (positions + 3 * shape.w) * width * BYTES  # the vertical stack's inputs; two rows of the other


def report(config: PlanConfig, shape: TokenShape, counted: Plan) -> None:
    per_token = counted.forward_flops / shape.length
    checkpointed = isinstance(config.prior, GptConfig) and config.prior.checkpoint
    micro = config.batch_size // config.accumulation
    lines = {
        "codes": f"{shape.h}x{shape.w} positions, {shape.K} of {shape.V} each: {shape.length} tokens per image",
        "parameters": f"{counted.parameters:,}",
        "forward": f"{flops(counted.forward_flops)} per image, {flops(per_token)} per token",
        "training step": f"{flops(counted.training_flops)} for {config.batch_size} images"
        + (", each layer twice (checkpoint)" if checkpointed else ""),
        "training memory": f"{size(counted.state_bytes)} for weights, gradients, AdamW and the weights' mean, "
        f"and activations of {micro} images: {size(counted.activation_bytes)}, "
        f"{size(counted.autocast_activation_bytes)} with bf16",
        "sampling memory": f"{size(BYTES * counted.parameters)} for weights, and {size(counted.cache_bytes)} per image",
    }
    for name, text in lines.items():
        print(f"{name:<16} {text}")


def size(number: float) -> str:
    """Bytes as text."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def flops(number: float) -> str:
    """Floating-point operations as text."""
    for unit in ("", "K", "M", "G", "T"):
        if number < 1000:
            return f"{number:.1f} {unit}FLOP"
        number /= 1000
    return f"{number:.1f} PFLOP"


if __name__ == "__main__":
    run_command(main)
