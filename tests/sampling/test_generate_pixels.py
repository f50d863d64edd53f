"""From codes to files: levels, chunks, the grid, and grey images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sampling.generate import main
from sampling.saved_images import DECODE_CHUNK, arrange_grid, decode_in_chunks, save_png
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.tokenizer import Tokenizer
from tests.helpers.artefacts import IMAGE_SIZE, write_prior, write_tokenizer
from tests.helpers.commands import run


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


class Showing(Tokenizer):
    """Decodes to given images (n, C, H, W), the first code of each says which."""

    def __init__(self, images: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.images = images

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.images[codes[:, 0, 0, 0]]


def test_images_are_rounded_and_clamped(tmp_path: Path) -> None:
    """Trap 38: all 256 levels survive, rounding errors and all; truncating would darken, wrapping would spoil."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = torch.cat(
        [
            normalise(levels) - 1e-3,
            normalise(levels) + 1e-3,
            torch.full((1, 3, 16, 16), 7.0),
            torch.full((1, 3, 16, 16), -7.0),
        ]
    )
    pictures = decode_in_chunks(Showing(images).decode_codes, torch.arange(4)[:, None, None, None])
    wanted = levels[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pictures[0], wanted)
    assert np.array_equal(pictures[1], wanted)
    assert (pictures[2] == 255).all()
    assert (pictures[3] == 0).all()
    save_png(tmp_path / "a.png", pictures[0])
    assert np.array_equal(pixels_of(tmp_path / "a.png"), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("n", [1, DECODE_CHUNK - 1, DECODE_CHUNK, 2 * DECODE_CHUNK + 1])
@pytest.mark.parametrize("larger", [1, 3, 1000])
def test_codes_decode_in_chunks_of_one_size(tmp_path: Path, n: int, larger: int) -> None:
    """Trap 36: filled-up chunks give n images, each the one that its codes give alone; of larger ones, fewer."""
    tokenizer = write_tokenizer(tmp_path).tokenizer
    codes = torch.randint(16, (n, *tokenizer.shape[:3]), generator=torch.Generator().manual_seed(n))
    alone = [decode_in_chunks(tokenizer.decode_codes, codes[i : i + 1], larger)[0] for i in range(n)]
    sizes = []

    def decode(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return tokenizer.decode_codes(part)

    assert np.array_equal(decode_in_chunks(decode, codes, larger), np.stack(alone))
    assert set(sizes) == {max(1, DECODE_CHUNK // larger)}


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (7, 3, 3)])
def test_the_grid_shows_each_image_at_its_place(n: int, rows: int, columns: int) -> None:
    """Trap 37: row by row, each image whole, two pixels apart, whatever place is left over stays grey."""
    pictures = np.random.default_rng(n).integers(0, 255, size=(n, 4, 6, 3), dtype=np.uint8)
    grid = arrange_grid(list(pictures))
    assert grid.shape == (rows * 6 + 2, columns * 8 + 2, 3)
    for i, picture in enumerate(pictures):
        top, left = i // columns * 6 + 2, i % columns * 8 + 2
        assert np.array_equal(grid[top : top + 4, left : left + 6], picture)
        grid[top : top + 4, left : left + 6] = 128
    assert (grid == 128).all()


def test_grey_images(tmp_path: Path) -> None:
    """A tokenizer of one channel gives grey files, not a crash, and in the .npz three equal channels."""
    write_prior(tmp_path / "run", tokenizer={"channels": 1})
    ended = run(main, "--prior", tmp_path / "run", "--out", tmp_path / "out", "-n", 3)
    assert ended.code == 0, ended.err
    with np.load(tmp_path / "out" / "samples.npz") as saved:
        assert saved["arr_0"].shape == (3, *IMAGE_SIZE, 3)
        for i, picture in enumerate(saved["arr_0"]):
            with Image.open(tmp_path / "out" / f"{i:06d}.png") as image:
                assert image.mode == "L"
                assert (np.asarray(image)[:, :, None] == picture).all()
