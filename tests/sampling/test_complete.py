"""Completion: what is kept, what is made, on which side an image grows, and that a variant is always the same one."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sampling.complete import main
from sampling.completion import CompletionTask, Margins, complete, encode, fill_hidden, grow, kept_codes
from sampling.sampler import Sampler, SamplingConfig
from tests.helpers.artefacts import IMAGE_SIZE, MAKERS, files_of, pixels_of, write_image_folder, write_prior
from tests.helpers.commands import Ended, run, run_script
from tests.helpers.processes import run_processes

H, W = IMAGE_SIZE  # 8x12, codes of 4x4 pixels: a grid of 2x3
PLAIN = SamplingConfig(guidance=1.0, top_p=1.0)


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    write_prior(made, ("rectangle", "triangle", "disk", "oval", "star"), kind=request.param)
    return made


def pictures(n: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, H, W, 3), dtype=np.uint8)


def task(n: int = 3, seed: int = 0, variant: int = 0) -> CompletionTask:
    return CompletionTask(pictures(n), np.arange(n), np.arange(n) % 5, seed, np.full(n, variant))


def half() -> NDArray[np.bool_]:
    keep = np.zeros((H, W), dtype=np.bool_)
    keep[:4] = True
    return keep


def command(folder: Path, out: Path, *arguments: object) -> Ended:
    return run(main, "--prior", folder, "--out", out, *arguments)


def test_a_code_is_kept_where_all_its_pixels_are() -> None:
    """A code that is partly hidden says something of the hidden part, and would give it away."""
    keep = np.ones((H, W), dtype=np.bool_)
    keep[3, 7] = False
    assert kept_codes(keep, 4).tolist() == [[True, False, True], [True, True, True]]
    keep[4:, 8:] = False
    assert kept_codes(keep, 4).tolist() == [[True, False, True], [True, True, False]]


def test_hidden_pixels_are_filled_from_what_is_kept_nearby() -> None:
    """By a slow search: the value comes from a kept pixel no more than three steps farther than the nearest."""
    image, keep = pictures(1), np.zeros((H, W), dtype=np.bool_)
    keep[2, 3], keep[7, 11], keep[0, 8] = True, True, True
    made = fill_hidden(image, keep)
    places = np.argwhere(keep)
    for row in range(H):
        for column in range(W):
            distance = np.abs(places - (row, column)).sum(axis=1)
            near = [image[0, a, b].tolist() for a, b in places[distance <= distance.min() + 3]]
            assert made[0, row, column].tolist() in near
    assert np.array_equal(fill_hidden(image, np.ones_like(keep)), image)
    assert (fill_hidden(image, np.zeros_like(keep)) == 128).all()


def test_kept_pixels_stay_and_the_others_are_made_of_codes(folder: Path) -> None:
    """What the user keeps is theirs to the last bit; what is made is what the tokenizer decodes."""
    sampler = Sampler.load(folder, PLAIN)
    pasted, decoded = (complete(sampler, task(), half(), paste=paste) for paste in (True, False))
    assert np.array_equal(pasted[:, :4], task().images[:, :4])
    assert np.array_equal(pasted[:, 4:], decoded[:, 4:])
    assert not np.array_equal(decoded[:, :4], task().images[:, :4])
    codes = encode(sampler, task().images)
    whole = sampler.decode(codes)
    assert not np.array_equal(decoded, whole)


def test_what_is_hidden_does_not_matter(folder: Path) -> None:
    """A completion that depends on what it must not see would be a copy, and a lie."""
    sampler = Sampler.load(folder, PLAIN)
    other = task()
    other.images[:, 4:] = 255 - other.images[:, 4:]
    codes = encode(sampler, task().images), encode(sampler, other.images)
    assert not torch.equal(codes[0][:, :1], codes[1][:, :1]), "the encoder must look over the edge, or this is easy"
    assert np.array_equal(complete(sampler, task(), half(), paste=True), complete(sampler, other, half(), paste=True))


def test_what_is_kept_does_matter(folder: Path) -> None:
    """Another upper half must lead to other lower halves, or the prior was never asked."""
    sampler = Sampler.load(folder, PLAIN)
    other = task()
    other.images[:, :4] = 255 - other.images[:, :4]
    mine, theirs = (complete(sampler, each, half(), paste=True)[:, 4:] for each in (task(), other))
    assert not np.array_equal(mine, theirs)


def test_variants_and_seeds_differ_and_repeat(folder: Path) -> None:
    """Trap 36: variant v of image i follows from (seed, i, v), whatever is completed beside it."""
    sampler = Sampler.load(folder, PLAIN)

    def made(seed: int, variant: int, rows: slice = slice(None)) -> NDArray[np.uint8]:
        whole = task(seed=seed, variant=variant)
        part = CompletionTask(whole.images[rows], whole.indices[rows], whole.labels[rows], seed, whole.variants[rows])
        return complete(sampler, part, half(), paste=True)

    assert np.array_equal(made(0, 1), made(0, 1))
    assert np.array_equal(made(0, 1)[2:], made(0, 1, slice(2, 3)))
    assert not np.array_equal(made(0, 0), made(0, 1))
    assert not np.array_equal(made(0, 0), made(1, 0))


@pytest.mark.parametrize("side", Margins._fields)
def test_an_image_grows_on_the_side_that_was_asked_for(folder: Path, side: str) -> None:
    """The image itself stands unchanged at the other side; what is new depends on it."""
    sampler = Sampler.load(folder, PLAIN)
    place = {"up": (4, 0), "down": (0, 0), "left": (0, 4), "right": (0, 0)}[side]
    size = (H + 4, W) if side in ("up", "down") else (H, W + 4)
    grown = grow(sampler, task(), Margins(**{side: 1}), paste=True)
    assert grown.shape == (3, *size, 3)
    top, left = place
    assert np.array_equal(grown[:, top : top + H, left : left + W], task().images)
    other = task()
    other.images[:] = 255 - other.images
    again = grow(sampler, other, Margins(**{side: 1}), paste=True)
    new = np.ones(size, dtype=np.bool_)
    new[top : top + H, left : left + W] = False
    assert not np.array_equal(grown[:, new], again[:, new])


def test_growing_to_the_left_is_growing_a_mirrored_image_to_the_right(folder: Path) -> None:
    """The prior only knows what comes before, so left and up are made by mirrors, and by the same noise rule."""
    sampler = Sampler.load(folder, PLAIN)
    for side, axis in (("left", 2), ("up", 1)):
        mirrored = CompletionTask(np.flip(pictures(), axis), *task()[1:])
        margins = {"left": Margins(right=2), "up": Margins(down=2)}[side]
        straight = grow(sampler, mirrored, margins, paste=True)
        turned = grow(sampler, task(), Margins(**{side: 2}), paste=True)
        assert turned.shape == straight.shape
        assert np.array_equal(np.flip(turned, axis)[:, :H, :W], straight[:, :H, :W])


def test_all_four_sides_at_once_keep_the_image_in_place(folder: Path) -> None:
    """Three passes, two of them mirrored, must leave it where the margins say."""
    grown = grow(Sampler.load(folder, PLAIN), task(), Margins(1, 2, 3, 1), paste=True)
    assert grown.shape == (3, H + 12, W + 16, 3)
    assert np.array_equal(grown[:, 4 : 4 + H, 12 : 12 + W], task().images)


def test_the_command_writes_originals_kept_parts_variants_and_a_grid(folder: Path, tmp_path: Path) -> None:
    """The original stands beside its variants; settings.json says what they were made with."""
    ended = command(folder, tmp_path / "o", "-n", 2, "--variants", 3, "--keep", "left")
    assert ended.code == 0, ended.err
    names = {"grid.png", "settings.json", ".lock", ".tessera"}
    names |= {f"{i:06d}-{what}.png" for i in range(2) for what in ("original", "kept", 0, 1, 2)}
    assert files_of(tmp_path / "o").keys() == names
    original, kept, variant = (pixels_of(tmp_path / f"o/000001-{what}.png") for what in ("original", "kept", 2))
    assert np.array_equal(kept[:, :6], original[:, :6])
    assert (kept[:, 6:] == 128).all()
    assert np.array_equal(variant[:, :6], original[:, :6])
    settings = json.loads((tmp_path / "o/settings.json").read_text())
    assert settings["keep"] == "left"
    assert len(settings["labels"]) == 2
    with Image.open(tmp_path / "o/grid.png") as grid:
        assert grid.size == (5 * (W + 2) + 2, 2 * (H + 2) + 2)


def test_batch_size_and_processes_change_no_completion(folder: Path, tmp_path: Path) -> None:
    """Trap 36: as with samples."""
    arguments = ("-n", 3, "--variants", 2, "--keep", "top", "--guidance", 1.5)
    assert command(folder, tmp_path / "a", *arguments).code == 0
    assert command(folder, tmp_path / "b", *arguments, "--batch_size", 1).code == 0
    words = ("--prior", folder, "--out", tmp_path / "c", *arguments)
    run_processes(2, run_script, "sampling/complete.py", *words)
    pictures = [{k: v for k, v in files_of(tmp_path / each).items() if k.endswith("png")} for each in "abc"]
    assert pictures[0] == pictures[1] == pictures[2]


def test_mask_box_and_invert_say_what_is_kept(folder: Path, tmp_path: Path) -> None:
    """White is kept, a box is kept, and --invert turns either round."""
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[:4, 4:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    outs = {}
    for name, arguments in {
        "mask": ("--mask", tmp_path / "mask.png"),
        "box": ("--box", "0,4,4,4"),
        "hole": ("--box", "0,4,4,4", "--invert"),
    }.items():
        assert command(folder, tmp_path / name, "-n", 1, "--variants", 1, *arguments).code == 0
        outs[name] = pixels_of(tmp_path / name / "000000-kept.png")
    original = pixels_of(tmp_path / "box/000000-original.png")
    assert np.array_equal(outs["mask"], outs["box"])
    inside = np.zeros((H, W), dtype=np.bool_)
    inside[:4, 4:8] = True
    for name, kept in (("box", inside), ("hole", ~inside)):
        assert np.array_equal(outs[name][kept], original[kept])
        assert (outs[name][~kept] == 128).all()


def test_files_are_completed_without_a_class_or_with_one(folder: Path, tmp_path: Path) -> None:
    """An image of one's own has any size and no label; --class gives it one, and changes what is made."""
    write_image_folder(tmp_path / "own", ("x",), per_class=2, size=(31, 20))
    made = {}
    for name, arguments in {"none": (), "star": ("--class", "star")}.items():
        out = tmp_path / name
        ended = command(folder, out, "--images", tmp_path / "own", "--keep", "top", *arguments)
        assert ended.code == 0, ended.err
        made[name] = [pixels_of(out / f"00000{i}-{v}.png") for i in range(2) for v in range(4)]
        labels = json.loads((out / "settings.json").read_text())["labels"]
        assert labels == ([5, 5] if name == "none" else [4, 4])
    assert any(not np.array_equal(a, b) for a, b in zip(made["none"], made["star"], strict=True))


