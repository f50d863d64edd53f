"""Options of `data` without a kind: they are laid over the data set that a run was trained on."""

import json
from collections.abc import Callable
from pathlib import Path

from stage1_tokenizer.config.base import Tree, merge
from stage1_tokenizer.data import DataConfig, data_config
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.model_files import read_data_tree


def with_own_data(tree: Tree, weights: Callable[[], Path | None]) -> Tree:
    """The tree with a whole `data`, where it has one without a kind.

    weights: finds the file whose header has the data set of the training; None: there is none.

    Raises:
        BadFileError: the file is damaged, or this version cannot read the data set in its header.
    """
    given = tree.get("data")
    if not isinstance(given, dict) or given.get("kind") is not None:
        return tree
    path = weights()
    if path is None:
        return tree
    own = own_data(path).tree()
    changed = ", ".join(f"data.{key} {json.dumps(value)}" for key, value in given.items())
    print_note(f"{changed}: for the data set of {path} (data.kind {own['kind']}), whose other keys stay")
    return {**tree, "data": merge(own, given)}


def own_data(weights: Path) -> DataConfig:
    """The data set of a training, from the header of its weights. Raises BadFileError as `with_own_data`."""
    return data_config(read_data_tree(read_tensors(weights)[1], str(weights)), str(weights))
