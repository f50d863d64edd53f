"""Suggestions in messages about unknown options."""

from functools import cache

import pytest

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.error_messages import _keys
from stage1_tokenizer.config.suggestions import ACCELERATE_NAMES, OTHER_NAMES
from stage1_tokenizer.engine.errors import ConfigError
from tests.helpers.commands import names_of

COMMANDS = {
    "stage1_tokenizer/train.py": "TrainTokenizerConfig",
    "stage2_prior/train.py": "TrainPriorConfig",
    "stage1_tokenizer/compare.py": "CompareConfig",
    "sampling/generate.py": "GenerateConfig",
    "sampling/complete.py": "CompleteConfig",
    "sampling/evaluate.py": "EvaluateConfig",
}


@cache
def config_of(script: str) -> type[CommandConfig]:
    """Return the config class of a script."""
    found: type[CommandConfig] = names_of(script)[COMMANDS[script]]
    return found


ONE, TWO, MAKE = "stage1_tokenizer/train.py", "stage2_prior/train.py", "sampling/generate.py"


@pytest.mark.parametrize(
    ("script", "typed", "meant"),
    [
        (ONE, "--lr", "did you mean --optim.lr?"),
        (TWO, "--learning_rate", "did you mean --optim.lr?"),
        (TWO, "--learning-rate", "did you mean --optim.lr?"),
        (ONE, "--epochs", "did you mean --steps? (a training's length is counted in steps)"),
        (ONE, "--resolution", "did you mean --data.image_size?"),
        (MAKE, "--resolution", "did you mean --size?"),
        (ONE, "--data-dir", "did you mean --data.root?"),
        (ONE, "--levels", "did you mean --bottleneck.levels?"),
        (ONE, "--gradient_accumulation", "did you mean --accumulation?"),
        (ONE, "--weight", "--adversarial.weight"),
        (TWO, "--n_layer", "did you mean --prior.layers?"),
        (MAKE, "--cfg_scale", "did you mean --guidance?"),
        (MAKE, "--num_samples", "did you mean -n?"),
        (MAKE, "--classes", "did you mean --class?"),
        (MAKE, "--ckpt", "did you mean --prior?"),
        (ONE, "--fp16", "`accelerate launch --mixed_precision bf16 SCRIPT ...`"),
        (ONE, "--device", "`accelerate launch --cpu SCRIPT ...`"),
        (ONE, "\u2013-steps", "did you mean --steps?"),
        (ONE, "--optim.learning_rate", "did you mean --optim.lr?"),
    ],
    ids=str,
)
def test_the_option_that_was_meant_is_named(script: str, typed: str, meant: str) -> None:
    """Well-known names of other programs find our option; similar spelling alone gives `adversarial.lr` for `--lr`."""
    with pytest.raises(ConfigError) as caught:
        parse_command_line(config_of(script), [typed, "1"])
    assert meant in str(caught.value)


def test_a_hint_names_what_there_is() -> None:
    """All options in the table exist, and no option is in its own list of names."""
    known = {key for script in COMMANDS for key in _keys(config_of(script))}
    assert sorted(OTHER_NAMES.keys() - known) == []
    assert [key for key, names in OTHER_NAMES.items() if key in names] == []
    assert set(ACCELERATE_NAMES)
    assert all(len(set(names)) == len(names) for names in OTHER_NAMES.values())


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--data.root X", "give --data.kind folder too"),
        ("--data.download", "data.kind cifar10, mnist, fashion_mnist, but the kind is shapes"),
        ("--bottleneck.levels 8,8", "give --bottleneck.kind fsq too"),
        ("--bottleneck.kind vqq", "did you mean vq?"),
    ],
    ids=str,
)
def test_a_key_of_another_kind_names_the_kind(words: str, meant: str) -> None:
    """A user who gives a root has a folder of images, so the message names that kind."""
    with pytest.raises(ConfigError) as caught:
        parse_command_line(config_of(ONE), words.split())
    assert meant in str(caught.value)
