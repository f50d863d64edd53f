"""How everything here is timed: all ways in turn, A B A B, so that a machine that drifts drifts for all of them.

`compare` gives the seconds of each way; `Floors` is what this machine can do at best, measured in the same run, so
that a time can be stated as a multiple of the least that any program would need.
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
        return median(self.all)

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, as a share of the median."""
        ordered = sorted(self.all)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / 2 / self.median

    def row(self) -> dict[str, float | list[float]]:
        """For the JSON file."""
        return {"median_s": self.median, "spread": round(self.spread, 3), "all_s": [round(one, 6) for one in self.all]}


def synchronise() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Of one call, to the end of its work on the device."""
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began


def compare(ways: Mapping[str, Callable[[], object]], repeats: int, warmups: int = 1) -> dict[str, Seconds]:
    """Time each way `repeats` times, interleaved, after `warmups` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warmups + repeats):
        for name, way in ways.items():
            took = seconds(way)
            if number >= warmups:
                times[name].append(took)
    return {name: Seconds(taken) for name, taken in times.items()}


@dataclass(frozen=True)
class Floors:
    """Best rates that this machine reached, in operations and bytes per second."""

    float32: float
    """Floating-point operations of a large float32 matrix product, by the faster of torch's two libraries on a CPU."""
    bfloat16: float | None
    """The same in bfloat16; None where it is emulated."""
    memory: float
    """Bytes read, by a sum over more memory than any cache holds."""

    def seconds(self, operations: float, bytes_read: float, rate: float | None = None) -> float:
        """The least time: arithmetic or memory, whichever is slower, as if they overlapped perfectly."""
        return max(operations / (rate or self.float32), bytes_read / self.memory)

    def row(self) -> dict[str, float | None]:
        """For the JSON file."""
        return {
            "float32_gflops": self.float32 / 1e9,
            "bfloat16_gflops": self.bfloat16 / 1e9 if self.bfloat16 else None,
            "memory_gb_per_s": self.memory / 1e9,
        }

    def text(self) -> str:
        """One line."""
        bfloat16 = f"{self.bfloat16 / 1e9:,.0f} GFLOP/s" if self.bfloat16 else "emulated"
        float32, memory = f"{self.float32 / 1e9:,.0f} GFLOP/s", f"{self.memory / 1e9:,.1f} GB/s"
        return f"floors: float32 {float32}, bfloat16 {bfloat16}, memory {memory}"


@torch.inference_mode()
def measure_floors(device: torch.device, small: bool = False) -> Floors:
    """Measure them: a second or two."""
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
    native = processor.takes("bfloat16", device)
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
