"""Checks of a run's folder, of stage one or two: every file in it, its saved states, and whether they fit together."""

import json
from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, check_leftovers
from sampling.checks.images import check_images, holds_images
from sampling.checks.tokens import check_tokens
from sampling.checks.weights import check_pair, check_safetensors, tokenizer_of
from sampling.output import SETTINGS
from stage1_tokenizer.config.base import Tree, read_saved_yaml
from stage1_tokenizer.config.yaml_and_json import is_cut_off
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.discriminator import DISCRIMINATOR_FILE
from stage1_tokenizer.engine.environment import SESSIONS_FILE
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.engine.lock import find_lock_holder
from stage1_tokenizer.engine.log_file import METRICS_FILE
from stage1_tokenizer.engine.state import FORMAT, find_problem, list_states
from stage1_tokenizer.tokenizer import TOKENIZER_FILE
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.tokens import list_shards

CONFIG = "config.yaml"
TOKENS = "tokens"
TRAINING_KEYS = {"seed", "steps", "batch_size", "optim"}
"""Keys of the configuration of every training."""
LAST_KEYS_OF_FORMER_VERSIONS = {"pictures", "samples"}
"""Last keys of a configuration, of stage one and two, in files of former versions, which do not mark their end."""


def check_run(folder: Path) -> Iterator[Finding]:
    """Check everything that a training writes; note other files that concern the run."""
    holder = find_lock_holder(folder)
    if holder is not None:
        yield Finding.note(folder, f"is in use by a running process ({holder}); what it is writing is not judged")
    tree, findings = _read_config(folder)
    yield from findings
    yield from check_states(folder / "state")
    yield from check_pair(folder / TOKENIZER_FILE, folder / PRIOR_FILE)
    tokenizer = tokenizer_of(folder / TOKENS)
    # A configuration of stage two holds the fingerprint of its tokenizer; one of stage one holds none.
    if tokenizer is not None and not tokenizer.makes_codes_of(tree.get("tokenizer", tokenizer.fingerprint)):
        other = f"of a run on the tokenizer {shorten(tree['tokenizer'])}, but beside it is {tokenizer.code_fingerprint}"
        yield Finding.bad(folder / CONFIG, f"is that {other}")
    weights = folder / (PRIOR_FILE if "tokenizer" in tree else TOKENIZER_FILE)
    if not weights.is_file():
        yield Finding.note(weights, "is not there; a run writes it with each state")
    yield from check_token_folder(folder / TOKENS)
    for name in (METRICS_FILE, "alarms.jsonl", SESSIONS_FILE):
        if (folder / name).exists():
            yield _check_log(folder / name)
    if (folder / BAD_FILES).exists():
        lines = (folder / BAD_FILES).read_bytes().count(b"\n")
        yield Finding.note(folder / BAD_FILES, f"lists {lines:,} image files that could not be read and were left out")
    for path in sorted([*folder.glob(DISCRIMINATOR_FILE), *folder.glob("nonfinite-*.safetensors")]):
        yield from check_safetensors(path)
    if holds_images(folder / "samples"):
        yield from check_images(folder / "samples")
    yield from check_leftovers(folder, holder)
    for path in sorted(folder.glob(f"*/*/{SETTINGS}")):
        yield Finding.note(path.parent, "a folder of samples, not looked at here; give its path to have it checked")


def check_token_folder(folder: Path) -> Iterator[Finding]:
    """Check the token files of a run, and whether its tokenizer made them."""
    holder = find_lock_holder(folder.absolute().parent)
    yield from check_tokens(list_shards(folder), tokenizer_of(folder), busy=holder is not None)
    yield from check_leftovers(folder, holder)


def check_state(state: Path) -> Iterator[Finding]:
    """Check one state, a folder step-XXXXXXXX."""
    problem = find_problem(state)
    yield Finding.ok(state, f"whole by its checksums, format {FORMAT}") if not problem else Finding.bad(state, problem)


def check_states(folder: Path) -> Iterator[Finding]:
    """Check all states in a folder, the newest first. A running training may delete one during the check."""
    usable = None
    for state in list_states(folder):
        (finding,) = check_state(state)
        if finding.verdict == "bad" and not state.exists():
            continue
        if finding.verdict == "ok" and usable is None:
            usable = state
            finding = Finding.ok(state, f"{finding.text}; a resume takes this one")
        yield finding
    if usable is None and list_states(folder):
        yield Finding.bad(folder, "none of its states can be used, so a resume is refused")
    yield from check_leftovers(folder, find_lock_holder(folder.absolute().parent))


def _read_config(folder: Path) -> tuple[Tree, list[Finding]]:
    """Return the run's configuration, empty if it cannot be read, and the findings on it."""
    path = folder / CONFIG
    if not path.exists():  # weights alone need none
        return {}, [Finding.bad(path, "is missing, so a resume is refused")] * bool(list_states(folder / "state"))
    try:
        tree = read_saved_yaml(path)
    except BadFileError as error:
        return {}, [Finding.of_error(path, error)]
    cut_off = is_cut_off(path.read_bytes())
    if cut_off is None:
        cut_off = not LAST_KEYS_OF_FORMER_VERSIONS & tree.keys()
    if cut_off or not tree.keys() >= TRAINING_KEYS:
        return {}, [Finding.bad(path, "is cut off, or is no training's configuration")]
    return tree, [
        Finding.ok(path, f"can be read; {shorten(tree['steps'])} steps of {shorten(tree['batch_size'])} images")
    ]


def _check_log(path: Path) -> Finding:
    """Check a log with one JSON object per line. The last line may have been cut off; a resume drops it."""
    lines = path.read_bytes().split(b"\n")
    wrong = [number for number, line in enumerate(lines[:-1], start=1) if not _is_entry(line)]
    if wrong:
        more = f" (and {len(wrong) - 1} further lines)" if len(wrong) > 1 else ""
        return Finding.bad(path, f"line {wrong[0]}{more} is no JSON object with a step; a resume leaves it out")
    if lines[-1]:
        return Finding.note(
            path, f"{len(lines) - 1:,} entries, and a last one that was cut off; a resume leaves it out"
        )
    return Finding.ok(path, f"{len(lines) - 1:,} entries")


def _is_entry(line: bytes) -> bool:
    """Return True for a JSON object with an integer step."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("step"), int)
