"""Readers of the files that name images and their classes: tables of labels, lists of classes, lists of paths.

file,label            {"file_name": "1.png", "label": "cat"}         cat/1.png
cat/1.png,cat         {"file_name": "2.png", "label": "dog"}         dog/2.png
a table as CSV        the same as JSON lines                         a list
"""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from stage1_tokenizer.data.bad_files import MAX_QUOTED
from stage1_tokenizer.data.folder.layout import Arrangement, Membership
from stage1_tokenizer.data.folder.name_rules import SPLIT_OF_WORD, NamedSplit
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import describe_path, normalise_name

FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "path", "image_path", "image", "img", "name", "id")
LABEL_COLUMNS = ("label", "class", "category", "class_name", "label_name", "target", "species", "breed", "labels", "y")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
MAX_COLUMNS = 20
"""Number of columns that a message lists."""
SAMPLE_ROWS = 50
"""Number of rows that decide which columns hold the files and the splits."""
MAX_BYTES = 2**31
"""Greatest size of such a file; a table of ten million images takes about a third of this."""

Row = dict[str, str]


class ImageFinder:
    """Finder of the image that a path in a file means. The path may start at the root or at any folder above it, and
    may lack the extension."""

    def __init__(self, names: Iterable[str], root: Path, beside: Path) -> None:
        """Index the images. names: relative to `root`. beside: the folder of the file that holds the paths."""
        self._names = {normalise_name(name): name for name in names}
        self._root, self._beside = os.path.abspath(root), os.path.abspath(beside)
        self._names_of_file = defaultdict[str, list[str]](list)
        for name in self._names:
            file = name.rsplit("/", 1)[-1]
            for key in {file, os.path.splitext(file)[0]}:
                self._names_of_file[key].append(name)

    def find(self, given: str) -> str | None:
        """Return the image's name; None if the path means no image, or may mean several."""
        text = normalise_name(given.strip())
        for form in (text, text.replace("\\", "/")):
            if name := self._find_exact(form):
                return name
        parts = PurePosixPath(text.replace("\\", "/")).parts
        for start in range(len(parts)):  # the longest end of the path that names one image
            tail = "/".join(parts[start:])
            names = [
                name
                for name in self._names_of_file.get(parts[-1], ())
                if f"/{name}".endswith(f"/{tail}") or f"/{os.path.splitext(name)[0]}".endswith(f"/{tail}")
            ]
            if names:
                return self._names[names[0]] if len(names) == 1 else None
        return None

    def _find_exact(self, text: str) -> str | None:
        if text in self._names:
            return self._names[text]
        for base in (self._root, self._beside):
            path = os.path.normpath(os.path.join(base, text))
            relative = os.path.relpath(path, self._root).replace(os.sep, "/")
            if relative in self._names:
                return self._names[relative]
        return None


def read_labels(path: Path, column: str | None, names: Iterable[str], root: Path) -> Arrangement:
    """Read a table of labels, CSV or JSON lines: the class of each image, and its split if the table has one.

    column: the column of the classes; None: the column with a usual name, or the only one beside the files.

    Raises:
        ConfigError: the table cannot be read, lacks such columns, names no image, or gives an image two classes.
    """
    option = f"data.labels {describe_path(path)}"
    text = _read_text(path, option)
    finder = ImageFinder(names, root, path.parent)
    rows = list(_json_rows(text, option) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text, finder, option))
    if not rows:
        raise ConfigError(f"{option}: holds no rows")
    files, labels, splits = _find_columns(rows, column, finder, option)
    members: dict[str, Membership] = {}
    missing, without_class = list[str](), 0
    for number, row in enumerate(rows, start=1):
        name, label = finder.find(row.get(files, "")), normalise_name(row.get(labels, "").strip())
        if name is None:
            missing.append(row.get(files, ""))
        elif not label:
            without_class += 1
        else:
            member = Membership(_split_of(row.get(splits, "") if splits else ""), label)
            if members.setdefault(name, member) != member:
                raise ConfigError(
                    f"{option}: row {number} gives {name} the class {label}, and an earlier row the class "
                    f"{members[name].class_}; an image has one class"
                )
    if not members:
        raise ConfigError(f"{option}: none of its {len(rows):,} rows names an image below {root}, e.g. {missing[:1]}")
    notes = [f"classes: column {labels} of {path}"]
    if missing:
        some = ", ".join(missing[:MAX_QUOTED])
        notes.append(f"{len(missing):,} rows of {path} name no image, or more than one: {some}")
    if without_class:
        notes.append(f"{without_class:,} rows of {path} have no class")
    return Arrangement(members, notes)


