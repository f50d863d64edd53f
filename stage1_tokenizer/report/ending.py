"""The report at the end of a training, which is finished by then: nothing that goes wrong here may say otherwise."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from stage1_tokenizer.data.bad_files import one_line

Write = Callable[[Path, torch.device], Path]


def report_at_end(accelerator: Accelerator, wanted: bool, folder: Path, write: Write) -> None:
    """In the main process, write the run's report and print where it is; or why it is not, and how to make it."""
    if not (wanted and accelerator.is_main_process):
        return
    try:
        print(f"report: {write(folder, accelerator.device)}")
    except Exception as error:  # whatever it is, a stop by the user too: the weights are whole, and exit code 0 says so
        print(
            f"the report could not be written ({one_line(str(error))[:500] or type(error).__name__}); the training is "
            f"complete all the same: python sampling/report.py {folder}"
        )
