"""Files and folders that go with images and are no images of the set: masks, labels, small copies. See docs/data.md.

    images, masks            a folder of masks beside that of the images
    1.jpg, 1_mask.png        a mask beside its image
    1.jpg, 1-150x150.jpg     a smaller copy beside its image
    1.jpg, 1_json/label.png  a folder that LabelMe writes about an image

And folders that only cut a set of images in pieces: part_1, part_2; fold1, fold2; a camera's 100APPLE, 101APPLE.
"""

import re
from collections.abc import Collection, Mapping, Sequence, Sized
from os.path import splitext

HOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "leftimg8bit"})
"""Folders that hold the images, and are no class whatever lies beside them."""
IMAGES = HOLDERS | {"original", "originals", "photos", "rgb"}
ABOUT = frozenset({"annot", "annotation", "annotations", "ground_truth", "groundtruth", "gtcoarse", "gtfine"}) | {
    *("segmentation", "segmentationclass", "segmentationobject", "segmentations", "trimaps")
}
"""Folders that say something about images, whatever lies beside them: no object is called so."""
COMPANIONS = ABOUT | {"depth", "edges", "gt", "label", "labels", "mask", "masks", "previews", "thumbnails", "thumbs"}
"""Folders that say something about images, or repeat them, where they lie beside a folder of IMAGES."""
_MASK = re.compile(r"(.+)[_-](?:masks?|labels?|seg|segmentation|gt|depth)(?:_\d+)?", re.IGNORECASE)
_SMALL = re.compile(r"(.+)-\d+x\d+")
_LABELME = "_json"
_PIECE = re.compile(r"(|.*[^a-z])(?:part|fold|batch|chunk|shard|images?|img)[ _-]?\d+", re.IGNORECASE)
_CAMERA = re.compile(r"\d{3}[A-Z_]{5}|\d{6}__")
"""The folders of cameras and phones by their standard (DCF): 100APPLE, 101_PANA, 202305__."""


def companion_files(names: Sequence[str]) -> dict[str, list[str]]:
    """The images that only say something about another image in the same folder, or repeat it, by what they are."""
    stems = {splitext(name)[0] for name in names}
    found: dict[str, list[str]] = {}
    for name in names:
        stem = splitext(name)[0]
        if (match := _MASK.fullmatch(stem)) and match[1] in stems:
            found.setdefault("masks or labels of others by their names", []).append(name)
        elif (match := _SMALL.fullmatch(stem)) and match[1] in stems:
            found.setdefault("smaller copies of others by their names", []).append(name)
        elif any(above in stems for above in name.split(f"{_LABELME}/")[:-1]):
            found.setdefault("in folders that LabelMe wrote about others", []).append(name)
    return found


def companion_folders(groups: Mapping[str, Sized]) -> tuple[set[str], str]:
    """The folders, of some beside each other, that go with the rest, and with what they go."""
    kinds = {name: name.lower() for name in groups}
    images = [name for name, kind in kinds.items() if kind in IMAGES]
    if len(images) == 1:
        rest = kinds.keys() - images
        most = len(groups[images[0]]) * 2 >= sum(map(len, groups.values()))
        if all(kinds[name] in COMPANIONS for name in rest) or (kinds[images[0]] in HOLDERS and most):
            return rest, f"which goes with {images[0]}/"
    about = {name for name, kind in kinds.items() if kind in ABOUT}
    return (about, "which says something about images") if len(about) < len(groups) else (set(), "")


def are_pieces(folders: Collection[str]) -> bool:
    """True where the names of folders say that each holds a piece of one set of images, and nothing else."""
    pieces = [_PIECE.fullmatch(name) for name in folders]
    numbered = all(pieces) and len({piece[1] for piece in pieces if piece}) == 1
    return len(folders) > 1 and (numbered or all(map(_CAMERA.fullmatch, folders)))
