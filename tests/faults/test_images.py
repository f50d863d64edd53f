"""Faults of image files and folders, each injected through real files: rows 18 to 29 of the table of faults."""

import errno
import io
import os
import pickle
import re
import shutil
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sampling.input_images import image_paths
from stage1_tokenizer.data import build_splits
from stage1_tokenizer.data.bad_files import BadFiles, BadImageError
from stage1_tokenizer.data.base import ImageArray, Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.order import BatchOrder, training_batches
from stage1_tokenizer.engine.errors import BadFileError, StorageError
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.processes import run_processes
from tests.helpers.training import TINY

SPLITS: tuple[Split, Split] = ("train", "validation")
# Python 3.12 warns of any fork in a process with threads, and torch has some.
may_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def chunks(*parts: bytes) -> bytes:
    """A PNG of these chunks (name and content), with good checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    return b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def stored(format: str, size: tuple[int, int] = (9, 8), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 100).convert("RGB").save(file, format, **options)
    return file.getvalue()


PNG, JPEG = stored("PNG"), stored("JPEG")
BAD = {
    "empty": b"",
    "text": b"not an image",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut": PNG[: len(PNG) // 2],
    "flipped": PNG[:80] + bytes([PNG[80] ^ 1]) + PNG[81:],
    "bomb": chunks(header(60_000, 60_000), b"IDAT" + zlib.compress(bytes(99)), b"IEND"),
}


def fill(root: Path, n: int = 30) -> list[Path]:
    """`n` images in each of two classes; the blue of image number k is k, and its red tells the class."""
    paths = []
    for number in range(2 * n):
        label, place = divmod(number, n)
        path = root / f"class {label}" / f"{place:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (label * 200, 7, number)).save(path)
        paths.append(path)
    return paths


def config(root: Path, **options: Any) -> FolderConfig:
    return FolderConfig(**{"root": str(root), "image_size": (8, 8), "bad_share": 0.3, **options})


def seen(made: ImageBatches) -> list[tuple[int, int]]:
    """(number, label) of each image of a split that `fill` wrote."""
    pixels, labels = made.batch(np.arange(len(made)))
    return list(zip(pixels[:, 2, 0, 0].tolist(), labels.tolist(), strict=True))


def train_on(root: Path, out: Path, **options: Any) -> Ended:
    """`python stage1_tokenizer/train.py` on a folder, as TINY has it."""
    tiny = {key: value for key, value in TINY.items() if key not in ("data.train_images", "data.validation_images")}
    tiny |= {"data.kind": "folder", "data.root": root, "steps": 2, "adversarial.weight": 0, **options}
    arguments = [part for key, value in tiny.items() if value is not True for part in (f"--{key}", value)]
    return run(names_of("stage1_tokenizer/train.py")["main"], "--no-report", "--out", out, *arguments)


@may_fork
def test_fault_18_unreadable_files_are_skipped_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 18: each is named once in the list, and the next image replaces it with its own label: the same one
    with and without a cache, with workers, and after a restart, so a place in the order is never another image."""
    paths = fill(tmp_path / "set")
    whole = seen(open_data(config(tmp_path / "set")).image_batches("train", 0))
    # The first, the last, and two neighbours.
    for (number, _), content in zip([whole[0], whole[20], whole[21], whole[-1]], BAD.values(), strict=False):
        paths[number].write_bytes(content)
    bad = [paths[whole[place][0]] for place in (0, 20, 21, len(whole) - 1)]
    expected = [*whole]
    for place, other in [(0, 1), (20, 22), (21, 22), (len(whole) - 1, 1)]:
        expected[place] = whole[other]
    bad_list = tmp_path / "run" / "bad_files.txt"
    assert not bad_list.exists()
    for cache in ("memory", "none"):
        for _ in range(2):
            made = open_data(config(tmp_path / "set", cache=cache)).image_batches("train", 0, bad_list=bad_list)
            assert seen(made) == expected
            told = capsys.readouterr().err
            assert ("4 of 60 images cannot be read" in told) == (cache == "memory")
            assert all(told.count(f"{path}: ") == 1 for path in bad)
    batches = [list(training_batches(made, BatchOrder(len(made), 8, 0), 0, 9, workers)) for workers in (0, 2)]
    assert all(torch.equal(a, b) for one, two in zip(*batches, strict=True) for a, b in zip(one, two, strict=True))
    lines = [line.split("\t") for line in bad_list.read_text().splitlines()]
    assert sorted(name for name, _ in lines) == sorted(map(str, bad))
    assert dict(lines)[str(bad[0])] == "the file is empty"


