"""What a prior costs before one is made: parameters, memory, arithmetic, disk, and time on a device.

    python -m stage2_prior.plan --config configs/stage2/imagenet256_llamagen_xxl.yaml \
        --shape 16,16,1,16384 --classes 1000 --images 1281167 --validation_images 50000 --device h100

All is counted on the real code, run on tensors without contents (`costs.py`), so any size fits any machine; time
follows from the rates of a device (`devices.py`).
"""

from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape
from stage2_prior.gpt.model import GptConfig
from stage2_prior.planning.costs import BYTES, GenerationCounts, TrainingCounts, count_generation, count_training
from stage2_prior.planning.devices import (
    LAUNCH,
    PUBLISHED,
    SHARE_OF_ARITHMETIC,
    SHARE_OF_BANDWIDTH,
    Device,
    resolve_device,
)
from stage2_prior.prior import PriorConfig

SAMPLED_AT_ONCE = (1, 16)


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
    steps: PositiveInt = 1500
    """Optimizer steps."""
    images: NonNegativeInt = 0
    """Training images, for the size of their tokens on disk."""
    validation_images: NonNegativeInt = 0
    """Validation images, likewise."""
    views: PositiveInt = 1
    """Views of each training image."""
    keep: int = Field(2, ge=2)
    """Saved states to keep."""
    device: str | None = None
    """How fast: `here` measures this machine for some seconds; a100, h100 and h200 go by published peaks; or three
    numbers, FLOP per second, bytes per second and seconds a call, as in 130e9,20e9,5e-6. null: no times."""
    precision: Literal["float32", "bf16"] | None = None
    """Of training's products; null: bf16 on the devices with published peaks, else float32."""


class Disk(NamedTuple):
    """Bytes of a run's folder, but for logs and pictures; the headers of files, some kilobytes, are left out."""

    tokens: int
    weights: int
    """prior.safetensors, the running mean of the weights."""
    states: int
    """What is kept in state/; while one is written, there is one more."""


def main() -> None:
    config = parse_command_line(PlanConfig)
    shape = shape_of(config)
    micro_batch = config.batch_size // config.accumulation
    counted, in_bf16 = (
        count_training(config.prior, shape, config.classes, micro_batch, each) for each in ("float32", "bf16")
    )
    report(config, shape, counted, in_bf16)
    if config.device is not None:
        device = resolve_device(config.device, config.prior)
        bf16 = (config.precision or ("bf16" if config.device in PUBLISHED else "float32")) == "bf16"
        report_times(config, shape, in_bf16 if bf16 else counted, device)


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


def disk(config: PlanConfig, shape: TokenShape, parameters: int) -> Disk:
    """Codes and labels are int32 (tokens.py); a state is weights, their running mean, the best of
    these (best_weights.py) and Adam's two means."""
    codes = (config.images * config.views + config.validation_images) * shape.length
    labels = config.images + config.validation_images
    weights = BYTES * parameters
    return Disk(4 * (codes + labels), weights, 5 * weights * config.keep)


def step_seconds(counted: TrainingCounts, accumulation: int, device: Device) -> float:
    """A training step, without validation and saving."""
    return device.training_seconds(counted.step) * accumulation + device.training_seconds([counted.update])


def image_seconds(counted: GenerationCounts, shape: TokenShape, batch: int, device: Device) -> float:
    """To draw the codes of an image, of `batch` at once; the tokenizer's decoder comes after that."""
    traced = device.generation_seconds(counted.operations, counted.reread_bytes)
    return traced / counted.positions * shape.h * shape.w / batch


def report(config: PlanConfig, shape: TokenShape, counted: TrainingCounts, in_bf16: TrainingCounts) -> None:
    per_token = counted.forward_flops / shape.length
    micro = config.batch_size // config.accumulation
    on_disk = disk(config, shape, counted.parameters)
    cache = count_generation(config.prior, shape, config.classes, 1).cache_bytes
    tokens = f"{size(on_disk.tokens)} for the tokens, " if on_disk.tokens else ""
    copies = 2 if config.prior.copies_weights else 1
    lines = {
        "codes": f"{shape.h}x{shape.w} positions, {shape.K} of {shape.V} each: {shape.length} tokens per image",
        "parameters": f"{counted.parameters:,}",
        "forward": f"{flops(counted.forward_flops)} per image, {flops(per_token)} per token",
        "training step": f"{flops(counted.training_flops * config.accumulation)} for {config.batch_size} images"
        + (", each layer twice (checkpoint)" if config.prior.computes_layers_twice else ""),
        "training memory": f"{size(counted.training_bytes)}, {size(in_bf16.training_bytes)} with bf16: "
        f"{size(counted.state_bytes)} for weights, AdamW and the weights' mean, the rest for gradients and "
        f"activations of {micro} images, of which {size(counted.activation_bytes)}, "
        f"{size(in_bf16.activation_bytes)} with bf16, wait for the backward pass",
        "sampling memory": f"{size(copies * BYTES * counted.parameters)} for weights"
        f"{' and their copy that decodes' if copies == 2 else ''}, and {size(cache)} per image",
        "disk": f"{tokens}{size(on_disk.weights)} for weights, {size(on_disk.states)} for {config.keep} states",
    }
    show(lines)


def report_times(config: PlanConfig, shape: TokenShape, counted: TrainingCounts, device: Device) -> None:
    step = step_seconds(counted, config.accumulation, device)
    each = [
        (batch, image_seconds(count_generation(config.prior, shape, config.classes, batch), shape, batch, device))
        for batch in SAMPLED_AT_ONCE
    ]
    source = {
        "here": "from this machine's rates, measured now",
        **dict.fromkeys(
            PUBLISHED,
            f"an estimate from what one H200 took: {SHARE_OF_ARITHMETIC:.0%} of the published arithmetic, "
            f"{SHARE_OF_BANDWIDTH:.0%} of the bandwidth, and {LAUNCH * 1e6:.0f} us to launch a kernel of a "
            "training step, which a faster processor shortens",
        ),
    }
    lines = {
        "times": f"{config.device}: {source.get(str(config.device), 'from the rates given')}",
        "training time": f"{duration(step)} a step, {1 / step:.3g} steps/s, {config.batch_size / step:.3g} images/s; "
        f"{duration(step * config.steps)} for {config.steps:,} steps",
        "sampling time": ", ".join(f"{duration(seconds)} per image at batch {batch}" for batch, seconds in each),
    }
    show(lines)


def show(lines: dict[str, str]) -> None:
    for name, text in lines.items():
        print(f"{name:<16} {text}")


def size(number: float) -> str:
    """Return bytes as text."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB"))


def flops(number: float) -> str:
    """Return floating-point operations as text."""
    return _scaled(number, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    power = next((power for power in range(len(units)) if number < step ** (power + 1)), len(units) - 1)
    return f"{number / step**power:.1f} {units[power]}"


def duration(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 1.0:
        return f"{1e3 * seconds:.3g} ms"
    for unit, length in (("s", 120.0), ("min", 120.0), ("h", 48.0)):
        if seconds < length:
            return f"{seconds:.1f} {unit}"
        seconds /= 60.0 if unit != "h" else 24.0
    return f"{seconds:.1f} days"


if __name__ == "__main__":
    run_command(main)
