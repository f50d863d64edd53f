"""A run's folder, of stage one or two: every file in it, its saved states, and whether they belong together."""

import json
from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, bad, check_leftovers, note, ok, reason
from sampling.checks.images import check_images, holds_images
from sampling.checks.tokens import check_tokens
from sampling.checks.weights import check_pair, check_safetensors, tokenizer_of
from sampling.output import SETTINGS
from stage1_tokenizer.config.base import Tree, read_saved_yaml
from stage1_tokenizer.config.yaml_and_json import is_cut_off
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.engine.environment import SESSIONS_FILE
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.engine.lock import find_lock_holder
from stage1_tokenizer.engine.state import FORMAT, find_problem, list_states
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.tokens import list_shards

CONFIG = "config.yaml"
TOKENS = "tokens"
NEEDED = {"seed", "steps", "batch_size", "optim"}
"""Keys of every training's configuration."""
LAST_OF_FORMER = {"pictures", "samples"}
"""The last keys, of stage one and two, in files of former versions, which do not mark their end."""


def check_run(folder: Path) -> Iterator[Finding]:
    """Everything that a training writes, and a word on what else is there."""
    holder = find_lock_holder(folder)
    if holder is not None:
        yield note(folder, f"is in use by a running process ({holder}); what it is writing is not judged")
    tree, findings = _config(folder)
    yield from findings
    yield from check_states(folder / "state")
    yield from check_pair(folder / TOKENIZER_FILE, folder / PRIOR_FILE)
    tokenizer = tokenizer_of(folder / TOKENS)
    if tokenizer is not None and not _is_of(tree, tokenizer):
        there = f"that of a run on the tokenizer {shorten(tree['tokenizer'])}, but beside it is {tokenizer.fingerprint}"
        yield bad(folder / CONFIG, f"is {there}")
    product = folder / (PRIOR_FILE if "tokenizer" in tree else TOKENIZER_FILE)
    if not product.is_file():
        yield note(product, "is not there; a run writes it with each state")
    yield from check_token_folder(folder / TOKENS)
    for name in ("metrics.jsonl", "alarms.jsonl", SESSIONS_FILE):
        if (folder / name).exists():
            yield _log(folder / name)
    if (folder / BAD_FILES).exists():
        lines = (folder / BAD_FILES).read_bytes().count(b"\n")
        yield note(folder / BAD_FILES, f"lists {lines:,} image files that could not be read and were left out")
    for path in sorted(folder.glob("nonfinite-*.safetensors")):
        yield from check_safetensors(path)
    if holds_images(folder / "samples"):
        yield from check_images(folder / "samples")
    yield from check_leftovers(folder, holder)
    for path in sorted(folder.glob(f"*/*/{SETTINGS}")):
        yield note(path.parent, "a folder of samples, not looked at here; give its path to have it checked")


def check_token_folder(folder: Path) -> Iterator[Finding]:
    """The token files of a run, and whether they are its tokenizer's."""
    holder = find_lock_holder(folder.absolute().parent)
    yield from check_tokens(list_shards(folder), tokenizer_of(folder), busy=holder is not None)
    yield from check_leftovers(folder, holder)


def check_state(state: Path) -> Iterator[Finding]:
    """One state, step-XXXXXXXX."""
    yield _judge(state)


def check_states(folder: Path) -> Iterator[Finding]:
    """All states in a folder, the newest first; the run may go on meanwhile, and drop one that is being looked at."""
    usable = None
    for state in list_states(folder):
        finding = _judge(state)
        if finding.verdict == "bad" and not state.exists():
            continue
        if finding.verdict == "ok" and usable is None:
            usable = state
            finding = ok(state, f"{finding.what}; a resume takes this one")
        yield finding
    if usable is None and list_states(folder):
        yield bad(folder, "none of its states can be used, so a resume is refused")
    yield from check_leftovers(folder, find_lock_holder(folder.absolute().parent))


def _judge(state: Path) -> Finding:
    problem = find_problem(state)
    return ok(state, f"whole by its checksums, format {FORMAT}") if problem is None else bad(state, problem)


def _config(folder: Path) -> tuple[Tree, list[Finding]]:
    """The run's configuration, as far as it can be read, and what is to be said of it."""
    path = folder / CONFIG
    if not path.exists():  # weights alone need none
        return {}, [bad(path, "is missing, so a resume is refused")] * bool(list_states(folder / "state"))
    try:
        tree = read_saved_yaml(path)
    except BadFileError as error:
        return {}, [bad(path, reason(error, path))]
    cut_off = is_cut_off(path.read_bytes())
    if cut_off is None:
        cut_off = not LAST_OF_FORMER & tree.keys()
    if cut_off or not tree.keys() >= NEEDED:
        return {}, [bad(path, "is cut off, or is no training's configuration")]
    return tree, [ok(path, f"can be read; {shorten(tree['steps'])} steps of {shorten(tree['batch_size'])} images")]


def _is_of(tree: Tree, tokenizer: LoadedTokenizer) -> bool:
    """False where a configuration of stage two, which has the fingerprint of a tokenizer, has another one's."""
    return tree.get("tokenizer", tokenizer.fingerprint) == tokenizer.fingerprint


def _log(path: Path) -> Finding:
    """A log of one JSON object on each line. The last line may have been cut off; a resume drops it."""
    lines = path.read_bytes().split(b"\n")
    wrong = [number for number, line in enumerate(lines[:-1], start=1) if not _is_entry(line)]
    if wrong:
        more = f" (and {len(wrong) - 1} further lines)" if len(wrong) > 1 else ""
        return bad(path, f"line {wrong[0]}{more} is no JSON object with a step; a resume leaves it out")
    if lines[-1]:
        return note(path, f"{len(lines) - 1:,} entries, and a last one that was cut off; a resume leaves it out")
    return ok(path, f"{len(lines) - 1:,} entries")


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("step"), int)
