"""Reading a config: precedence, kinds, errors, and help."""

import itertools
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field, PositiveInt, ValidationError

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.config.base import (
    CommandConfig,
    Config,
    config_from_json,
    differences,
    merge,
    parse_command_line,
    write_yaml,
)
from stage1_tokenizer.config.value_types import Size
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.networks import NetworkConfig

TRAIN = Path(__file__).resolve().parents[3] / "stage1_tokenizer" / "train.py"


class Apple(Config):
    """A kind."""

    kind: Literal["apple"] = "apple"
    weight: float = 1.0
    worms: int = 3


class Pear(Config):
    """Another kind, with another default for the common key and a required key of its own."""

    kind: Literal["pear"] = "pear"
    weight: float = 2.0
    stem: str


class Basket(CommandConfig):
    """A small command."""

    count: PositiveInt = 1
    ripe: bool = True
    name: str | None = None
    size: Size = (8, 8)
    span: tuple[float, float] | None = (0.0, 1.0)
    fruit: Annotated[Apple | Pear, Field(discriminator="kind")] = Apple(weight=7.0)


Parse = Callable[..., Basket]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """parse(yaml or None, *argv) -> Basket; each element of argv may have several words."""

    def call(yaml: str | None, *argv: str) -> Basket:
        words = [word for flags in argv for word in flags.split()]
        if yaml is not None:
            (tmp_path / "c.yaml").write_text(yaml)
            words += ["--config", str(tmp_path / "c.yaml")]
        return parse_command_line(Basket, words)

    return call


@pytest.fixture(scope="module")
def train_config() -> type[CommandConfig]:
    """The config class of stage one's train.py."""
    found: type[CommandConfig] = runpy.run_path(str(TRAIN), run_name="train")["TrainTokenizerConfig"]
    return found


def test_command_line_beats_yaml_beats_defaults(tmp_path: Path) -> None:
    """Each source overrides only the keys that it names, and options come in any order."""
    (tmp_path / "c.yaml").write_text("count: 2\nname: b\nfruit: {worms: 5}")
    flags = [["--config", str(tmp_path / "c.yaml")], ["--count", "3"], ["--fruit.worms", "9"], ["--no-ripe"]]
    for order in itertools.permutations(flags):
        config = parse_command_line(Basket, [word for flag in order for word in flag])
        assert (config.count, config.name, config.ripe, config.size) == (3, "b", False, (8, 8))
        assert config.fruit == Apple(weight=7.0, worms=9)
    assert parse_command_line(Basket, []) == Basket()


@pytest.mark.parametrize(
    ("yaml", "argv", "expected"),
    [
        (None, ["--fruit.kind pear", "--fruit.stem s"], Pear(stem="s")),
        (None, ["--fruit.stem s", "--fruit.kind pear"], Pear(stem="s")),
        ("fruit: {kind: pear, stem: s}", [], Pear(stem="s")),
        ("fruit: {kind: pear, stem: s}", ["--fruit.stem t"], Pear(stem="t")),
        ("fruit: {worms: 5}", ["--fruit.kind pear", "--fruit.stem s"], Pear(stem="s")),
        ("fruit: {kind: pear, stem: s, weight: 4}", ["--fruit.kind apple"], Apple()),
        ("fruit: {kind: apple, worms: 5}", ["--fruit.kind apple"], Apple(weight=7.0, worms=5)),
    ],
)
def test_another_kind_drops_the_old_keys(parse: Parse, yaml: str | None, argv: list[str], expected: Config) -> None:
    """A default or a value for one kind never reaches another kind, whichever source chooses it."""
    assert parse(yaml, *argv).fruit == expected