def read_classes(path: Path) -> tuple[str, ...]:
    """Read names of classes, one a line, in the order of their labels.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a name twice.
    """
    option = f"data.classes {describe_path(path)}"
    names = [normalise_name(line.strip()) for line in _read_text(path, option).splitlines() if line.strip()]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice or not names:
        raise ConfigError(f"{option}: " + (f"names {twice[0]} twice" if twice else "holds no names"))
    return tuple(names)


def read_list(path: Path, names: Iterable[str], root: Path, key: str) -> set[str]:
    """Read a list of paths, one a line, and return the names of the images.

    Raises:
        ConfigError: the list cannot be read, or a path in it names no image.
    """
    option = f"data.{key} {describe_path(path)}"
    finder = ImageFinder(names, root, path.parent)
    lines = [line for line in _read_text(path, option).splitlines() if line.strip()]
    names_of_lines = {line: finder.find(line) for line in lines}
    if missing := [line for line, name in names_of_lines.items() if name is None]:
        quoted = "; ".join(missing[:MAX_QUOTED])
        raise ConfigError(
            f"{option}: {len(missing):,} of its {len(lines):,} lines name no image below {root}, or more than one: "
            f"{quoted}. A line is a path, from the root or from the folder of the list; classes go into a table for "
            "--data.labels"
        )
    return {name for name in names_of_lines.values() if name is not None}


def _read_text(path: Path, option: str) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{option}: has more than {MAX_BYTES:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{option}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: is not text in UTF-8; save it as UTF-8") from None


def _csv_rows(text: str, finder: ImageFinder, option: str) -> Iterator[Row]:
    first = text.splitlines()[0] if text.strip() else ""
    delimiter = max(",;\t|", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ConfigError(f"{option}: line {reader.line_num} is not CSV ({error})") from None
    if not rows:
        return
    header = [cell.strip() for cell in rows[0]]
    if any(finder.find(cell) for cell in header):  # no header: the first row has an image already
        header = [f"{number}" for number in range(1, len(header) + 1)]
    else:
        rows = rows[1:]
    for row in rows:
        yield dict(zip(header, row, strict=False))


def _json_rows(text: str, option: str) -> Iterator[Row]:
    lines: Iterable[Any] = [line for line in text.splitlines() if line.strip()]
    try:
        objects = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option}: is not JSON, one object a line ({error})") from None
    for number, row in enumerate(objects, start=1):
        if not isinstance(row, dict):
            raise ConfigError(f"{option}: row {number} is not a JSON object")
        yield {
            str(key): "" if value is None else value if isinstance(value, str) else json.dumps(value)
            for key, value in row.items()
        }


def _find_columns(rows: list[Row], column: str | None, finder: ImageFinder, option: str) -> tuple[str, str, str | None]:
    """Return the names of the columns that hold the files, the classes and, if there is one, the splits."""
    columns = list(rows[0])
    listed = ", ".join(columns[:MAX_COLUMNS])
    spelling = {name.lower(): name for name in columns}
    sample = rows[:SAMPLE_ROWS]
    candidates = [*(spelling[name] for name in FILE_COLUMNS if name in spelling), *columns]
    hits = {name: sum(finder.find(row.get(name, "")) is not None for row in sample) for name in candidates}
    files = max(hits, key=lambda name: hits[name])
    if not hits[files]:
        raise ConfigError(
            f"{option}: no column holds names of images below the root; the columns are {listed}, and the first row is "
            + ", ".join(list(rows[0].values())[:MAX_QUOTED])
        )
    splits = next((spelling[name] for name in SPLIT_COLUMNS if name in spelling and spelling[name] != files), None)
    if splits and not all(_split_of(row.get(splits, "")) for row in sample):
        splits = None
    if column is not None and column not in columns:
        raise ConfigError(f"data.label_column {column}: {option} has the columns {listed}")
    others = [name for name in columns if name not in (files, splits)]
    usual = [spelling[name] for name in LABEL_COLUMNS if name in spelling and spelling[name] in others]
    label = column or (usual[0] if usual else others[0] if len(others) == 1 else None)
    if label is None and others:
        named = ", ".join(others[:MAX_COLUMNS])
        raise ConfigError(f"{option}: which column is the class? Name one of {named} with --data.label_column")
    if label is None:
        raise ConfigError(f"{option}: has no column beside {files}, so no classes; a list of paths is --data.files")
    return files, label, splits


def _split_of(text: str) -> NamedSplit | None:
    return SPLIT_OF_WORD.get(text.strip().lower())
