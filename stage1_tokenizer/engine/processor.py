"""The processor's fast paths: which of them are taken, and the environment variable that decides otherwise.

    TESSERA_FAST_PATHS=onednn,-bfloat16 python stage2_prior/train.py      onednn on, bfloat16 off, packed by its rule

path       what it speeds up                                                          taken by itself on
onednn     a GPT's linear maps in float32, in training and wherever a whole           AMD with AVX-512
           sequence is computed: by oneDNN, not by torch's default (MKL)
packed     a GPT's products in float32 while it decodes: by oneDNN, from weights      AMD
           in the order that its kernels read
bfloat16   training by plain `python` in bfloat16; `--precision bfloat16` from        AVX-512 BF16, AMX, GPUs that
           packed weights                                                             compute in it

The rules look at the processor and never at a stopwatch: the same machine always chooses the same arithmetic, or a
resumed run would round differently from the one that it continues. Code that computes differently on a CPU than on a
GPU, on all CPUs alike, is no matter of this file.
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

VARIABLE = "TESSERA_FAST_PATHS"
FastPath = Literal["onednn", "packed", "bfloat16"]
FAST_PATHS: tuple[FastPath, ...] = get_args(FastPath)
ONEDNN = ("_reorder_linear_weight", "_linear_pointwise")
"""The operators of torch.ops.mkldnn that `onednn` and `packed` call. They are private to torch, which emits them when
it compiles, so a version or build of torch may lack them."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt(3), from its malloc.h."""


def takes(path: FastPath, device: torch.device | None = None) -> bool:
    """True if this process takes the fast path: by the variable, or by the path's rule. device: None is the CPU.

    Raises:
        ConfigError: the variable has a wrong value.
    """
    forced = _parse(os.environ.get(VARIABLE, ""))
    return forced[path] if path in forced else RULES[path](device or torch.device("cpu"))


def check_fast_paths() -> None:
    """Read the variable at a command's start, where a wrong value can still be told before anything is done.

    Raises:
        ConfigError: an unknown name, a path that is both on and off, or one that this build of torch cannot take.
    """
    for path, is_on in _parse(os.environ.get(VARIABLE, "")).items():
        if is_on and path in ("onednn", "packed") and not has_onednn():
            raise ConfigError(
                f"{VARIABLE}: {path} cannot be turned on, since this build of torch has no oneDNN or not the operators "
                f"that the path calls; leave {path} out, or give -{path}"
            )


@cache
def _parse(value: str) -> Mapping[FastPath, bool]:
    forced: dict[FastPath, bool] = {}
    for word in (part.strip() for part in value.split(",")):
        path = next((known for known in FAST_PATHS if known == word.removeprefix("-")), None)
        if path is None and word:
            raise ConfigError(
                f"{VARIABLE}={value}: {word!r} is no fast path; allowed are {', '.join(FAST_PATHS)}, each with a - "
                f"before it to turn it off, separated by commas, e.g. {VARIABLE}=onednn,-bfloat16"
            )
        if path is not None and forced.setdefault(path, word == path) != (word == path):
            raise ConfigError(f"{VARIABLE}={value}: {path} is turned both on and off; give it once")
    return forced


def is_traced(x: Tensor) -> bool:
    """True if what happens to x is compiled, exported, traced or counted, and not only computed.

    The operators of oneDNN have no version for tensors without contents and no formula for their arithmetic, so there
    the plain operators stand in for them: torch.compile, torch.export, torch.jit.trace, torch.func, fake tensors (and
    other subclasses), and modes that look at every operation, such as torch's FlopCounterMode.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def has_onednn() -> bool:
    """True if this torch has oneDNN with the private operators."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN))


def _prefers_onednn(_: torch.device) -> bool:
    """MKL chooses its kernels by the vendor: on AMD processors with AVX-512 it ran at half of oneDNN's rate (207 and
    410 GFLOP/s, Zen 5), on those with AVX2 alone at the same (130, Zen 3). Nothing was measured on Intel's."""
    return has_onednn() and is_amd() and torch.cpu._is_avx512_supported()


def _prefers_packed(_: torch.device) -> bool:
    """On an AMD processor with AVX2, 16 rows took 0.6 to 0.8 times as long as by MKL, and 1 or 64 rows the same; with
    AVX-512, half as long."""
    return has_onednn() and is_amd()


def _has_bfloat16(device: torch.device) -> bool:
    """Elsewhere bfloat16 is emulated, slowly."""
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
    """From Linux's description of the processor; elsewhere unknown, and taken for no."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


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
