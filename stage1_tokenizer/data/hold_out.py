"""Which images are held out for validation: a function of each image's name, so adding images moves none."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from stage1_tokenizer.engine.names import folded


def held_out(names: Sequence[str], classes: Mapping[str, str | None], share: float) -> set[str]:
    """The names whose hash is below the share.

    Each class keeps one image to train on, and one image at least is held out if another of its class is left. So of a
    folder with few images the result may be empty: then none can be spared.
    """
    hashes = {name: unit_hash(name) for name in names}
    out = {name for name in names if hashes[name] < share}
    left = Counter(classes[name] for name in names if name not in out)
    for name in sorted(out, key=lambda name: -hashes[name]):
        if not left[classes[name]]:
            out.remove(name)
            left[classes[name]] += 1
    if not out and names:
        spare = [name for name in names if left[classes[name]] > 1]
        out.update(sorted(spare, key=lambda name: hashes[name])[:1])
    return out


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, in whichever normal form its accents are."""
    data = folded(name).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2.0**64