def test_fault_18_the_list_survives_a_torn_line_and_any_name(tmp_path: Path) -> None:
    """Fault 18: a name with line breaks stays one line, and a line that a power cut left half swallows no other."""
    paths = fill(tmp_path / "set")
    odd = os.fsencode(paths[0].parent) + b"/a\nb\tc\\ d caf\xe9 \xe2\x98\x83.png"
    paths[0].rename(os.fsdecode(odd))
    Path(os.fsdecode(odd)).write_bytes(b"")
    (tmp_path / "list").write_bytes(b"half a li")
    for _ in range(2):
        for split in ("train", "validation"):
            open_data(config(tmp_path / "set")).image_batches(split, 0, bad_list=tmp_path / "list")
    half, line = (tmp_path / "list").read_text(encoding="utf-8").splitlines()
    assert half == "half a li"
    assert line == f"{paths[0].parent}/a\\nb\\tc\\\\ d caf\\udce9 \u2603.png\tthe file is empty"


def test_fault_18_a_list_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 18: if the list cannot be written, bad files are printed all the same."""
    for path in fill(tmp_path / "set")[:4]:
        path.write_bytes(b"")
    made = open_data(config(tmp_path / "set")).image_batches(
        "train", 0, bad_list=tmp_path / "set" / "class 0" / "029.png" / "x"
    )
    assert len(seen(made)) == len(made)
    told = capsys.readouterr().err
    assert told.count("x cannot be written (File exists)") == 1
    assert told.count("the file is empty") >= 2


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_fault_18_too_many_bad_files_end_the_run(tmp_path: Path, cache: str) -> None:
    """Fault 18: with more than data.bad_share, something is wrong with the data set, and the message has examples."""
    paths = fill(tmp_path / "set")
    for path in paths[:12]:
        path.write_bytes(b"")
    ended = train_on(tmp_path / "set", tmp_path / "run", **{"data.cache": cache, "data.bad_share": 0.1})
    assert ended.code == 3
    assert "Traceback" not in ended.err
    assert re.search(r"\d+ of \d\d images cannot be read, and data.bad_share tolerates 10.00% of them", ended.err)
    assert sum(f"  {path}: the file is empty" in ended.err for path in paths) >= 5
    assert "raise --data.bad_share" in ended.err
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(BadFileError, match=r"(\d+) of \1 images cannot be read"):
        seen(open_data(config(tmp_path / "set", cache=cache, bad_share=1.0)).image_batches("train", 0))


@pytest.mark.parametrize(
    ("fault", "times", "outcome", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), 1, None, ""),
        (OSError(errno.EIO, "Input/output error"), 2, StorageError, "cannot be read .Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), 2, StorageError, "fault of the machine"),
        (OSError(errno.EMFILE, "Too many open files"), 2, StorageError, "Too many open files"),
        (MemoryError(), 1, StorageError, "no memory left"),
        (OSError(errno.EINVAL, "Invalid argument"), 1, BadImageError, "Invalid argument"),
        (OSError("image file is truncated"), 1, BadImageError, "truncated"),
    ],
    ids=str,
)
def test_fault_18_a_failing_machine_is_no_bad_picture(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    times: int,
    outcome: type[Exception] | None,
    words: str,
) -> None:
    """Fault 18: a failing disk, network or memory ends the run, after one more try. Otherwise sound images would be
    replaced by others, on this machine alone."""
    (tmp_path / "x.png").write_bytes(PNG)
    faults, load = iter([fault] * times), PngImageFile.load

    def failing(self: PngImageFile) -> Any:
        for each in faults:
            raise each
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", failing)
    if outcome is None:
        assert read_image(tmp_path / "x.png", 3).shape == (8, 9, 3)
        return
    with pytest.raises(outcome, match=rf"x\.png: .*{words}") as caught:
        read_image(tmp_path / "x.png", 3)
    assert type(caught.value) is outcome


class Slow(dict[int, BadImageError]):
    """A dictionary that is counted while it grows."""

    def __len__(self) -> int:
        time.sleep(1e-3)  # the other threads' turn
        return super().__len__()


@pytest.mark.parametrize("what", ["one image", "many"])
def test_fault_18_threads_report_each_picture_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """Fault 18: a cache is filled by many threads; none prints or lists what another one does."""
    bad = BadFiles(tmp_path / "list", 0.9, 100)
    bad = pickle.loads(pickle.dumps(bad))  # as it goes to workers
    places = [0] * 60 if what == "one image" else list(range(60))
    together = threading.Barrier(len(places))

    def report(place: int) -> None:
        together.wait()
        bad.add(place, BadImageError(Path(f"{place}.png"), "is bad"))

    bad._errors = Slow()
    with ThreadPoolExecutor(len(places)) as threads:
        list(threads.map(report, places))
    assert sorted((tmp_path / "list").read_text().splitlines()) == sorted(f"{n}.png\tis bad" for n in {*places})
    assert capsys.readouterr().err.count("replaces it") == min(10, len({*places}))
    assert bad.summary().startswith(f"{len({*places})} of 100")


def test_fault_19_a_damaged_png_ends_no_process(tmp_path: Path) -> None:
    """Fault 19: wherever a byte of a PNG's pixels or checksums is changed, it is a bad file and nothing worse."""
    path, start = tmp_path / "x.png", PNG.index(b"IDAT")
    for place in range(start + 4, len(PNG) - 12):
        path.write_bytes(PNG[:place] + bytes([PNG[place] ^ 0x10]) + PNG[place + 1 :])
        with pytest.raises(BadFileError, match=r"x\.png: "):
            read_image(path, 3)


