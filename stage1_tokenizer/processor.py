"""What this machine's processor computes fast. Every rule that chooses arithmetic by the processor asks here.

The rules look at the processor and never at a stopwatch: the same machine always chooses the same arithmetic, or a
resumed run would round differently from the one that it continues.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt(3), from its malloc.h."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed natively (on a CPU: AVX-512 BF16 or AMX); elsewhere they are emulated,
    slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prefers_onednn() -> bool:
    """Whether float32 products are faster by oneDNN than by torch's default, MKL.

    MKL chooses its kernels by the vendor: on AMD processors with AVX-512 it ran at half of oneDNN's rate (207 against
    410 GFLOP/s, Zen 5), on those with AVX2 alone at the same (130, Zen 3). Nothing was measured on Intel's.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and is_amd() and torch.cpu._is_avx512_supported())


@cache
def is_amd() -> bool:
    """From Linux's description of the processor; elsewhere unknown, and taken for no."""
    description = Path("/proc/cpuinfo")
    return description.is_file() and "AuthenticAMD" in description.read_text(encoding="utf-8", errors="replace")


def keep_freed_memory() -> None:
    """Ask glibc to use freed memory again rather than give it back to the system; elsewhere nothing happens.

    By default each tensor of megabytes gets new memory, which the system clears page by page at the first touch: half a
    gigabyte for one pass through a VQGAN's encoder. Without that, encoding and decoding took 0.8 times as long, a
    training step 0.94, and the most memory in use stayed the same. The process stays as large as it once was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    mallopt(M_MMAP_MAX, 0)  # (a high M_MMAP_THRESHOLD would not do: glibc ignores more than 32 MiB)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 64 * 2**20)
