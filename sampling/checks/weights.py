"""Safetensors files: a tokenizer, a prior and whether it fits the tokenizer, a kept batch, or another file."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sampling.checks.finding import Finding, Verdict, bad, note, ok, reason
from sampling.checks.tokens import check_tokens
from stage1_tokenizer.engine.checkpoint import CHECKSUM_KEY, Header, read_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.state import STATE_NAME, find_problem
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.prior import PRIOR_FILE, SavedPrior
from stage2_prior.tokens import PROVENANCE


def check_safetensors(path: Path) -> Iterator[Finding]:
    """A file of any kind, which its name or else its header tells."""
    header = _header(path)
    kind = {TOKENIZER_FILE: "tokenizer", PRIOR_FILE: "prior"}.get(path.name, header.get("kind"))
    if STATE_NAME.fullmatch(path.parent.name):
        problem = find_problem(path.parent)
        state = f"the state {path.parent.name}"
        yield bad(path, f"is a part of {state}: {problem}") if problem else ok(path, f"is a part of {state}, whole")
    elif kind == "tokenizer":
        yield check_tokenizer(path)[0]
    elif kind == "prior":
        yield from check_pair(path.parent / TOKENIZER_FILE, path)
    elif PROVENANCE in header:
        yield from check_tokens([path], tokenizer_of(path.parent), alone=True)
    else:
        yield _check_other(path)


def check_pair(tokenizer: Path, prior: Path) -> Iterator[Finding]:
    """The files of a tokenizer and a prior, as far as they are there, and whether they belong together."""
    loaded = None
    if tokenizer.is_file():
        finding, loaded = check_tokenizer(tokenizer)
        yield finding
    if prior.is_file():
        yield _check_prior(prior, tokenizer, loaded)


def tokenizer_of(tokens: Path) -> LoadedTokenizer | None:
    """The tokenizer in the run's folder that a folder of tokens is in, where there is one and it can be loaded."""
    path = tokens.absolute().parent / TOKENIZER_FILE
    return check_tokenizer(path)[1] if path.is_file() else None


def check_tokenizer(path: Path) -> tuple[Finding, LoadedTokenizer | None]:
    """A tokenizer's file; and the tokenizer, where it can be loaded."""
    try:
        loaded = LoadedTokenizer.load(path)
    except (BadFileError, ConfigError) as error:
        return bad(path, reason(error, path)), None
    broken = _not_finite(loaded.tokenizer.state_dict())
    if broken:
        return bad(path, broken), loaded
    config = loaded.tokenizer.config
    size = f"{config.image_size[0]}x{config.image_size[1]}x{config.image_channels}"
    what = f"a tokenizer of step {loaded.step:,} ({config.bottleneck.kind}), images {size}, {_codes(loaded)}"
    return ok(path, f"{_wholeness(_header(path))}; {what}; fingerprint {loaded.fingerprint}"), loaded


def _check_prior(path: Path, beside: Path, tokenizer: LoadedTokenizer | None) -> Finding:
    """A prior's file, and whether the tokenizer in the file `beside` it, None where it cannot be loaded, is its own."""
    try:
        saved = SavedPrior.read(path)
        saved.build()
    except BadFileError as error:
        return bad(path, reason(error, path))
    broken = _not_finite(saved.weights)
    if broken:
        return bad(path, broken)
    header = saved.header
    what = f"a prior of step {saved.step:,} ({header.prior.kind}) over {saved.shape.in_words}"
    verdict, fit = _fit(saved, beside, tokenizer)
    return Finding(verdict, path, f"{_wholeness(_header(path))}; {what}, {len(header.classes)} classes; {fit}")


def _fit(saved: SavedPrior, beside: Path, tokenizer: LoadedTokenizer | None) -> tuple[Verdict, str]:
    """A word on whether the tokenizer is that of a prior's training."""
    wanted = saved.header.tokenizer
    if not beside.is_file():
        return "bad", f"but the tokenizer {wanted}, to which it belongs, is not beside it"
    if tokenizer is None:
        return "note", f"whether the tokenizer beside it is its own, {wanted}, cannot be seen"
    if tokenizer.fingerprint != wanted:
        return "bad", f"but it belongs to the tokenizer {wanted}, and beside it is {tokenizer.fingerprint}"
    if _codes(tokenizer) != saved.shape.in_words:
        return "bad", f"but its tokenizer has {_codes(tokenizer)}"
    return "ok", "fits the tokenizer beside it"


def _check_other(path: Path) -> Finding:
    try:
        tensors, header = read_tensors(path)
    except BadFileError as error:
        return bad(path, reason(error, path))
    size = f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()):,} bytes"
    if header.get("kind") == "batch":
        step, found = shorten(header.get("step")), shorten(header.get("found"))
        return note(path, f"can be read, carries no checksum; the batch of step {step}, left out for {found}")
    if CHECKSUM_KEY in header:
        return note(path, f"is whole, of the unknown kind {shorten(header.get('kind'))}; {size}")
    return note(path, f"can be read, but carries no checksum, and Tessera did not write it; {size}")


def _header(path: Path) -> Header:
    """What a file says of itself; nothing where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            header: Header = file.metadata() or {}
            return header
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def _wholeness(header: Header) -> str:
    """For a file that was read without complaint."""
    sound = "whole by its checksum" if CHECKSUM_KEY in header else "can be read, but carries no checksum"
    return f"{sound}, format {header.get('format')}"


def _codes(loaded: LoadedTokenizer) -> str:
    try:
        return loaded.tokenizer.shape.in_words
    except ConfigError:
        return "a continuous latent"


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor holds NaN or infinity; empty where none does."""
    wrong = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"is as it was written, but {wrong[0]}{more} is not finite" if wrong else ""