def test_a_data_set_that_was_moved_is_named_by_root(tmp_path: Path) -> None:
    """As in a prior that was published: its header has the folder of another machine."""
    data = {"kind": "folder", "root": "elsewhere", "image_size": list(IMAGE_SIZE), "validation_share": 0.5}
    write_prior(tmp_path / "prior", ("cat", "dog"), tokenizer={"data": data})
    write_image_folder(tmp_path / "images", ("cat", "dog"), per_class=4)
    ended = command(tmp_path / "prior", tmp_path / "a", "-n", 2)
    assert ended.code == 2
    assert "elsewhere" in ended.err
    ended = command(tmp_path / "prior", tmp_path / "b", "-n", 2, "--root", tmp_path / "images")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "top", "--box", "0,0,4,4"), "keep and box exclude each other"),
        (("--keep", "top", "--grow.right", 4), "grow keeps the whole image"),
        (("--grow.right", 3), "grow.right 3.*0 and 4"),
        (("--box", "0,0,9,4"), "box 0,0,9,4.*8x12"),
        (("--box", "0,0,8,12"), "nothing to complete"),
        (("--box", "1,1,4,4"), "no code whole.*4x4 pixels"),
        (("--mask", "none.png"), "no such file"),
        (("--images", "none"), "there is no such file or folder"),
        (("--images", "none", "--root", "."), "images names the images"),
        (("--root", "."), "the images are drawn"),
        (("--class", "cat"), "rectangle.*star"),
        (("-n", 0), "n: "),
        (("--variants", 0), "variants: "),
        (("--grow.down", 8, "--candidates", 2), "candidates 2"),
        (("--window", "9,3"), "window 9x3.*2x3"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_message(
    folder: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    """Exit code 2, what was given and what would fit, and no folder is left behind."""
    ended = command(folder, tmp_path / "o", *arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert re.search(message, ended.err, flags=re.S), ended.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("data", [b"", b"no picture", b"half"], ids=["empty", "text", "half"])
def test_bad_images_are_refused_before_anything_is_written(folder: Path, tmp_path: Path, data: bytes) -> None:
    """Fault 18: exit code 3; all that are bad are named, so that they can be taken out at once; no folder is left."""
    write_image_folder(tmp_path / "own", ("x",), per_class=4)
    whole = (tmp_path / "own/x/00.png").read_bytes()
    bad = [tmp_path / "own/x/01.png", tmp_path / "own/x/03.png"]
    for path in bad:
        path.write_bytes(whole[: len(whole) // 2] if data == b"half" else data)
    for arguments in (("--images", tmp_path / "own"), ("--images", bad[1]), ("--mask", bad[1])):
        ended = command(folder, tmp_path / "o", *arguments)
        assert ended.code == 3, ended
        assert "Traceback" not in ended.err
        assert str(bad[1]) in ended.err
        assert (str(bad[0]) in ended.err) == (arguments[1] == tmp_path / "own")
        assert not (tmp_path / "o").exists()
    assert command(folder, tmp_path / "o", "--images", tmp_path / "own", "-n", 1, "--variants", 1).code == 0


def test_a_mask_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    """Scaling it silently would keep other pixels than were painted."""
    Image.fromarray(np.zeros((12, 8), dtype=np.uint8)).save(tmp_path / "mask.png")
    ended = command(folder, tmp_path / "o", "--mask", tmp_path / "mask.png")
    assert ended.code == 2
    assert "12x8" in ended.err
    assert "8x12" in ended.err
