"""The identity of a data set: a hash that is the same wherever its files lie, and another one when they change."""

import hashlib
import os
from collections.abc import Sequence

from stage1_tokenizer.data.folder_index import Item
from stage1_tokenizer.engine.names import folded

SAMPLED = 256
"""Files of which the content is looked at too: all sizes stay the same when files without compression are replaced."""
ENDS = 4096
"""Bytes at the beginning and at the end of such a file."""


def identity_of(items: Sequence[Item]) -> str:
    """A hash of the names, classes and sizes of files, in their order, and of the content of some."""
    digest = hashlib.blake2b(digest_size=16)
    every = max(1, len(items) // SAMPLED)
    for place, item in enumerate(items):
        line = f"{folded(item.name)}\t{item.class_}\t{_size(item)}\n"
        digest.update(line.encode(errors="surrogateescape"))
        if place % every == 0 and not item.refusal:
            digest.update(_ends(item))
    return digest.hexdigest()


def _size(item: Item) -> int | str:
    if item.refusal:
        return "refused"
    try:
        return item.path.stat().st_size
    except OSError:  # a link to nowhere
        return "unreadable"


def _ends(item: Item) -> bytes:
    try:
        file = os.open(item.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(file).st_size
            first = os.read(file, ENDS)
            os.lseek(file, max(ENDS, size - ENDS), os.SEEK_SET)
            return first + os.read(file, ENDS)
        finally:
            os.close(file)
    except OSError:
        return b""
