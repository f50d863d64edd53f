"""FAULTS' table: each of its 55 rows has a test that carries its number, and docs/reliability.md leads to it."""

import re
from pathlib import Path

from tests.commands import ROOT

ROWS = range(1, 56)
PAGE = ROOT / "docs" / "reliability.md"


def fault_tests() -> dict[str, set[int]]:
    """file::test -> the rows in its name; `test_fault_08_09_10_...` carries three."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name in re.findall(r"^def (test_fault_\w+)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            numbers = re.match(r"test_fault((?:_\d\d|_and(?=_\d\d))+)_", name)
            assert numbers, f"{name}: two digits name the row"
            found[f"tests/{path.name}::{name}"] = {int(number) for number in re.findall(r"\d\d", numbers[1])}
    return found


def test_every_row_has_its_test() -> None:
    """A row that nobody tests is a promise that nobody keeps."""
    covered = set().union(*fault_tests().values())
    assert covered == set(ROWS)


def test_the_page_leads_to_every_row() -> None:
    """The table has a line for each row, in order, with tests that carry its number; no link leads nowhere."""
    text, known = PAGE.read_text(encoding="utf-8"), fault_tests()
    lines = re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(ROWS)
    for number, cell in lines:
        named = re.findall(r"`(tests/\S+::\w+)`", cell)
        assert named, number
        assert all(int(number) in known[name] for name in named), number
    for name in re.findall(r"`(tests/\S+\.py)::(\w+)`", text):
        assert f"def {name[1]}(" in (ROOT / name[0]).read_text(encoding="utf-8"), name
