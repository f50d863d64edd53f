"""The fast paths of the processor, the rules that choose them, and the environment variable that overrides the rules.

    TESSERA_FAST_PATHS=onednn,-bfloat16 python stage2_prior/train.py      onednn on, bfloat16 off, packed by its rule

path       what it speeds up                                                          chosen by its rule on
onednn     the search for nearest codes: by oneDNN instead of MKL, torch's default    AMD with AVX-512
packed     matrix products of a GPT in float32 while it generates: by oneDNN,         AMD
           with weights in the memory order of its kernels
bfloat16   training in bfloat16 when plain `python` starts it; `--precision           AVX-512 BF16, AMX, GPUs that
           bfloat16` with packed weights                                              compute in it

The rules depend on the processor only, never on measured times: a resumed run on the same machine must round as before.
Differences between CPU and GPU that are the same on all CPUs do not belong here. `keep_freed_memory` is no fast path,
but it too makes a CPU faster without a change of results.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from stage1_tokenizer.engine.errors import ConfigError

FAST_PATHS_VARIABLE = "TESSERA_FAST_PATHS"
FastPath = Literal["onednn", "packed", "bfloat16"]
FAST_PATHS: tuple[FastPath, ...] = get_args(FastPath)
ONEDNN = ("_reorder_linear_weight", "_linear_pointwise")
"""Operators of torch.ops.mkldnn that `onednn` and `packed` call. They are private to torch, so some versions or builds
of torch lack them."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt(3), from its malloc.h."""


def takes_fast_path(path: FastPath, device: torch.device | None = None) -> bool:
    """Return True if this process takes a fast path: by the variable if it names the path, else by the path's rule.

    device: None is the CPU.

    Raises:
        ConfigError: the variable has a wrong value.
    """
    forced = _parse(os.environ.get(FAST_PATHS_VARIABLE, ""))
    return forced[path] if path in forced else RULES[path](device or torch.device("cpu"))


def check_fast_paths() -> None:
    """Check the variable at the start of a command, before any work.

    Raises:
        ConfigError: an unknown name, a path that is both on and off, or one that this build of torch cannot take.
    """
    for path, is_on in _parse(os.environ.get(FAST_PATHS_VARIABLE, "")).items():
        if is_on and path in ("onednn", "packed") and not has_onednn():
            raise ConfigError(
                f"{FAST_PATHS_VARIABLE}: {path} cannot be turned on, since this build of torch has no oneDNN or lacks "
                f"the operators that the path calls. Leave {path} out, or give -{path}"
            )


@cache
def _parse(value: str) -> Mapping[FastPath, bool]:
    forced: dict[FastPath, bool] = {}
    for word in (part.strip() for part in value.split(",")):
        path = next((known for known in FAST_PATHS if known == word.removeprefix("-")), None)
        if path is None and word:
            raise ConfigError(
                f"{FAST_PATHS_VARIABLE}={value}: {word!r} is not a fast path. Allowed are {', '.join(FAST_PATHS)}, "
                f"each with a - before it to turn it off, separated by commas, e.g. "
                f"{FAST_PATHS_VARIABLE}=onednn,-bfloat16"
            )
        if path is not None and forced.setdefault(path, word == path) != (word == path):
            raise ConfigError(f"{FAST_PATHS_VARIABLE}={value}: {path} is turned both on and off. Give it once")
    return forced


def is_traced(x: Tensor) -> bool:
    """Return True if operations on x are compiled, exported, traced or counted, and not only computed.

    The operators of oneDNN do not work with tensors without contents and have no FLOP formula. So callers use plain
    operators under torch.compile, torch.export, torch.jit.trace and torch.func, for fake tensors and other subclasses,
    and in modes that inspect each operation, such as FlopCounterMode.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def has_onednn() -> bool:
    """Return True if this build of torch has oneDNN with the private operators."""
    is_available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(is_available and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN))


def pack(weight: Tensor, rows: int | None = None) -> Tensor:
    """Copy a weight (o, i) into the order that oneDNN's kernels read. rows: number of input rows, if known.

    Raises:
        RuntimeError: oneDNN does not support the weight's dtype on this processor.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a packed weight: x (n, i), packed (o, i), bias (o,) -> (n, o)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y


def _prefers_onednn(_: torch.device) -> bool:
    """Return True on AMD with AVX-512.

    MKL chooses its kernels by the vendor. On AMD with AVX-512 it had half the rate of oneDNN (207 and 410 GFLOP/s,
    Zen 5), with AVX2 only the same rate (130 GFLOP/s, Zen 3). Intel processors were not measured.
    """
    return has_onednn() and is_amd() and torch.cpu._is_avx512_supported()


def _prefers_packed(_: torch.device) -> bool:
    """Return True on AMD.

    With AVX2, 16 rows took 0.6 to 0.8 times as long as by MKL, 1 or 64 rows the same; with AVX-512, half as long.
    """
    return has_onednn() and is_amd()


def _has_bfloat16(device: torch.device) -> bool:
    """Return True if the device computes in bfloat16; other devices emulate it, slowly."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


RULES: Mapping[FastPath, Callable[[torch.device], bool]] = {
    "onednn": _prefers_onednn,
    "packed": _prefers_packed,
    "bfloat16": _has_bfloat16,
}


@cache
def is_amd() -> bool:
    """Return True if /proc/cpuinfo names AMD; False on systems without that file."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors; other C libraries stay as they are.

    By default glibc returns the memory of large tensors to the system, which clears new memory page by page: half a
    gigabyte for one pass through the encoder of a VQGAN. With this setting encoding and decoding took 0.8 times as
    long, a training step 0.94 times, with the same peak of memory. The process does not shrink after its peak.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    mallopt(M_MMAP_MAX, 0)  # glibc ignores an M_MMAP_THRESHOLD above 32 MiB
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 64 * 2**20)
