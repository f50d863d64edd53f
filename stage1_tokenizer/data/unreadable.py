"""Finding the bad files of a folder ahead of a training, by reading all of it once."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stage1_tokenizer.data.bad_files import PictureError
from stage1_tokenizer.data.decode import decode
from stage1_tokenizer.data.listing import Links, image_files

AT_ONCE = 256
"""Files that are handed to the threads together, so that a folder of millions takes no memory."""


def unreadable(
    root: Path, links: Links = "inside", seen: Callable[[], object] = lambda: None
) -> Iterator[PictureError]:
    """The path and the reason of each image file below the root that a training could not read, as they are found.
    `seen` is called once for each file, good or bad.

    Raises:
        BadFileError: a folder cannot be listed.
    """

    def judge(file: tuple[str, str]) -> PictureError | None:
        name, reason = file
        if reason:
            return PictureError(root / name, reason)
        try:
            decode(root / name, channels=3)
        except PictureError as error:
            return error
        return None

    files = image_files(root, links, also_ours=True)
    with ThreadPoolExecutor() as threads:  # Pillow releases the interpreter's lock while it decodes
        while together := list(itertools.islice(files, AT_ONCE)):
            for error in threads.map(judge, together):
                seen()
                if error:
                    yield error
