"""Saved states: which are whole, and which one a run would go on from."""

from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, bad, ok
from sampling.checks.leftovers import check_leftovers
from stage1_tokenizer.engine.lock import holder_of
from stage1_tokenizer.engine.state import FORMAT, problem_of, states


def check_state(state: Path) -> Iterator[Finding]:
    """One state, step-XXXXXXXX."""
    yield _judge(state)


def check_states(folder: Path) -> Iterator[Finding]:
    """All states in a folder, the newest first; the run may go on meanwhile, and drop one that is being looked at."""
    usable = None
    for state in states(folder):
        finding = _judge(state)
        if finding.verdict == "bad" and not state.exists():
            continue
        if finding.verdict == "ok" and usable is None:
            usable = state
            finding = ok(state, f"{finding.what}; a resume takes this one")
        yield finding
    if usable is None and states(folder):
        yield bad(folder, "none of its states can be used, so a resume is refused")
    yield from check_leftovers(folder, holder_of(folder.absolute().parent))


def _judge(state: Path) -> Finding:
    problem = problem_of(state)
    return ok(state, f"whole by its checksums, format {FORMAT}") if problem is None else bad(state, problem)
