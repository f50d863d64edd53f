"""Rules of the repository, checked on its files: imports between packages, names of files, no pickles.

The tests do not import the packages, so they take a second and also work while the code does not run.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stage1_tokenizer", "stage2_prior", "sampling")  # each may import itself and those before it
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports: `from a.b import c` gives a.b and a.b.c, relative ones begin with "."."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def repository_files() -> tuple[Path, ...]:
    """Return the tracked files and the untracked files that git does not ignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(path for name in listed.split("\0") if (path := ROOT / name).is_file())


def test_the_packages_are_found() -> None:
    """The other tests loop over these files, and would pass on an empty list."""
    for package in PACKAGES:
        assert ROOT / package / "__init__.py" in SOURCES
        assert (ROOT / package / "__init__.py").stat().st_size


def test_imports_go_one_way() -> None:
    """sampling -> stage2_prior -> stage1_tokenizer: a reader of one stage never has to open a later one."""
    wrong = []
    for path in SOURCES:
        package = path.relative_to(ROOT).parts[0]
        allowed = PACKAGES[: PACKAGES.index(package) + 1]
        tops = {module.split(".")[0] for module in imports(path)}
        wrong += [f"{name_of(path)}: {top}" for top in tops & {*PACKAGES, "configs", "tests"} - {*allowed}]
    assert not wrong


INNER_LAYERS = {
    "config": {"config", "engine.console", "engine.errors", "engine.file_names", "engine.files"},
    "engine": {"config", "engine"},
}
"""Folders of stage one that know nothing of images and data sets, with the modules that each may import. The modules of
the engine that config may import do not import config: else neither could be read first."""


@pytest.mark.parametrize("folder", INNER_LAYERS)
def test_machinery_knows_no_images(folder: str) -> None:
    """engine and config serve any training: a change of data sets, networks or reports never reaches them."""
    wrong = []
    for path in (ROOT / "stage1_tokenizer" / folder).glob("*.py"):
        ours = {module.removeprefix("stage1_tokenizer.") for module in imports(path) if module.startswith("stage1_")}
        allowed = tuple(f"{layer}." for layer in INNER_LAYERS[folder])
        ours -= {"config", "engine"}  # `from stage1_tokenizer.engine import console` gives engine and engine.console
        wrong += [f"{name_of(path)}: {module}" for module in ours if not f"{module}.".startswith(allowed)]
    assert not wrong


