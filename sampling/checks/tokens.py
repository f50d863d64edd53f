"""Token files: each whole, together all of a split, and made by the tokenizer beside them.

What is bad here costs only time: a training that does not find what it wants extracts all anew.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from sampling.checks.finding import Finding, bad, note, ok, reason
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.tokens import Shard, read_shard

ANEW = "a training extracts the codes anew"


def check_tokens(
    paths: Iterable[Path], tokenizer: LoadedTokenizer | None, alone: bool = False, busy: bool = False
) -> Iterator[Finding]:
    """Shards, in the order of their names. `alone`: not all there are were given, so they need not make a whole.
    `busy`: a running process may be writing them."""
    for split, files in groupby(paths, key=lambda path: path.name.split("-")[0]):
        sound: list[Shard] = []
        broken = False
        for path in files:
            try:
                shard, _ = read_shard(path)
            except BadFileError as error:
                broken = True
                yield bad(path, f"{reason(error, path)}; {ANEW}")
            else:
                sound.append(shard)
                yield _judge(path, shard, tokenizer)
        if not alone and not broken:
            yield _judge_split(path.parent, split, sound, busy)


def _judge(path: Path, shard: Shard, tokenizer: LoadedTokenizer | None) -> Finding:
    by = shorten(shard.provenance.get("tokenizer"))
    if tokenizer is not None and tokenizer.fingerprint != by:
        return bad(path, f"made by the tokenizer {by}, but beside it is {tokenizer.fingerprint}; {ANEW}")
    what = f"{shard.n:,} of {shard.total:,} images as {shard.shape.in_words}"
    return ok(path, f"whole by its checksum; {what}, by the tokenizer {by}")


def _judge_split(folder: Path, split: str, shards: list[Shard], busy: bool) -> Finding:
    """True or not: the shards, all of them sound, follow one another and make the whole split."""
    if not all(shard.continues(shards[:place]) for place, shard in enumerate(shards)):
        return bad(folder, f"{split}: its files do not continue one another, or were made from different data; {ANEW}")
    there, total = sum(shard.n for shard in shards), shards[0].total
    if there == total:
        return ok(folder, f"{split}: complete, {total:,} images")
    if busy:
        return note(folder, f"{split}: {there:,} of {total:,} images so far")
    return bad(folder, f"{split}: incomplete, {there:,} of {total:,} images; {ANEW}")
