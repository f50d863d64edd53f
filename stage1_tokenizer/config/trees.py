"""Trees of plain values out of YAML and JSON that may come from anybody: of bounded size, and refused in one way.

A few lines of YAML can stand for billions of values, or for a value within itself; a few kB of brackets, in YAML or in
JSON, overflow the interpreter's stack.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import yaml

from stage1_tokenizer.engine.errors import UserError

LARGEST_YAML = 100_000
"""Bytes of a config file; ours have some hundred."""
LARGEST_JSON = 4_000_000
"""Characters of a config in a header, which may name ten thousands of classes."""
MOST_NODES = 50_000
"""Keys and values of a tree."""
DEEPEST = 50
"""Trees within trees."""


def parse_yaml(data: bytes) -> Any:
    """What a YAML file says.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(data) > LARGEST_YAML:
        raise ValueError(f"has more than {LARGEST_YAML:,} bytes, which no config needs")
    try:
        return _construct(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("is not YAML: it is nested too deeply") from None
    except UserError:  # not of the text: a signal may have raised it here
        raise
    # PyYAML lets through whatever int, float, datetime and base64 raise about a value, KeyError and AttributeError too.
    except Exception as error:
        raise ValueError(f"is not YAML: {str(error)[:500]}") from None


def _construct(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is made of the nodes: an alias is one node, but stands for a whole tree, or for its own.
        _check_extent(node, _children)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def parse_json(text: str | None) -> Any:
    """What a header's JSON says, if it is JSON, finite, and not of an extent that no config has.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(text or "") > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} characters")
    try:
        tree = json.loads(text or "", parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_extent(
        tree, lambda each: each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    )
    return tree


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number that a config may hold")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Always: equal values are written out each time."""
        return True


def dump_yaml(tree: Mapping[str, Any]) -> bytes:
    """A tree as YAML, in the order of its keys and without aliases, between the marks of a document's start and end."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, explicit_start=True, explicit_end=True).encode()


def is_cut_off(text: bytes) -> bool | None:
    """True if a file of `dump_yaml` lacks its end; None where it cannot be known, for it has no mark of its start
    either: former versions wrote none."""
    return None if not text.startswith(b"---\n") else not text.endswith(b"\n...\n")


def _children(node: Any) -> Iterable[Any]:
    """The nodes of a sequence, or the keys and values of a mapping. Raises ValueError where a key is there twice."""
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.most_common(1):
            if times > 1:  # PyYAML would take the last one
                raise ValueError(f"{name[:100]} is given {times} times")
        return chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _check_extent(root: Any, children: Callable[[Any], Iterable[Any]]) -> None:
    """Raises ValueError where a tree has too many nodes or too many levels, without walking further than that."""
    level, nodes = [root], 1
    for _ in range(DEEPEST):
        below: list[Any] = []
        for node in level:
            room = MOST_NODES - nodes - len(below)
            below += islice(children(node), room + 1)
            if len(below) + nodes > MOST_NODES:
                raise ValueError(f"it has more than {MOST_NODES:,} keys and values, aliases counted in full")
        level, nodes = below, nodes + len(below)
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
