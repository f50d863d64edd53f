"""Pictures: one file, or every one below a folder, each decoded as a training would."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, bad, note, ok
from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.folder.scan import find_images, try_images
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.engine.console import progress_bar

MOST_CLASSES = 20
"""Sub-folders whose images are counted one by one."""


def holds_images(folder: Path) -> bool:
    """Whether there is such a folder, and a file with an image's extension somewhere below."""
    return folder.is_dir() and any(True for _ in find_images(folder, "inside", also_ours=True))


def check_image(path: Path) -> Iterator[Finding]:
    """One file."""
    try:
        height, width, _ = read_image(path, channels=3).shape
        yield ok(path, f"an image of {height}x{width} (height, width)")
    except BadImageError as error:
        yield bad(path, error.reason)


def check_images(folder: Path) -> Iterator[Finding]:
    """Every image below a folder: those that cannot be read, then a line for all. Memory does not grow with them."""
    files = find_images(folder, "inside", also_ours=True)
    found = Counter(name.split("/", 1)[0] if "/" in name else "" for name, _ in files)
    broken = 0
    with progress_bar(found.total(), "image", folder.name) as shown:
        for error in try_images(folder):
            shown.update()
            if error:
                broken += 1
                yield bad(error.path, error.reason)
    where = f" in {len(found)} sub-folders" if len(found) > 1 else ""
    if 1 < len(found) <= MOST_CLASSES:
        numbers = (f"{name or 'itself'} {number:,}" for name, number in sorted(found.items()))
        where += f" ({', '.join(numbers)})"
    images = f"{found.total():,} image{'s' * (found.total() != 1)}{where}"
    if broken:
        yield note(folder, f"{broken:,} of {images} cannot be read")
    else:
        yield ok(folder, f"{images}, all can be read")
