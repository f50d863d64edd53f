"""Drawn shapes: the objects of an image, and the statistics of PurdueShapes where its rules are set."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from accelerate import Accelerator
from numpy.typing import NDArray

from stage1_tokenizer.data.base import BaseDataConfig, ImageArray, Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.shapes import SHAPE_CLASSES, Mask, Shapes, ShapesConfig
from stage1_tokenizer.data.torchvision_sets import Cifar10Config
from stage1_tokenizer.engine.errors import ConfigError
from tests.helpers.processes import run_processes

LECTURE: dict[str, Any] = {"image_size": 64, "size": None, "palette": None, "holes": True}


def drawn(n: int, split: Split = "train", **options: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first n images (n, H, W, 3) and labels (n,)."""
    shapes = Shapes(ShapesConfig(**options), split)
    images, labels = zip(*(shapes[i] for i in range(n)), strict=True)
    return np.stack(images), np.array(labels)


def colours(image: ImageArray) -> NDArray[np.int64]:
    """(H, W): each pixel's colour as one number, 0 for black."""
    return image.astype(np.int64) @ np.array([1, 256, 65536])


def objects(image: ImageArray) -> list[Mask]:
    packed = colours(image)
    return [np.equal(packed, colour) for colour in np.unique(packed[packed > 0])]


def box(mask: Mask) -> Mask:
    """The part of a mask inside its bounding box."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def axes(mask: Mask) -> tuple[float, float]:
    """Standard deviations of the pixels along the two main axes, the short one first."""
    short, long = np.sqrt(np.linalg.eigvalsh(np.cov(np.argwhere(mask).T, bias=True)) + 1e-9)
    return float(short), float(long)


def kind_of(mask: Mask) -> str:
    """By area over the product of the axes, which no stretching or turning changes.

    It is 4 pi for ellipses, 12 for rectangles, 10.4 for triangles; for a pentagram, 9.3 in these images.
    """
    short, long = axes(mask)
    ratio = mask.sum() / (short * long)
    if ratio > 12.28:
        return "disk" if short / long > 0.85 else "oval"
    return "rectangle" if ratio > 11.2 else "triangle" if ratio > 9.8 else "star"


def extent(mask: Mask, kind: str) -> float:
    """The long side or axis of a rectangle or an oval, the greatest width of anything else, in pixels."""
    if kind in ("rectangle", "oval"):
        return axes(mask)[1] * (12.0**0.5 if kind == "rectangle" else 4.0)
    angles = np.linspace(0.0, np.pi, 90)
    return float(np.ptp(np.argwhere(mask) @ np.stack([np.sin(angles), np.cos(angles)]), axis=0).max()) + 1.0


def holes(image: ImageArray) -> Mask:
    """Black pixels whose four neighbours are coloured."""
    on = colours(image) > 0
    hole: Mask = ~on[1:-1, 1:-1] & on[:-2, 1:-1] & on[2:, 1:-1] & on[1:-1, :-2] & on[1:-1, 2:]
    return hole


def draw_elsewhere(_: Accelerator, options: dict[str, Any], indices: list[int]) -> list[ImageArray]:
    np.random.seed(5)
    shapes = Shapes(ShapesConfig(**options), "train")
    return [shapes[i][0] for i in indices]


def test_an_image_depends_on_its_index_alone() -> None:
    """Another process, another order and a larger set give the same image, so nothing has to be stored."""
    images, _ = drawn(30, max_shapes=4, train_images=30)
    (elsewhere,) = run_processes(1, draw_elsewhere, {"max_shapes": 4, "train_images": 99}, [*range(29, -1, -1), 7, 7])
    assert np.array_equal(np.stack(elsewhere), images[[*range(29, -1, -1), 7, 7]])
    assert not np.array_equal(drawn(30, max_shapes=4, drawing_seed=1)[0], images)


def test_train_and_validation_share_no_image() -> None:
    """A tokenizer is validated on images it has not seen."""
    splits: tuple[Split, Split] = ("train", "validation")
    seen, held_out = ({image.tobytes() for image in drawn(400, split, max_shapes=5)[0]} for split in splits)
    assert len(seen) > 390
    assert not seen & held_out


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (90, 3), (64, 48), (50, 70)])
@pytest.mark.parametrize("rules", [{}, {"size": None, "palette": None, "holes": True}])
def test_any_size_is_drawn(size: tuple[int, int], rules: dict[str, Any]) -> None:
    """Height and width are what was asked for, and no image is empty, however narrow the frame."""
    images, labels = drawn(60, image_size=size, max_shapes=3, **rules)
    assert images.shape == (60, *size, 3)
    assert images.any(axis=(1, 2, 3)).all()
    assert set(labels) == set(range(len(SHAPE_CLASSES)))


def test_the_class_is_the_kind_of_the_last_object() -> None:
    """Nothing covers the last object, so among the objects of an image there is always a whole one of its class."""
    for number in (1, 4):
        images, labels = drawn(250, image_size=96, max_shapes=number, palette=None)
        for image, label in zip(images, labels, strict=True):
            assert SHAPE_CLASSES[label] in {kind_of(mask) for mask in objects(image) if mask.sum() > 100}
        assert np.bincount(labels).min() > 30


def test_the_number_of_objects_is_uniform() -> None:
    """1..max_shapes, each as often, counted by their colours: they are so small that none covers another."""
    images, _ = drawn(1500, image_size=96, max_shapes=5, size=(0.06, 0.09), palette=None)
    counts = np.bincount([len(np.unique(colours(image))) - 1 for image in images], minlength=6)
    assert counts[0] == 0
    assert len(counts) == 6
    assert ((counts[1:] - 300) ** 2 / 300).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize("palette", [1, 3, 6, 64])
def test_a_palette_holds_that_many_colours(palette: int) -> None:
    """All of them are used and no other, and none is near black, so a small codebook can hold them."""
    images, _ = drawn(500, max_shapes=3, palette=palette, image_size=24)
    used = np.unique(images.reshape(-1, 3), axis=0)
    assert len(used) == palette + 1
    assert used[0].tolist() == [0, 0, 0]
    assert used[1:].max(axis=1).min() > 200


@pytest.mark.parametrize("holed", [False, True])
def test_objects_have_the_size_asked_for(holed: bool) -> None:
    """Extents fill the range and do not leave it, for each kind, with and without holes, in a frame of any shape."""
    images, labels = drawn(500, image_size=(100, 130), size=(0.3, 0.6), holes=holed)
    found: dict[str, list[float]] = {kind: [] for kind in SHAPE_CLASSES}
    for image, label in zip(images, labels, strict=True):
        found[SHAPE_CLASSES[label]].append(extent(image.any(-1), SHAPE_CLASSES[label]))
    for kind, extents in found.items():
        assert 0.9 * 30.0 - 2.0 < min(extents) < 35.0, kind  # a triangle's corners may lie a tenth nearer the centre
        assert 53.0 < max(extents) < 60.0 + (3.0 if kind == "disk" else 1.5), kind  # a disk's radius is a whole number


@pytest.mark.parametrize("size", [[0.8, 0.4], [0.0, 0.0], [-0.5, 0.5]])
def test_a_size_that_cannot_be_drawn_is_refused(size: list[float]) -> None:
    """The user learns of it before the training starts, and without a traceback."""
    with pytest.raises(ConfigError, match="size"):
        ShapesConfig.from_tree({"size": size})


def test_holes_are_in_turned_rectangles_and_ovals_alone() -> None:
    """Reconstructing these one-pixel holes is the lecture's test of a codebook, so they are there when asked for."""
    images, labels = drawn(300, image_size=64, holes=True)
    counts = np.array([holes(image).sum() for image in images])
    for label, kind in enumerate(SHAPE_CLASSES):
        of_kind = counts[labels == label]
        if kind in ("rectangle", "oval"):
            assert (of_kind > 3).mean() > 0.8, kind
        else:
            assert not of_kind.any(), kind
    assert not any(holes(image).any() for image in drawn(300, image_size=64, holes=False)[0])