def test_machinery_has_no_import_cycles() -> None:
    """engine imports config, and config the lowest modules of engine: in a cycle none could be imported first."""
    paths = [path for folder in INNER_LAYERS for path in (ROOT / "stage1_tokenizer" / folder).glob("*.py")]
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in paths}
    graph = {name: modules.keys() & set(imports(path)) for name, path in modules.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_imports_are_absolute() -> None:
    """A relative import fails in a file that is started as a script, which has no package."""
    wrong = [f"{name_of(path)}: {module}" for path in SOURCES for module in imports(path) if module.startswith(".")]
    assert not wrong


def test_nothing_imports_a_train_script() -> None:
    """train.py runs as `__main__`; imported too, its classes would exist twice, and be different ones."""
    wrong = [
        name_of(path)
        for path in SOURCES + TESTS
        if any(re.match(r"(stage1_tokenizer|stage2_prior|sampling)\.train\b", module) for module in imports(path))
    ]
    assert not wrong


def test_no_file_shadows_a_module() -> None:
    """`python stage2_prior/train.py` puts that folder first on the path: a types.py there is everybody's `types`."""
    taken = sys.stdlib_module_names | (packages_distributions().keys() - {*PACKAGES})
    script_folders = {ROOT / package for package in PACKAGES} | {
        path.parent for path in SOURCES if "__main__" in path.read_text(encoding="utf-8")
    }
    beside_scripts = [path for folder in script_folders for path in folder.iterdir() if path.suffix in {".py", ""}]
    wrong = [name_of(path) for path in beside_scripts if path.stem in taken - {"__init__"}]
    assert not wrong


def test_nothing_is_unpickled() -> None:
    """A pickle runs what it contains, and a checkpoint may come from anybody (Trap 44)."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load"}
    keywords = {("weights_only", False), ("allow_pickle", True)}
    wrong = []
    for path in SOURCES:
        wrong += [f"{name_of(path)}: import {module}" for module in imports(path) if module in modules]
        for node in ast.walk(parse(path)):
            match node:
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    wrong.append(f"{name_of(path)}:{node.lineno}: torch.load")
                case ast.keyword(arg=str(name), value=ast.Constant(value)) if (name, value) in keywords:
                    wrong.append(f"{name_of(path)}:{node.lineno}: {name}={value!r}")
    assert not wrong


def test_no_file_names_a_registry() -> None:
    """The machine decides where packages come from: a host in a file breaks every install behind a mirror."""
    # In pieces, for this file is searched too.
    registry = re.compile("index" + r"[-_]url|https?://\S*/(simple|packages)/|python" + r"hosted\.org", re.IGNORECASE)
    wrong = []
    for path in repository_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        wrong += [f"{name_of(path)}: {match.group()}" for match in registry.finditer(text)]
    assert not wrong
    assert ROOT / "uv.lock" not in repository_files()


LOCKS = ["requirements.lock", "benchmarks/requirements.lock", ".ci/lowest.lock", ".ci/torch-2.11.lock"]


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_hashes_and_no_addresses(lock: str) -> None:
    """An install must fail on a file that is not the one which was tested."""
    entries = re.split(r"\n(?=\S)", (ROOT / lock).read_text(encoding="utf-8"))
    assert len(entries) > 1
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^\s@]+ .*\n    --hash=sha256:", entry), entry.splitlines()[0]


def test_the_lowest_versions_are_those_of_the_bounds() -> None:
    """`make test-lowest` tests what pyproject.toml promises: a bound that changes changes that lock too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][name] for name in ("app", "bench", "dev"))
    locked = dict(re.findall(r"^(\S+)==(\S+) ", (ROOT / ".ci/lowest.lock").read_text(encoding="utf-8"), re.MULTILINE))
    for requirement in [*project["dependencies"], *(each for extra in extras for each in extra)]:
        stated = re.fullmatch(r"([\w-]+)[>=]=([\d.]+)(,<[\d.]+)?", requirement)
        assert stated, f"{requirement}: states no lower bound"
        assert f"{locked[stated[1].lower()]}.".startswith(f"{stated[2]}."), requirement


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_file_says_its_idea(path: Path) -> None:
    assert ast.get_docstring(parse(path)), "no module docstring"


LONGEST = {"stage1_tokenizer/train.py": 125, "stage2_prior/train.py": 125}
"""Lines of the two loops, each of which is to be seen on one screen with its set-up."""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_can_be_read(path: Path) -> None:
    """A function of more than 60 lines does several things, and nobody remembers the order of eight arguments."""
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= (LONGEST.get(name_of(path), 60) if node.name == "main" else 60), f"{node.name}: {lines} lines"
        given = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
        given = [name for name in given if name not in {"self", "cls", "ctx"}]
        assert len(given) <= 7, f"{node.name}: {len(given)} arguments by position; those beyond go after a *"


@pytest.mark.parametrize("package", ["stage1_tokenizer", "stage2_prior"])
def test_a_package_shows_the_paper(package: str) -> None:
    """The top folder has the model, its parts and its commands; the machinery is in sub-folders."""
    entries = {path.name for path in (ROOT / package).iterdir() if path.suffix in {".py", ""}}
    most = {"stage1_tokenizer": 17, "stage2_prior": 22}[package]  # 16, and the command import_weights
    assert len(entries - {"__init__.py", "__pycache__"}) <= most, sorted(entries)
