"""One page about a run, or several runs side by side.   python sampling/report.py [RUN] [RUN ...]

what the run's folder holds, what its tokenizer does with validation pictures, what was sampled since -> RUN/report.html

The file is self-contained: it can be opened from anywhere, and sent to anybody. Of several runs the page compares their
figures, curves, settings and pictures.
"""

from pathlib import Path

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from sampling.report_comparison import comparison_page
from sampling.report_outputs import output_sections
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.diagnostics.report.ending import REPORT
from stage1_tokenizer.diagnostics.report.run_folder import CONFIG, RunFolder, open_run
from stage1_tokenizer.diagnostics.report.tokenizer import tokenizer_page
from stage1_tokenizer.engine.checkpoint import write_file
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.report import prior_page, run_kind

COMPARISON = "comparison.html"
MOST = 8
"""Runs side by side: there are that many colours."""


class ReportConfig(CommandConfig):
    """Write a page about a run; about several, one that compares them."""

    runs: CliPositionalArg[tuple[str, ...]] = Field((), max_length=MOST)
    """Runs' folders, of either stage; none: the newest run under runs/."""
    root: str | None = None
    """Where the images of the training are now; null: where they were then."""
    out: str | None = None
    """The file to write; default: report.html in the run's folder, and for several runs comparison.html here."""


def main() -> None:
    config = parse_command_line(ReportConfig)
    paths = config.runs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [open_run(path, PRIOR_FILE) for path in paths or [newest_of_both(Path("runs"))]]
    names = [run.path.resolve() for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError("RUN: the same run is named twice; a comparison needs different ones")
    if len(runs) == 1:
        path = Path(config.out) if config.out else runs[0].path / REPORT
        page = page_of(runs[0], device, config.root)
    else:
        path = Path(config.out or COMPARISON)
        page = comparison_page(runs, device, config.root)
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder, not a file; name the page in it, e.g. {path / REPORT}")
    write_file(path, page.encode())
    print(f"report: {one_line(str(path))}")


def page_of(run: RunFolder, device: torch.device, root: str | None) -> str:
    """The page of one run, with what was sampled from it since."""
    make = prior_page if run_kind(run) == "prior" else tokenizer_page
    return make(run, device, root, output_sections(run))


def newest_of_both(folder: Path) -> Path:
    """The run of either stage whose configuration or weights were written last. Raises ConfigError: there is none."""
    files = [file for name in (CONFIG, "*.safetensors") for file in folder.glob(f"stage?/*/{name}")]
    if not files:
        raise ConfigError(
            f"there is no run to report on: nothing in {folder}/stage1 and {folder}/stage2; name its folder"
        )
    return max(files, key=lambda file: file.stat().st_mtime).parent


if __name__ == "__main__":
    run_command(main)
