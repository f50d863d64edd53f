"""Commands in a test: run a script's main function in this process, as `python SCRIPT ARGUMENTS` would."""

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
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def names_of(script: str) -> dict[str, Any]:
    """Return the globals of a fresh copy of a script, e.g. "stage2_prior/train.py"; tests may replace them."""
    main = runpy.run_path(str(ROOT / script), run_name="tessera_script")["main"]
    names: dict[str, Any] = main.__globals__
    return names


def run(main: Callable[[], None], *arguments: object) -> Ended:
    """Run a main function in this process, on CPU in float32 with one thread. Exceptions other than SystemExit pass."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # start_accelerator keeps any number of threads except 1.
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
    """Return an accelerator of one process on CPU, in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, mixed_precision="no")


def run_script(_: Accelerator | None, script: str, *arguments: object) -> None:
    """Run a script's main function with these arguments; for run_processes."""
    sys.argv = [script, *map(str, arguments)]
    names_of(script)["main"]()
