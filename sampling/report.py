"""Write one page about a run, or a page that compares several.   python sampling/report.py [RUN] [RUN ...]

the run's folder, the tokenizer applied to validation images, samples and evaluations -> RUN/report.html

The page is one file that works without a network. For several runs it compares metrics, curves, settings and images.
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
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.files import write_file
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.report import prior_page, run_kind

COMPARISON = "comparison.html"
MOST_RUNS = 8
"""Runs side by side, at most: there are as many colours."""


class ReportConfig(CommandConfig):
    """Write a page about one run, or a page that compares several runs."""

    runs: CliPositionalArg[tuple[str, ...]] = Field((), max_length=MOST_RUNS)
    """Folders of runs, of either stage, or pretrained:NAME; none: the newest run under runs/."""
    root: str | None = None
    """Folder that now has the images of the training; null: the folder that the training used."""
    out: str | None = None
    """File to write; default: report.html in the run's folder, or comparison.html in the current folder."""


def main() -> None:
    """Write the page of one run, or the page that compares several."""
    config = parse_command_line(ReportConfig)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [open_run(path, PRIOR_FILE) for path in config.runs or [newest_of_both_stages(Path("runs"))]]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise ConfigError("RUN: the same run is named twice; a comparison needs different runs")
    if len(runs) == 1:
        path = Path(config.out) if config.out else runs[0].outputs / REPORT
        page = build_page(runs[0], device, config.root)
    else:
        path = Path(config.out or COMPARISON)
        page = comparison_page(runs, device, config.root)
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder, not a file; name a file in it, e.g. {path / REPORT}")
    write_file(path, page.encode())
    print(f"report: {one_line(str(path))}")


def build_page(run: RunFolder, device: torch.device, root: str | None) -> str:
    """Return the page of one run, with its samples and evaluations."""
    make_page = prior_page if run_kind(run) == "prior" else tokenizer_page
    return make_page(run, device, root, output_sections(run))


def newest_of_both_stages(folder: Path) -> Path:
    """Return the run, of either stage, with the newest configuration or weights. Raise ConfigError if there is none."""
    files = [file for name in (CONFIG, "*.safetensors") for file in folder.glob(f"stage?/*/{name}")]
    if not files:
        raise ConfigError(
            f"there is no run to report on: {folder}/stage1 and {folder}/stage2 hold none; name the folder of a run"
        )
    return max(files, key=lambda file: file.stat().st_mtime).parent


if __name__ == "__main__":
    run_command(main)
