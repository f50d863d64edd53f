"""Faults 43 to 46: commands that make pictures, killed anywhere and given again; their numbers; damaged weights."""

import errno
import os
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sampling import complete as completing
from sampling import generate as generating
from sampling.choose import ChooseConfig, choose
from sampling.sampler import Sampler
from sampling.saved_images import is_complete_png, read_png, save_png
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.engine.errors import BadFileError, DivergedError
from stage1_tokenizer.engine.lock import lock_folder, unlock_folders
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import Generation
from stage2_prior.generation import generate, sample_softmax
from stage2_prior.prior import PRIOR_FILE, LoadedPrior
from tests.helpers.artefacts import (
    MAKERS,
    edit_weights,
    files_of,
    gpt,
    noise_of,
    pictures_of,
    write_image_folder,
    write_prior,
)
from tests.helpers.commands import Ended, run, run_script
from tests.helpers.processes import RankFailedError, run_processes

KINDS = pytest.mark.parametrize("kind", MAKERS)
GENERATE, COMPLETE = "sampling/generate.py", "sampling/complete.py"
MAINS = {GENERATE: generating.main, COMPLETE: completing.main}
N = 3
COUNTS = {GENERATE: ("-n", N), COMPLETE: ("-n", 1, "--variants", N)}
FILES = {GENERATE: N + 4, COMPLETE: N + 5}
"""Files that a command puts in place, one after the other: settings.json, the pictures, the grid, samples.npz or the
original and what is kept of it, settings.json again."""
STOPS = [("full disk", GENERATE, number) for number in range(FILES[GENERATE])]
STOPS += [("full disk", COMPLETE, number) for number in (0, 3, 5, 7)]
STOPS += [("Ctrl-C", GENERATE, number) for number in (0, 2, 4, 5, 6)]
STOPS += [("Ctrl-C", COMPLETE, number) for number in (1, 5)]
STOPS += [("SIGTERM", GENERATE, number) for number in (0, 2, 5)]
CODES = {"full disk": 5, "Ctrl-C": 130, "SIGTERM": 75}
KILLS = [(GENERATE, number, False) for number in (0, 2, 4, 6)]
KILLS += [(COMPLETE, 2, False), (COMPLETE, 3, True)]


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedPrior]:
    folder = tmp_path_factory.mktemp("priors")
    return {kind: write_prior(folder / kind, kind=kind) for kind in MAKERS}


@pytest.fixture(scope="module")
def prior(priors: dict[str, LoadedPrior]) -> Path:
    return priors["gpt"].path.parent