def test_fault_20_grey_of_16_bits_keeps_its_brightness(tmp_path: Path) -> None:
    """Fault 20: a ramp over all 16-bit levels is a ramp, where Pillow makes it white; 32 bits without a white are no
    image, for a guess at their brightness would differ from file to file."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert abs(read_image(tmp_path / "x.png", 3) / 255.0 - ramp[..., None] / 65535.0).max() <= 1 / 255
    for wide in (ramp / np.float32(65535), ramp.astype(np.int32) * 2, np.full((2, 2), np.nan, np.float32)):
        Image.fromarray(wide).save(tmp_path / "x.tif")
        with pytest.raises(BadFileError, match="nothing says which"):
            read_image(tmp_path / "x.tif", 3)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("RGBA", (200, 0, 40, 51), "png", (244, 204, 212)),
        ("LA", (100, 51), "png", (224, 224, 224)),
        ("P", 1, "png", (10, 20, 30)),
        ("1", 1, "png", (255, 255, 255)),
    ],
)
def test_fault_21_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: Any, suffix: str, expected: tuple[int, int, int]
) -> None:
    """Fault 21: golden values for each kind of pixel, alpha over white."""
    image = Image.new(mode, (5, 4), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / f"x.{suffix}")
    pixels = read_image(tmp_path / f"x.{suffix}", 3)
    assert pixels.shape == (4, 5, 3)
    assert abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_fault_22_the_first_frame_is_the_picture(tmp_path: Path, suffix: str) -> None:
    """Fault 22: animations and pages are three-dimensional images, of their first frame."""
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    pixels = read_image(tmp_path / f"x.{suffix}", 3)
    assert pixels.shape == (4, 5, 3)
    assert abs(pixels.astype(int) - [255, 0, 0]).max() <= 1


def test_fault_23_all_orientations_are_one_picture(tmp_path: Path) -> None:
    """Fault 23: eight files of one scene, each stored as its orientation says, decode to the same pixels."""
    scene = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    sideways: Callable[[ImageArray], ImageArray] = lambda x: x.transpose(1, 0, 2)  # noqa: E731
    turned = [scene, scene[:, ::-1], scene[::-1, ::-1], scene[::-1]]
    turned += [sideways(scene), sideways(scene[:, ::-1]), sideways(scene[::-1, ::-1]), sideways(scene[::-1])]
    for orientation, pixels in enumerate(turned, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{orientation}.png", exif=exif)
    assert all(np.array_equal(read_image(path, 3), scene) for path in tmp_path.iterdir())


def test_fault_24_any_size_becomes_the_image_size(tmp_path: Path) -> None:
    """Fault 24: a single pixel, a line of 5000, and an image smaller than the crop are scaled up; nothing fails."""
    sizes = [(1, 1), (5000, 1), (1, 5000), (3, 2), (4000, 7)]
    for number, size in enumerate(sizes * 6):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / f"{number}.png")
    for options in [{}, {"random_crop": True, "resize_to": 40, "flip": True}]:
        made = open_data(config(tmp_path, image_size=(16, 24), **options)).image_batches("train", 0)
        pixels, _ = made.batch(np.arange(len(made)), np.zeros(len(made), dtype=np.int64))
        assert (pixels == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all()


def inflating(size: int) -> bytes:
    """A stream of `size` megabytes of zeros, made in no time: one flushed block, over and over."""
    one = zlib.compressobj(9)
    block = one.compress(b"") + one.compress(bytes(1 << 20)) + one.flush(zlib.Z_FULL_FLUSH)
    return block[:2] + block[2:] * size


def rises(_: Accelerator, folder: Path) -> dict[str, tuple[int, str]]:
    """For each file, by how many bytes the peak memory rose in reading it, and the error."""
    found = {}
    for path in sorted(folder.iterdir()):
        error, before = "", getrusage(RUSAGE_SELF).ru_maxrss
        try:
            read_image(path, 3)
        except BadFileError as refused:
            error = str(refused)
        found[path.name] = (getrusage(RUSAGE_SELF).ru_maxrss - before) * 1024, error
    return found


def test_fault_25_and_29_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    """Faults 25 and 29: what a header, a frame, compressed text or a colour profile would unpack to is never in memory.
    The last file is large but allowed, and shows that the measurement sees it."""
    pixels = b"IDAT" + inflating(60)
    small, end = (header(1, 1), b"IDAT" + zlib.compress(bytes(4))), b"IEND"
    bombs = {
        "1.png": chunks(header(20_000, 20_000, 1, 0), pixels, end),
        "2.png": chunks(header(60_000, 60_000), pixels, end),
        "3.png": chunks(header(10_000, 8_000), pixels, end),
        "4.gif": struct.pack("<6sHHBBB", b"GIF89a", 1, 1, 0x80, 0, 0)
        + bytes(6)
        + struct.pack("<cHHHHB", b",", 0, 0, 60_000, 60_000, 0)
        + b"\x02\x02L\x01\x00;",
        "5.png": chunks(small[0], b"zTXtk\0\0" + inflating(500), small[1], end),
        "6.png": chunks(small[0], b"iTXtk\0\1\0\0\0" + inflating(500), small[1], end),
        "7.png": chunks(small[0], b"iCCPk\0\0" + inflating(500), small[1], end),
        "8.png": chunks(*small, b"zTXtk\0\0" + inflating(500), end),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (6_000, 6_000)).save(tmp_path / "9.png")
    with (tmp_path / "0.webp").open("wb") as file:
        file.write(stored("WEBP"))
        file.truncate(4_000_000_000)  # Pillow reads a WEBP file whole
    found = run_processes(1, rises, tmp_path)[0]
    rise, error = found.pop("9.png")
    assert (rise > 100_000_000, error) == (True, "")
    for name, (rise, error) in found.items():
        assert rise < 100_000_000, name
        assert "more" in error or "too large" in error, (name, error)


def test_fault_26_what_is_no_readable_file_is_skipped_and_listed(tmp_path: Path) -> None:
    """Fault 26: links to nowhere and to themselves, folders, pipes and files without permission, each with an image's
    name, are listed with their reasons; the classes, the identity and the other images are as without them."""
    fill(tmp_path / "set")
    before = open_data(config(tmp_path / "set")).image_batches("train", 0)
    odd = tmp_path / "set" / "class 0"
    expected = {
        "dangling.png": "No such file",
        "loop.png": "symbolic links",
        "folder.png": "is a folder",
        "linked.png": "is a folder",
        "pipe.png": "not a regular file",
    }
    (odd / "dangling.png").symlink_to("gone.png")
    (odd / "loop.png").symlink_to("loop.png")
    (odd / "folder.png").mkdir()
    (odd / "linked.png").symlink_to(odd / "folder.png")
    os.mkfifo(odd / "pipe.png")
    if os.getuid():  # root reads all
        (odd / "secret.png").touch(mode=0o000)
        expected["secret.png"] = "Permission denied"
    (tmp_path / "set" / "top.png").mkdir()  # beside the classes
    options = {"bad_share": 0.6, "validation_share": 0.1}
    bad_list = tmp_path / "list"
    splits = [
        open_data(config(tmp_path / "set", **options)).image_batches(split, 0, "cpu", bad_list) for split in SPLITS
    ]
    reasons = dict(line.split("\t") for line in bad_list.read_text().splitlines())
    assert len(reasons) == len(expected) + 1
    assert all(words in reasons[str(odd / name)] for name, words in expected.items())
    assert splits[0].classes == before.classes == ("class 0", "class 1")
    assert set(seen(splits[0])) == set(seen(before))


def test_fault_26_the_identity_of_what_cannot_be_read(tmp_path: Path) -> None:
    """Fault 26: links to nowhere and refused ones have an identity too, and another one as soon as they can be read:
    tokens of the others alone would be taken for those of all."""
    fill(tmp_path / "set")
    for number in range(20):  # so many that both splits have some
        (tmp_path / "set" / "class 0" / f"dangling{number}.png").symlink_to("gone.png")
        (tmp_path / "set" / "class 1" / f"out{number}.png").symlink_to("/gone.png")
    options: list[dict[str, Any]] = [{}, {}, {"links": "anywhere"}]
    before, same, permitted = (identities(tmp_path / "set", **each) for each in options)
    assert before == same
    assert all(map(str.__ne__, before, permitted))
    shutil.copy(tmp_path / "set" / "class 0" / "000.png", tmp_path / "set" / "class 0" / "gone.png")
    assert all(map(str.__ne__, before, identities(tmp_path / "set")))


def identities(root: Path, **options: Any) -> list[str]:
    return [build_splits(config(root, **options))[split].identity for split in SPLITS]


def test_fault_26_a_pipe_is_no_picture(tmp_path: Path) -> None:
    """Fault 26: whoever opens a pipe waits for its other end, for ever; so it is refused wherever it was named."""
    os.mkfifo(tmp_path / "x.png")
    writer = os.open(tmp_path / "x.png", os.O_RDWR)  # lest the test waits where the pipe is opened as files are
    try:
        with pytest.raises(BadImageError, match="is not a regular file"):
            read_image(tmp_path / "x.png", 3)
    finally:
        os.close(writer)
    with pytest.raises(BadImageError, match="is not a regular file"):
        read_image(tmp_path / "x.png", 3)


def test_fault_26_a_folder_that_cannot_be_listed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 26: a class without read permission would be missing without a word, so it is an error with its path."""
    fill(tmp_path / "set")
    scandir = os.scandir

    def denied(path: str) -> Any:
        if path.endswith("class 1"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(BadFileError, match=r"class 1 cannot be listed \(Permission denied\)"):
        build_splits(config(tmp_path / "set"))["train"]
    with pytest.raises(BadFileError, match=r"class 1 cannot be listed"):
        image_paths(tmp_path / "set", "images")


def test_fault_27_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """Fault 27: exit 2, naming the folder and the extensions that were looked for; nothing is begun."""
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "set" / "sub" / "notes.txt").write_text("x")
    for root, words in [("set", "looked for .jpg, .jpeg, .png"), ("nowhere", "no such folder")]:
        ended = train_on(tmp_path / root, tmp_path / "run")
        assert ended.code == 2
        assert str(tmp_path / root) in ended.err
        assert words in ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_fault_27_fewer_pictures_than_a_batch_train(tmp_path: Path) -> None:
    """Fault 27: batches go on over the ends of epochs, so that a few images fill a batch of sixteen: it works."""
    fill(tmp_path / "set", 4)
    ended = train_on(tmp_path / "set", tmp_path / "run", **{"data.validation_share": 0.5, "batch_size": 16})
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    assert (tmp_path / "run" / "tokenizer.safetensors").exists()


