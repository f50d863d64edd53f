"""Random numbers as pure functions of a seed and of names and indices.

There is no generator state to save. A resumed run, another number of processes or data workers, and another batch size
draw the same numbers for the same (seed, purpose, epoch, index).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for a purpose, e.g. `derive_seed(0, "model", step, rank)`."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def draw_uniforms(
    seed: int, purpose: str, epochs: NDArray[np.int64], indices: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Draw uniform numbers in [0, 1), `draws` for each (epoch, index): (B,), (B,) -> (B, draws).

    A counter-based generator: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied to the key and then to
    each coordinate in turn.
    """
    state = np.full((1, 1), derive_seed(seed, purpose), dtype=np.uint64)
    for coordinate in (epochs[:, None], indices[:, None], np.arange(draws)[None, :]):
        state = _mix(state ^ _mix(coordinate.astype(np.uint64) + np.uint64(1)))
    return np.asarray((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