@pytest.fixture(scope="module")
def lecture(real_data: Path) -> NDArray[np.uint8]:
    """3,000 of the lecture's training images."""
    archive = np.load(real_data / "purdue_shapes5" / "purdueshapes5_multiobject_64.npz")
    images: NDArray[np.uint8] = archive["train"][:3000]
    return images


@pytest.fixture(scope="module")
def ours() -> NDArray[np.uint8]:
    return drawn(3000, max_shapes=5, **LECTURE)[0]


def test_foreground_and_colours_are_the_lectures(lecture: NDArray[np.uint8], ours: NDArray[np.uint8]) -> None:
    """A result on drawn images says something about the lecture's only if they are alike."""
    assert ours.any(-1).mean() == pytest.approx(lecture.any(-1).mean(), rel=0.1)
    means = [images.mean(axis=(0, 1, 2)) for images in (ours, lecture)]
    assert np.abs(means[0] - means[1]).max() < 6.0
    coloured = [images[images.any(-1)].mean(axis=0) for images in (ours, lecture)]
    assert np.abs(coloured[0] - coloured[1]).max() < 6.0
    assert ours.max() == lecture.max() == 254


def test_disks_are_red_by_their_radius(lecture: NDArray[np.uint8], ours: NDArray[np.uint8]) -> None:
    """The lecture's source has this anomaly, a test of whether a tokenizer keeps small differences of colour."""
    for images in (lecture, ours):
        radii, reds = [], []
        for image in images:
            masks = objects(image)
            disk = box(masks[0])
            radius = len(disk) // 2
            across = np.arange(-radius, radius + 1) ** 2
            distances = across[:, None] + across  # squared, to the middle
            if len(masks) > 1 or disk.shape != distances.shape or not 5 <= radius <= 11:
                continue
            if np.array_equal(disk, distances <= distances[disk].max()):
                radii.append(radius)
                reds.append(int(image[masks[0]][0, 0]))
        assert len(radii) > 60
        assert set(radii) >= set(range(5, 11))
        assert np.mean(np.equal(radii, reds)) > 0.97


def test_each_kind_is_as_large_as_the_lectures() -> None:
    """Mean bounding boxes of the real data, by its description: the classes' share of the loss follows from them."""
    images, labels = drawn(2500, max_shapes=1, **LECTURE)
    described = {"rectangle": 15.0, "triangle": 26.0, "disk": 15.0, "oval": 14.0, "star": 15.0}
    for label, kind in enumerate(SHAPE_CLASSES):
        sides = [box(image.any(-1)).shape for image in images[labels == label]]
        assert np.mean(sides) == pytest.approx(described[kind], abs=1.5), kind
        # A kind is as often high as wide.
        assert np.abs(np.diff(np.mean(sides, axis=0))) < 1.0, kind


class Dots(BaseDataConfig):
    """A kind of somebody's own, whose images are computed."""

    kind: Literal["dots"] = "dots"


def test_images_that_are_drawn_have_no_folder() -> None:
    """Whatever their kind: a folder that is given in place of theirs would silently be another name for nothing."""
    assert Dots().is_drawn
    assert ShapesConfig().is_drawn
    assert not FolderConfig(root="images").is_drawn
    assert not Cifar10Config().is_drawn
