"""Token files: each whole, together all of a split, and made by the tokenizer beside them.

    train-00000-of-00002.safetensors    codes (n, views, h, w, K), labels (n,) of images start..start+n-1 of total

What is bad here costs only time: a training that does not find what it wants extracts all anew.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from sampling.checks.finding import Finding, bad, note, ok, reason
from stage1_tokenizer.config.trees import parse_json
from stage1_tokenizer.engine.checkpoint import SUM, brief, read_tensors
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.tokenizer import LoadedTokenizer

SHARD_NAME = re.compile(r"(\w+)-(\d{5})-of-(\d{5})\.safetensors")
PROVENANCE = "provenance"
"""The entry of a shard's header that says what it was made from."""
ANEW = "a training extracts the codes anew"


class Shard(NamedTuple):
    """What a sound shard holds."""

    start: int
    n: int
    total: int
    tokenizer: str
    shape: tuple[int, ...]
    """h, w, K, V."""
    made_from: tuple[str, ...]
    """What must be equal in all shards of a split."""


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if SHARD_NAME.fullmatch(path.name))


def check_tokens(
    paths: Iterable[Path], tokenizer: LoadedTokenizer | None, alone: bool = False, busy: bool = False
) -> Iterator[Finding]:
    """Shards, in the order of their names. `alone`: not all there are were given, so they need not make a whole.
    `busy`: a running process may be writing them."""
    for split, files in groupby(paths, key=lambda path: path.name.split("-")[0]):
        shards: list[Shard | None] = []
        for path in files:
            shard = _read(path)
            shards.append(shard if isinstance(shard, Shard) else None)
            yield _judge(path, shard, tokenizer)
        if not alone:
            yield from _judge_split(path.parent, split, shards, busy)


def _judge(path: Path, shard: Shard | BadFileError, tokenizer: LoadedTokenizer | None) -> Finding:
    if isinstance(shard, BadFileError):
        return bad(path, f"{reason(shard, path)}; {ANEW}")
    if tokenizer is not None and tokenizer.fingerprint != shard.tokenizer:
        there = f"made by the tokenizer {shard.tokenizer}, but beside it is {tokenizer.fingerprint}"
        return bad(path, f"{there}; {ANEW}")
    h, w, depth, size = shard.shape
    what = f"whole by its checksum; {shard.n:,} of {shard.total:,} images as {h}x{w}x{depth} codes of {size}"
    return ok(path, f"{what}, by the tokenizer {shard.tokenizer}")


def _judge_split(folder: Path, split: str, shards: list[Shard | None], busy: bool) -> Iterator[Finding]:
    """Whether the shards follow one another and make the whole split."""
    sound = [shard for shard in shards if shard is not None]
    if len(sound) < len(shards):
        return  # said already
    there, place = sum(shard.n for shard in sound), 0
    for shard in sound:
        if shard.made_from != sound[0].made_from or shard.start != place:
            yield bad(
                folder, f"{split}: its files do not continue one another, or were made from different data; {ANEW}"
            )
            return
        place += shard.n
    total = sound[0].total
    if there == total:
        yield ok(folder, f"{split}: complete, {total:,} images")
    elif busy:
        yield note(folder, f"{split}: {there:,} of {total:,} images so far")
    else:
        yield bad(folder, f"{split}: incomplete, {there:,} of {total:,} images; {ANEW}")


def _read(path: Path) -> Shard | BadFileError:
    """A shard, or what is wrong with it."""
    try:
        tensors, header = read_tensors(path)
        if SUM not in header:
            raise BadFileError(f"{path}: carries no checksum, as format 1 has none, and is not used")
        made_from = parse_json(header[PROVENANCE])
        h, w, depth, size = map(int, made_from["shape"])
        n, classes = len(tensors["labels"]), parse_json(header["classes"])
        for name, shape, limit in (
            ("codes", (n, int(made_from["views"]), h, w, depth), size),
            ("labels", (n,), max(1, len(classes))),
        ):
            values = tensors[name]
            if values.dtype != torch.int32 or values.shape != shape:
                raise BadFileError(f"{path}: its {name} are {values.dtype} {tuple(values.shape)}, not int32 {shape}")
            if n and not 0 <= int(values.min()) <= int(values.max()) < limit:
                found = f"{int(values.min())}..{int(values.max())}"
                raise BadFileError(f"{path}: its {name} are {found}, but must lie in 0..{limit - 1}")
        same = (header[PROVENANCE], header["classes"], header["total"])
        start, total, tokenizer = int(header["start"]), int(header["total"]), brief(made_from["tokenizer"])
        return Shard(start, n, total, tokenizer, (h, w, depth, size), same)
    except BadFileError as error:
        return error
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        return BadFileError(f"{path}: its header cannot be read ({brief(error)})")
