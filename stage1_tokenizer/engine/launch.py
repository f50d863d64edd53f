"""Start of a command in one or several processes: device, precision, threads, and work that the processes share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError, UserError
from stage1_tokenizer.engine.files import storage_error
from stage1_tokenizer.engine.precision import device_of_float64
from stage1_tokenizer.engine.system import count_cores

T = TypeVar("T")


def start_accelerator(exact: bool = False) -> Accelerator:
    """Join the processes that `accelerate launch` or `torchrun` started, and print their device and precision.

    The device is a GPU (CUDA or Apple's) if there is one, else the CPU. ACCELERATE_USE_CPU=true chooses the CPU.

    exact: the command computes in float64, which Apple's GPUs do not have.

    Raises:
        ConfigError: several processes were started but did not form a group; each would write the same files.
    """
    device = device_of_float64(choose_device()) if exact else choose_device()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=choose_precision(device))
    if accelerator.device.type == "cpu":
        _use_all_cores(accelerator.num_processes)
        processor.keep_freed_memory()
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but they form a group of {accelerator.num_processes}. "
            "On CPU use `accelerate launch --multi_gpu --num_processes N` (it falls back to gloo) or `torchrun`"
        )
    accelerator.print(
        f"processes={accelerator.num_processes} device={accelerator.device} precision={accelerator.mixed_precision} "
        f"threads={torch.get_num_threads()} "
        f"backend={torch.distributed.get_backend() if accelerator.num_processes > 1 else 'none'}"
    )
    if accelerator.device.type == "mps":
        accelerator.print("Apple's GPU: not tested yet; ACCELERATE_USE_CPU=true computes on the CPU")
    return accelerator


def choose_device() -> torch.device:
    """Return the type of device for this process; Accelerate chooses one of several devices of this type."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    # Several processes exchange tensors by NCCL or gloo, which know no Apple GPUs.
    is_alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    return torch.device("mps" if is_alone and torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device) -> str | None:
    """Return the mixed precision of a script that plain `python` started; None: `accelerate launch` has set it.

    It is bfloat16 on devices that compute in it, where it is more than twice as fast; elsewhere it would be emulated.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if processor.takes_fast_path("bfloat16", device) else "no"


def _use_all_cores(processes: int) -> None:
    """Share the cores among the processes of this machine, unless OMP_NUM_THREADS has a value other than 1.

    `accelerate launch` sets it to 1 by itself, so 1 is no choice of the user.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
        torch.set_num_threads(max(1, count_cores() // local_processes))


def check_batch_size(batch_size: int, accumulation: int, processes: int) -> None:
    """Raise ConfigError unless processes and micro-batches divide the batch evenly."""
    if batch_size % (accumulation * processes):
        raise ConfigError(
            f"batch_size {batch_size} must be divisible by accumulation x processes = {accumulation} x {processes}"
        )


def check_validation_size(images: int, processes: int) -> None:
    """Raise ConfigError unless each process has at least one image of the validation split."""
    if images < processes:
        raise ConfigError(
            f"{images} validation images are fewer than the {processes} processes that share them. Start fewer "
            "processes, or give more images"
        )


def run_on_all(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run a function in each process. If one raises a UserError, all raise it after all have ended."""
    error: UserError | None = None
    try:
        action()
    except UserError as raised:
        error = raised
    for raised_in_one in gather_object([error]):
        if raised_in_one is not None:
            raise raised_in_one


def run_on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run a function in the main process only, and return its result in all processes.

    An error in one process only would leave the others waiting until a launcher ends them.

    Raises:
        UserError: in all processes, if the function raised it.
        StorageError: in all processes, if the function raised an OSError.
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
