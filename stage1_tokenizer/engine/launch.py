"""How a command joins the processes that a launcher started, and what must hold between their number and the work."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.checkpoint import storage_error
from stage1_tokenizer.engine.errors import ConfigError, UserError
from stage1_tokenizer.engine.precision import device_of_float64
from stage1_tokenizer.engine.system import cores

T = TypeVar("T")


def start_accelerator(exact: bool = False) -> Accelerator:
    """Join the processes that `accelerate launch` or `torchrun` started, on GPUs (CUDA, or Apple's) where there are
    some, else on CPU. ACCELERATE_USE_CPU=true asks for the CPU. exact: the command computes in float64, which Apple's
    GPUs have not.

    Raises:
        ConfigError: several processes were started, but each would believe itself alone and write the same files.
    """
    device = device_of_float64(best_device()) if exact else best_device()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=default_precision(device))
    if accelerator.device.type == "cpu":
        _use_all_cores(accelerator.num_processes)
        processor.keep_freed_memory()
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but they form a group of {accelerator.num_processes}; "
            "on CPU use `accelerate launch --multi_gpu --num_processes N` (it falls back to gloo) or `torchrun`"
        )
    accelerator.print(
        f"processes={accelerator.num_processes} device={accelerator.device} precision={accelerator.mixed_precision} "
        f"threads={torch.get_num_threads()} "
        f"backend={torch.distributed.get_backend() if accelerator.num_processes > 1 else 'none'}"
    )
    if accelerator.device.type == "mps":
        accelerator.print("Apple's GPU: nobody has tested it yet; ACCELERATE_USE_CPU=true computes on the CPU")
    return accelerator


def best_device() -> torch.device:
    """The kind of device that Accelerate is to take; which one of several, it decides."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1  # several processes exchange tensors by NCCL or gloo alone
    return torch.device("mps" if alone and torch.backends.mps.is_available() else "cpu")


def default_precision(device: torch.device) -> str | None:
    """Precision belongs to Accelerate. Where it was not told any, since the script runs by plain `python`, bfloat16 is
    chosen on processors that compute in it (more than twice as fast there); elsewhere it would be emulated."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if processor.takes("bfloat16", device) else "no"


def _use_all_cores(processes: int) -> None:
    """Share the cores among the processes of this machine. `accelerate launch` sets OMP_NUM_THREADS=1 where it was not
    told a number, and a training on one core of many is not what anyone wants; any other number is left alone."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
        torch.set_num_threads(max(1, cores() // here))


def check_batch_size(batch_size: int, accumulation: int, processes: int) -> None:
    """Raises ConfigError unless processes and micro-batches divide the batch evenly."""
    if batch_size % (accumulation * processes):
        raise ConfigError(
            f"batch_size {batch_size} must be divisible by accumulation x processes = {accumulation} x {processes}"
        )


def check_share(images: int, processes: int) -> None:
    """Raises ConfigError unless each process has at least one image of the validation split."""
    if images < processes:
        raise ConfigError(f"{images} validation images are fewer than the {processes} processes that share them")


def in_all(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Do a share of some work in each process. A UserError that one of them raises, all raise, once all have ended."""
    error: UserError | None = None
    try:
        action()
    except UserError as raised:
        error = raised
    for each in gather_object([error]):
        if each is not None:
            raise each


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something in the main process alone. What it returns, all return; a UserError that it raises, all raise, and
    an OSError as StorageError.

    (Raised in one process alone, it would leave the others waiting for it until a launcher ends them.)
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [action()]
        except UserError as error:
            answer = [error]
        except OSError as error:
            answer = [storage_error(Path(error.filename or "."), error)]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    returned: T = answer[0]
    return returned
