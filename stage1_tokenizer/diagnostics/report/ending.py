"""The report at the end of a training. The weights are already written, so an error here does not fail the training."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder, open_run
from stage1_tokenizer.engine.console import format_command, say
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.precision import device_of_float64
from stage1_tokenizer.engine.signals import stop_at_once

REPORT = "report.html"
"""File name of the page in the run's folder."""
PageOf = Callable[[RunFolder, torch.device], str]


def report_at_end(accelerator: Accelerator, wanted: bool, folder: Path, page_of: PageOf) -> None:
    """Write the run's page in the main process and print its path, or the reason why it could not be written.

    Ctrl-C and SIGTERM stop only the report.
    """
    if not (wanted and accelerator.is_main_process):
        return
    stop_at_once("stopped")
    try:
        say("writing the report ...")
        run = open_run(folder)
        path = run.path / REPORT
        write_file(path, page_of(run, device_of_float64(accelerator.device)).encode())
        say(f"report: {path}")
    except Exception as error:  # any error, and a stop by the user: the training is complete, and its exit code is 0
        say(
            f"the report could not be written ({one_line(str(error))[:500] or type(error).__name__}); the training is "
            f"complete. To write the report: {format_command('sampling/report.py', folder)}"
        )
