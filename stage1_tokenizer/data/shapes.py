"""Flat coloured shapes on black, drawn on demand: a data set like PurdueShapes5MultiObject that needs no file.

Image i is a function of (drawing_seed, split, i). With `size` and `palette` unset, the rules are those measured on
PurdueShapes5MultiObject (A. Kak, DLStudio): 1..max_shapes objects, no antialiasing, overlaps allowed. With `holes`,
rectangles and ovals are drawn as in that data set: each source pixel is mapped forward to a rounded target, which
leaves regular one-pixel holes in rotated objects. These holes show the difference between a codebook and a plain VAE.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray, Split
from stage1_tokenizer.engine.seeds import derive_seed

Mask = NDArray[np.bool_]
SHAPE_CLASSES = ("rectangle", "triangle", "disk", "oval", "star")


class ShapesConfig(BaseDataConfig):
    """Rectangles, triangles, disks, ovals and stars, drawn on demand. The class is that of the last object drawn."""

    kind: Literal["shapes"] = "shapes"
    max_shapes: PositiveInt = 1
    """Greatest number of objects in an image; each number from 1 on is equally likely."""
    size: tuple[float, float] | None = (0.5, 0.8)
    """Least and greatest extent of an object, as a share of the image's short side; null: the sizes of PurdueShapes."""
    palette: Annotated[int, Field(ge=1, le=64)] | None = 4
    """Number of colours (evenly spaced hues); null: any colour, as in PurdueShapes."""
    holes: bool = False
    """Leave one-pixel holes in rotated rectangles and ovals, as PurdueShapes has them."""
    train_images: PositiveInt = 20_000
    """Number of images to train on."""
    validation_images: PositiveInt = 2_000
    """Number of images to validate on."""
    drawing_seed: int = 0
    """Seed of the images. Another seed gives another data set of the same kind."""

    @model_validator(mode="after")
    def _check_size(self) -> "ShapesConfig":
        if self.size is not None and not 0.0 < self.size[0] <= self.size[1] <= 1.0:
            raise ValueError(f"size must be two shares, 0 < least <= greatest <= 1, got {self.size}")
        return self


class Shapes(DataSplit):
    """One split of drawn shapes."""

    classes: tuple[str, ...] = SHAPE_CLASSES
    origin = "drawn on the fly"

    def __init__(self, config: ShapesConfig, split: Split) -> None:
        self._config = config
        self._n = config.train_images if split == "train" else config.validation_images
        self._seed = derive_seed(config.drawing_seed, "shapes", split)

    @property
    def identity(self) -> str:
        """Empty: the config determines the images."""
        return ""

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        """Draw an image (H, W, 3) uint8; its label is the index in SHAPE_CLASSES of the last object drawn."""
        rng = np.random.default_rng((self._seed, index))
        image = np.zeros((*self._config.image_size, 3), dtype=np.uint8)
        kind = 0
        for _ in range(rng.integers(1, self._config.max_shapes + 1)):
            kind = int(rng.integers(len(SHAPE_CLASSES)))
            points, radius = _draw_object(rng, SHAPE_CLASSES[kind], self._config)
            mask = _place_randomly(rng, points, np.asarray(image.any(axis=-1)))
            colour = _draw_colour(rng, self._config.palette)
            if self._config.palette is None and SHAPE_CLASSES[kind] == "disk":
                colour[0] = radius  # as in PurdueShapes, where the red level of a disk is its radius in pixels
            image[mask] = colour
        return image, kind


def _draw_object(rng: np.random.Generator, kind: str, config: ShapesConfig) -> tuple[NDArray[np.int64], int]:
    """Draw one object around the origin: return its pixels (n, 2), and the radius in pixels (0 unless it is a disk)."""
    frame = config.image_size
    pixel = min(frame) / 64.0  # the sizes of PurdueShapes are pixels of a 64 x 64 frame
    extent = None if config.size is None else rng.uniform(*config.size) * min(frame)
    turn = rng.uniform(0.0, 2.0 * np.pi)
    radius = 0
    if kind in ("rectangle", "oval"):
        if extent is None:
            sides = rng.uniform(1.0, 23.0 if kind == "rectangle" else 25.0, size=2) * pixel
        else:
            sides = np.array([extent, extent * rng.uniform(0.4, 0.6)])
        points = _rotate_forward(kind, sides, turn) if config.holes else _fill_rotated(kind, sides, turn)
    elif kind == "disk":
        # The radii in PurdueShapes are 5..11 pixels with frequencies proportional to 8, 7, ... 2.
        weights = np.arange(8, 1, -1) / 35.0
        size = rng.choice(np.arange(5, 12), p=weights) if extent is None else extent / 2.0 / pixel
        radius = max(1, round(size * pixel))
        across = np.arange(-radius, radius + 1)
        inside = across[:, None] ** 2 + across[None, :] ** 2 <= (radius + 0.66) ** 2
        points = np.argwhere(inside) - radius
    else:
        if kind == "triangle":
            size = rng.uniform(14.5, 18.5) * pixel if extent is None else extent / 1.73
            corners = 3
            radii = size * rng.uniform(0.9, 1.0, size=3)
        else:
            size = rng.uniform(5.0, 11.4) * pixel if extent is None else extent / 1.9
            corners = 10
            radii = size * np.tile([1.0, 0.382], 5)  # a regular pentagram
        angles = turn + 2.0 * np.pi * np.arange(corners) / corners
        points = _fill_polygon(np.stack([np.sin(angles), np.cos(angles)], axis=1) * radii[:, None])
    return points, radius


