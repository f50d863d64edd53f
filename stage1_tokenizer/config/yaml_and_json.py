"""Safe reading of YAML and JSON from other people, with bounds on size and depth, and writing of YAML.

By aliases a few lines of YAML can mean billions of values, or a value inside itself. A few kilobytes of brackets, in
YAML or in JSON, overflow the stack of the interpreter.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import yaml

from stage1_tokenizer.engine.errors import UserError

LARGEST_YAML = 100_000
"""Bytes of a config file; ours have some hundreds."""
LARGEST_JSON = 4_000_000
"""Characters of a config in a header, which may have the names of ten thousands of classes."""
MOST_NODES = 50_000
"""Number of keys and values of a tree."""
DEEPEST = 50
"""Number of levels of a tree."""


def parse_yaml(data: bytes) -> Any:
    """Return the content of a YAML file as plain values.

    Raises:
        ValueError: it is not YAML, too large, or nested too deeply.
    """
    if len(data) > LARGEST_YAML:
        raise ValueError(f"has more than {LARGEST_YAML:,} bytes, which no config needs")
    try:
        return _construct(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("is not YAML: it is nested too deeply") from None
    except UserError:  # raised by a signal
        raise
    # PyYAML passes on all errors of int, float, datetime and base64, also KeyError and AttributeError.
    except Exception as error:
        raise ValueError(f"is not YAML: {str(error)[:500]}") from None


def _construct(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Checked before any value is built, since an alias is one node that means a whole tree, or its own tree.
        _check_extent(node, _children)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def parse_json(text: str | None) -> Any:
    """Return the content of a header's JSON as plain values.

    Raises:
        ValueError: it is not JSON, has a number that is not finite, is too large, or nested too deeply.
    """
    if len(text or "") > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} characters")
    try:
        tree = json.loads(text or "", parse_constant=_refuse_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_extent(
        tree, lambda node: node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    )
    return tree


def _refuse_number(name: str) -> None:
    raise ValueError(f"{name} is not a number that a config may have")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Return True: equal values are written out each time."""
        return True


def dump_yaml(tree: Mapping[str, Any]) -> bytes:
    """Return a tree as YAML in the order of its keys, without aliases, with markers of start and end."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, explicit_start=True, explicit_end=True).encode()


def is_cut_off(text: bytes) -> bool | None:
    """Return True if a file of `dump_yaml` lacks its end; None if it has no start marker, as in former versions."""
    return None if not text.startswith(b"---\n") else not text.endswith(b"\n...\n")


def _children(node: Any) -> Iterable[Any]:
    """Return the nodes of a sequence, or the keys and values of a mapping.

    Raises:
        ValueError: a mapping has a key twice.
    """
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.most_common(1):
            if times > 1:  # PyYAML would use the last one
                raise ValueError(f"{name[:100]} is given {times} times")
        return chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _check_extent(root: Any, children: Callable[[Any], Iterable[Any]]) -> None:
    """Raise ValueError if a tree has too many nodes or levels; the walk stops at the limit."""
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
