"""The section of docs/weights.md about imports: its commands run on a fixture, and print what the page shows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.import_weights.families import FAMILIES
from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.documents import blocks_of, commands_of
from tests.helpers.foreign import FOREIGN

SECTION = (ROOT / "docs/weights.md").read_text(encoding="utf-8").split("\n## Import a tokenizer\n")[1].split("\n## ")[0]


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of the fixture of taming-transformers, then a reconstruction of a photo."""
    for name in ("last.ckpt", "model.yaml"):
        shutil.copy(FOREIGN / "taming_vqgan" / name, tmp_path)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(
        tmp_path / "photos/1.png"
    )
    monkeypatch.chdir(tmp_path)
    printed = ""
    commands = commands_of("\n".join(block.text for block in blocks_of(SECTION) if not block.language))
    assert len(commands) == 2
    for script, arguments in commands:
        ended = run(names_of(script)["main"], *arguments)
        assert ended.code == 0, (script, ended.err)
        printed += ended.out
    for block in blocks_of(SECTION):
        if block.language == "text":
            assert block.text in printed


def test_the_page_names_every_family() -> None:
    """Each family has a row of the table."""
    for name in FAMILIES:
        assert f"| `{name}` |" in SECTION
