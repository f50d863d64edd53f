"""How long operations take on a device: each the longer of its arithmetic and its traffic, and the cost of a call.

    time = sum over operations of   max(work / rate, bytes / bandwidth) + call

(Williams et al., "Roofline", 2009). The rates come from a short measurement (`here`), from a table of published peaks,
or by hand. Small calls reach less than large ones, so a rate is a curve over the size of a call.

How true it is, by `benchmarks/growth.py` on two cores of an AMD EPYC (Zen 3): steps of GPTs over grids of 8x8 to 64x64
codes were predicted at 0.97 to 1.28 of what they took, at batches of 1 to 256 at 0.90 to 1.08, sampling at 0.84 to
1.14. Steps with codebooks of 2^15 and more take longer than predicted: 0.6. Beside other programs sampling was off by
up to six times, since most of it is the cost of calls.

Of GPUs, an H200 was measured in two sessions (docs/performance.md), and the constants below follow from it: a GPT's
training step in bfloat16 is predicted at 1.04 of what it took, sampling at a batch of 1 at 0.98 and 1.12, at 16 at
0.99. All were bound by the processor that launches the kernels, so another processor changes them.
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
from stage2_prior.planning.operations import Kind, Operation
from stage2_prior.prior import PriorConfig, build_prior

Curve = tuple[tuple[float, float], ...]
"""(size of a call, rate that it reaches), sizes rising."""

SHARE_OF_ARITHMETIC, SHARE_OF_BANDWIDTH = 0.6, 0.7
"""Share of its published peaks that a GPU reaches."""
LAUNCH = 2.8e-5
"""Seconds from one kernel of a training step to the next where the processor cannot launch them faster."""
REPLAY = 2.5e-6
"""Seconds a kernel where a GPT's step is replayed as a CUDA graph, with what is launched between two replays."""
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "a100": (19.5e12, 312e12, 2.039e12),
    "h100": (67e12, 989e12, 3.35e12),
    "h200": (67e12, 989e12, 4.8e12),
}
"""NVIDIA's data sheets of the SXM modules (A100 with 80 GB): float32 FLOP/s outside tensor cores, as torch computes
unless told otherwise; dense bfloat16 FLOP/s; bytes/s."""


@dataclass(frozen=True)
class Device:
    """Rates of a device."""

    rates: Mapping[Kind, Curve]
    """Of a kind's work per second: FLOPs of products and convolutions by the call's FLOPs (batched: of one matrix),
    elements of functions and draws. A kind that is not here costs its traffic alone."""
    bf16: float
    """How many times faster products are in bfloat16."""
    memory: Curve
    """Bytes per second of element-wise operations that write new memory, by the bytes of a call."""
    moving: Curve
    """The same of operations that put values, or sums of them, into another order or shape."""
    reading: Curve
    """Bytes per second of products that read a matrix once, by the bytes that take turns in the cache."""
    training_call: float
    """Seconds that an operation costs whatever its size, in a training step."""
    generation_call: float
    overlaps: bool
    """Whether calls are queued while the former ones compute, as on a GPU."""

    def training_seconds(self, operations: Iterable[Operation]) -> float:
        """Of these operations, in a training step."""
        return self._seconds(operations, self.training_call, 0.0)

    def generation_seconds(self, operations: Iterable[Operation], reread_bytes: float) -> float:
        """Of these operations; `reread_bytes`: weights and caches that each position reads anew."""
        return self._seconds(operations, self.generation_call, reread_bytes)

    def _seconds(self, operations: Iterable[Operation], call: float, reread_bytes: float) -> float:
        computing = calling = 0.0
        for each in operations:
            computing += self._computing(each, reread_bytes)
            calling += call * each.calls
        return max(computing, calling) if self.overlaps else computing + calling

    def _computing(self, each: Operation, reread_bytes: float) -> float:
        if each.flops:
            bandwidth = at(self.reading, max(each.bytes, reread_bytes))
        else:
            bandwidth = at(self.moving if each.kind == "moving" else self.memory, each.bytes)
        return max(self.arithmetic(each), each.bytes / bandwidth)

    def arithmetic(self, each: Operation) -> float:
        """Seconds that an operation would take if memory were free."""
        curve, work = self.rates.get(each.kind), each.flops or each.elements
        if curve is None:
            return 0.0
        return work / at(curve, work / each.matrices) / (self.bf16 if each.flops and each.bf16 else 1.0)


