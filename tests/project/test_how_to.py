"""docs/how_to.md, executed: each command runs on tiny models, and prints the lines that the page shows."""

import re
import shutil
from pathlib import Path

import pytest

from stage1_tokenizer.engine import pretrained
from tests.helpers.artefacts import write_image_folder
from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.documents import blocks_of, commands_of

PAGE = (ROOT / "docs/how_to.md").read_text(encoding="utf-8")
NOT_RUN = {
    "A preset": "downloads CIFAR-10; tests/project/test_presets.py runs every preset",
    "A VQGAN": "downloads LPIPS's backbone; tests/stage1_tokenizer/test_training_kinds.py trains one",
    "Several tokenizers in one table": "downloads MNIST; tests/stage1_tokenizer/test_compare.py",
    "In the browser": "goes on until it is stopped; tests/sampling/playground/",
    "The curves of a training while it runs": "is TensorBoard's",
    "A tokenizer's rFID and LPIPS, a prior's FID": "downloads Inception; tests/sampling/evaluation/",
    "A misspelt option": "tests/stage1_tokenizer/config/test_hints.py",
    "Several GPUs, mixed precision, compilation": "needs several GPUs; tests/machines/",
}
ELLIPSIS = "…"
TINY_TRAINING = "--steps 4 --batch_size 4 --validate_every 4"
TINY_SHAPES = "--data.train_images 12 --data.validation_images 6"
TINY_NETWORK = "--network.channels 8 --network.residual_channels 4"


def sections() -> dict[str, str]:
    """Heading of each entry -> its text."""
    parts = re.split(r"^### (.*)$", PAGE, flags=re.MULTILINE)
    texts = [re.split(r"^## ", text, flags=re.MULTILINE)[0] for text in parts[2::2]]
    return dict(zip(parts[1::2], texts, strict=True))


def made_small(script: str, arguments: list[str]) -> list[str]:
    """The arguments, with options that make a command take a second."""
    words = list(arguments)
    if script.endswith("/train.py"):
        words += TINY_TRAINING.split()
    if script == "stage1_tokenizer/train.py":
        words += TINY_NETWORK.split() + ([] if "--data.kind" in words else TINY_SHAPES.split())
    if script == "stage2_prior/train.py":
        words += ["--prior.layers", "1", "--prior.width", "16"]
        words += [] if "--prior.kind" in words else ["--prior.heads", "2"]
    return words


def without_numbers(text: str) -> list[str]:
    """Lines of a text, each number as 0 and each space once."""
    lines = [re.sub(r"\d[\d,.]*", "0", line) for line in text.replace("...", ELLIPSIS).splitlines()]
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def is_printed(shown: str, printed: list[str]) -> bool:
    """True if a line of the page is among the printed ones; `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in shown.split(ELLIPSIS))
    return any(re.fullmatch(pattern, line) for line in printed)


def test_each_entry_has_a_command_and_what_it_prints() -> None:
    """Whoever reads an entry can compare."""
    assert set(sections()) >= set(NOT_RUN)
    for title, text in sections().items():
        languages = {block.language for block in blocks_of(text)}
        assert languages & {"", "python"} or title == "A misspelt option", title
        assert "text" in languages or "python" in languages or title in NOT_RUN, title


@pytest.mark.slow
def test_each_command_prints_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries run from first to last in one folder. Numbers may differ, words may not."""
    monkeypatch.chdir(tmp_path)
    classes = ("daisy", "dandelion", "rose", "sunflower", "tulip")
    write_image_folder(tmp_path / "PATH/flowers", classes, size=(64, 64))
    problems = ""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
    for title, text in sections().items():
        if title in NOT_RUN:
            continue
        if "pretrained:shapes" in text:
            shutil.copytree("runs/stage2/shapes_vq_gpt", "package/shapes")
        printed: list[str] = []
        for block in blocks_of(text):
            if block.language == "python":
                exec(block.text, {})
            for script, arguments in commands_of(block.text) if not block.language else ():
                ended = run(names_of(script)["main"], *made_small(script, arguments))
                assert ended.code == 0, (title, ended.err)
                printed += without_numbers(ended.out + ended.err)
        shown = [line for block in blocks_of(text) if block.language == "text" for line in without_numbers(block.text)]
        absent = [line for line in shown if not is_printed(line, printed)]
        if absent:
            problems += "\n".join([f"\n{title} shows", *absent, "but it prints", *printed])
    assert not problems, problems
