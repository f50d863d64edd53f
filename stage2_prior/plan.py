"""Print the costs of a prior before it is trained: parameters, memory, arithmetic, disk, and time on a device.

    python -m stage2_prior.plan --config configs/stage2/imagenet256_llamagen_xxl.yaml \
        --shape 16,16,1,16384 --classes 1000 --images 1281167 --validation_images 50000 --device h100

The costs are counted on the real code, run with tensors without contents (`costs.py`), so a prior of any size can be
counted on any machine. Times follow from the rates of a device (`devices.py`).
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
    DeviceRates,
    resolve_device,
)
from stage2_prior.prior import PriorConfig

SAMPLED_AT_ONCE = (1, 16)
"""Batch sizes for which sampling times are printed."""


class PlanConfig(CommandConfig):
    """Count the costs of a prior. Reads the config files of stage2_prior/train.py and ignores keys that it does not
    need."""

    model_config = ConfigDict(extra="ignore")

    prior: PriorConfig = GptConfig()
    tokenizer: str | None = None
    """A stage-one run's folder, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME, for the shape
    of the codes."""
    shape: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] | None = None
    """The shape of the codes without a tokenizer: rows, columns, codes per position, codebook size."""
    classes: NonNegativeInt = 0
    """Number of classes; 0: unconditional."""
    batch_size: PositiveInt = 64
    """Images per optimizer step."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step; more need less memory for activations."""
    steps: PositiveInt = 1500
    """Optimizer steps."""
    images: NonNegativeInt = 0
    """Training images, for the size of their tokens on disk."""
    validation_images: NonNegativeInt = 0
    """Validation images, for the size of their tokens on disk."""
    views: PositiveInt = 1
    """Versions of each training image to encode."""
    keep: int = Field(2, ge=2)
    """Saved states to keep."""
    device: str | None = None
    """Device for which to print times: `here` measures this machine for some seconds; a100, h100, h200: by published
    peaks; or three numbers, FLOP per second, bytes per second, seconds per call (130e9,20e9,5e-6). null: no times."""
    precision: Literal["float32", "bf16"] | None = None
    """Precision of the products of training; null: bf16 on a100, h100, h200, else float32."""


class DiskBytes(NamedTuple):
    """The bytes of a run's folder, without logs, images and the headers of files (some kilobytes)."""

    tokens: int
    """Codes and labels of both splits."""
    weights: int
    """prior.safetensors, the running mean of the weights."""
    states: int
    """All saved states in state/; while a state is written, there is one more."""


def main() -> None:
    """Count the costs, and print them."""
    config = parse_command_line(PlanConfig)
    shape = read_shape(config)
    micro_batch = config.batch_size // config.accumulation
    counted, in_bf16 = (
        count_training(config.prior, shape, config.classes, micro_batch, precision) for precision in ("float32", "bf16")
    )
    print_costs(config, shape, counted, in_bf16)
    if config.device is not None:
        device = resolve_device(config.device, config.prior)
        bf16 = (config.precision or ("bf16" if config.device in PUBLISHED else "float32")) == "bf16"
        print_times(config, shape, in_bf16 if bf16 else counted, device)


def read_shape(config: PlanConfig) -> TokenShape:
    """Return the shape of the codes. Raise ConfigError if neither a shape nor a tokenizer is given."""
    if config.shape is not None:
        return TokenShape(*config.shape)
    if config.tokenizer is None:
        raise ConfigError("give the codes' shape: --shape ROWS,COLUMNS,CODES_PER_POSITION,CODEBOOK, or --tokenizer RUN")
    try:
        return LoadedTokenizer.load(config.tokenizer).tokenizer.shape
    except ConfigError as error:
        raise ConfigError(f"{error}; or give --shape ROWS,COLUMNS,CODES_PER_POSITION,CODEBOOK instead") from None


def count_disk(config: PlanConfig, shape: TokenShape, parameters: int) -> DiskBytes:
    """Count the bytes on disk. Codes and labels are int32 (tokens.py). A state holds the weights, their running mean,
    the best weights (best_weights.py) and Adam's two means."""
    codes = (config.images * config.views + config.validation_images) * shape.length
    labels = config.images + config.validation_images
    weights = BYTES * parameters
    return DiskBytes(4 * (codes + labels), weights, 5 * weights * config.keep)


def step_seconds(counted: TrainingCounts, accumulation: int, device: DeviceRates) -> float:
    """Return the seconds of a training step, without validation and saving."""
    return device.training_seconds(counted.step) * accumulation + device.training_seconds([counted.update])


