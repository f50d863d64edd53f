"""The report at the end of a training, which is finished by then: nothing that goes wrong here may say otherwise."""

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
"""In the run's folder."""
PageOf = Callable[[RunFolder, torch.device], str]


def report_at_end(accelerator: Accelerator, wanted: bool, folder: Path, page_of: PageOf) -> None:
    """In the main process, write the run's page and print where it is; or why it is not, and how to make it.

    Ctrl-C and SIGTERM give up the report alone.
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
    except Exception as error:  # whatever it is, a stop by the user too: the weights are whole, and exit code 0 says so
        say(
            f"the report could not be written ({one_line(str(error))[:500] or type(error).__name__}); the training is "
            f"complete all the same: {format_command('sampling/report.py', folder)}"
        )
