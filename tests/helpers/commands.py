"""Commands inside a test: a script's main function, run and ended as `python SCRIPT ARGUMENTS` would be."""

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from stage1_tokenizer.engine.command import run_command

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def names_of(script: str) -> dict[str, Any]:
    """The globals of a fresh copy of a script, e.g. "stage2_prior/train.py"; what is replaced in them, `main` sees."""
    main = runpy.run_path(str(ROOT / script), run_name="tessera_script")["main"]
    names: dict[str, Any] = main.__globals__
    return names


def run(main: Callable[[], None], *arguments: object) -> Ended:
    """Run a main function in this process, alone, on CPU in float32 and one thread. Other exceptions pass through."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # A number of threads other than 1 is left alone by start_accelerator.
    settings = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    try:
        with (
            mock.patch.dict(os.environ, settings),
            mock.patch.object(sys, "argv", ["script", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            run_command(main)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return Ended(code, out.getvalue(), err.getvalue())


def lone_accelerator() -> Accelerator:
    """An accelerator of one process on CPU, in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, mixed_precision="no")


def run_script(_: Accelerator | None, script: str, *arguments: object) -> None:
    """A script's main function with these arguments; to be called by run_processes."""
    sys.argv = [script, *map(str, arguments)]
    names_of(script)["main"]()
