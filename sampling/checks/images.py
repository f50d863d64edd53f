"""Checks of images: one file, or all files in a folder, each decoded as a training would."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding
from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.folder.scan import find_images, try_images
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.engine.console import progress_bar

MOST_FOLDERS = 20
"""Number of sub-folders for which the finding gives the number of images of each."""


def holds_images(folder: Path) -> bool:
    """Return True if the folder exists and holds an image file, in itself or below."""
    return folder.is_dir() and any(True for _ in find_images(folder, "inside", also_ours=True))


def check_image(path: Path) -> Iterator[Finding]:
    """Check one image file."""
    try:
        height, width, _ = read_image(path, channels=3).shape
        yield Finding.ok(path, f"an image of {height}x{width} (height, width)")
    except BadImageError as error:
        yield Finding.bad(path, error.reason)


def check_images(folder: Path) -> Iterator[Finding]:
    """Check every image in a folder and below: a finding for each unreadable one, then one for all."""
    files = find_images(folder, "inside", also_ours=True)
    count_by_folder = Counter(name.split("/", 1)[0] if "/" in name else "" for name, _ in files)
    total, broken = count_by_folder.total(), 0
    with progress_bar(total, "image", folder.name) as progress:
        for error in try_images(folder):
            progress.update()
            if error:
                broken += 1
                yield Finding.bad(error.path, error.reason)
    where = f" in {len(count_by_folder)} sub-folders" if len(count_by_folder) > 1 else ""
    if 1 < len(count_by_folder) <= MOST_FOLDERS:
        counts = (f"{name or 'itself'} {count:,}" for name, count in sorted(count_by_folder.items()))
        where += f" ({', '.join(counts)})"
    images = f"{total:,} image{'s' * (total != 1)}{where}"
    if broken:
        yield Finding.note(folder, f"{broken:,} of {images} cannot be read")
    else:
        yield Finding.ok(folder, f"{images}, all can be read")
