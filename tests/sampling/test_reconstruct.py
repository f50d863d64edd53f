"""sampling/reconstruct.py: images of any size there and back, its figures, and what it refuses."""

import json
import os
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.metrics import ssim
from tests.helpers.artefacts import files_of, pixels_of, write_image_folder, write_tokenizer
from tests.helpers.commands import Ended, names_of, run, run_script
from tests.helpers.processes import RankFailedError, run_processes


def reconstruct(tokenizer: Path, out: Path, *arguments: object) -> Ended:
    return run(
        names_of("sampling/reconstruct.py")["main"], "--tokenizer", tokenizer, "--out", out, *map(str, arguments)
    )


def figures(out: Path) -> Any:
    return json.loads((out / "figures.json").read_text(encoding="utf-8"))


def draw(path: Path, height: int, width: int, mode: str = "RGB") -> Path:
    noise = np.random.default_rng(height).integers(0, 256, size=(height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def test_an_image_comes_back_in_its_own_size(tmp_path: Path) -> None:
    """Of a size that no factor divides and no tile holds: continued by reflection, encoded, decoded, cropped."""
    loaded = write_tokenizer(tmp_path)
    picture = draw(tmp_path / "a.png", 53, 39)
    ended = reconstruct(tmp_path, tmp_path / "out", picture, "--tile", 32, "--overlap", 8)
    assert ended.code == 0, ended.err
    made = pixels_of(tmp_path / "out/a.png")
    assert made.shape == (53, 39, 3)

    original = pixels_of(picture)
    continued = np.pad(original, ((0, 3), (0, 1), (0, 0)), mode="reflect")
    x = normalise(torch.from_numpy(continued)[None].permute(0, 3, 1, 2))
    with torch.no_grad():
        whole = to_uint8(loaded.tokenizer.decode_codes(loaded.tokenizer.encode_codes(x)))[0].permute(1, 2, 0).numpy()
    inside = (slice(0, 8), slice(0, 8))  # far from every seam of the tiles
    assert np.abs(whole[inside].astype(int) - made[inside].astype(int)).max() <= 1

    found = figures(tmp_path / "out")
    (row,) = found["pictures"]
    assert (row["file"], row["of"], row["height"], row["width"]) == ("a.png", str(picture), 53, 39)
    assert row["bits"] == 14 * 10 * 4, "one code of 16 for each 4x4 pixels"
    assert row["bits_per_pixel"] == pytest.approx(560 / (53 * 39))
    assert found["mean"] == {"psnr": row["psnr"], "ssim": row["ssim"]}
    assert f"PSNR {row['psnr']:.2f} dB" in ended.out
    error = ((original.astype(float) - made) ** 2).mean()
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.05), "up to the rounding to eight bits"
    assert (found["settings"]["tile"], found["settings"]["overlap"]) == ([32, 32], 8)


def test_folders_and_files_in_the_order_given(tmp_path: Path) -> None:
    """Sub-folders too; -n stops after the first ones, and --beside puts the original on the left."""
    write_tokenizer(tmp_path)
    write_image_folder(tmp_path / "photos", ("cat", "dog"), per_class=2, size=(12, 20))
    last = draw(tmp_path / "last.png", 10, 9, "L")
    ended = reconstruct(tmp_path, tmp_path / "out", tmp_path / "photos", last, "--beside")
    assert ended.code == 0, ended.err
    rows = figures(tmp_path / "out")["pictures"]
    assert [Path(row["of"]).relative_to(tmp_path).as_posix() for row in rows] == [
        *(f"photos/{name}/0{number}.png" for name in ("cat", "dog") for number in range(2)),
        "last.png",
    ]
    both = pixels_of(tmp_path / "out/cat/00.png")
    assert np.array_equal(both[2:14, 2:22], pixels_of(tmp_path / "photos/cat/00.png"))
    assert both.shape == (16, 46, 3)
    assert reconstruct(tmp_path, tmp_path / "two", tmp_path / "photos", "-n", 2).code == 0
    assert len(figures(tmp_path / "two")["pictures"]) == 2


def test_without_an_image_the_validation_split_is_reconstructed(tmp_path: Path) -> None:
    """That of the training, into a numbered folder in the run's."""
    loaded = write_tokenizer(tmp_path)
    ended = run(names_of("sampling/reconstruct.py")["main"], "--tokenizer", tmp_path)
    assert ended.code == 0, ended.err
    rows = figures(tmp_path / "reconstructed/001")["pictures"]
    assert [row["of"] for row in rows] == [f"validation picture {index} of shapes" for index in range(7)]
    assert {row["bits"] for row in rows} == {loaded.tokenizer.shape.length * 4.0}


def test_a_continuous_latent_is_reconstructed_without_bits(tmp_path: Path) -> None:
    """A VAE too has something to show; it has no codes whose bits could be counted."""
    write_tokenizer(tmp_path, bottleneck=KlConfig())
    ended = reconstruct(tmp_path, tmp_path / "out", draw(tmp_path / "a.png", 40, 36), "--tile", 32)
    assert ended.code == 0, ended.err
    (row,) = figures(tmp_path / "out")["pictures"]
    assert row["bits"] is row["bits_per_pixel"] is None
    assert "bits" not in ended.out
    assert pixels_of(tmp_path / "out/a.png").shape == (40, 36, 3)


def test_wrong_usage_is_one_message(tmp_path: Path) -> None:
    """Exit code 2 before anything is written; 3 for a file that is no image."""
    write_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, message in (
        ((tmp_path / "none.png",), "there is no such file or folder"),
        ((tmp_path / "empty",), "holds no images"),
        (("--tile", 30), "tile 30: must be a multiple of the tokenizer's factor 4; the nearest are 28 and 32"),
        (("--tile", 32, "--overlap", 20), "more than half"),
    ):
        ended = reconstruct(tmp_path, out, *arguments)
        assert (ended.code, message in ended.err) == (2, True), ended.err
        assert not out.exists()
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    assert reconstruct(tmp_path, out, tmp_path / "bad.png").code == 3


def test_an_interrupted_command_begins_again_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 44: with --out and without, it ends with what an uninterrupted one gives; other settings are refused."""
    write_tokenizer(tmp_path)
    write_image_folder(tmp_path / "photos", ("cat",), per_class=3, size=(12, 20))
    run_main = partial(run, names_of("sampling/reconstruct.py")["main"], "--tokenizer", tmp_path, tmp_path / "photos")
    assert run_main("--out", tmp_path / "whole").code == 0
    wanted = {name: data for name, data in files_of(tmp_path / "whole").items() if name.endswith(".png")}
    replace, count = os.replace, iter(range(1000))

    def stopping(*names: Any, **options: Any) -> None:
        if next(count) in (2, 5):
            raise KeyboardInterrupt
        replace(*names, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopping)
        assert run_main("--out", tmp_path / "out").code == 130
        assert run_main().code == 130
    ended = run_main("--out", tmp_path / "out", "--beside")
    assert ended.code == 2
    assert "beside: false -> true" in ended.err
    for out, arguments in ((tmp_path / "out", ("--out", tmp_path / "out")), (tmp_path / "reconstructed/001", ())):
        assert sum(path.suffix == ".png" for path in out.rglob("*")) == 1
        assert run_main(*arguments).code == 0
        assert {name: data for name, data in files_of(out).items() if name.endswith(".png")} == wanted
        assert figures(out)["mean"] == figures(tmp_path / "whole")["mean"]
    assert not (tmp_path / "reconstructed/002").exists()
    assert run_main("--out", tmp_path / "out").code == 2


def test_reconstructions_have_the_names_of_their_images(tmp_path: Path) -> None:
    """A hundred numbers said nothing of which is which. Folders stay, no two share a file on any system, and long names
    leave room for what is added while a file is written."""
    write_tokenizer(tmp_path)
    names = ["a.jpg", "a.png", "A.webp", "sub/two words.bmp", "sub/x.y.png", f"{'n' * 250}.png"]
    (tmp_path / "photos/sub").mkdir(parents=True)
    for name in names:
        draw(tmp_path / "photos" / name, 12, 8)
    ended = reconstruct(tmp_path, tmp_path / "out", tmp_path / "photos", draw(tmp_path / "a.png", 8, 8))
    assert ended.code == 0, ended.err
    files = {row["of"].removeprefix(f"{tmp_path}/"): row["file"] for row in figures(tmp_path / "out")["pictures"]}
    assert len({file.casefold() for file in files.values()}) == len(names) + 1
    assert files["photos/sub/two words.bmp"] == "sub/two words.png"
    assert files["photos/sub/x.y.png"] == "sub/x.y.png"
    assert files[f"photos/{'n' * 250}.png"] == f"{'n' * 200}.png"
    assert {files[f"photos/{name}"] for name in names[:2]} | {files["a.png"]} <= {
        "a.png",
        "a-2.png",
        "a-3.png",
        "a-4.png",
    }
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert written == set(files.values())
    assert run(names_of("sampling/check.py")["main"], tmp_path / "out").code == 0
    (tmp_path / "out/sub/x.y.png").unlink()
    ended = run(names_of("sampling/check.py")["main"], tmp_path / "out")
    assert "the first that is missing is sub/x.y.png" in ended.out


def write_bad(folder: Path) -> list[Path]:
    """Files that are no images, of each kind."""
    whole = draw(folder / "whole.png", 20, 24).read_bytes()
    (folder / "whole.png").unlink()
    width = (60000).to_bytes(4, "big")
    header = b"IHDR" + width + width + bytes([8, 2, 0, 0, 0])
    bomb = whole[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    bad = {"cut.png": whole[: len(whole) // 2], "text.png": b"not a picture", "bomb.png": bomb, "empty.png": b""}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in bad]


def test_bad_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Faults 18 and 25: where there is no other, exit code 3, each file by its name, and no folder."""
    write_tokenizer(tmp_path)
    (tmp_path / "bad").mkdir()
    bad = write_bad(tmp_path / "bad")
    for given in (*([path] for path in bad), bad, [tmp_path / "bad"]):
        ended = reconstruct(tmp_path, tmp_path / "out", *given)
        assert ended.code == 3
        named = bad if given in (bad, [tmp_path / "bad"]) else given
        assert all(str(path) in ended.err for path in named)
        assert "Traceback" not in ended.err
        assert not (tmp_path / "out").exists()


def test_bad_images_among_good_ones_are_left_out(tmp_path: Path) -> None:
    """Fault 18: the others are made all the same, by one process or two; the bad ones are named, and the exit code is
    3, so that a script does not take the result for all."""
    write_tokenizer(tmp_path)
    write_image_folder(tmp_path / "photos", ("cat",), per_class=3, size=(12, 20))
    bad = write_bad(tmp_path / "photos/cat")
    ended = reconstruct(tmp_path, tmp_path / "out", tmp_path / "photos")
    assert ended.code == 3
    assert "4 of 7 images were left out" in ended.err
    found = figures(tmp_path / "out")
    assert [Path(row["of"]).name for row in found["pictures"]] == ["00.png", "01.png", "02.png"]
    assert all(np.isfinite(row["psnr"]) for row in found["pictures"])
    assert len(list((tmp_path / "out").glob("cat/0*.png"))) == 3
    for path in bad:
        assert f"left out: {path}: " in ended.out
        assert any(reason.startswith(f"{path}: ") for reason in found["left_out"])
    words = ("--tokenizer", tmp_path, "--out", tmp_path / "two", tmp_path / "photos")
    with pytest.raises(RankFailedError, match="4 of 7 images were left out"):
        run_processes(2, run_script, "sampling/reconstruct.py", *words)
    again = figures(tmp_path / "two")
    assert (again["mean"], again["left_out"]) == (found["mean"], found["left_out"])


def test_ssim_is_the_formula_of_the_paper() -> None:
    """Equation 13 window by window, in numpy; and 1 for equal images, less for a blurred one."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(2, 3, 14, 13))
    y = np.clip(0.7 * x + 0.3 * rng.uniform(-1, 1, size=x.shape), -1, 1)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    expected = []
    for a, b in zip(x, y, strict=True):
        values = []
        for channel, down, right in np.ndindex(3, 4, 3):
            p, q = (image[channel, down : down + 11, right : right + 11] for image in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 0.0004) * (2 * cov + 0.0036)
            values.append(top / ((mean_p**2 + mean_q**2 + 0.0004) * (var_p + var_q + 0.0036)))
        expected.append(np.mean(values))
    assert ssim(torch.from_numpy(x), torch.from_numpy(y)).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(torch.from_numpy(x), torch.from_numpy(x)).tolist() == pytest.approx([1.0, 1.0])
    assert ssim(torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3)).tolist() == pytest.approx([1.0]), "smaller than 11x11"
