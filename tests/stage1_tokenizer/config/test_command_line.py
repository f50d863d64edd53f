"""Command lines: any text arrives as typed, and the last value of an option counts."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic_settings import CliPositionalArg

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.value_types import Limit, Size, Texts
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.data.torchvision_sets import Cifar10Config
from stage1_tokenizer.engine.errors import ConfigError


class Command(CommandConfig):
    """Options of every type."""

    data: DataConfig = ShapesConfig()
    paths: CliPositionalArg[tuple[str, ...]] = ()
    number: int = 1
    share: float = 0.5
    text: str | None = None
    choice: Literal["a", "b"] = "a"
    flag: bool = False
    on: bool = True
    levels: tuple[int, ...] = (1,)
    most: Limit = None
    names: Texts | None = None
    size: Size = (1, 1)


class Bare(Command):
    """The same options, without words that belong to no option."""

    paths: tuple[str, ...] = ()


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
    """For every type the last value counts, and a line names the value that does not."""
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
    """As one value, and as one of several paths: the parser alone would split, strip or refuse it."""
    found = parse_command_line(Command, ["--number", "5", f"--text={text}", *ODD])
    assert (found.text, found.paths, found.number) == (text, tuple(ODD), 5)
    data = parse_command_line(Command, ["--data.kind", "folder", "--data.root", text]).data
    assert isinstance(data, FolderConfig)
    assert data.root == text


def test_keys_of_a_file_that_do_not_count_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line names a preset's `flip: true` if the command line chooses another kind of data."""
    file = tmp_path / "x.yaml"
    file.write_text("data:\n  kind: cifar10\n  flip: true\n  image_size: [32, 32]\n")
    found = parse_command_line(
        Command, ["--config", str(file), "--data.kind", "shapes", "--data.image_size", "16"]
    ).data
    assert (found.kind, found.flip, found.image_size) == ("shapes", False, (16, 16))
    said = capsys.readouterr().err
    assert "data.kind shapes replaces cifar10" in said
    assert "data.flip true" in said
    assert "image_size" not in said
    same = parse_command_line(Command, ["--config", str(file), "--data.workers", "2"]).data
    assert isinstance(same, Cifar10Config)
    assert (same.flip, same.workers, capsys.readouterr().err) == (True, 2, "")


@pytest.mark.parametrize(
    ("key", "words", "value"),
    [
        ("flag", ["--flag", "true"], True),
        ("flag", ["--flag=yes"], True),
        ("flag", ["--flag", "False"], False),
        ("on", ["--on", "off", "--number", "2"], False),
        ("on", ["--no-on", "true"], False),
        ("on", ["--no-on", "false"], True),
        ("size", ["--size", "64x96"], (64, 96)),
        ("size", ["--size", "64X96"], (64, 96)),
        ("size", ["--size=64\u00d796"], (64, 96)),
        ("size", ["--size", "64", "96"], (64, 96)),
        ("size", ["--size", "[64, 96]"], (64, 96)),
        ("levels", ["--levels", "8", "5", "5", "--number", "2"], (8, 5, 5)),
        ("most", ["--most", "0"], None),
        ("most", ["--most", "3"], 3),
        ("text", ["--text", "two", "--number", "2"], "two"),
    ],
    ids=str,
)
def test_the_forms_that_people_type_are_taken(key: str, words: list[str], value: Any) -> None:
    """Each form can mean one thing only."""
    assert getattr(parse_command_line(Bare, words), key) == value


@pytest.mark.parametrize("value", ["true", "64x96", "0"])
def test_the_same_forms_in_a_file(value: str, tmp_path: Path) -> None:
    """A value means the same in a file and on the command line."""
    key = {"true": "flag", "64x96": "size", "0": "most"}[value]
    (tmp_path / "x.yaml").write_text(f"{key}: {value}\n")
    found = parse_command_line(Bare, ["--config", str(tmp_path / "x.yaml")])
    assert found.tree()[key] == parse_command_line(Bare, [f"--{key}", value]).tree()[key]


def test_an_option_that_collects_texts_collects_them(capsys: pytest.CaptureFixture[str]) -> None:
    """`--class a --class b` is two classes; a comma may be a part of a name; one text stays one text."""
    assert parse_command_line(Bare, ["--names", "a", "--names", "b,c"]).names == ("a", "b,c")
    assert parse_command_line(Bare, ["--names", "a", "b"]).names == ("a", "b")
    assert parse_command_line(Bare, ["--names=a,b"]).names == "a,b"
    assert parse_command_line(Bare, ["--names", "null"]).names is None
    assert Bare.from_tree({"names": [1, "b"]}).names == ("1", "b")
    assert Bare.from_tree({"names": ["b"]}).names == "b"
    assert capsys.readouterr().err == ""


def test_dashes_in_an_option_are_underscores() -> None:
    """Most programs write `--top-p`."""
    data = parse_command_line(Bare, ["--data.train-images", "5"]).data
    assert isinstance(data, ShapesConfig)
    assert data.train_images == 5


@pytest.mark.parametrize("words", [["--text", "--number", "2"], ["--number"]])
def test_a_value_that_was_forgotten_is_asked_for(words: list[str]) -> None:
    """The next option is not a value: else a folder `--number` would be made."""
    with pytest.raises(ConfigError, match="expected one argument"):
        parse_command_line(Bare, words)
