"""docs/weights.md, its trained models and from the exports on: commands and Python run on tiny models."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.engine import pretrained
from tests.helpers.artefacts import write_prior, write_tokenizer
from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.documents import blocks_of, commands_of

PAGE = (ROOT / "docs/weights.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a tokenizer of 8x8 codes of 256 at the page's path, and three photos."""
    data = {"kind": "shapes", "image_size": (32, 32)}
    write_tokenizer(tmp_path / "runs/stage1/NAME", bottleneck=VqConfig(kmeans_init=False), data=data)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"photos/{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("heading", ["Run a tokenizer without this package", "Codes for other programs"])
def test_a_section(folder: Path, heading: str) -> None:
    """The commands print what the page shows, and its Python runs after them."""
    blocks = blocks_of(PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0])
    printed, names = "", dict[str, Any]()
    for script, arguments in commands_of("\n".join(block.text for block in blocks if not block.language)):
        ended = run(names_of(script)["main"], *arguments)
        assert ended.code == 0, (script, ended.err)
        printed += ended.out
    for block in blocks:
        if block.language == "text":
            assert block.text.strip() in printed
        if block.language == "python":
            exec(block.text, names)
    if "codes" in names:  # of the images of the export
        assert np.shape(names["codes"]) == (4, 8, 8, 1)
        assert np.shape(names["again"]) == (4, 3, 32, 32)
    else:
        assert np.shape(names["images"]) == (3, 32, 32, 3)
        assert sorted(os.listdir(folder / "decoded")) == ["0.png", "1.png", "2.png"]


def test_the_trained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command runs with a model of the package, and the folder in half the bytes is printed as the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
    write_prior(tmp_path / "package/shapes")
    write_prior(tmp_path / "runs/stage2/NAME")
    blocks = blocks_of(PAGE.split("\n## Trained models of this package\n")[1].split("\n## ")[0])
    printed, names = "", dict[str, Any]()
    for script, arguments in commands_of("\n".join(block.text for block in blocks if not block.language)):
        ended = run(names_of(script)["main"], *arguments)
        assert ended.code == 0, (script, ended.err)
        printed += ended.out
    for block in blocks:
        if block.language == "text":
            assert all(line in printed for line in block.text.splitlines()), printed
        if block.language == "python":
            exec(block.text, names)
    assert np.shape(names["images"]) == (4, 8, 12, 3)
    made = sorted(path.name for path in Path("runs/pretrained/shapes").iterdir())
    assert made == ["completed", "generated", "reconstructed"]
