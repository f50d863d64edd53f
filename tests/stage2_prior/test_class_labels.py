"""Classes in options: several at once, with commas in their names."""

import itertools

import numpy as np
import pytest

from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.class_labels import assign_labels, parse_classes

NAMES = ("cat", "dog", "a", "b", "a,b", "b,cat", "x, y")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("cat", ["cat"]),
        ("cat,dog", ["cat", "dog"]),
        ("cat, dog", ["cat", "dog"]),
        ("a,b", ["a,b"]),
        ("b,a", ["b", "a"]),
        ("a,b,cat", ["a,b", "cat"]),
        (("a", "b"), ["a", "b"]),
        (("a,b", "dog,cat"), ["a,b", "dog", "cat"]),
        ("x, y,dog", ["x, y", "dog"]),
        ("1,cat", ["dog", "cat"]),
        ("cat,cat,dog", ["cat", "cat", "dog"]),
    ],
    ids=str,
)
def test_several_classes_and_commas_in_names(given: str | tuple[str, ...], names: list[str]) -> None:
    """A whole name comes first, then the longest names that fit."""
    assert [NAMES[label] for label in parse_classes(given, NAMES)] == names


def test_any_list_of_classes_can_be_given() -> None:
    """Given one by one, every pair of classes is just that pair, whatever its names hold."""
    for pair in itertools.product(NAMES, repeat=2):
        assert [NAMES[label] for label in parse_classes(pair, NAMES)] == list(pair)


def test_the_class_that_does_not_exist_is_named() -> None:
    """The error names the unknown class of two; a text of many commas is refused at once."""
    with pytest.raises(ConfigError, match='class "bird": there is no such class'):
        parse_classes("cat,bird", NAMES)
    with pytest.raises(ConfigError, match="there is no such class"):
        parse_classes("a," * 20_000, NAMES)


def test_images_have_the_classes_in_turn() -> None:
    """The label depends on the image's number only, so that any part of the images can be made again."""
    assert assign_labels("dog,cat", NAMES, np.array([0, 1, 2, 7])).tolist() == [1, 0, 1, 0]
