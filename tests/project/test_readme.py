"""README and docs: their commands run, their options and files exist."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from tests.helpers.commands import ROOT, names_of, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "stage1_tokenizer/train.py": "TrainTokenizerConfig",
    "stage1_tokenizer/analyze.py": "AnalyzeConfig",
    "stage1_tokenizer/compare.py": "CompareConfig",
    "sampling/check.py": "CheckConfig",
    "stage2_prior/train.py": "TrainPriorConfig",
    "stage2_prior/score.py": "ScoreConfig",
    "stage2_prior/plan.py": "PlanConfig",
    "sampling/generate.py": "GenerateConfig",
    "sampling/complete.py": "CompleteConfig",
    "sampling/reconstruct.py": "ReconstructConfig",
    "sampling/report.py": "ReportConfig",
    "sampling/summary.py": "SummaryConfig",
    "sampling/evaluate.py": "EvaluateConfig",
    "sampling/app.py": "AppConfig",
}
TINY_SHAPES = "--data.train_images 12 --data.validation_images 6 --network.channels 8 --network.residual_channels 4"


def documents() -> list[str]:
    return [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]


def commands() -> list[tuple[str, list[str]]]:
    """Return script and arguments of each command in README, docs and the configs' comments."""
    fenced = [found for text in documents() for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)]
    blocks = [block for language, block in fenced if not language]
    blocks += [path.read_text(encoding="utf-8").replace("#", "") for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    found = []
    text = re.sub(r"python -m (\w+)\.(\w+)", r"python \1/\2.py", "\n".join(blocks).replace("\\\n", " "))
    for line in text.splitlines():
        words = shlex.split(line, comments=True) if ".py" in line else []
        scripts = [index for index, word in enumerate(words) if word in SCRIPTS]
        if scripts:
            found.append((words[scripts[0]], words[scripts[0] + 1 :]))
    return found


def config_class(script: str) -> type[CommandConfig]:
    cls: type[CommandConfig] = names_of(script)[SCRIPTS[script]]
    return cls


def test_every_command_that_the_documents_show_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command parses, so no option is misspelt or removed."""
    monkeypatch.chdir(ROOT)
    found = commands()
    assert {script for script, _ in found} >= set(SCRIPTS) - {"sampling/summary.py"}
    for script, arguments in found:
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        config = parse_command_line(config_class(script), own)
        for preset in getattr(config, "presets", ()):  # the other words are for each training
            words = ["--config", f"configs/stage1/{preset}.yaml", *arguments[len(own) + 1 :]]
            parse_command_line(config_class("stage1_tokenizer/train.py"), words)


def test_every_option_in_the_readmes_table_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's second column is options of the stage-one trainer, unless it names accelerate."""
    monkeypatch.chdir(ROOT)
    cells = re.findall(r"^\|[^|]*\| `(--[^`]*)`", README, flags=re.MULTILINE)
    assert len(cells) >= 6
    for cell in cells:
        parse_command_line(config_class("stage1_tokenizer/train.py"), cell.split())


def test_every_config_file_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset parses."""
    monkeypatch.chdir(ROOT)
    for stage, script in (("stage1", "stage1_tokenizer/train.py"), ("stage2", "stage2_prior/train.py")):
        paths = sorted((ROOT / "configs" / stage).glob("*.yaml"))
        assert paths
        for path in paths:
            parse_command_line(config_class(script), ["--config", str(path)])


def test_every_file_that_the_readme_names_exists() -> None:
    """Links, images and the map of the code point to existing files."""
    for path in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / name).exists(), (path.name, name)
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:stage1_tokenizer|stage2_prior|sampling|configs|docs)/[\w/.]*)`", README)
    assert links
    assert named
    for name in links + named:
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_three_commands_of_daily_use_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's own lines, with a few settings that make them small, make 64 images."""
    monkeypatch.chdir(tmp_path)
    block = README.split("## Three commands of daily use")[1].split("```")[1]
    small = {
        "stage1_tokenizer/train.py": f"{TINY_SHAPES} --steps 3 --batch_size 4",
        "stage2_prior/train.py": "--steps 3 --batch_size 4 --prior.layers 1 --prior.width 16 --prior.heads 2",
        "sampling/generate.py": "",
    }
    lines = [shlex.split(line) for line in block.strip().splitlines()]
    assert len(lines) == 3
    for words in lines:
        script = next(word for word in words if word in SCRIPTS)
        arguments = words[words.index(script) + 1 :] + small[script].split()
        ended = run(names_of(script)["main"], *arguments)
        assert ended.code == 0, ended.err
    out = tmp_path / "runs/stage2/shapes_vq_gpt/generated/001"
    assert sorted(path.name for path in out.glob("0*.png")) == [f"{index:06d}.png" for index in range(64)]
    with np.load(out / "samples.npz") as saved:
        assert saved["arr_0"].shape == (64, 32, 32, 3)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 8 * 32
