"""The seconds that operations take on a device, by the roofline model plus a fixed time per call.

    seconds = sum over operations of   max(work / rate, bytes / bandwidth) + call

(Williams et al., "Roofline", 2009). The rates come from a short measurement (`here`), from a table of published peaks,
or from the user. Small operations reach lower rates than large ones, so a rate is a curve over the size.

Accuracy, measured with `benchmarks/growth.py` on two cores of an AMD EPYC (Zen 3), as predicted time / measured time:
training steps of GPTs on grids of 8x8 to 64x64 codes 0.97 to 1.28; at batches of 1 to 256 0.90 to 1.08; generation 0.84
to 1.14; training steps with codebooks of 2^15 and more 0.6. While other programs ran, generation was wrong by up to six
times, since most of its time is the cost of calls.

One GPU, an H200, was measured in two sessions (docs/performance.md); the constants below come from it. Predicted /
measured: a GPT's training step in bfloat16 1.04; generation at a batch of 1 0.98 and 1.12, at a batch of 16 0.99. In
all of them the CPU that launches the kernels was the limit, so another CPU changes them.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate
from stage2_prior.likelihood import token_loss
from stage2_prior.pixelcnn.generation import one_thread
from stage2_prior.planning.costs import count_generation, count_training, zero_batch
from stage2_prior.planning.operations import Operation, OperationKind
from stage2_prior.prior import PriorConfig, build_prior

RateCurve = tuple[tuple[float, float], ...]
"""Points (size of an operation, rate that it reaches), in rising order of size."""

SHARE_OF_ARITHMETIC, SHARE_OF_BANDWIDTH = 0.6, 0.7
"""Shares of its published peaks that a GPU reaches."""
LAUNCH = 2.8e-5
"""Seconds per kernel of a training step on a GPU, limited by the CPU that launches the kernels."""
REPLAY = 2.5e-6
"""Seconds per kernel of a generation step that is replayed as a CUDA graph, including the launches between replays."""
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "a100": (19.5e12, 312e12, 2.039e12),
    "h100": (67e12, 989e12, 3.35e12),
    "h200": (67e12, 989e12, 4.8e12),
}
"""Published peaks of the SXM modules (A100 with 80 GB), from NVIDIA's data sheets: float32 FLOP/s outside tensor cores
(torch's default), dense bfloat16 FLOP/s, bytes/s."""


@dataclass(frozen=True)
class DeviceRates:
    """The rates of a device."""

    rates: Mapping[OperationKind, RateCurve]
    """Work per second of each kind of operation: FLOP/s of products and convolutions over the FLOPs of the call
    (batched: of one matrix); elements/s of functions and random draws over elements. Other kinds only cost memory
    traffic."""
    bf16: float
    """Factor by which products are faster in bfloat16 than in float32."""
    memory: RateCurve
    """Bytes/s of element-wise operations that write new memory, over the bytes of the call."""
    moving: RateCurve
    """Bytes/s of operations that copy or sum values into another order or shape, over the bytes of the call."""
    reading: RateCurve
    """Bytes/s of products that read a matrix once, over the bytes that share the processor's cache."""
    training_call: float
    """Fixed seconds per operation in a training step."""
    generation_call: float
    """Fixed seconds per operation in generation."""
    overlaps: bool
    """True if calls are queued while earlier operations compute, as on a GPU."""

    def training_seconds(self, operations: Iterable[Operation]) -> float:
        """Return the seconds of these operations in a training step."""
        return self._seconds(operations, self.training_call, 0.0)

    def generation_seconds(self, operations: Iterable[Operation], reread_bytes: float) -> float:
        """Return the seconds of these operations in generation, which reads `reread_bytes` again at each position."""
        return self._seconds(operations, self.generation_call, reread_bytes)

    def _seconds(self, operations: Iterable[Operation], call: float, reread_bytes: float) -> float:
        computing = calling = 0.0
        for operation in operations:
            computing += self._computing_seconds(operation, reread_bytes)
            calling += call * operation.calls
        return max(computing, calling) if self.overlaps else computing + calling

    def _computing_seconds(self, operation: Operation, reread_bytes: float) -> float:
        """Return the seconds of one operation without the call."""
        if operation.flops:
            bandwidth = interpolate(self.reading, max(operation.bytes, reread_bytes))
        else:
            bandwidth = interpolate(self.moving if operation.kind == "moving" else self.memory, operation.bytes)
        return max(self.arithmetic_seconds(operation), operation.bytes / bandwidth)

    def arithmetic_seconds(self, operation: Operation) -> float:
        """Return the seconds of an operation's arithmetic alone, without memory traffic and call."""
        curve, work = self.rates.get(operation.kind), operation.flops or operation.elements
        if curve is None:
            return 0.0
        factor = self.bf16 if operation.flops and operation.bf16 else 1.0
        return work / interpolate(curve, work / operation.matrices) / factor


def interpolate(curve: RateCurve, size: float) -> float:
    """Return the rate at a size: linear between the points on logarithmic axes, constant outside."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in pairwise(curve):
        if size <= right:
            share = math.log(size / left) / math.log(right / left)
            return low * (high / low) ** share
    return curve[-1][1]


def resolve_device(name: str, prior: PriorConfig) -> DeviceRates:
    """Return the rates of a device that the user names, for this kind of prior.

    name: `here` (measure this machine), a name in PUBLISHED, or "FLOP/s,bytes/s,seconds per call".

    Raises:
        ConfigError: the name is none of these.
    """
    if name == "here":
        return measure_device(prior, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name in PUBLISHED:
        float32, bf16, bandwidth = PUBLISHED[name]
        reached = SHARE_OF_ARITHMETIC * float32
        published = constant_rates(reached, SHARE_OF_BANDWIDTH * bandwidth, LAUNCH, bf16 / float32, overlaps=True)
        return replace(published, generation_call=REPLAY) if prior.replays else published
    try:
        rate, bandwidth, call = (float(part) for part in name.split(","))
        if min(rate, bandwidth) <= 0.0 or call < 0.0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--device {name}: unknown; give here, one of {', '.join(PUBLISHED)}, or three numbers: FLOP per second, "
            "bytes per second, seconds per call, as in 130e9,20e9,5e-6"
        ) from None
    return constant_rates(rate, bandwidth, call, 1.0, overlaps=False)


def constant_rates(rate: float, bandwidth: float, call: float, bf16: float, overlaps: bool) -> DeviceRates:
    """Return the rates of a device that reaches the same rates at every size."""
    products: tuple[OperationKind, ...] = ("product", "batched", "convolution", "convolution_backward")
    memory = ((1.0, bandwidth),)
    return DeviceRates(dict.fromkeys(products, ((1.0, rate),)), bf16, memory, memory, memory, call, call, overlaps)


def measure_device(prior: PriorConfig, device: torch.device) -> DeviceRates:
    """Measure the rates of a device of this machine for this kind of prior; takes two or three seconds."""
    with one_thread(prior.generates_on_one_thread):
        small = _product_rate(*PRODUCTS[0], device)
    rates: dict[OperationKind, RateCurve] = {
        "product": (small, *(_product_rate(rows, inner, columns, device) for rows, inner, columns in PRODUCTS[1:])),
        "batched": tuple(_product_rate(rows, inner, columns, device, n) for n, rows, inner, columns in BATCHED),
        **_convolution_rates(device),
    }
    for kind, call in FUNCTIONS.items():
        rates[kind] = tuple((n, n / median_seconds(call, torch.rand(n, device=device))) for n in ELEMENTS)
    plain, bf16 = (_product_rate(*PRODUCTS[1], device, dtype=dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    memory = tuple(_copy_rate(torch.mul, n, 3, device) for n in WRITTEN)
    moving = tuple(_copy_rate(reorder_heads, n, 2, device) for n in WRITTEN)
    reading = []
    for side in READ:
        matrix, vector = torch.rand(side, side, device=device), torch.rand(side, device=device)
        reading.append((matrix.nbytes, matrix.nbytes / median_seconds(torch.mv, matrix, vector)))
    calls = _call_seconds(prior, device)
    return DeviceRates(rates, bf16 / plain, memory, moving, tuple(reading), *calls, overlaps=device.type == "cuda")


# Sizes at which `measure_device` measures: products (rows, inner, columns), batched products (count, rows, inner,
# columns), elements of functions, numbers of copies, sides of square matrices.
PRODUCTS = [(16, 256, 256), (256, 256, 256), (4096, 256, 1024)]
BATCHED = [(256, 1, 32, 64), (256, 16, 16, 32), (256, 64, 64, 32), (64, 256, 256, 64)]
ELEMENTS = [1 << 14, 1 << 19]
WRITTEN = [1 << 13, 1 << 17, 1 << 20, 1 << 21, 1 << 23]
RING = 1 << 24
"""Numbers that copies cycle through, more than the processor's caches hold."""
READ = [512, 1448, 4096]
FUNCTIONS: dict[OperationKind, Callable[[Tensor], Tensor]] = {
    "function": torch.sigmoid,
    "tanh": torch.tanh,
    "draw": lambda x: x.bernoulli_(0.5),
}


def median_seconds(call: Callable[..., object], *arguments: Tensor, least: float = 0.06) -> float:
    """Return the median seconds of a call, after two warm-up calls: at least five calls, and `least` seconds in
    total."""
    durations: list[float] = []
    while len(durations) < 7 or sum(durations) < least:
        began = time.perf_counter()
        call(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    return median(durations[2:])


def _copy_rate(
    call: Callable[[Tensor, Tensor], Tensor], n: int, tensors: int, device: torch.device
) -> tuple[float, float]:
    """Measure (bytes of a call, bytes/s) of a call that reads and writes `tensors` tensors of n numbers.

    As in training, its inputs were written long ago, and its outputs are kept.
    """
    ring = min(max(RING // n, 2), 64)
    inputs = [torch.rand(n, device=device) for _ in range(ring)]
    outputs: deque[Tensor] = deque(maxlen=ring)
    indices = cycle(range(ring))

    def turn() -> None:
        index = next(indices)
        outputs.append(call(inputs[index], inputs[index - 1]))

    for _ in range(2 * ring):  # until the allocator reuses freed memory
        turn()
    size = 4.0 * tensors * n
    return size, size / median_seconds(turn)


def reorder_heads(x: Tensor, _: Tensor) -> Tensor:
    """Copy numbers into another order, as attention does with its heads."""
    return x.view(-1, 64, 4, 32).transpose(1, 2).contiguous()


def _product_rate(
    rows: int, inner: int, columns: int, device: torch.device, n: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Measure (FLOPs of one product, FLOP/s) of n products (rows, inner) x (inner, columns)."""
    shape = [] if n == 1 else [n]
    left = torch.rand(*shape, rows, inner, device=device, dtype=dtype)
    right = torch.rand(*shape, columns, inner, device=device, dtype=dtype).mT  # in the memory order of weights
    flops = 2.0 * rows * inner * columns
    return flops, n * flops / median_seconds(torch.matmul, left, right)


def _convolution_rates(device: torch.device) -> dict[OperationKind, RateCurve]:
    """Measure a convolution of the shape of a PixelCNN's layer, forward and backward."""
    images, width, side = 32, 96, 8
    x = torch.rand(images, width, side + 1, side + 2, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(2 * width, width, 2, 3, device=device)
    gradient = torch.rand(images, 2 * width, side, side, device=device).contiguous(memory_format=torch.channels_last)
    flops = 2.0 * gradient.numel() * kernel[0].numel()

    def backward() -> object:
        return torch.ops.aten.convolution_backward(
            gradient, x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )

    return {
        "convolution": ((flops, flops / median_seconds(F.conv2d, x, kernel)),),
        "convolution_backward": ((2 * flops, 2 * flops / median_seconds(backward)),),
    }


def _call_seconds(config: PriorConfig, device: torch.device) -> tuple[float, float]:
    """Measure the fixed seconds per operation in training and in generation, with a prior so small that nothing else
    takes time."""
    tiny, shape = config.smallest(), TokenShape(8, 8, 1, 16)
    prior = build_prior(tiny, shape, 0).to(device)
    codes, labels = (part.to(device) for part in zero_batch(shape, 1))
    noise = torch.zeros(1, shape.length, device=device)

    def train() -> None:
        token_loss(prior(codes, labels), codes).backward()  # type: ignore[no-untyped-call]

    training_calls = sum(operation.calls for operation in count_training(tiny, shape, 0, 1).step)
    counted = count_generation(tiny, shape, 0, 1)
    calls = sum(operation.calls for operation in counted.operations) * shape.length / counted.positions
    training_seconds = median_seconds(train, least=0.4)
    prepared = prior.eval().prepare()
    generation_seconds = median_seconds(lambda: generate(prior, labels, noise, prepared=prepared), least=0.4)
    return training_seconds / training_calls, generation_seconds / calls
