"""What a run was trained on: data.json in its folder, by which a resume knows the same data again."""

import json
from pathlib import Path
from typing import NamedTuple, Self

from stage1_tokenizer.data import OpenData
from stage1_tokenizer.engine.checkpoint import write_file

DATA_FILE = "data.json"


class DataRecord(NamedTuple):
    """The data of a run."""

    found: list[str]
    """What was found, in words; the first line is a summary."""
    identity: dict[str, str]
    """A hash for each split; the same wherever the data lies."""
    classes: list[str]

    @classmethod
    def of(cls, data: OpenData) -> Self:
        """The record of a data set that is open."""
        return cls(data.found.lines(), data.identity, list(data.images("train").classes))

    @classmethod
    def saved_in(cls, folder: Path) -> Self | None:
        """The record in a run's folder; None where there is none, as earlier versions left it, or a damaged one."""
        try:
            tree = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
            found, identity, classes = (tree[name] for name in cls._fields)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not (isinstance(found, list) and isinstance(identity, dict) and isinstance(classes, list) and found):
            return None
        return cls([str(line) for line in found], {str(k): str(v) for k, v in identity.items()}, [*map(str, classes)])

    def write(self, folder: Path) -> None:
        """Raises StorageError: no space, or no permission."""
        write_file(folder / DATA_FILE, json.dumps(self._asdict(), indent=1, ensure_ascii=False).encode())

    def differences(self, now: Self) -> list[str]:
        """Lines that say which data a run had, and which there are now; none where they are the same."""
        if self.identity == now.identity and self.classes == now.classes:
            return []
        splits = [split for split, identity in now.identity.items() if self.identity.get(split) != identity]
        what = f"the files of {' and '.join(splits)}" if splits else "the order of the classes"
        return [f"the data, {what}: {self.found[0]} ({self.found[1]}) -> {now.found[0]} ({now.found[1]})"]
