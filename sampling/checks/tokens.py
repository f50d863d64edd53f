"""Checks of token files: each is undamaged, together they are a whole split, and the tokenizer beside them made them.

A bad token file costs only time: a training that cannot use it encodes all images again.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from sampling.checks.finding import Finding
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.tokens import Shard, read_shard

CONSEQUENCE = "a training extracts the codes anew"


def check_tokens(
    paths: Iterable[Path], tokenizer: LoadedTokenizer | None, alone: bool = False, busy: bool = False
) -> Iterator[Finding]:
    """Check token files, given in the order of their names.

    Args:
        paths: the shards.
        tokenizer: the one beside them, if there is one.
        alone: True: these need not be all shards of their split.
        busy: True: a running process may be writing more shards.
    """
    for split, files in groupby(paths, key=lambda path: path.name.split("-")[0]):
        shards: list[Shard] = []
        has_bad = False
        for path in files:
            try:
                shard, _ = read_shard(path)
            except BadFileError as error:
                has_bad = True
                finding = Finding.of_error(path, error)
                yield finding._replace(text=f"{finding.text}; {CONSEQUENCE}")
            else:
                shards.append(shard)
                yield _check_shard(path, shard, tokenizer)
        if not alone and not has_bad:
            yield _check_split(path.parent, split, shards, busy)


def _check_shard(path: Path, shard: Shard, tokenizer: LoadedTokenizer | None) -> Finding:
    """Check that an undamaged shard was made by the tokenizer beside it."""
    maker = shorten(shard.provenance.get("tokenizer"))
    if tokenizer is not None and tokenizer.fingerprint != maker:
        beside = f"but beside it is {tokenizer.fingerprint}"
        return Finding.bad(path, f"made by the tokenizer {maker}, {beside}; {CONSEQUENCE}")
    content = f"{shard.n:,} of {shard.total:,} images as {shard.shape.in_words}"
    return Finding.ok(path, f"whole by its checksum; {content}, by the tokenizer {maker}")


def _check_split(folder: Path, split: str, shards: list[Shard], busy: bool) -> Finding:
    """Check that undamaged shards follow one another and make up the whole split."""
    if not all(shard.continues(shards[:place]) for place, shard in enumerate(shards)):
        text = "its files do not continue one another, or were made from different data"
        return Finding.bad(folder, f"{split}: {text}; {CONSEQUENCE}")
    count, total = sum(shard.n for shard in shards), shards[0].total
    if count == total:
        return Finding.ok(folder, f"{split}: complete, {total:,} images")
    if busy:
        return Finding.note(folder, f"{split}: {count:,} of {total:,} images so far")
    return Finding.bad(folder, f"{split}: incomplete, {count:,} of {total:,} images; {CONSEQUENCE}")