def image_seconds(counted: GenerationCounts, shape: TokenShape, batch: int, device: DeviceRates) -> float:
    """Return the seconds per image to generate codes, `batch` images at once, without decoding them."""
    traced = device.generation_seconds(counted.operations, counted.reread_bytes)
    return traced / counted.positions * shape.h * shape.w / batch


def print_costs(config: PlanConfig, shape: TokenShape, counted: TrainingCounts, in_bf16: TrainingCounts) -> None:
    """Print parameters, arithmetic, memory and disk."""
    per_token = counted.forward_flops / shape.length
    micro = config.batch_size // config.accumulation
    on_disk = count_disk(config, shape, counted.parameters)
    cache = count_generation(config.prior, shape, config.classes, 1).cache_bytes
    tokens = f"{format_bytes(on_disk.tokens)} for the tokens, " if on_disk.tokens else ""
    copies = 2 if config.prior.copies_weights else 1
    lines = {
        "codes": f"{shape.h}x{shape.w} positions, {shape.K} of {shape.V} each: {shape.length} tokens per image",
        "parameters": f"{counted.parameters:,}",
        "forward": f"{format_flops(counted.forward_flops)} per image, {format_flops(per_token)} per token",
        "training step": f"{format_flops(counted.training_flops * config.accumulation)} for {config.batch_size} images"
        + (", each layer twice (checkpoint)" if config.prior.computes_layers_twice else ""),
        "training memory": f"{format_bytes(counted.training_bytes)}, {format_bytes(in_bf16.training_bytes)} with bf16: "
        f"{format_bytes(counted.state_bytes)} for weights, AdamW and the weights' mean, the rest for gradients and "
        f"activations of {micro} images ({format_bytes(counted.activation_bytes)}, with bf16 "
        f"{format_bytes(in_bf16.activation_bytes)}, are kept for the backward pass)",
        "sampling memory": f"{format_bytes(copies * BYTES * counted.parameters)} for weights"
        f"{' and their copy for generation' if copies == 2 else ''}, and {format_bytes(cache)} per image",
        "disk": f"{tokens}{format_bytes(on_disk.weights)} for weights, "
        f"{format_bytes(on_disk.states)} for {config.keep} states",
    }
    print_lines(lines)


def print_times(config: PlanConfig, shape: TokenShape, counted: TrainingCounts, device: DeviceRates) -> None:
    """Print the time of training and sampling."""
    step = step_seconds(counted, config.accumulation, device)
    times = [
        (batch, image_seconds(count_generation(config.prior, shape, config.classes, batch), shape, batch, device))
        for batch in SAMPLED_AT_ONCE
    ]
    source = {
        "here": "from this machine's rates, measured now",
        **dict.fromkeys(
            PUBLISHED,
            f"an estimate from measurements of one H200: {SHARE_OF_ARITHMETIC:.0%} of the published arithmetic, "
            f"{SHARE_OF_BANDWIDTH:.0%} of the bandwidth, and {LAUNCH * 1e6:.0f} us to launch a kernel of a "
            "training step (less with a faster CPU)",
        ),
    }
    lines = {
        "times": f"{config.device}: {source.get(str(config.device), 'from the rates given')}",
        "training time": f"{format_seconds(step)} per step, {1 / step:.3g} steps/s, "
        f"{config.batch_size / step:.3g} images/s; {format_seconds(step * config.steps)} for {config.steps:,} steps",
        "sampling time": ", ".join(f"{format_seconds(seconds)} per image at batch {batch}" for batch, seconds in times),
    }
    print_lines(lines)


def print_lines(lines: dict[str, str]) -> None:
    """Print one line per name, the texts aligned."""
    for name, text in lines.items():
        print(f"{name:<16} {text}")


def format_bytes(number: float) -> str:
    """Format a number of bytes, in powers of 1024."""
    return _format_scaled(number, 1024, ("B", "KiB", "MiB", "GiB"))


def format_flops(number: float) -> str:
    """Format a number of floating-point operations, in powers of 1000."""
    return _format_scaled(number, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _format_scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    """Format a number in the largest unit of which it is at least 1."""
    power = next((power for power in range(len(units)) if number < step ** (power + 1)), len(units) - 1)
    return f"{number / step**power:.1f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """Format seconds in ms, s, min, h or days."""
    if seconds < 1.0:
        return f"{1e3 * seconds:.3g} ms"
    for unit, length in (("s", 120.0), ("min", 120.0), ("h", 48.0)):
        if seconds < length:
            return f"{seconds:.1f} {unit}"
        seconds /= 60.0 if unit != "h" else 24.0
    return f"{seconds:.1f} days"


if __name__ == "__main__":
    run_command(main)