def _rotate_forward(kind: str, sides: NDArray[np.float64], turn: float) -> NDArray[np.int64]:
    """Rotate an upright rectangle or oval, and return the pixels (n, 2) that they hit; some are missed."""
    height, width = np.maximum(1, np.round(sides)).astype(int)
    rows, columns = np.mgrid[0:height, 0:width].reshape(2, -1) - (np.array([[height], [width]]) - 1) / 2.0
    if kind == "oval":
        inside = (rows / (height / 2.0)) ** 2 + (columns / (width / 2.0)) ** 2 <= 1.0
        rows, columns = rows[inside], columns[inside]
    turned = np.stack(
        [rows * np.cos(turn) - columns * np.sin(turn), rows * np.sin(turn) + columns * np.cos(turn)], axis=1
    )
    return np.round(turned).astype(np.int64)


def _fill_rotated(kind: str, sides: NDArray[np.float64], turn: float) -> NDArray[np.int64]:
    """Return the pixels (n, 2) inside a rotated rectangle or oval. Each pixel is mapped back, so there are no holes."""
    reach = int(np.ceil(np.hypot(*sides) / 2.0)) + 1
    grid = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    rows = (grid[0] * np.cos(turn) + grid[1] * np.sin(turn)) / (sides[0] / 2.0)
    columns = (grid[1] * np.cos(turn) - grid[0] * np.sin(turn)) / (sides[1] / 2.0)
    inside = rows**2 + columns**2 <= 1.0 if kind == "oval" else np.maximum(abs(rows), abs(columns)) <= 1.0
    return grid[:, inside].T.astype(np.int64)


def _fill_polygon(corners: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pixels (n, 2) whose centres lie inside a polygon of corners (m, 2), by the even-odd rule."""
    reach = int(np.ceil(abs(corners).max())) + 1
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    inside = np.zeros(rows.shape, dtype=bool)
    for (y0, x0), (y1, x1) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        crosses = (y0 > rows) != (y1 > rows)
        inside ^= crosses & (columns < (x1 - x0) * (rows - y0) / (y1 - y0 + 1e-12) + x0)
    return np.stack([rows[inside], columns[inside]], axis=1)


def _place_randomly(rng: np.random.Generator, points: NDArray[np.int64], occupied: Mask) -> Mask:
    """Move an object's pixels (n, 2) to a random place inside the frame, and return them as a mask (H, W).

    Objects in PurdueShapes overlap less often than independent random places would, at a rate that fits up to three
    tries for a free place. An object larger than the frame is cut off.
    """
    mask = np.zeros(occupied.shape, dtype=bool)
    points = points - points.min(axis=0) if len(points) else np.zeros((1, 2), dtype=np.int64)
    room = np.maximum(0, np.array(occupied.shape) - 1 - points.max(axis=0))
    points = points[(points < occupied.shape).all(axis=1)]
    for _ in range(3):
        rows, columns = (points + rng.integers(0, room + 1)).T
        if not occupied[rows, columns].any():
            break
    mask[rows, columns] = True
    return mask


def _draw_colour(rng: np.random.Generator, palette: int | None) -> NDArray[np.uint8]:
    """Draw one RGB colour: any colour, or one of `palette` evenly spaced hues at full brightness."""
    if palette is None:
        return rng.integers(0, 255, size=3).astype(np.uint8)
    hue = rng.integers(palette) / palette
    # HSV to RGB: each channel is a trapezoid over the circle of hues, shifted by a third.
    channels = np.clip(abs((hue * 6.0 - np.array([0.0, 2.0, 4.0]) + 3.0) % 6.0 - 3.0) * -1.0 + 2.0, 0.0, 1.0)
    return (55 + 200 * channels).astype(np.uint8)
