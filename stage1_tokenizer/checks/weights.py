"""Safetensors files: a tokenizer, a prior and whether it fits the tokenizer, a batch that was kept, or somebody else's.

A prior belongs to a later stage, so its file is known by its header alone: whether its weights fit the network that
the header describes shows when it is loaded.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stage1_tokenizer.checkpoint import SUM, Header, read_tensors, read_weights
from stage1_tokenizer.checks.finding import Finding, bad, note, ok, reason
from stage1_tokenizer.checks.tokens import PROVENANCE, check_tokens
from stage1_tokenizer.config import Tree
from stage1_tokenizer.errors import BadFileError, ConfigError, UserError
from stage1_tokenizer.state import STATE_NAME, problem_of
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer

PRIOR_FILE = "prior.safetensors"


def check_safetensors(path: Path) -> Iterator[Finding]:
    """A file of any kind, which its name or else its header tells."""
    header = _header(path)
    kind = {TOKENIZER_FILE: "tokenizer", PRIOR_FILE: "prior"}.get(path.name, header.get("kind"))
    if STATE_NAME.fullmatch(path.parent.name):
        problem = problem_of(path.parent)
        state = f"the state {path.parent.name}"
        yield bad(path, f"is a part of {state}: {problem}") if problem else ok(path, f"is a part of {state}, whole")
    elif kind == "tokenizer":
        yield check_tokenizer(path)[0]
    elif kind == "prior":
        finding, tokenizer = check_tokenizer(path.parent / TOKENIZER_FILE)
        yield finding
        yield check_prior(path, tokenizer)
    elif PROVENANCE in header:
        yield from check_tokens([path], None, alone=True)
    else:
        yield _check_other(path)


def check_tokenizer(path: Path) -> tuple[Finding, LoadedTokenizer | None]:
    """A tokenizer's file; and the tokenizer, where it can be loaded."""
    if not path.is_file():
        return bad(path, "is missing; a prior is of no use without its tokenizer beside it"), None
    try:
        loaded = LoadedTokenizer.load(path)
    except UserError as error:
        return bad(path, reason(error, path)), None
    broken = _not_finite(loaded.tokenizer.state_dict())
    if broken:
        return bad(path, broken), loaded
    config = loaded.tokenizer.config
    size = f"{config.image_size[0]}x{config.image_size[1]}x{config.image_channels}"
    what = f"a tokenizer of step {loaded.step:,} ({config.bottleneck.kind}), images {size}, {_codes(loaded)}"
    return ok(path, f"{_wholeness(_header(path))}; {what}; fingerprint {loaded.fingerprint}"), loaded


def check_prior(path: Path, tokenizer: LoadedTokenizer | None) -> Finding:
    """A prior's file, and whether the tokenizer beside it, None if there is none that can be used, is its own."""
    try:
        tensors, header = read_weights(path, kind="prior")
        described = _described(header, path)
    except BadFileError as error:
        return bad(path, reason(error, path))
    broken = _not_finite(tensors)
    if broken:
        return bad(path, broken)
    (h, w, depth, size), wanted, classes = described["shape"], described["tokenizer"], described["classes"]
    what = f"a prior of step {int(header.get('step', 0)):,} ({described['prior'].get('kind')})"
    what += f" over {h}x{w}x{depth} codes of {size}, {len(classes)} classes"
    if tokenizer is None:
        return bad(path, f"{what}; the tokenizer {wanted}, to which it belongs, is not beside it or cannot be used")
    if tokenizer.fingerprint != wanted:
        return bad(path, f"{what}; it belongs to the tokenizer {wanted}, but beside it is {tokenizer.fingerprint}")
    if _codes(tokenizer) != f"{h}x{w}x{depth} codes of {size}":
        return bad(path, f"{what}, but its tokenizer has {_codes(tokenizer)}")
    return ok(path, f"{_wholeness(_header(path))}; {what}; fits the tokenizer beside it")


def _check_other(path: Path) -> Finding:
    try:
        tensors, header = read_tensors(path)
    except BadFileError as error:
        return bad(path, reason(error, path))
    size = f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()):,} bytes"
    if header.get("kind") == "batch":
        found = f"the batch of step {header.get('step')} that was left out: {header.get('found')} was not finite"
        return note(path, f"can be read, carries no checksum; {found}")
    if SUM in header:
        return note(path, f"is whole, of the unknown kind {header.get('kind')!r}; {size}")
    return note(path, f"can be read, but carries no checksum, and Tessera did not write it; {size}")


def _header(path: Path) -> Header:
    """What a file says of itself; nothing where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            header: Header = file.metadata() or {}
            return header
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def _described(header: Header, path: Path) -> Tree:
    """What a prior's header says of it: `prior`, `shape`, `classes`, `tokenizer`.

    Raises:
        BadFileError: it does not.
    """
    try:
        tree = json.loads(header["config"])
        h, w, depth, size = map(int, tree["shape"])
        found: Tree = {
            "prior": dict(tree["prior"]),
            "shape": (h, w, depth, size),
            "classes": list(tree["classes"]),
            "tokenizer": str(tree["tokenizer"]),
        }
        int(header.get("step", 0))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise BadFileError(f"{path}: its header does not describe a prior ({type(error).__name__}: {error})") from None
    return found


def _wholeness(header: Header) -> str:
    """For a file that was read without complaint."""
    sound = "whole by its checksum" if SUM in header else "can be read, but carries no checksum"
    return f"{sound}, format {header.get('format')}"


def _codes(loaded: LoadedTokenizer) -> str:
    try:
        h, w, depth, size = loaded.tokenizer.shape
    except ConfigError:
        return "a continuous latent"
    return f"{h}x{w}x{depth} codes of {size}"


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor holds NaN or infinity; empty where none does."""
    wrong = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"is as it was written, but {wrong[0]}{more} is not finite" if wrong else ""
