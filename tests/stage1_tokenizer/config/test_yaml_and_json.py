"""YAML that is not a config, and values that a config may not have: one message, whatever the reader raises."""

import itertools
import os
from pathlib import Path

import pytest

from stage1_tokenizer.config.base import parse_command_line, read_saved_yaml, read_yaml, write_yaml
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, StorageError
from tests.stage1_tokenizer.config.test_config import Basket

NINE = [(this, ", ".join([f"*{before}"] * 9)) for before, this in itertools.pairwise("abcdefghij")]
LAUGHS = "\n".join(["a: &a [x, x]", *(f"{this}: &{this} [{nine}]" for this, nine in NINE)])
MERGED = "\n".join(["a: &a {x: 1}", *(f"{this}: &{this} {{<<: [{nine}]}}" for this, nine in NINE)])
BAD_YAML = {
    "billions of values": (LAUGHS, "more than 50,000 keys and values"),
    "billions of merged values": (MERGED, "more than 50,000 keys and values"),
    "within itself": ("count: &a [*a]", "more than 50 levels"),
    "merged into itself": ("&a {<<: *a}", "more than 50 levels"),
    "nested": ("{a: " * 5000, "nested too deeply"),
    "large": ("#" * 100_001, "more than 100,000 bytes"),
    "a date that is none": ("count: 2001-99-99", "is not YAML: month must be in 1..12"),
    "a long number": ("count: " + "1" * 5000, "is not YAML"),
    "a boolean that is none": ("ripe: !!bool maybe", "is not YAML"),
    "a time that is none": ("name: !!timestamp now", "is not YAML"),
    "an object": ("!!python/object/apply:os.getcwd []", "is not YAML"),
    "not UTF-8": ("count: \udcff", "is not YAML"),
    "twice": ("count: 1\nfruit: {worms: 1, worms: 2}", "worms is given 2 times"),
    "a list": ("- count", "is a list"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_file_that_is_no_config(name: str, tmp_path: Path) -> None:
    """Fault 31: whatever PyYAML raises, or would build, it is one message about the file; that of a run is a bad file,
    and not bad usage."""
    text, message = BAD_YAML[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=rf"(?s)^--config \S+c\.yaml: .*{message}") as caught:
        parse_command_line(Basket, ["--config", str(path)])
    assert len(str(caught.value)) < 1000
    with pytest.raises(BadFileError, match=rf"(?s)^/\S+c\.yaml: .*{message}"):
        read_saved_yaml(path)


@pytest.mark.parametrize(
    "yaml",
    [
        "{1: 2, null: 3, 2001-01-01: 4}",
        "{? [count] : 1}",
        "count: .nan",
        "count: .inf",
        "count: 0x" + "f" * 9000,
        "fruit: {weight: .inf}",
        "fruit: {weight: 1" + "0" * 400 + "}",
        "fruit: null",
        "fruit: [1]",
        "size: {a: 1}",
        "span: .nan",
        "name: " + "a" * 90_000 + "\ncount: " + "b" * 5000,
        "count: [" + "1, " * 20_000 + "]",
        "".join(f"key{i}: 1\n" for i in range(5000)),
        "? " + "k" * 5000 + "\n: 1",
    ],
)
def test_values_that_no_key_takes(yaml: str, tmp_path: Path) -> None:
    """Fault 31: the message is short even if the value is a whole file or cannot be printed."""
    (tmp_path / "c.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=r"^(in the configuration:\n|--config )") as caught:
        parse_command_line(Basket, ["--config", str(tmp_path / "c.yaml")])
    assert len(str(caught.value)) < 3000


def test_a_config_is_written_whole_and_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values are written without aliases, which confuse readers; an interrupted write leaves the old file."""
    both = [1, 2]
    write_yaml(tmp_path / "c.yaml", {"b": both, "a": both})
    assert (tmp_path / "c.yaml").read_text() == "---\nb:\n- 1\n- 2\na:\n- 1\n- 2\n...\n"

    def cut(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(StorageError, match=r"c\.yaml.*No space left"):
        write_yaml(tmp_path / "c.yaml", {"b": 1})
    assert read_yaml(tmp_path / "c.yaml") == {"b": [1, 2], "a": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
