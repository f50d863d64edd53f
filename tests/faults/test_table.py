"""The table of docs/reliability.md: each of its 55 faults has a test with its number, and a line leads to it."""

import re

from tests.helpers.commands import ROOT

ROWS = range(1, 56)
PAGE = ROOT / "docs" / "reliability.md"


def fault_tests() -> dict[str, set[int]]:
    """file::test -> the rows in its name; `test_fault_08_09_10_...` carries three."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_fault_\w+)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            numbers = re.match(r"test_fault((?:_\d\d|_and(?=_\d\d))+)_", name)
            assert numbers, f"{name}: two digits name the row"
            found[f"{path.relative_to(ROOT).as_posix()}::{name}"] = {
                int(number) for number in re.findall(r"\d\d", numbers[1])
            }
    return found


def test_every_row_has_its_test() -> None:
    """A row that nobody tests is a promise that nobody keeps."""
    covered = set().union(*fault_tests().values())
    assert covered == set(ROWS)


def test_the_page_leads_to_every_row() -> None:
    """The table has a line for each row, in order, with tests that carry its number; no name leads nowhere."""
    table = PAGE.read_text(encoding="utf-8").split("| # | fault |")[1].split("\n\n")[0]
    lines, known = table.splitlines()[2:], fault_tests()
    assert [int(line.split("|")[1]) for line in lines] == list(ROWS)
    for number, line in enumerate(lines, start=1):
        named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", line)
        assert named, number
        assert all(number in known[f"{file}::{name}"] for name, file in named), number