def at(curve: Curve, size: float) -> float:
    """The rate at a size: straight lines between the points, on logarithmic axes, and level outside."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in pairwise(curve):
        if size <= right:
            share = math.log(size / left) / math.log(right / left)
            return low * (high / low) ** share
    return curve[-1][1]


def resolve_device(name: str, prior: PriorConfig) -> Device:
    """`here`, a name of PUBLISHED, or FLOP/s, bytes/s and seconds a call as three numbers with commas.

    Raises:
        ConfigError: it is none of them.
    """
    if name == "here":
        return measure_device(prior, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name in PUBLISHED:
        float32, bf16, bandwidth = PUBLISHED[name]
        reached = SHARE_OF_ARITHMETIC * float32
        published = flat(reached, SHARE_OF_BANDWIDTH * bandwidth, LAUNCH, bf16 / float32, overlaps=True)
        return replace(published, generation_call=REPLAY) if prior.replays else published
    try:
        rate, bandwidth, call = (float(part) for part in name.split(","))
        if min(rate, bandwidth) <= 0.0 or call < 0.0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--device {name}: give here, one of {', '.join(PUBLISHED)}, or three numbers: FLOP per second, bytes per "
            "second, seconds a call, as in 130e9,20e9,5e-6"
        ) from None
    return flat(rate, bandwidth, call, 1.0, overlaps=False)


def flat(rate: float, bandwidth: float, call: float, bf16: float, overlaps: bool) -> Device:
    """A device with the same rates at every size."""
    products: tuple[Kind, ...] = ("product", "batched", "convolution", "convolution_backward")
    memory = ((1.0, bandwidth),)
    return Device(dict.fromkeys(products, ((1.0, rate),)), bf16, memory, memory, memory, call, call, overlaps)


def measure_device(prior: PriorConfig, device: torch.device) -> Device:
    """This machine's rates, for priors of this kind; takes two or three seconds."""
    with one_thread(prior.generates_on_one_thread):
        small = _product(*PRODUCTS[0], device)
    rates: dict[Kind, Curve] = {
        "product": (small, *(_product(rows, inner, columns, device) for rows, inner, columns in PRODUCTS[1:])),
        "batched": tuple(_product(rows, inner, columns, device, n) for n, rows, inner, columns in BATCHED),
        **_convolutions(device),
    }
    for kind, call in FUNCTIONS.items():
        rates[kind] = tuple((n, n / seconds(call, torch.rand(n, device=device))) for n in ELEMENTS)
    plain, bf16 = (_product(*PRODUCTS[1], device, dtype=dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    memory = tuple(_written(torch.mul, n, 3, device) for n in WRITTEN)
    moving = tuple(_written(reordered, n, 2, device) for n in WRITTEN)
    reading = []
    for side in READ:
        matrix, vector = torch.rand(side, side, device=device), torch.rand(side, device=device)
        reading.append((matrix.nbytes, matrix.nbytes / seconds(torch.mv, matrix, vector)))
    calls = _calls(prior, device)
    return Device(rates, bf16 / plain, memory, moving, tuple(reading), *calls, overlaps=device.type == "cuda")


PRODUCTS = [(16, 256, 256), (256, 256, 256), (4096, 256, 1024)]
BATCHED = [(256, 1, 32, 64), (256, 16, 16, 32), (256, 64, 64, 32), (64, 256, 256, 64)]
ELEMENTS = [1 << 14, 1 << 19]
WRITTEN = [1 << 13, 1 << 17, 1 << 20, 1 << 21, 1 << 23]
RING = 1 << 24
"""Numbers, more than caches hold."""
READ = [512, 1448, 4096]
FUNCTIONS: dict[Kind, Callable[[Tensor], Tensor]] = {
    "function": torch.sigmoid,
    "tanh": torch.tanh,
    "draw": lambda x: x.bernoulli_(0.5),
}


def seconds(call: Callable[..., object], *arguments: Tensor, least: float = 0.06) -> float:
    """Median of several calls, at least five of them and at least `least` seconds together, after two that warm up."""
    taken: list[float] = []
    while len(taken) < 7 or sum(taken) < least:
        began = time.perf_counter()
        call(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return median(taken[2:])


def _written(
    call: Callable[[Tensor, Tensor], Tensor], n: int, tensors: int, device: torch.device
) -> tuple[float, float]:
    """(bytes of a call, bytes per second) where `tensors` of n numbers are read and written. As in training, what is
    read was written long ago, and what is written is kept."""
    many = min(max(RING // n, 2), 64)
    inputs = [torch.rand(n, device=device) for _ in range(many)]
    outputs: deque[Tensor] = deque(maxlen=many)
    turns = cycle(range(many))

    def turn() -> None:
        number = next(turns)
        outputs.append(call(inputs[number], inputs[number - 1]))

    for _ in range(2 * many):  # until the allocator uses again what was freed
        turn()
    size = 4.0 * tensors * n
    return size, size / seconds(turn)


def reordered(x: Tensor, _: Tensor) -> Tensor:
    """As attention's heads are."""
    return x.view(-1, 64, 4, 32).transpose(1, 2).contiguous()


def _product(
    rows: int, inner: int, columns: int, device: torch.device, n: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """(FLOPs of one matrix, FLOP/s)."""
    shape = [] if n == 1 else [n]
    left = torch.rand(*shape, rows, inner, device=device, dtype=dtype)
    right = torch.rand(*shape, columns, inner, device=device, dtype=dtype).mT  # as weights lie
    flops = 2.0 * rows * inner * columns
    return flops, n * flops / seconds(torch.matmul, left, right)


def _convolutions(device: torch.device) -> dict[Kind, Curve]:
    """Of a PixelCNN's shape."""
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
        "convolution": ((flops, flops / seconds(F.conv2d, x, kernel)),),
        "convolution_backward": ((2 * flops, 2 * flops / seconds(backward)),),
    }


def _calls(config: PriorConfig, device: torch.device) -> tuple[float, float]:
    """Seconds an operation, training and decoding: of a prior so small that nothing else counts."""
    tiny, shape = config.smallest(), TokenShape(8, 8, 1, 16)
    prior = build_prior(tiny, shape, 0).to(device)
    codes, labels = (part.to(device) for part in zero_batch(shape, 1))
    noise = torch.zeros(1, shape.length, device=device)

    def train() -> None:
        token_loss(prior(codes, labels), codes).backward()  # type: ignore[no-untyped-call]

    training = sum(each.calls for each in count_training(tiny, shape, 0, 1).step)
    decoding = count_generation(tiny, shape, 0, 1)
    calls = sum(each.calls for each in decoding.operations) * shape.length / decoding.positions
    in_training = seconds(train, least=0.4)
    prepared = prior.eval().prepare()
    in_decoding = seconds(lambda: generate(prior, labels, noise, prepared=prepared), least=0.4)
    return in_training / training, in_decoding / calls
