"""Statements of README and docs: their commands run, their options exist, their files and sections are there."""

import re
import shlex
import shutil
import unicodedata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.documents import PAGES, README, SCRIPTS, anchors_of, blocks_of, commands

CITING = ("stage1_tokenizer", "stage2_prior", "sampling", "configs", "docs")
TINY_SHAPES = "--data.train_images 12 --data.validation_images 6 --network.channels 8 --network.residual_channels 4"


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
        if "--init_from" in own:  # its file is read for the defaults; test_weights_document.py runs these commands
            place = own.index("--init_from")
            own = own[:place] + own[place + 2 :]
        config = parse_command_line(config_class(script), own)
        for preset in getattr(config, "presets", ()):  # the other words are for each training
            words = ["--config", f"configs/stage1/{preset}.yaml", *arguments[len(own) + 1 :]]
            parse_command_line(config_class("stage1_tokenizer/train.py"), words)


def test_every_option_in_a_table_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second column that begins with an option has options of stage one's training on a folder of images."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\|[^|]*\| `(--[^`]*)`", text, flags=re.MULTILINE)
    cells += re.findall(r"^\| `(--[^`]*)`", text, flags=re.MULTILINE)
    assert len(cells) >= 10
    for cell in cells:
        words = ["--data.kind", "folder", "--data.root", "PATH", *cell.split()]
        parse_command_line(config_class("stage1_tokenizer/train.py"), words)


def test_every_config_file_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset parses."""
    monkeypatch.chdir(ROOT)
    for stage, script in (("stage1", "stage1_tokenizer/train.py"), ("stage2", "stage2_prior/train.py")):
        paths = sorted((ROOT / "configs" / stage).glob("*.yaml"))
        assert paths
        for path in paths:
            parse_command_line(config_class(script), ["--config", str(path)])


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files exist, and so do the sections that an anchor names."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_every_file_that_is_named_is_there() -> None:
    """Paths between backticks in the README, and modules in the glossary and the sources."""
    named = re.findall(r"`((?:stage1_tokenizer|stage2_prior|sampling|configs|docs)/[\w/.]*)`", README)
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    for page in ("glossary.md", "sources.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        modules = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
        assert len(modules) >= 10
        roots = (ROOT, ROOT / "stage1_tokenizer", ROOT / "stage1_tokenizer/bottlenecks")
        assert [name for name in modules if not any((root / name).exists() for root in roots)] == [], page


def test_the_index_has_every_page() -> None:
    """One line leads to each page."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.md)\)", index)) == [page.name for page in PAGES if page.stem != "README"]


def test_every_bottleneck_is_described() -> None:
    """A kind that no page names is found by nobody."""
    kinds = [config.model_fields["kind"].default for config in get_args(get_args(BottleneckConfig)[0])]
    assert len(kinds) >= 10
    for page in ("how_to.md", "tokenizers.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert [kind for kind in kinds if f"`{kind}`" not in text] == [], page


def test_every_source_has_its_title() -> None:
    """Each `Author et al. YEAR` in code, configs and docs has a row in docs/sources.md."""
    files = [path for top in CITING for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    cited = {found for text in texts for found in re.findall(r"([A-Z][\w-]+) et al\.,? (\d{4})", text)}
    assert len(cited) >= 15
    rows = [
        row for row in ascii_of((ROOT / "docs/sources.md").read_text(encoding="utf-8")).splitlines() if row[:1] == "|"
    ]
    for author, year in sorted(cited):
        assert any(ascii_of(author) in row and year in row for row in rows), f"{author} {year}"


def ascii_of(text: str) -> str:
    """The text without accents, as some files write names."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@pytest.mark.slow
def test_the_three_commands_of_daily_use_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's own lines, with a few settings that make them small: from nothing to exactly 64 images. Then its
    Python lines, and the metrics that it shows."""
    monkeypatch.chdir(tmp_path)
    block = README.split("### Three commands of daily use")[1].split("```")[1]
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
    shutil.copytree(out, tmp_path / "photos", ignore=shutil.ignore_patterns("[!0]*"))  # the folder of the last lines
    for shown in blocks_of(README):
        if shown.language == "python":
            exec(shown.text, {})
    summary = run(names_of("sampling/summary.py")["main"], "--samples", 8, "--classifier_steps", 2)
    metrics = next(shown.text for shown in blocks_of(README) if shown.language == "text").splitlines()
    assert len(metrics) == 5
    for line in metrics:
        name = re.split(r"[\d.]*\d", line)[0].strip()
        assert name in summary.out
