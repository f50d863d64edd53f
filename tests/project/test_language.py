"""The language rules that a program can check: docstrings exist, and begin as a noun phrase or an imperative.

Nothing here imports the packages, so the tests take a second and hold even while the code does not run.
"""

import ast
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ("stage1_tokenizer", "stage2_prior", "sampling", "benchmarks")
"""Folders whose files follow the rules."""
FRAGMENT = re.compile(
    r"(Of|What|Whether|How|As|That|Those|To|For|By|In|Where|Why|Which|Who|When|If|From|With|Without|On|At|So)\b"
)
"""First word of a docstring that is part of a sentence whose subject is missing."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Documented(NamedTuple):
    """A place that may have a docstring."""

    line: int
    name: str
    docstring: str | None
    is_required: bool


def files() -> list[Path]:
    """Return the files to check."""
    return sorted(path for name in CHECKED for path in (ROOT / name).rglob("*.py"))


def documented(path: Path) -> Iterator[Documented]:
    """Yield the module, its functions, classes, methods and fields."""
    module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    public = set(public_definitions(module))
    yield Documented(1, "the module", ast.get_docstring(module), is_required=True)
    for node in ast.walk(module):
        if isinstance(node, Definition):
            yield Documented(node.lineno, node.name, ast.get_docstring(node), node in public)
    yield from fields(module, "", is_config=False)


def public_definitions(parent: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Yield the public functions and classes of a module or class, and those of its public classes."""
    for node in parent.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def fields(parent: ast.Module | ast.ClassDef, prefix: str, is_config: bool) -> Iterator[Documented]:
    """Yield the fields and constants of a module or class, and those of its classes; a config's need a docstring."""
    for node, following in zip_longest(parent.body, parent.body[1:]):
        match node:
            case ast.ClassDef():
                bases = [ast.unparse(base) for base in node.bases]
                yield from fields(node, f"{prefix}{node.name}.", any(base.endswith("Config") for base in bases))
            case ast.AnnAssign(target=ast.Name(name)) | ast.Assign(targets=[ast.Name(name)]):
                text = following.value if isinstance(following, ast.Expr) else None
                docstring = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None
                # A field that is a config itself is documented by the docstring of its class.
                is_field = isinstance(node, ast.AnnAssign) and not re.search(
                    r"ClassVar|Config$", ast.unparse(node.annotation)
                )
                is_required = is_config and is_field and name != "kind" and not name.startswith("_")
                yield Documented(node.lineno, f"{prefix}{name}", docstring, is_required)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_files_are_found() -> None:
    """The other tests loop over these files, and would pass on an empty list."""
    assert len(files()) > 10
    assert {name_of(path).split("/")[0] for path in files()} == {name.split("/")[0] for name in CHECKED}


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_docstrings_begin_as_sentences(path: Path) -> None:
    """A docstring that begins with "Of" or "Whether" leaves its subject to the reader's guess."""
    wrong = [
        f"{name_of(path)}:{each.line}: {each.name}: {each.docstring.splitlines()[0]}"
        for each in documented(path)
        if each.docstring and FRAGMENT.match(each.docstring)
    ]
    assert not wrong


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    """Modules, functions, methods, classes and the fields of configs, whose docstrings are the text of `-h`."""
    wrong = [
        f"{name_of(path)}:{each.line}: {each.name}"
        for each in documented(path)
        if each.is_required and not each.docstring
    ]
    assert not wrong


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    """The same functions on a file with one fault of each kind."""
    path = tmp_path / "faulty.py"
    path.write_text(
        'LIMIT = 3\n"""Of something."""\n\n\nclass Options(BaseConfig):\n    """Whether to."""\n\n    kind: str = "a"\n'
        '    bare: int = 1\n    good: int = 2\n    """Number of steps."""\n\n    def run(self):\n        pass\n\n'
        '    def _hidden(self):\n        """How it runs."""\n'
    )
    found = list(documented(path))
    fragments = {each.name for each in found if each.docstring and FRAGMENT.match(each.docstring)}
    missing = [each.name for each in found if each.is_required and not each.docstring]
    assert fragments == {"LIMIT", "Options", "_hidden"}
    assert missing == ["the module", "run", "Options.bare"]
