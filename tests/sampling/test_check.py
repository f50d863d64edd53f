"""check.py: what is whole is called so, each damage is named with its file, and nothing is touched."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sampling import check, generate
from sampling.checks import paths as checked_paths
from sampling.checks.finding import Finding
from sampling.checks.weights import check_safetensors
from stage1_tokenizer.engine.errors import InterruptionError
from stage2_prior.prior import PRIOR_FILE
from tests.helpers import prior_training
from tests.helpers.artefacts import edit_weights, files_of, write_image_folder, write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.mutations import mutate_safetensors
from tests.helpers.processes import run_processes
from tests.helpers.training import train

TRAIN_SHARD = "tokens/train-00000-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both stages, five images, and a folder of images in two classes."""
    folder = tmp_path_factory.mktemp("made")
    run_processes(1, train, folder / "one", {"steps": 3, "keep": 2})
    write_tokenizer(folder / "tokenizer")
    ended = prior_training.train(folder / "two", folder / "tokenizer", steps=3, keep=2, validate_every=3)
    assert ended.code == 0, ended.err
    ended = run(generate.main, "--prior", folder / "two", "--out", folder / "pictures", "-n", 5)
    assert ended.code == 0, ended.err
    write_image_folder(folder / "images", ("cat", "dog"), per_class=4)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def checked(*paths: Path) -> Ended:
    """The command, which must leave every file as it is."""
    before = [files_of(path) for path in paths]
    ended = run(check.main, *paths)
    assert [files_of(path) for path in paths] == before
    return ended


def lines(ended: Ended, verdict: str) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith(f"{verdict} ")]


