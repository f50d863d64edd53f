"""Mutations of good inputs for tests/helpers/fuzzing.py: bytes, trees of JSON and YAML, command lines, safetensors."""

import contextlib
import copy
import json
import math
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

NUMBERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Mutate bytes of any format: change bits or numbers; remove, repeat, move or insert pieces; cut off the end."""
    if not data:
        return rng.randbytes(rng.choice((1, 8, 100)))
    made, at = bytearray(data), rng.randrange(len(data))
    if rng.random() < 0.5:  # the front decides most about how a file is read
        at = rng.randrange(min(len(data), 128))
    length = min(rng.choice((1, 2, 4, 16, 256)), len(data) - at)
    piece = made[at : at + length]
    match rng.randrange(9):
        case 0:
            made[at] ^= 1 << rng.randrange(8)
        case 1:
            made[at] = rng.choice((0, 0xFF, 0x7F, 0x80, 0x20, 0x0A, rng.randrange(256)))
        case 2:
            made[at : at + length] = rng.randbytes(length)
        case 3:
            del made[at : at + length]
        case 4:
            made[at:at] = piece * rng.choice((1, 1, 2, 100))
        case 5:
            to = rng.randrange(len(made))
            made[to:to] = piece
        case 6:
            del made[at:]
        case 7:
            number = rng.choice(NUMBERS) & 0xFFFFFFFF
            made[at : at + 4] = struct.pack(rng.choice((">I", "<I")), number)
        case _:
            made += rng.randbytes(rng.choice((1, 10, 1000)))
    return bytes(made)


NESTED: Any = json.loads("[" * 40 + "]" * 40)
VALUES: list[Any] = [
    *(None, True, False, "", "x", "null", "1e999", "é\u4e2d\U0001f600", "\0", "\udcff", "a" * 3000, "../../x", "-1"),
    *(*NUMBERS, -1, -(2**63), 2**100, 10**4000, 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan),
    *([], {}, [[]], [1], ["1", "2"], [0] * 500, {"kind": "vq"}, {"kind": None}, {"": 1}, {"a": {"b": 1}}, NESTED),
]


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Make one change at a random place of a tree: another value, a key renamed, removed or added, values copied."""
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return _value(rng)
    holder, key = rng.choice(places)
    match rng.randrange(7):
        case 0 | 1:
            holder[key] = _value(rng)
        case 2 if isinstance(holder[key], int | float):
            change = rng.choice(
                (lambda x: x + 1, lambda x: x - 1, lambda x: -x, lambda x: x * 1000, str, lambda x: [x])
            )
            holder[key] = change(holder[key])
        case 3 if isinstance(holder, dict):
            holder[rng.choice((f"{key}x", key[:-1], "kind", "", "a" * 300))] = holder.pop(key)
        case 4:
            del holder[key]
        case 5:
            other, its_key = rng.choice(places)
            with contextlib.suppress(LookupError):
                holder[key] = json.loads(json.dumps(other[its_key]))
        case _ if isinstance(holder, list):
            holder[key:key] = [holder[key]] * rng.choice((1, 2, 50))
        case _:
            holder[f"key{rng.randrange(9)}"] = _value(rng)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each (container, key or index) of a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(value)


def _edited_json(rng: random.Random, text: str) -> str:
    try:
        return json.dumps(mutate_tree(rng, json.loads(text)))
    except (ValueError, RecursionError):  # mutated before
        return text + rng.choice(("}", "[" * 100_000, "1" * 5000, "NaN"))


WORDS_OF_YAML = (
    *("&a [*a]", "*a", "<<: *a", "!!binary =", "!!bool x", "!!int ''", "!!float x", "!!timestamp x", "!!set {a, b}"),
    *("2001-99-99", "0x" + "f" * 9000, "1" * 5000, "1:59:59", "? [a]", "? ", "- ", "{", "{a: " * 400, "'", "|", "---"),
    *("...", "%YAML 9.9", "!!python/object/apply:os.system [x]", "\t", "\ufeff", "#", "=", "~", ".nan", ".inf", "&a"),
)


def mutate_yaml(rng: random.Random, data: bytes) -> bytes:
    """Mutate YAML: change its tree, insert a special word of YAML, or an alias bomb."""
    with contextlib.suppress(Exception):
        if rng.random() < 0.6 and b"*" not in data:  # aliases may stand for billions of places
            return yaml.safe_dump(mutate_tree(rng, yaml.safe_load(data))).encode(errors="surrogatepass")
    at = rng.randrange(len(data) + 1)
    word = rng.choice(WORDS_OF_YAML)
    if rng.random() < 0.1:
        lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * rng.choice((2, 9, 30)))}]" for i in range(1, 12)]
        word = "\n".join(["", "a0: &a0 1", *lines, ""])
    return data[:at] + rng.choice(("", " ", "\n")).encode() + word.encode() + data[at:]


def mutate_words(rng: random.Random, data: bytes) -> bytes:
    """Mutate a command line, whose words are divided by zeros: change, remove, repeat, move or insert a word."""
    words = data.split(b"\0")
    at = rng.randrange(len(words))
    values = ["null", "[", "{", "1,2,3", "[1,2]", '{"a": 1}', "--", "-h", "-", "=", "@x", "1e999", "\u4e2d", "'", '"']
    value = rng.choice([*values, *map(str, VALUES[:40])]).replace("\0", "0")[:4000].encode(errors="surrogatepass")
    match rng.randrange(6):
        case 0:
            words[at] = value
        case 1:
            del words[at]
        case 2:
            words.insert(at, rng.choice(words))
        case 3:
            words.insert(at, value)
        case 4:
            words[at] = mutate_bytes(rng, words[at])[:4000].replace(b"\0", b"0")
        case _:
            words[at] += rng.choice((b"=", b".", b"x", b".kind", b"=" + value, b",", b".0"))
    return b"\0".join(words)


def words_of(path: Path) -> list[str]:
    """Read the words of a command line, as Python passes them to a program."""
    return path.read_bytes().decode(sys.getfilesystemencoding(), "surrogateescape").split("\0")


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Mutate the tree of JSON."""
    return _edited_json(rng, data.decode(errors="replace")).encode(errors="surrogatepass")


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Mutate the header of a safetensors file, which stays JSON: names, shapes, formats, often the config in it.

    The checksum of most inputs is removed (the first files had none), because otherwise reading would stop there.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
    except (ValueError, LookupError, TypeError, struct.error):
        return mutate_bytes(rng, data)
    if isinstance(metadata, dict) and rng.random() < 0.9:
        metadata.pop("sha256", None)
        metadata["format"] = "1"
    entries = [key for key in ("config", "data") if isinstance(metadata, dict) and isinstance(metadata.get(key), str)]
    if entries and rng.random() < 0.7:
        key = rng.choice(entries)
        metadata[key] = _edited_json(rng, metadata[key])
    elif isinstance(metadata, dict) and rng.random() < 0.2:
        metadata[rng.choice(("step", "kind", "format", "sha256", "x"))] = rng.choice(
            ("", "-1", "1e9", "x" * 300, "9" * 30)
        )
    elif rng.random() < 0.3 and isinstance(entry := header[rng.choice(sorted(header))], dict):
        entry["dtype"] = rng.choice(("F4", "F6_E2M3", "F8_E4M3", "F8_E8M0", "F16", "F64", "BF16", "C64", "BOOL", "U64"))
    else:
        header = mutate_tree(rng, header)
    try:
        written = json.dumps(header).encode()
    except (ValueError, RecursionError):  # a number too long to print
        return mutate_bytes(rng, data)
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + data[8 + length :]
