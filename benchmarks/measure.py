"""Timing for all benchmarks: the ways take turns (A B A B), so that a change of the machine's speed affects all.

`compare` returns the seconds of each way. `Floors` are the best rates of this machine, measured in the same run, so
that a time can be stated as a multiple of the least time that any program needs.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from stage1_tokenizer.engine import processor


@dataclass(frozen=True)
class Seconds:
    """Repeated timings of one way."""

    all: list[float]

    @property
    def median(self) -> float:
        """Median of all timings."""
        return median(self.all)

    @property
    def spread(self) -> float:
        """Half of the interquartile range, as a share of the median."""
        ordered = sorted(self.all)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / 2 / self.median

    def row(self) -> dict[str, float | list[float]]:
        """Return the entries for the JSON file."""
        return {"median_s": self.median, "spread": round(self.spread, 3), "all_s": [round(one, 6) for one in self.all]}


def synchronise() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one call, until its work on the device is finished."""
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began


def compare(ways: Mapping[str, Callable[[], object]], repeats: int, warmups: int = 1) -> dict[str, Seconds]:
    """Time each way `repeats` times, in turn, after `warmups` rounds that are not timed."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warmups + repeats):
        for name, way in ways.items():
            took = seconds(way)
            if number >= warmups:
                times[name].append(took)
    return {name: Seconds(values) for name, values in times.items()}


@dataclass(frozen=True)
class Floors:
    """Best rates of this machine, in operations and bytes per second."""

    float32: float
    """Rate of a large float32 matrix product; on a CPU, by the faster of torch's two libraries."""
    bfloat16: float | None
    """Rate in bfloat16; None if the processor emulates it."""
    memory: float
    """Rate of reading memory, by a sum over more numbers than fit into a cache."""

    def seconds(self, operations: float, bytes_read: float, rate: float | None = None) -> float:
        """Return the least time: that of arithmetic or memory, whichever is slower, as if both overlapped."""
        return max(operations / (rate or self.float32), bytes_read / self.memory)

    def row(self) -> dict[str, float | None]:
        """Return the entries for the JSON file."""
        return {
            "float32_gflops": self.float32 / 1e9,
            "bfloat16_gflops": self.bfloat16 / 1e9 if self.bfloat16 else None,
            "memory_gb_per_s": self.memory / 1e9,
        }

    def text(self) -> str:
        """Return the rates in one line."""
        bfloat16 = f"{self.bfloat16 / 1e9:,.0f} GFLOP/s" if self.bfloat16 else "emulated"
        float32, memory = f"{self.float32 / 1e9:,.0f} GFLOP/s", f"{self.memory / 1e9:,.1f} GB/s"
        return f"floors: float32 {float32}, bfloat16 {bfloat16}, memory {memory}"


@torch.inference_mode()
def measure_floors(device: torch.device, small: bool = False) -> Floors:
    """Measure the floors; takes a second or two."""
    n = 256 if small else 8192 if device.type == "cuda" else 1536
    repeats = 3 if small else 9
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device)
    b = torch.randn(n, n, generator=generator).to(device)
    ways: dict[str, Callable[[], Tensor]] = {"float32": lambda: a @ b}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # A 1x1 convolution is a matrix product that torch gives to oneDNN.
        image, kernel = a.t().reshape(1, n, n, 1).contiguous(memory_format=torch.channels_last), b[:, :, None, None]
        ways["oneDNN"] = lambda: torch.nn.functional.conv2d(image, kernel)
    native = processor.takes_fast_path("bfloat16", device)
    if native:
        a16, b16 = a.bfloat16(), b.bfloat16()
        ways["bfloat16"] = lambda: a16 @ b16
    best = {name: min(times.all) for name, times in compare(ways, repeats).items()}
    operations = 2.0 * n**3
    numbers = torch.ones((1 << 20 if small else 1 << 26), device=device)  # 256 MiB
    reading = min(compare({"sum": numbers.sum}, repeats)["sum"].all)
    return Floors(
        operations / min(best["float32"], best.get("oneDNN", best["float32"])),
        operations / best["bfloat16"] if native else None,
        numbers.nbytes / reading,
    )