@pytest.mark.parametrize(
    ("yaml", "argv", "words"),
    [
        (None, ["--cuont 3"], ["--cuont", "did you mean --count"]),
        (None, ["--coun 3"], ["--coun", "did you mean --count"]),
        (None, ["--fruit.wight 3"], ["--fruit.wight", "did you mean --fruit.weight"]),
        (None, ["--worms 3"], ["--worms", "did you mean --fruit.worms"]),
        ("fruit: {wight: 3}", [], ["fruit.wight", "did you mean fruit.weight"]),
        ("fruit: {kind: pear, setm: s}", [], ["fruit.setm", "did you mean fruit.stem", "fruit.stem: is required"]),
        (None, ["--count many"], ["count", "'many'", "integer"]),
        ("count: 0", [], ["count", "got 0"]),
        ("fruit: {worms: some}", [], ["fruit.worms", "'some'"]),
        (None, ["--fruit.kind plum"], ["fruit.kind", "'plum'", "apple, pear"]),
        ("fruit: {kind: [apple]}", [], ["fruit.kind", "['apple']", "apple, pear"]),
        ("fruit: apple", [], ["fruit", "'apple'"]),
        (None, ["--fruit.kind pear"], ["fruit.stem", "required", "--fruit.stem"]),
        (None, ["--size 1,2,3"], ["size", "[1, 2, 3]"]),
        ("count: x\nsize: y", ["--fruit.worms z"], ["count", "'x'", "size", "'y'", "fruit.worms", "'z'"]),
        (None, ["--config nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        ("- 1", [], ["c.yaml", "list", "mapping"]),
        ("a: [1", [], ["c.yaml", "not YAML"]),
        ("\tcount: 1", [], ["c.yaml", "not YAML"]),
        ("3: 4", [], ["3: "]),
    ],
)
def test_an_error_says_what_and_where(parse: Parse, yaml: str | None, argv: list[str], words: list[str]) -> None:
    """The message has the dotted key, the value, and the nearest known key."""
    with pytest.raises(ConfigError) as caught:
        parse(yaml, *argv)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_key_of_another_kind_is_not_its_own_advice(parse: Parse) -> None:
    """The message 'There is no fruit.worms; did you mean fruit.worms?' would not help the user."""
    with pytest.raises(ConfigError) as caught:
        parse("fruit: {kind: pear, stem: s}", "--fruit.worms 3")
    assert "fruit.worms" in str(caught.value)
    assert "did you mean fruit.worms" not in str(caught.value)


def test_a_tuple_can_be_null_on_the_command_line(parse: Parse) -> None:
    """The help says that `--data.size null` chooses the original shapes."""
    assert parse(None, "--span null").span is None


@pytest.mark.parametrize("word", ["-n", "stray"])
def test_an_unknown_word_is_shown_as_it_was_typed(parse: Parse, word: str) -> None:
    """A message about `---n` or `--stray` would name something that the user never wrote."""
    with pytest.raises(ConfigError, match=rf"(^|\s){word}: ") as caught:
        parse(None, word)
    assert f"-{word}" not in str(caught.value)


def test_one_number_is_a_square(parse: Parse) -> None:
    """A size is (height, width), in this order, from every source."""
    assert parse(None, "--size 64").size == parse("size: 64").size == parse("size: [64]").size == (64, 64)
    assert parse(None, "--size 64,48").size == parse("size: [64, 48]").size == (64, 48)


def test_a_config_cannot_be_changed() -> None:
    """The config that ran is the config that was saved."""
    with pytest.raises(ValidationError, match="frozen"):
        Basket().count = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        Basket().fruit.weight = 2.0  # type: ignore[misc]


def test_a_tree_survives_the_file_and_the_header(tmp_path: Path, train_config: type[CommandConfig]) -> None:
    """The config in a run's folder and in the header of its weights is the config that ran, for all kinds."""
    chosen = "--data.kind folder --data.root r --data.image_size 64,48 --network.kind vqgan --bottleneck.kind none"
    for argv in ([], ["--data.palette", "null", "--bottleneck.update", "gradient"], chosen.split()):
        config = parse_command_line(train_config, argv)
        write_yaml(tmp_path / "c.yaml", config.tree())
        again = parse_command_line(train_config, ["--config", str(tmp_path / "c.yaml")])
        assert again.model_copy(update={"config": None}) == config
        assert differences(config.tree(), again.model_copy(update={"config": None}).tree()) == []
        assert config_from_json(train_config, config.model_dump_json(by_alias=True), "f") == config
    for text in (None, "", "[1]", "{", '{"steps": 0}', '{"unknown": 1}'):
        with pytest.raises(BadFileError, match=r"^f: .*TrainTokenizerConfig"):
            config_from_json(train_config, text, "f")


def test_merge_and_differences_edit_nothing() -> None:
    """Callers use both trees afterwards; differences names the dotted key, the old value and the new value."""
    old: dict[str, Any] = {"a": {"kind": "x", "k": 1, "deep": {"m": 1}}, "b": 2}
    new = merge(old, {"a": {"deep": {"m": 5}}, "c": 3})
    assert old == {"a": {"kind": "x", "k": 1, "deep": {"m": 1}}, "b": 2}
    assert differences(old, new) == ["a.deep.m: 1 -> 5", "c: null -> 3"]
    assert merge(old, {"a": {"kind": "y"}}) == {"a": {"kind": "y"}, "b": 2}


def test_help_lists_every_option(train_config: type[CommandConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """-h lists each key that a YAML file may have, with the docstring under the field."""
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_command_line(train_config, ["-h"])
    text = capsys.readouterr().out
    unions = {"data": DataConfig, "network": NetworkConfig, "bottleneck": BottleneckConfig}
    keys = {
        f"{name}.{key}"
        for name, kinds in unions.items()
        for kind in get_args(get_args(kinds)[0])
        for key in kind.model_fields
    }
    keys |= {"steps", "optim.lr", "adversarial.discriminator.layers", "data.root", "bottleneck.revive_below"}
    assert keys - set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE)) == set()
    assert "Peak learning rate." in text


def test_help_shows_the_default_kind(train_config: type[CommandConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """-h of pydantic-settings says `--data.kind (default: folder)` although the default is shapes."""
    with pytest.raises(SystemExit):
        parse_command_line(train_config, ["-h"])
    shown = dict(re.findall(r"^  --(\w+)\.kind .*\s+\(default: (\w+)\)", capsys.readouterr().out, re.MULTILINE))
    defaults = parse_command_line(train_config, []).tree()
    assert shown == {name: defaults[name]["kind"] for name in ("data", "network", "bottleneck")}


def test_a_choice_among_numbers_can_be_made_on_the_command_line(train_config: type[CommandConfig]) -> None:
    """Each value of a command line is a word, and "1" is not one of the numbers 1 and 3."""
    words = ["--data.kind", "folder", "--data.root", "pictures", "--data.channels"]
    assert parse_command_line(train_config, [*words, "1"]).tree()["data"]["channels"] == 1
    with pytest.raises(ConfigError, match=r"data\.channels.*1 or 3, got '2'"):
        parse_command_line(train_config, [*words, "2"])
