"""Files that say which images there are, and of which class: tables of labels, lists of classes, lists of paths.

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

from stage1_tokenizer.data.folder.layout import Arranged, Place
from stage1_tokenizer.data.folder.names import PARTS, Part
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import describe_path, normalise_name

FILE_COLUMNS = ("file_name", "filename", "file", "filepath", "path", "image_path", "image", "img", "name", "id")
LABEL_COLUMNS = ("label", "class", "category", "class_name", "label_name", "target", "species", "breed", "labels", "y")
PART_COLUMNS = ["split", "subset", "partition", "set"]
SHOWN = 5
"""Rows, columns or names that a message lists."""
LARGEST = 2**31
"""Bytes of such a file; one line for each of ten million images is a third of it."""

Row = dict[str, str]


class Matcher:
    """Finder of the image that a path in a file means: from the root or from any folder above it, with or without the
    extension."""

    def __init__(self, names: Iterable[str], root: Path, beside: Path) -> None:
        """names: relative to `root`. beside: the folder of the file that holds the paths."""
        self._names = {normalise_name(name): name for name in names}
        self._root, self._beside = os.path.abspath(root), os.path.abspath(beside)
        self._ends = defaultdict[str, list[str]](list)
        for name in self._names:
            end = name.rsplit("/", 1)[-1]
            for key in {end, os.path.splitext(end)[0]}:
                self._ends[key].append(name)

    def find(self, given: str) -> str | None:
        """The image's name, or None where there is none, or more than one that it may mean."""
        text = normalise_name(given.strip())
        for form in (text, text.replace("\\", "/")):
            if found := self._exact(form):
                return found
        parts = PurePosixPath(text.replace("\\", "/")).parts
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        for tail in tails:  # the longest end of the path that names one image
            named = [
                name
                for name in self._ends.get(tail.rsplit("/", 1)[-1], ())
                if f"/{name}".endswith(f"/{tail}") or f"/{os.path.splitext(name)[0]}".endswith(f"/{tail}")
            ]
            if len(named) == 1:
                return self._names[named[0]]
            if named:
                return None
        return None

    def _exact(self, text: str) -> str | None:
        if text in self._names:
            return self._names[text]
        for base in (self._root, self._beside):
            path = os.path.normpath(os.path.join(base, text))
            near = os.path.relpath(path, self._root).replace(os.sep, "/")
            if near in self._names:
                return self._names[near]
        return None


def read_labels(path: Path, column: str | None, names: Iterable[str], root: Path) -> Arranged:
    """Read a table of labels, CSV or JSON lines: the class, and the split if the table has one, of each image.

    column: the column of the classes; None: it is found by its name, or is the only one beside the files.

    Raises:
        ConfigError: it cannot be read, has no such columns, names no image, or gives an image two classes.
    """
    option = f"data.labels {describe_path(path)}"
    text = _read(path, option)
    matcher = Matcher(names, root, path.parent)
    rows = list(_json_rows(text, option) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text, matcher, option))
    if not rows:
        raise ConfigError(f"{option}: holds no rows")
    files, labels, parts = _columns(rows, column, matcher, option)
    places: dict[str, Place] = {}
    missing, empty = list[str](), 0
    for number, row in enumerate(rows, start=1):
        name, label = matcher.find(row.get(files, "")), normalise_name(row.get(labels, "").strip())
        if name is None:
            missing.append(row.get(files, ""))
        elif not label:
            empty += 1
        else:
            place = Place(_part(row.get(parts, "") if parts else ""), label)
            if places.setdefault(name, place) != place:
                raise ConfigError(
                    f"{option}: row {number} gives {name} the class {label}, and an earlier one {places[name].class_}; "
                    "an image has one class"
                )
    if not places:
        raise ConfigError(f"{option}: none of its {len(rows):,} rows names an image below {root}, e.g. {missing[:1]}")
    notes = [f"classes: column {labels} of {path}"]
    if missing:
        notes.append(f"{len(missing):,} rows of {path} name no image, or more than one: {', '.join(missing[:SHOWN])}")
    if empty:
        notes.append(f"{empty:,} rows of {path} have no class")
    return Arranged(places, notes)


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of their labels. Raises ConfigError: unreadable, empty, or a name is
    there twice."""
    option = f"data.classes {describe_path(path)}"
    names = [normalise_name(line.strip()) for line in _read(path, option).splitlines() if line.strip()]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice or not names:
        raise ConfigError(f"{option}: " + (f"names {twice[0]} twice" if twice else "holds no names"))
    return tuple(names)


def read_list(path: Path, names: Iterable[str], root: Path, key: str) -> set[str]:
    """The images that a list of paths names, one a line.

    Raises:
        ConfigError: it cannot be read, or a path in it names no image.
    """
    option = f"data.{key} {describe_path(path)}"
    matcher = Matcher(names, root, path.parent)
    lines = [line for line in _read(path, option).splitlines() if line.strip()]
    found = {line: matcher.find(line) for line in lines}
    if missing := [line for line, name in found.items() if name is None]:
        raise ConfigError(
            f"{option}: {len(missing):,} of its {len(lines):,} lines name no image below {root}, or more than one: "
            f"{'; '.join(missing[:SHOWN])}. A line is a path, from the root or from the folder of the list; classes go "
            "into a table for --data.labels"
        )
    return {name for name in found.values() if name is not None}


def _read(path: Path, option: str) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{option}: has more than {LARGEST:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{option}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: is not text in UTF-8; save it as UTF-8") from None


def _csv_rows(text: str, matcher: Matcher, option: str) -> Iterator[Row]:
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
    if any(matcher.find(cell) for cell in header):  # no header: the first row has an image already
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
            raise ConfigError(f"{option}: row {number} is no JSON object")
        yield {
            str(key): "" if value is None else value if isinstance(value, str) else json.dumps(value)
            for key, value in row.items()
        }


def _columns(rows: list[Row], column: str | None, matcher: Matcher, option: str) -> tuple[str, str, str | None]:
    """The names of the columns that hold the files, the classes and, if there is one, the splits."""
    columns = list(rows[0])
    known = {name.lower(): name for name in columns}
    sample = rows[: 10 * SHOWN]
    named = [known[name] for name in FILE_COLUMNS if name in known]
    hits = {name: sum(matcher.find(row.get(name, "")) is not None for row in sample) for name in [*named, *columns]}
    files = max(hits, key=lambda name: hits[name])
    if not hits[files]:
        raise ConfigError(
            f"{option}: no column holds names of images below the root; the columns are {', '.join(columns[:20])}, and "
            f"the first row is {', '.join(list(rows[0].values())[:SHOWN])}"
        )
    parts = next((known[name] for name in PART_COLUMNS if name in known and known[name] != files), None)
    if parts and not all(_part(row.get(parts, "")) for row in sample):
        parts = None
    if column is not None and column not in columns:
        raise ConfigError(f"data.label_column {column}: {option} has the columns {', '.join(columns[:20])}")
    others = [name for name in columns if name not in (files, parts)]
    found = [known[name] for name in LABEL_COLUMNS if name in known and known[name] in others]
    label = column or (found[0] if found else others[0] if len(others) == 1 else None)
    if label is None:
        raise ConfigError(
            f"{option}: which column is the class? Name one of {', '.join(others[:20])} with --data.label_column"
            if others
            else f"{option}: has no column beside {files}, so no classes; a list of paths is --data.files"
        )
    return files, label, parts


def _part(text: str) -> Part | None:
    return PARTS.get(text.strip().lower())
