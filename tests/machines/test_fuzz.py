"""Inputs that nobody would write: each is used or refused in our own words, in bounded time and memory."""

import json
import mmap
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from stage1_tokenizer.engine.errors import ConfigError
from tests.helpers.fuzz_targets import targets
from tests.helpers.fuzzing import Counts, FindingError, Target, attempt, fuzz, inputs, measures_memory

N = 200
"""Inputs of a format; where one costs more, the number is below."""
FEWER = {"config-stage1": 50, "config-stage2": 50, "run-config": 60}
FEWER |= {"command-line-stage1": 30, "command-line-stage2": 30, "backbone": 60}
FEWER |= {"samples-npz": 100, "moments-npz": 100, "codes-npz": 100, "discriminator": 60, "extractor": 60}
FEWER |= {"tokenizer": 120, "prior-gpt": 50, "prior-pixelcnn": 50, "prior-depth": 50}
FEWER |= {"foreign-gpt": 60, "foreign-zip": 100, "foreign-legacy": 100}
OTHERS = ("avif", "jpeg2000", "tga", "pcx", "ico", "icns", "sgi", "dds", "qoi", "xbm", "dib")
"""Formats that few have; they are read all the same, so a stranger's folder may hold them."""
FEWER |= {f"picture-{name}": 60 for name in OTHERS}
NAMES = [
    *(name for name in FEWER if not name.startswith("picture-")),
    "state",
    "tokens",
    "log",
    "labels",
    "data-record",
    *(f"picture-{name}" for name in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm")),
    *(f"picture-{name}" for name in OTHERS),
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("beside"))}


def test_every_target_is_fuzzed(known: dict[str, Target]) -> None:
    """One that is added to the list and not to this file would be fuzzed by the soak alone."""
    assert sorted(NAMES) == sorted(known)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_accepted(known: dict[str, Target], name: str, tmp_path: Path) -> None:
    """Mutations of what is refused anyway would prove nothing."""
    for number, seed in enumerate(known[name].seeds[:4]):
        path = tmp_path / f"seed{number}{known[name].suffix}"
        path.write_bytes(seed)
        assert attempt(known[name], path)


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_input_is_accepted_or_refused(known: dict[str, Target], name: str, tmp_path: Path) -> None:
    """Faults 18, 19, 31 to 34, 41: nothing that a file holds is a traceback, a hang, or a spent memory."""
    n = FEWER.get(name, N)
    counts = fuzz(known[name], n, seed=2, folder=tmp_path)
    assert sum(counts) == n
    assert counts.refused > n / 20, "mutations that nobody minds prove nothing"


def test_inputs_follow_from_the_seed(known: dict[str, Target]) -> None:
    """A finding of the soak can be had again, whatever was read before it."""
    for name in ("config-stage1", "command-line-stage1", "tokenizer", "picture-png"):
        first = list(inputs(known[name], 20, seed=5))
        assert first == list(inputs(known[name], 20, seed=5))
        assert first != list(inputs(known[name], 20, seed=6))
        assert len(set(first)) > 10


def safetensors(**entries: tuple[str, list[int], int]) -> bytes:
    """A file of tensors of zeros: name=(format, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"kind": "tokenizer", "format": "1"}}
    size = 0
    for name, (dtype, shape, length) in entries.items():
        header[name.replace("__", ".")] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + bytes(size)


ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
FOUR_BITS = {
    **{f"features__{layer}__weight": ("F4", [o, i, k, 2 * k], o * i * k * k) for layer, (o, i, k) in ALEX.items()},
    **{f"features__{layer}__bias": ("F4", [2 * o], o) for layer, (o, _, _) in ALEX.items()},
}
FOUND: dict[str, tuple[str, bytes]] = {
    # what it was: the target, the input
    "TypeError: a side of 2^63 and one of 0": ("backbone", safetensors(features__0__weight=("F32", [2**63, 0], 0))),
    "TypeError: the same in our own weights": ("tokenizer", safetensors(features__0__weight=("F32", [2**63, 0], 0))),
    "NotImplementedError: four bits to float32": ("backbone", safetensors(**FOUR_BITS)),
    "KeyError: PyYAML's booleans": ("run-config", b"a: !!bool maybe"),
    "AttributeError: PyYAML's times": ("run-config", b"a: !!timestamp now"),
    "OverflowError: PyYAML's escapes": ("run-config", b'a: "\\UFFFFFFFF"'),
    "RecursionError: PyYAML's brackets": ("config-stage1", b"{a: " * 500),
    "memory: PyYAML's merge keys": (
        "config-stage1",
        b"a: &a {x: 1}\n" + b"\n".join(b"b%d: &b%d {<<: [%s]}" % (i, i, b"*a," * 9) for i in range(12)) * 3,
    ),
    "ValueError: a number that Python does not print": ("config-stage1", b"steps: 0x" + b"f" * 5000),
    "UnicodeEncodeError: half a character as a path": ("config-stage1", b'out: "\\uD800"'),
    "ValueError: a path with a zero": ("config-stage1", b'out: "\\0"'),
    "UnicodeEncodeError: a word that is no UTF-8": ("command-line-stage1", b"--out\0a\xff"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_once_is_refused(known: dict[str, Target], what: str, tmp_path: Path) -> None:
    """Each was a traceback, or a machine without memory."""
    name, data = FOUND[what]
    path = tmp_path / f"found{known[name].suffix}"
    path.write_bytes(data)
    assert not attempt(known[name], path)


def crashes(path: Path) -> None:
    path.read_bytes().decode("ascii")


def hangs(_: Path) -> None:
    while True:
        pass


def hoards(_: Path) -> None:
    with mmap.mmap(-1, 400 * 2**20) as pages:  # the heap may have as much left over from other tests
        for page in range(0, len(pages), mmap.PAGESIZE):
            pages[page] = 1


def waits(_: Path) -> None:
    signal.pause()


def refuses(_: Path) -> None:
    raise ConfigError("no")


def test_the_driver_finds_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of another class, a hang and a waste of memory are findings, whose bytes are kept; a refusal is
    none. Nothing of the alarms is left."""
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)]
    findings = {crashes: "UnicodeDecodeError", hangs: "OvertimeError.*computing", waits: "OvertimeError"}
    if measures_memory():
        findings[hoards] = "400 MB were taken"
    for read, reason in findings.items():
        monkeypatch.setattr("tests.helpers.fuzzing.LIMIT_S", 0.1 if read is hangs else 10.0)
        monkeypatch.setattr("tests.helpers.fuzzing.WAIT_S", 0.1 if read is waits else 60.0)
        with pytest.raises(FindingError, match=f"{reason}.*finding-x-0-") as caught:
            fuzz(Target("x", [b"\xe9" * 100], read), 50, seed=0, folder=tmp_path)
        assert Path(str(caught.value).rsplit(": ", 1)[1]).is_file()
    assert fuzz(Target("x", [b"a"], refuses), 5, seed=0, folder=tmp_path) == Counts(accepted=0, refused=5)
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)] == handlers


def test_the_driver_works_where_memory_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some containers hide a process's memory, or do not let its peak be forgotten: that is no finding of an input."""
    for status, cleared in (("Name: x", True), ("VmRSS: 1 kB\nVmHWM: 999999999 kB", False)):
        monkeypatch.setattr(Path, "read_text", lambda _, status=status: status)
        monkeypatch.setattr("tests.helpers.fuzzing._forget_peak", lambda cleared=cleared: cleared)
        assert not measures_memory()
        assert fuzz(Target("x", [b"a"], lambda _: None), 3, seed=0, folder=tmp_path) == Counts(accepted=3, refused=0)