@pytest.fixture(scope="module")
def wanted(prior: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each command where nothing interrupts it."""
    made = {}
    for script in MAINS:
        out = tmp_path_factory.mktemp("wanted")
        assert again(script, prior, out, *COUNTS[script]).code == 0
        made[script] = content(out)
    return made


def again(script: str, prior: Path, out: Path, *arguments: object) -> Ended:
    return run(MAINS[script], "--prior", prior, "--out", out, *arguments)


def content(out: Path) -> dict[str, bytes]:
    """Its files; nothing that was being written may be left."""
    files = files_of(out)
    assert not [name for name in files if name.startswith(".tmp-")]
    return {name: data for name, data in files.items() if not name.startswith(".")}


def at_file(number: int, action: Callable[[], object], after: bool = False) -> Callable[..., None]:
    """os.replace, which acts before (or after) it puts that file in place, counted from 0."""
    replace, counted = os.replace, iter(range(10**6))

    def replaced(*names: Any, **options: Any) -> None:
        now = next(counted) == number
        if now and not after:
            action()
        replace(*names, **options)
        if now and after:
            action()

    return replaced


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(accelerator: Accelerator, rank: int, number: int, after: bool, script: str, *arguments: object) -> None:
    """A command whose process of this rank is killed when it puts that file in place."""
    if accelerator.process_index == rank:
        os.replace = at_file(number, die, after)
    run_script(accelerator, script, *arguments)


def kill(processes: int, rank: int, number: int, after: bool, script: str, *arguments: object) -> None:
    with pytest.raises(RankFailedError, match=r"died without a word|rank \d"):
        run_processes(processes, killed, rank, number, after, script, *arguments)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the pictures that are sampled from now on."""
    sampled: list[int] = []
    images = Sampler.images

    def recording(self: Sampler, indices: NDArray[np.int64], *arguments: Any) -> NDArray[np.uint8]:
        sampled.extend(indices.tolist())
        return images(self, indices, *arguments)

    monkeypatch.setattr(Sampler, "images", recording)
    return sampled


@pytest.mark.parametrize(("script", "number", "after"), KILLS)
def test_fault_44_killed_at_any_file_the_rest_is_made(
    prior: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path, script: str, number: int, after: bool
) -> None:
    """Fault 44: SIGKILL between a temporary file and its final name, or after it; the same command again gives what an
    uninterrupted one does, byte for byte."""
    kill(1, 0, number, after, script, "--prior", prior, "--out", tmp_path, *COUNTS[script])
    assert bool(list(tmp_path.glob(".tmp-*"))) is not after, "the kill must have struck while a file was written"
    before = len(list(tmp_path.glob("0*.png")))
    ended = again(script, prior, tmp_path, *COUNTS[script])
    assert ended.code == 0, ended.err
    assert content(tmp_path) == wanted[script]
    if script == GENERATE and before:
        assert f"{before} of {N} images are there already; making the rest" in ended.out
    assert again(script, prior, tmp_path, *COUNTS[script]).code == 2, "finished, and nothing is written over"
    assert content(tmp_path) == wanted[script]


@pytest.mark.parametrize(("fault", "script", "number"), STOPS)
def test_fault_44_stopped_at_any_file_nothing_is_half(
    prior: Path,
    wanted: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    script: str,
    number: int,
) -> None:
    """Fault 44: a disk that is full, or a signal, at any file: exit code 5 with its path and the reason, or that of an
    interruption; no temporary file; and the command again gives all the files."""

    def strike() -> None:
        if fault == "Ctrl-C":
            raise KeyboardInterrupt
        if fault == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", at_file(number, strike))
        ended = again(script, prior, tmp_path, *COUNTS[script])
    assert ended.code == CODES[fault]
    assert "Traceback" not in ended.err
    if fault == "full disk":
        assert f"no space left writing {tmp_path}" in ended.err
    kept = {name for name in content(tmp_path) if name.startswith("0")}
    sampled = recorded(monkeypatch)
    assert again(script, prior, tmp_path, *COUNTS[script]).code == 0
    assert content(tmp_path) == wanted[script]
    if script == GENERATE:
        assert sampled == [i for i in range(N) if f"{i:06d}.png" not in kept], "no picture is made twice"


def limited(_: Accelerator, prior: Path, out: Path) -> Ended:
    """generate.py, which after its second picture may write no file of more than 64 bytes."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    os.replace = at_file(2, limit, after=True)
    return again(GENERATE, prior, out, *COUNTS[GENERATE])


def test_fault_44_the_disk_is_full_in_the_middle_of_a_picture(
    prior: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Fault 44: the system itself refuses to write on; the first two pictures stay, of the third there is nothing."""
    (ended,) = run_processes(1, limited, prior, tmp_path)
    assert ended.code == 5
    assert f"StorageError: no space left writing {tmp_path / '000002.png'}" in ended.err
    assert pictures_of(tmp_path).keys() == {"000000.png", "000001.png"}
    assert content(tmp_path).keys() == {"000000.png", "000001.png", "settings.json"}
    assert again(GENERATE, prior, tmp_path, *COUNTS[GENERATE]).code == 0
    assert content(tmp_path) == wanted[GENERATE]


def test_fault_14_a_command_that_was_faster(
    prior: Path, half: Path, wanted: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 14: the folder is looked at again once it is locked, for another command may have finished in it between:
    what that one has made is not written over, be the folder named or the newest numbered one."""
    words = ("--prior", prior, *COUNTS[GENERATE])
    numbered = prior / "generated" / "001"
    numbered.parent.mkdir()
    shutil.copytree(half, numbered)

    def finish_and_lock(folder: Path) -> None:
        if folder in (half, numbered) and not (folder / "samples.npz").exists():
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
        lock_folder(folder)

    whole = half.with_name("whole")
    assert again(GENERATE, prior, whole, *COUNTS[GENERATE]).code == 0
    monkeypatch.setattr("sampling.output.lock_folder", finish_and_lock)
    try:
        ended = run(generating.main, *words, "--out", half)
        assert (ended.code, "is not empty" in ended.err) == (2, True)
        assert run(generating.main, *words).code == 0
        assert content(half) == content(numbered) == content(prior / "generated" / "002") == wanted[GENERATE]
        assert not (prior / "generated" / "003").exists()
    finally:
        shutil.rmtree(prior / "generated")


@pytest.mark.parametrize("rank", [0, 1])
def test_fault_44_one_of_two_processes_is_killed(prior: Path, tmp_path: Path, rank: int) -> None:
    """Fault 44: what is missing then is shared anew, by one process or by two, and all of it is made once."""
    words = ("-n", 7, "--batch_size", 2)
    assert again(GENERATE, prior, tmp_path / "whole", *words).code == 0
    out = tmp_path / "one"
    kill(2, rank, 2, False, GENERATE, "--prior", prior, "--out", out, *words)
    assert 0 < len(pictures_of(out)) < 7
    shutil.copytree(out, tmp_path / "two")
    assert again(GENERATE, prior, out, *words).code == 0
    run_processes(2, run_script, GENERATE, "--prior", prior, "--out", tmp_path / "two", *words)
    for name in ("one", "two"):
        assert content(tmp_path / name) == content(tmp_path / "whole")


def test_fault_14_two_commands_in_one_folder(prior: Path, half: Path, wanted: dict[str, dict[str, bytes]]) -> None:
    """Fault 14: the second one is refused, and what is there stays; when the first one has ended, it may go on."""
    before = content(half)
    words = ("--prior", prior, "--out", half, *COUNTS[GENERATE])
    lock_folder(half)
    try:
        with pytest.raises(RankFailedError, match=rf"in use by another process(?s:.*){os.getpid()}"):
            run_processes(1, run_script, GENERATE, *words)
        assert {path.name for path in half.glob("[!.]*")} == before.keys()
    finally:
        unlock_folders()
    run_processes(1, run_script, GENERATE, *words)
    assert content(half) == wanted[GENERATE]


def of_its_own_seed(accelerator: Accelerator, *arguments: object) -> None:
    """generate.py, of which each process has another seed."""
    run_script(accelerator, GENERATE, *arguments, "--seed", accelerator.process_index)


def test_fault_44_processes_must_agree(prior: Path, tmp_path: Path) -> None:
    """Fault 44: where one has loaded other weights, since they were replaced meanwhile, or has another configuration,
    nothing is written."""
    with pytest.raises(RankFailedError, match=r"processes have loaded different things(?s:.*)seed: 0 -> 1"):
        run_processes(2, of_its_own_seed, "--prior", prior, "--out", tmp_path / "out", "-n", 4)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def half(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which generate.py was stopped after one picture."""
    out = tmp_path / "half"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", at_file(2, lambda: (_ for _ in ()).throw(KeyboardInterrupt)))
        assert again(GENERATE, prior, out, *COUNTS[GENERATE]).code
    assert content(out).keys() == {"000000.png", "settings.json"}
    return out


def test_fault_44_another_batch_size_continues(
    prior: Path, half: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Fault 44: what changes no picture may change, and the run may have been moved."""
    shutil.copytree(prior, tmp_path / "moved")
    assert again(GENERATE, tmp_path / "moved", half, *COUNTS[GENERATE], "--batch_size", 1).code == 0
    assert content(half) == wanted[GENERATE]


def test_fault_44_other_settings_do_not_mix(prior: Path, half: Path, tmp_path: Path) -> None:
    """Fault 44: pictures of two seeds, or of two priors, in one folder would be believed to be of one."""
    before = content(half)
    other = write_prior(tmp_path / "other", seed=1).path.parent
    for given, words, difference in (
        (prior, ("--seed", 1), "seed: 0 -> 1"),
        (prior, ("-n", 4), "n: 3 -> 4"),
        (prior, ("--class", "dog"), 'class: null -> "dog"'),
        (other, (), "weights: "),
    ):
        ended = again(GENERATE, given, half, *COUNTS[GENERATE], *words)
        assert ended.code == 2
        assert "unfinished images of other settings" in ended.err
        assert difference in ended.err
        assert content(half) == before


def test_fault_44_a_folder_without_a_picture_is_free(prior: Path, half: Path) -> None:
    """Fault 44: where a command failed before its first picture, the mended one may have its folder."""
    (half / "000000.png").unlink()
    assert again(GENERATE, prior, half, "-n", 2, "--seed", 1).code == 0
    assert len(pictures_of(half)) == 2


@pytest.mark.parametrize("damage", ["half", "empty", "text", "bit", "size", "grey", "tail"])
def test_fault_44_damaged_pictures_are_made_again(
    prior: Path, half: Path, wanted: dict[str, dict[str, bytes]], damage: str
) -> None:
    """Fault 44: a power cut may leave what no rename protects from; what is there is decoded before it is kept."""
    picture = half / "000000.png"
    data = picture.read_bytes()
    middle = len(data) // 2
    flipped = bytes([*data[:middle], data[middle] ^ 1, *data[middle + 1 :]])
    files = {"half": data[:middle], "empty": b"", "text": b"a picture", "bit": flipped, "tail": data[:-12]}
    if damage in files:
        picture.write_bytes(files[damage])
    else:
        Image.new("L" if damage == "grey" else "RGB", (12, 8) if damage == "grey" else (8, 12)).save(picture)
    ended = again(GENERATE, prior, half, *COUNTS[GENERATE])
    assert ended.code == 0
    assert "there already" not in ended.out
    assert content(half) == wanted[GENERATE]


def test_fault_44_no_damage_to_a_picture_goes_unseen(tmp_path: Path) -> None:
    """Fault 44: any byte that is wrong, and any end that is missing."""
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", picture)
    data = (tmp_path / "a.png").read_bytes()
    assert is_complete_png(tmp_path / "a.png", (5, 4, 3))
    assert not is_complete_png(tmp_path / "a.png", (4, 5, 3))
    assert not is_complete_png(tmp_path / "b.png", (5, 4, 3))
    for place in range(len(data)):
        (tmp_path / "flipped.png").write_bytes(bytes([*data[:place], data[place] ^ 16, *data[place + 1 :]]))
        (tmp_path / "cut.png").write_bytes(data[:place])
        assert not is_complete_png(tmp_path / "flipped.png", (5, 4, 3)), place
        assert not is_complete_png(tmp_path / "cut.png", (5, 4, 3)), place


def test_fault_25_a_bomb_in_the_place_of_a_picture(tmp_path: Path) -> None:
    """Fault 25: what promises more pixels than memory is no picture of ours, and no error of Pillow's either."""
    save_png(tmp_path / "a.png", np.zeros((5, 4, 3), np.uint8))
    data = (tmp_path / "a.png").read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    assert not is_complete_png(tmp_path / "a.png", (5, 4, 3))
    with pytest.raises(BadFileError, match=r"a\.png: cannot be read again"):
        read_png(tmp_path / "a.png")


def test_fault_44_the_newest_numbered_folder_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 44: without --out the same command finds its own unfinished folder, and others begin new ones."""
    run_folder = write_prior(tmp_path / "run").path.parent
    one, two, three = (run_folder / "generated" / f"{number:03d}" for number in (1, 2, 3))
    command = partial(run, generating.main, "--prior", run_folder, "-n", N)

    def stop_after_a_picture() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", at_file(2, stop_after_a_picture))
        assert command().code
    before = content(one)
    assert before.keys() == {"000000.png", "settings.json"}
    assert command("--seed", 1).code == 0
    assert content(one) == before, "an unfinished folder of other settings is not touched"
    assert len(pictures_of(two)) == N
    shutil.rmtree(two)
    assert command().code == 0
    assert len(pictures_of(one)) == N
    assert not two.exists()
    assert command().code == 0, "a finished one is followed by another"
    assert pictures_of(two) == pictures_of(one)
    assert not three.exists()


def test_fault_44_completions_of_other_pictures_do_not_mix(
    prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 44: the pictures themselves are among what completions follow from, not their files' names alone."""
    write_image_folder(tmp_path / "own", ("x",), per_class=2)
    words = ("--images", tmp_path / "own", "--variants", 2)

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", at_file(3, stop))
        assert again(COMPLETE, prior, tmp_path / "out", *words).code
    before = content(tmp_path / "out")
    Image.new("RGB", (12, 8), "red").save(tmp_path / "own/x/01.png")
    ended = again(COMPLETE, prior, tmp_path / "out", *words)
    assert ended.code == 2
    assert "pictures: " in ended.err
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("script", MAINS)
def test_fault_43_no_picture_is_no_number(prior: Path, tmp_path: Path, script: str) -> None:
    """Fault 43: -n 0 is a mistake, and nothing is left of it."""
    ended = again(script, prior, tmp_path / "out", "-n", 0)
    assert ended.code == 2
    assert "n: " in ended.err
    assert not (tmp_path / "out").exists()


def test_fault_43_more_pictures_than_anybody_makes(prior: Path, tmp_path: Path) -> None:
    """Fault 43: the names of 10^12 pictures alone would take all memory, before the first of them."""
    ended = again(GENERATE, prior, tmp_path / "out", "-n", 10**12)
    assert ended.code == 2
    assert "less than or equal to 10000000" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "n", "batch"), [("gpt", 1, 64), ("pixelcnn", 3, 2), ("gpt", 65, 64)])
def test_fault_43_exactly_n_pictures_on_any_number_of_processes(
    priors: dict[str, LoadedPrior], tmp_path: Path, kind: str, n: int, batch: int
) -> None:
    """Fault 43: one, a number that two processes cannot share evenly, and one more than a batch: n files, each name
    once, and the same bytes in all of them."""
    words = ("-n", n, "--batch_size", batch, "--top_p", 1)
    path = priors[kind].path.parent
    assert again(GENERATE, path, tmp_path / "one", *words).code == 0
    run_processes(2, run_script, GENERATE, "--prior", path, "--out", tmp_path / "two", *words)
    names = {f"{i:06d}.png" for i in range(n)} | {"grid.png", "samples.npz", "settings.json"}
    assert content(tmp_path / "one").keys() == names
    assert content(tmp_path / "one") == content(tmp_path / "two")


@KINDS
@pytest.mark.parametrize("script", MAINS)
@pytest.mark.parametrize("options", [("--temperature", 0), ("--top_k", 1)], ids=str)
def test_fault_45_nan_in_the_weights_gives_no_picture(
    tmp_path: Path, kind: str, script: str, options: tuple[object, ...]
) -> None:
    """Fault 45: greedily, NaN would be code 0 everywhere, and a picture like any other."""
    folder = write_prior(tmp_path / "run", kind=kind).path.parent
    edit_weights(folder / PRIOR_FILE, **{"head.output.weight": torch.full((16, 24), float("nan"))})
    words = ("--variants", 1) if script == COMPLETE else ()
    ended = run(MAINS[script], "--prior", folder, "--out", tmp_path / "out", "-n", 2, *options, *words)
    assert ended.code == 3
    assert "not finite" in ended.err
    assert str(folder / PRIOR_FILE) in ended.err
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 7, 15])
def test_fault_45_one_logit_that_is_not_finite_is_enough(
    value: float, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 45: a single one, or a row of -inf, at any place, in one row of several, whichever way a code is chosen."""
    prior = gpt(TokenShape(2, 3, 1, 16), classes=3)
    logits = torch.zeros(3, 16)
    logits[1, slice(None) if value == -float("inf") else place] = value
    choices: list[Callable[..., Tensor]] = [sample_softmax]
    configs = (ChooseConfig(temperature=0.0), ChooseConfig(), ChooseConfig(top_k=3), ChooseConfig(top_p=0.5, min_p=0.1))
    choices += [partial(choose, config=config) for config in configs]
    for each in choices:
        answers = iter([torch.zeros(3, 16)] * 4 + [logits] + [torch.zeros(3, 16)])
        monkeypatch.setattr(Generation, "logits", lambda _, answers=answers: next(answers))
        with pytest.raises(DivergedError, match="not finite"):
            generate(prior, torch.arange(3), noise_of(3, 6), each)


@KINDS
def test_fault_45_more_than_all_codes_is_no_filter(priors: dict[str, LoadedPrior], tmp_path: Path, kind: str) -> None:
    """Fault 45: top_k beyond the codebook is clamped to it."""
    for name, options in (("plain", ()), ("all", ("--top_k", 16)), ("more", ("--top_k", 10**9))):
        words = ("-n", 4, "--top_p", 1, *options)
        assert again(GENERATE, priors[kind].path.parent, tmp_path / name, *words).code == 0
    assert pictures_of(tmp_path / "plain") == pictures_of(tmp_path / "all") == pictures_of(tmp_path / "more")


@KINDS
def test_fault_45_temperature_has_an_end_at_zero(priors: dict[str, LoadedPrior], tmp_path: Path, kind: str) -> None:
    """Fault 45: 0 is the likeliest code, whatever the seed; below there is nothing; a tiny one does not overflow."""
    path = priors[kind].path.parent
    for temperature, seed in ((0, 0), (0, 1), (1e-300, 2)):
        out = tmp_path / f"{temperature}-{seed}"
        assert again(GENERATE, path, out, "-n", 4, "--temperature", temperature, "--seed", seed).code == 0
    assert pictures_of(tmp_path / "0-0") == pictures_of(tmp_path / "0-1") == pictures_of(tmp_path / "1e-300-2")
    ended = again(GENERATE, path, tmp_path / "out", "--temperature=-0.5")
    assert ended.code == 2
    assert "temperature: " in ended.err
    assert "greater than or equal to 0" in ended.err
    assert not (tmp_path / "out").exists()


@KINDS
@pytest.mark.parametrize("depth", [1, 3])
def test_fault_46_whatever_is_favoured_is_a_code(tmp_path: Path, kind: str, depth: int) -> None:
    """Fault 46: the start is no id here, so there is no logit for it: V of them, and a huge bias on any one, the last
    among them, at any position and depth, gives just that code, which decodes."""
    bottleneck = {"bottleneck": RvqConfig(codebook_size=16, depth=depth)} if depth > 1 else {}
    loaded = write_prior(tmp_path, kind=kind, tokenizer=bottleneck)
    shape, tokenizer = loaded.model.shape, loaded.tokenizer.tokenizer
    assert depth == shape.K
    labels = torch.tensor([0, 1, loaded.model.null_label])
    noise = noise_of(3, shape.length)
    last = shape.h * shape.w - 1
    for temperature, favoured, position in product((0.0, 1.0), (0, shape.V - 1), (0, last)):
        config = ChooseConfig(temperature=temperature)
        codes = generate(loaded.model, labels, noise, partial(favouring, favoured, position / last, config))
        assert (codes.flatten(1, 2)[:, position] == favoured).all()
        assert 0 <= int(codes.min()) <= int(codes.max()) < shape.V
        assert torch.isfinite(tokenizer.decode_codes(codes)).all()


def favouring(
    favoured: int, where: float, config: ChooseConfig, logits: Tensor, noise: Tensor, progress: float
) -> Tensor:
    """`choose`, with a huge bias on one logit at one place."""
    assert logits.shape[1] == 16
    if progress == where:
        logits = logits + 1e30 * (torch.arange(16) == favoured)
    return choose(logits, noise, progress, config)


@pytest.mark.parametrize("wrong", [-1, 16])
def test_fault_46_a_code_that_is_none_is_refused(priors: dict[str, LoadedPrior], wrong: int) -> None:
    """Fault 46: an index of -1 would silently be the last code's."""
    sampler = Sampler(priors["gpt"])
    codes = torch.zeros(2, 2, 3, 1, dtype=torch.int64)
    codes[1, 1, 2] = wrong
    for decode in (sampler.prior.tokenizer.tokenizer.decode_codes, sampler.decode):
        with pytest.raises(ValueError, match=r"codes must lie in 0\.\.15, got"):
            decode(codes)