def test_fault_28_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    """Fault 28: absolute, relative, and by way of another link; what stays inside is read, the root may be a link
    itself, and one key permits all of them."""
    fill(tmp_path / "real")
    Image.new("RGB", (9, 8), (1, 2, 255)).save(tmp_path / "secret.png")
    (tmp_path / "real-too").mkdir()
    shutil.copy(tmp_path / "secret.png", tmp_path / "real-too" / "s.png")  # the root's name is a prefix of its path
    inside = tmp_path / "real" / "class 0"
    (inside / "absolute.png").symlink_to(tmp_path / "secret.png")
    (inside / "relative.png").symlink_to("../../secret.png")
    (inside / "chain.png").symlink_to("relative.png")
    (inside / "neighbour.png").symlink_to("../../real-too/s.png")
    (inside / "good.png").symlink_to("../class 1/000.png")
    (tmp_path / "set").symlink_to("real")
    shown: dict[str, set[int]] = {}
    for links in ("inside", "anywhere"):
        data = config(tmp_path / "set", links=links)
        made = [open_data(data).image_batches(split, 0, "cpu", tmp_path / links) for split in SPLITS]
        shown[links] = {number for split in made for number, _ in seen(split)}
    assert shown["inside"] == set(range(60))
    assert shown["anywhere"] == {*range(60), 255}
    reasons = dict(line.split("\t") for line in (tmp_path / "inside").read_text().splitlines())
    assert {Path(name).stem for name in reasons} == {"absolute", "relative", "chain", "neighbour"}
    assert all("leads out of the folder" in reason and "--data.links" in reason for reason in reasons.values())
    assert not (tmp_path / "anywhere").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_fault_29_an_archive_is_not_unpacked(tmp_path: Path, kind: str) -> None:
    """Fault 29: an archive in place of the folder is refused before a byte of it is read, so none can be a bomb."""
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("../escaped.png", PNG)
    else:
        with tarfile.open(archive, "w:gz" if kind.endswith("gz") else "w") as file_:
            member = tarfile.TarInfo("../escaped.png")
            member.size = len(PNG)
            file_.addfile(member, io.BytesIO(PNG))
    ended = train_on(archive, tmp_path / "run")
    assert ended.code == 2
    assert f"{archive}: there is no such folder; it is a file, and an archive is not unpacked" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