def flip(path: Path, place: int | None = None) -> None:
    """Invert one byte, by default the one in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_last_line(path: Path) -> None:
    path.write_text(path.read_text().rstrip("\n").rpartition("\n")[0] + "\n")


def edit_json(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def with_code(path: Path, code: int) -> None:
    """A shard that holds a code, and has a good checksum."""
    codes: Tensor = load_file(path)["codes"]
    codes[3] = code
    edit_weights(path, codes=codes)


def with_nan(path: Path) -> None:
    """A weight that is NaN, in a file with a good checksum."""
    name, tensor = next((name, tensor) for name, tensor in load_file(path).items() if tensor.is_floating_point())
    edit_weights(path, **{name: torch.full_like(tensor, torch.nan)})


def of_another_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, seed=1)


def test_what_is_whole_is_called_so(made: Path) -> None:
    """Runs of both stages, token files, samples and images: each is looked at, and nothing is bad or remarkable."""
    ended = checked(made)
    assert (ended.code, ended.err) == (0, "")
    *found, last = ended.out.splitlines()
    assert all(line.startswith("ok   ") for line in found)
    assert last == f"{len(found)} ok, 0 bad, 0 note"
    said = dict(line.removeprefix(f"ok   {made}/").split(": ", 1) for line in found)
    assert [name for name in said if name.startswith("one/")] == [
        "one/config.yaml",
        "one/state/step-00000003",
        "one/state/step-00000002",
        "one/tokenizer.safetensors",
        "one/metrics.jsonl",
        "one/environment.jsonl",
        "one/samples",
    ]
    assert said["one/state/step-00000003"] == "whole by its checksums, format 2; a resume takes this one"
    assert said["one/state/step-00000002"] == "whole by its checksums, format 2"
    assert "a tokenizer of step 3 (vq), images 16x16x3, 4x4x1 codes of 8; fing" in said["one/tokenizer.safetensors"]
    assert said[f"two/{PRIOR_FILE}"] == (
        "whole by its checksum, format 2; a prior of step 3 (gpt) over 2x3x1 codes of 16, 5 classes; fits the "
        "tokenizer beside it"
    )
    assert said[f"two/{TRAIN_SHARD}"].startswith("whole by its checksum; 23 of 23 images as 2x3x1 codes of 16, by the")
    assert said["two/samples"] == "1 image, all can be read"
    assert said["pictures/settings.json"] == "finished, 5 of 5 images are there"
    assert said["pictures"] == "6 images, all can be read"


def test_each_thing_can_be_given_alone(made: Path) -> None:
    """A state, a file of any kind, a folder of tokens, of samples or of images, one image; as many as one likes."""
    alone = {
        "one/state": "whole by its checksums",
        "one/state/step-00000002": "whole by its checksums",
        "one/state/step-00000002/ema.safetensors": "is a part of the state step-00000002, whole",
        "one/tokenizer.safetensors": "a tokenizer of step 3",
        f"two/{PRIOR_FILE}": "fits the tokenizer beside it",
        f"two/{TRAIN_SHARD}": "23 of 23 images",
        "two/tokens": "train: complete, 23 images",
        "pictures": "5 of 5 images are there",
        "images": "8 images in 2 sub-folders (cat 4, dog 4), all can be read",
        "images/cat/00.png": "an image of 8x12 (height, width)",
    }
    for name, words in alone.items():
        ended = checked(made / name)
        assert ended.code == 0, ended.out
        assert any(words in line for line in lines(ended, "ok")), (name, ended.out)
    together = checked(*(made / name for name in alone))
    assert together.code == 0
    assert all(words in together.out for words in alone.values())


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[str, Damage, str, str]] = {
    "flipped weights": ("one/tokenizer.safetensors", flip, "", "is damaged"),
    "truncated weights": ("one/tokenizer.safetensors", cut, "", "is damaged"),
    "weights not finite": ("one/tokenizer.safetensors", with_nan, "", "is as it was written, but "),
    "truncated part of a state": (
        "one/state/step-00000003/ema.safetensors",
        cut,
        "one/state/step-00000003",
        "ema.safetensors is damaged",
    ),
    "flipped part of a state": (
        "two/state/step-00000003/prior.safetensors",
        flip,
        "two/state/step-00000003",
        "prior.safetensors is damag",
    ),
    "missing manifest": (
        "one/state/step-00000003/manifest.json",
        Path.unlink,
        "one/state/step-00000003",
        "manifest.json is missing",
    ),
    "configuration cut off": ("one/config.yaml", without_last_line, "", "is cut off"),
    "configuration that is not YAML": ("one/config.yaml", lambda path: path.write_text("a: [b"), "", "is not YAML"),
    "no configuration": ("one/config.yaml", Path.unlink, "", "is missing, so a resume is refused"),
    "log": ("one/metrics.jsonl", lambda path: path.write_text('{"step": 1}\n{"st\n{"step": 3}\n'), "", "line 2 is no"),
    "flipped prior": (f"two/{PRIOR_FILE}", flip, "", "is damaged"),
    "prior beside another tokenizer": (
        "two",
        of_another_tokenizer,
        f"two/{PRIOR_FILE}",
        "but it belongs to the tokenizer",
    ),
    "tokens of another tokenizer": ("two", of_another_tokenizer, f"two/{TRAIN_SHARD}", "made by the tokenizer"),
    "run on another tokenizer": ("two", of_another_tokenizer, "two/config.yaml", "is that of a run on the tokenizer"),
    "prior without a tokenizer": ("two/tokenizer.safetensors", Path.unlink, f"two/{PRIOR_FILE}", "is not beside it"),
    "flipped token": (f"two/{TRAIN_SHARD}", flip, "", "is damaged"),
    "code V": (f"two/{TRAIN_SHARD}", lambda path: with_code(path, 16), "", "..16, but must lie in 0..15"),
    "code -1": (f"two/{TRAIN_SHARD}", lambda path: with_code(path, -1), "", "its codes are -1.."),
    "samples begun": ("pictures/settings.json", lambda path: edit_json(path, finished=False), "", "unfinished: 5 of 5"),
    "missing sample": (
        "pictures/000003.png",
        Path.unlink,
        "pictures/settings.json",
        "the first that is missing is 000003.p",
    ),
    "truncated sample": ("pictures/000003.png", cut, "", ""),
    "flipped samples": ("pictures/samples.npz", flip, "", "is damaged"),
    "truncated image": ("images/dog/02.png", cut, "", ""),
    "text as an image": ("images/dog/02.png", lambda path: path.write_text("no"), "", "cannot be read as an image"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_bad_and_its_file_is_named(copy: Path, name: str) -> None:
    """Exit code 3, and a line that begins with `bad`, the path, and what is wrong."""
    damaged, damage, named, words = DAMAGES[name]
    damage(copy / damaged)
    ended = checked(copy)
    assert ended.code == 3, ended.out
    path = copy / (named or damaged)
    found = [line for line in lines(ended, "bad") if line.startswith(f"bad  {path}: ")]
    assert found, ended.out
    assert words in found[0]


@pytest.mark.parametrize("file", ["one/tokenizer.safetensors", f"two/{PRIOR_FILE}", f"two/{TRAIN_SHARD}"])
def test_no_flipped_byte_goes_unnoticed(copy: Path, file: str) -> None:
    """In the weights or in the header, at whatever place."""
    path = copy / file
    whole = path.read_bytes()
    for place in [*range(0, 700, 29), *range(700, len(whole), len(whole) // 12)]:
        flip(path, place)
        findings = [finding for finding in check_safetensors(path) if finding.path == path]
        assert [finding.verdict for finding in findings] == ["bad"], (place, findings)
        path.write_bytes(whole)


@pytest.mark.parametrize("file", ["one/tokenizer.safetensors", f"two/{PRIOR_FILE}", f"two/{TRAIN_SHARD}"])
def test_whatever_a_header_says_there_is_a_finding(copy: Path, file: str) -> None:
    """Mutated as a stranger might, with a good checksum where it can be: no exception, and never without a word."""
    path, rng = copy / file, random.Random(1)
    whole = path.read_bytes()
    for _ in range(40):
        path.write_bytes(mutate_safetensors(rng, whole))
        findings = list(check_safetensors(path))
        assert path in [finding.path for finding in findings]
        assert all(len(str(finding)) < 2000 for finding in findings)


def test_a_resume_takes_the_newest_state_that_is_whole(copy: Path) -> None:
    """And where there is none, that is said of all of them."""
    cut(copy / "one/state/step-00000003/optimizer.safetensors")
    ended = checked(copy / "one")
    assert ended.code == 3
    assert "step-00000002: whole by its checksums, format 2; a resume takes this one" in ended.out
    cut(copy / "one/state/step-00000002/optimizer.safetensors")
    ended = checked(copy / "one")
    assert f"bad  {copy}/one/state: none of its states can be used, so a resume is refused" in ended.out
    assert "a resume takes" not in ended.out


def test_tokens_that_are_not_all_there_are_bad_unless_they_are_in_the_making(copy: Path) -> None:
    """A shard of two that is alone; a run that holds the folder may be about to write the other one."""
    shard = copy / "two" / TRAIN_SHARD
    with safe_open(shard, framework="pt") as file:
        header = file.metadata() | {"total": "46"}
    tensors = load_file(shard)
    save_file(tensors, shard, header)
    edit_weights(shard, **tensors)  # makes the checksum good
    ended = checked(copy / "two")
    assert ended.code == 3
    assert lines(ended, "bad") == [
        f"bad  {copy}/two/tokens: train: incomplete, 23 of 46 images; a training extracts the codes anew"
    ]
    with held(copy / "two"):
        ended = checked(copy / "two")
    assert ended.code == 0, ended.out
    assert f"note {copy}/two/tokens: train: 23 of 46 images so far" in ended.out


def test_a_run_that_is_under_way_is_said_to_be(copy: Path) -> None:
    """The check neither waits for it nor disturbs it, and images that it has not made yet are not missing."""
    edit_json(copy / "pictures/settings.json", finished=False)
    (copy / "pictures/000004.png").unlink()
    with held(copy / "one"), held(copy / "pictures"):
        ended = checked(copy / "one", copy / "pictures")
    assert ended.code == 0, ended.out
    assert f"note {copy}/one: is in use by a running process (somebody)" in ended.out
    assert "in use by a running process (somebody); 4 of 5 images are there so far" in ended.out


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process has the lock of a folder."""
    words = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    (folder / ".lock").write_text("somebody\n")
    command = [sys.executable, "-S", "-c", words, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate("\n")


def test_what_is_harmless_is_noted(copy: Path) -> None:
    """Leftovers of a killed process, a last line cut off, the list of bad images, a batch that was kept, samples."""
    (copy / "one/state/.tmp-step-00000004-99").mkdir()
    (copy / "pictures/.tmp-000001.png-99").write_bytes(b"half")
    with (copy / "one/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')
    (copy / "one/bad_files.txt").write_text("a.png\tthe file is empty\nb.png\tis a folder\n")
    header = {"kind": "batch", "step": "2", "seed": "0", "found": "the loss's total (1 of 1 values, NaN)"}
    save_file({"images": torch.zeros(2)}, copy / "one/nonfinite-step-00000002-rank-0.safetensors", header)
    shutil.copytree(copy / "pictures", copy / "two/generated/001")
    ended = checked(copy)
    assert ended.code == 0, ended.out
    assert len(lines(ended, "note")) == 6
    for words in (
        f"note {copy}/one/state/.tmp-step-00000004-99: is left over",
        f"note {copy}/pictures/.tmp-000001.png-99: is left over",
        "entries, and a last one that was cut off",
        "lists 2 image files",
        "the batch of step 2, left out for the loss's total (1 of 1 values, NaN)",
        f"note {copy}/two/generated/001: a folder of samples, not looked at here",
    ):
        assert words in ended.out, words


def test_a_file_that_tessera_did_not_write_is_noted(tmp_path: Path) -> None:
    """It says what it is and that nothing vouches for its content; damaged, it is bad."""
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path)
    ended = checked(path)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "0 ok, 0 bad, 1 note")
    assert "carries no checksum, and Tessera did not write it; 2 tensors, 28 bytes" in ended.out
    cut(path)
    assert checked(path).code == 3


