"""A data set whose files were listed once: its splits, a summary for the user, and its batches."""

from collections.abc import Iterator
from pathlib import Path

import torch

from stage1_tokenizer.data import DataConfig, build_splits
from stage1_tokenizer.data.bad_files import BadFiles, BadImageError, read_errors
from stage1_tokenizer.data.base import DataSplit, Split
from stage1_tokenizer.data.folder.scan import check_is_no_data
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.record import DataRecord, DataSummary, print_data_summary


class OpenData:
    """Both splits of a data set, listed once."""

    def __init__(self, config: DataConfig) -> None:
        """List the files. Raise the errors of the data set's own class."""
        self.config = config
        self.splits = build_splits(config)
        self._bad: BadFiles | None = None

    @property
    def summary(self) -> DataSummary:
        """Number of images of each split and class, and of the other files beside them."""
        train, validation = self.splits["train"], self.splits["validation"]
        is_shared, classes = train is validation, dict(train.class_sizes)
        if not is_shared:
            sizes = validation.class_sizes
            classes = {name: None if size is None else size + (sizes[name] or 0) for name, size in classes.items()}
        return DataSummary(train.origin, len(train), len(validation), is_shared, classes, train.ignored, train.notes)

    @property
    def identity(self) -> dict[str, str]:
        """The identity of each split. It changes with the images, and does not depend on the folder that holds them."""
        return {split: images.identity for split, images in self.splits.items()}

    @property
    def record(self) -> DataRecord:
        """The record by which a resume recognises this data set."""
        return DataRecord(self.summary.lines(), self.identity, list(self.splits["train"].classes))

    def check_run_folder(self, folder: Path) -> None:
        """Raise ConfigError if a folder has images in it and no run; the engine calls it before it writes a run."""
        check_is_no_data(folder)

    def find_changes(self, folder: Path) -> list[str] | None:
        """Return lines that describe how this data set differs from the record in a run's folder; None: no record."""
        saved = DataRecord.saved_in(folder)
        return None if saved is None else saved.differences(self.record)

    def write_record(self, folder: Path) -> None:
        """Write the record of this data set into a run's folder. Raise StorageError if that fails."""
        self.record.write(folder)

    def image_batches(
        self,
        split: Split,
        seed: int,
        device: torch.device | str = "cpu",
        bad_list: Path | None = None,
        only: range | None = None,
    ) -> ImageBatches:
        """Prepare one split for batches; see `ImageBatches` for the parameters and the errors.

        bad_list: the file that lists images that cannot be read; None: they are only printed. Both splits together
        decide whether too many cannot be read.
        """
        if self._bad is None:
            self._bad = BadFiles(bad_list, self.config.tolerated_bad_share, self.summary.images, self._find_bad)
        return ImageBatches(self.splits[split], self.config, seed, device, self._bad, only)

    def _find_bad(self) -> Iterator[tuple[tuple[DataSplit, int], BadImageError]]:
        """Read the images of both splits, and yield the bad ones with the keys that `ResizedImages` gives them."""
        for images in dict.fromkeys(self.splits.values()):  # once if both splits are the same images
            errors = read_errors(images.__getitem__, range(len(images)))
            yield from (((images, index), error) for index, error in enumerate(errors) if error)


def open_data(config: DataConfig) -> OpenData:
    """List the files of a data set once, and print what was found."""
    opened = OpenData(config)
    print_data_summary(opened.summary)
    return opened
