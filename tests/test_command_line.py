"""What is typed on a command line is what a command gets: any text, and of an option given twice the last value."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic_settings import CliPositionalArg

from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.data.torchvision_sets import Cifar10Config
from stage1_tokenizer.value_forms import Size


class Command(CommandConfig):
    """Options of every type."""

    data: DataConfig = ShapesConfig()
    paths: CliPositionalArg[tuple[str, ...]] = ()
    number: int = 1
    share: float = 0.5
    text: str | None = None
    choice: Literal["a", "b"] = "a"
    flag: bool = False
    size: Size = (1, 1)


@pytest.mark.parametrize(
    ("key", "words", "value"),
    [
        ("number", ["--number", "2", "--number=3"], 3),
        ("share", ["--share", "0.1", "--share", "-1"], -1.0),
        ("text", ["--text", "x", "--text", "y"], "y"),
        ("text", ["--text", "x", "--text", "null"], None),
        ("choice", ["--choice", "b", "--choice", "a"], "a"),
        ("flag", ["--flag", "--no-flag"], False),
        ("flag", ["--no-flag", "--flag"], True),
        ("size", ["--size", "32", "--size", "64"], (64, 64)),
        ("size", ["--size", "32,48", "--size=64,80"], (64, 80)),
    ],
    ids=str,
)
def test_the_last_one_counts_and_it_is_said(
    key: str, words: list[str], value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sizes made an oblong one; for every type the last value counts, alone, and the other is named."""
    assert getattr(parse_command_line(Command, words), key) == value
    assert "does not count" in capsys.readouterr().err


ODD = [
    "a,b",
    'say "hi"',
    '"',
    "'",
    "[x]",
    "{x",
    "two words",
    " x ",
    "007",
    "1e5",
    "true",
    "\u00e9\u0301",
    "-",
    "a=b",
    "\\n",
    "*",
]


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_taken_as_it_is_typed(text: str) -> None:
    """As a value, and as one of several paths: the parser alone would split, strip or refuse it."""
    found = parse_command_line(Command, ["--number", "5", f"--text={text}", *ODD])
    assert (found.text, found.paths, found.number) == (text, tuple(ODD), 5)
    data = parse_command_line(Command, ["--data.kind", "folder", "--data.root", text]).data
    assert isinstance(data, FolderConfig)
    assert data.root == text


def test_keys_of_a_file_that_do_not_count_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset's `flip: true` was dropped without a word where the command line chose another kind of data."""
    file = tmp_path / "x.yaml"
    file.write_text("data:\n  kind: cifar10\n  flip: true\n  image_size: [32, 32]\n")
    found = parse_command_line(
        Command, ["--config", str(file), "--data.kind", "shapes", "--data.image_size", "16"]
    ).data
    assert (found.kind, found.flip, found.image_size) == ("shapes", False, (16, 16))
    said = capsys.readouterr().err
    assert "data.kind shapes takes the place of cifar10" in said
    assert "data.flip true" in said
    assert "image_size" not in said
    same = parse_command_line(Command, ["--config", str(file), "--data.workers", "2"]).data
    assert isinstance(same, Cifar10Config)
    assert (same.flip, same.workers, capsys.readouterr().err) == (True, 2, "")