def test_files_of_format_1_are_read_where_this_version_reads_them() -> None:
    """Fault 50: weights without a checksum are, and that is said; a state is not."""
    fixture = Path(__file__).parents[1] / "fixtures" / "format_1"
    ended = checked(fixture)
    assert ended.code == 3
    assert [line.split(": ")[1][:63] for line in lines(ended, "ok")] == [
        "can be read, but carries no checksum, format 1; a tokenizer of ",
        "can be read, but carries no checksum, format 1; a prior of step",
    ]
    assert f"bad  {fixture}/state/step-00000012: its format is 1, this version reads 2" in ended.out


def test_an_image_folder_has_each_bad_image_in_a_line(tmp_path: Path) -> None:
    """A newline in a name stays on its line, and the rest is counted."""
    rng = np.random.default_rng(0)
    for name in ("a b.png", "c,d.jpg", "é\n.png", "broken.png", "empty.jpg"):
        Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(tmp_path / name)
    flip(tmp_path / "broken.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    flip(tmp_path / "é\n.png")
    ended = checked(tmp_path)
    assert ended.code == 3
    assert sorted(line.split(": ")[0] for line in lines(ended, "bad")) == [
        f"bad  {tmp_path}/broken.png",
        f"bad  {tmp_path}/empty.jpg",
        f"bad  {tmp_path}/é\\n.png",
    ]
    assert ended.out.splitlines()[-2:] == [
        f"note {tmp_path}: 3 of 5 images cannot be read",
        "0 ok, 3 bad, 1 note",
    ]


def test_what_is_nothing_is_refused_before_anything_is_looked_at(made: Path, tmp_path: Path) -> None:
    """No such path, an empty folder, a file of no kind that we know, a pickle: exit code 2, which names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "text.txt").write_text("text")
    for path, words in (
        (tmp_path / "nowhere", "there is no such file or folder"),
        (tmp_path / "empty", "is nothing that Tessera writes or reads"),
        (tmp_path / "weights.pt", "is nothing that Tessera writes or reads"),
        (tmp_path / "text.txt", "is nothing that Tessera writes or reads"),
    ):
        ended = run(check.main, made / "one", path)
        assert (ended.code, ended.out) == (2, "")
        assert f"{path}: {words}" in ended.err
    assert run(check.main).code == 2


@pytest.mark.parametrize("name", ["a b", "a,b", "[a]", '"', "'", "é\n", "{}", "null", "1", "\\n"])
def test_fault_52_paths_may_have_any_name(made: Path, tmp_path: Path, name: str) -> None:
    """Fault 52: the parser would split a list at commas, and take some words for JSON; a line stays a line."""
    shutil.copytree(made / "images", tmp_path / name)
    ended = checked(tmp_path / name, made / "images")
    assert (ended.code, ended.err) == (0, "")
    assert len(ended.out.splitlines()) == 3
    assert "8 images in 2 sub-folders" in ended.out.splitlines()[0]


def test_a_folder_that_cannot_be_read_is_bad(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beside it is looked at all the same. (Root may read everything, so the refusal is made here.)"""

    def refuse(path: Path) -> Iterator[Finding]:
        raise PermissionError(13, "Permission denied", str(path))
        yield

    monkeypatch.setattr(checked_paths, "check_samples", refuse)
    ended = checked(copy)
    assert ended.code == 3
    assert lines(ended, "bad") == [f"bad  {copy}/pictures: cannot be read (Permission denied)"]
    assert f"ok   {copy}/two/{PRIOR_FILE}" in ended.out


def test_a_signal_ends_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Being asked to stop is no finding."""

    def stopped(path: Path) -> Iterator[Finding]:
        raise InterruptionError("asked to stop")
        yield

    monkeypatch.setattr(checked_paths, "check_samples", stopped)
    assert run(check.main, made / "pictures").code == 75


def test_the_script_is_the_module(made: Path) -> None:
    """`python sampling/check.py` and `python -m sampling.check` are one."""
    ended = run(names_of("sampling/check.py")["main"], made / "images")
    assert (ended.code, ended.out) == (0, checked(made / "images").out)


def test_a_file_of_a_former_version_without_an_end_mark(copy: Path) -> None:
    """Its last key says whether it is whole, for no key is added to it any more."""
    path = copy / "one/config.yaml"
    former = path.read_text().removeprefix("---\n").removesuffix("...\n")
    path.write_text(former)
    assert checked(copy / "one").code == 0
    path.write_text(former.rpartition("pictures:")[0])
    assert f"bad  {path}: is cut off" in checked(copy / "one").out


def test_a_prior_whose_weights_do_not_fit_its_header_is_bad(copy: Path) -> None:
    """The check builds what the header describes, as loading does."""
    path = copy / "two" / PRIOR_FILE
    edit_weights(path, **{"head.output.weight": torch.zeros(17, 24)})
    assert "head.output.weight" in "".join(lines(checked(copy / "two"), "bad"))


def test_the_former_command_names_the_new_one(tmp_path: Path) -> None:
    """`python -m stage1_tokenizer.check` was the command of earlier versions; the message is the one to type."""
    ended = run(names_of("stage1_tokenizer/check.py")["main"], tmp_path)
    assert ended.code == 2
    assert ended.err.endswith("type: python sampling/check.py " + str(tmp_path) + "\n")
