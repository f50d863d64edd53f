"""Checks of safetensors files: a tokenizer, a prior (and whether it fits the tokenizer), a saved batch, any other."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sampling.checks.finding import Finding, Verdict
from sampling.checks.tokens import check_tokens
from sampling.prior_defaults import describe_draw, read_defaults
from stage1_tokenizer.engine.checkpoint import CHECKSUM_KEY, Header, read_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.state import STATE_NAME, find_problem
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.prior import PRIOR_FILE, SavedPrior
from stage2_prior.tokens import PROVENANCE


def check_safetensors(path: Path) -> Iterator[Finding]:
    """Check a file of any kind. Its name or its header says which kind it is."""
    header = _read_header(path)
    kind = {TOKENIZER_FILE: "tokenizer", PRIOR_FILE: "prior"}.get(path.name, header.get("kind"))
    if STATE_NAME.fullmatch(path.parent.name):
        problem = find_problem(path.parent)
        part = f"is a part of the state {path.parent.name}"
        yield Finding.bad(path, f"{part}: {problem}") if problem else Finding.ok(path, f"{part}, whole")
    elif kind == "tokenizer":
        yield check_tokenizer(path)[0]
    elif kind == "prior":
        yield from check_pair(path.parent / TOKENIZER_FILE, path)
    elif PROVENANCE in header:
        yield from check_tokens([path], tokenizer_of(path.parent), alone=True)
    else:
        yield _check_other(path)


def check_pair(tokenizer: Path, prior: Path) -> Iterator[Finding]:
    """Check the files of a tokenizer and a prior, as far as they exist, and whether they belong together."""
    loaded = None
    if tokenizer.is_file():
        finding, loaded = check_tokenizer(tokenizer)
        yield finding
    if prior.is_file():
        yield _check_prior(prior, tokenizer, loaded)


def tokenizer_of(tokens: Path) -> LoadedTokenizer | None:
    """Return the tokenizer in the run's folder that holds this folder of tokens; None if it cannot be loaded."""
    path = tokens.absolute().parent / TOKENIZER_FILE
    return check_tokenizer(path)[1] if path.is_file() else None


def check_tokenizer(path: Path) -> tuple[Finding, LoadedTokenizer | None]:
    """Check a tokenizer's file. Return the finding, and the tokenizer if it can be loaded."""
    try:
        loaded = LoadedTokenizer.load(path)
    except (BadFileError, ConfigError) as error:
        return Finding.of_error(path, error), None
    if problem := _not_finite(loaded.tokenizer.state_dict()):
        return Finding.bad(path, problem), loaded
    config = loaded.tokenizer.config
    size = f"{config.image_size[0]}x{config.image_size[1]}x{config.image_channels}"
    text = f"a tokenizer of step {loaded.step:,} ({config.bottleneck.kind}), images {size}, {_codes(loaded)}"
    return Finding.ok(path, f"{_integrity(_read_header(path))}; {text}; fingerprint {loaded.fingerprint}"), loaded


def _check_prior(path: Path, tokenizer_path: Path, tokenizer: LoadedTokenizer | None) -> Finding:
    """Check a prior's file, and whether it was trained on the tokenizer beside it (None if it cannot be loaded)."""
    try:
        saved = SavedPrior.read(path)
        saved.build()
        stated = describe_draw(read_defaults(path).defaults_beside({}))
    except BadFileError as error:
        return Finding.of_error(path, error)
    if problem := _not_finite(saved.weights):
        return Finding.bad(path, problem)
    header = saved.header
    text = f"a prior of step {saved.step:,} ({header.prior.kind}) over {saved.shape.in_words}"
    verdict, fit = _compare_with_tokenizer(saved, tokenizer_path, tokenizer)
    text += f", {len(header.classes)} classes"
    text += f", sampling defaults {stated}" if stated else ""
    return Finding(verdict, path, f"{_integrity(_read_header(path))}; {text}; {fit}")


def _compare_with_tokenizer(saved: SavedPrior, path: Path, tokenizer: LoadedTokenizer | None) -> tuple[Verdict, str]:
    """Return a verdict and a text on whether the prior was trained on this tokenizer."""
    wanted = saved.header.tokenizer
    if not path.is_file():
        return "bad", f"but the tokenizer {wanted}, to which it belongs, is not beside it"
    if tokenizer is None:
        return "note", f"its tokenizer is {wanted}; the one beside it cannot be loaded, so they cannot be compared"
    if not tokenizer.makes_codes_of(wanted):
        return "bad", f"but it belongs to the tokenizer {wanted}, and beside it is {tokenizer.code_fingerprint}"
    if _codes(tokenizer) != saved.shape.in_words:
        return "bad", f"but its tokenizer has {_codes(tokenizer)}"
    return "ok", "fits the tokenizer beside it"


def _check_other(path: Path) -> Finding:
    try:
        tensors, header = read_tensors(path)
    except BadFileError as error:
        return Finding.of_error(path, error)
    size = f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()):,} bytes"
    if header.get("kind") == "batch":
        step, found = shorten(header.get("step")), shorten(header.get("found"))
        return Finding.note(path, f"can be read, carries no checksum; the batch of step {step}, left out for {found}")
    if header.get("kind") == "discriminator" and CHECKSUM_KEY in header:
        step = shorten(header.get("step"))
        return Finding.ok(path, f"whole by its checksum; the discriminator of step {step}, for --init_from; {size}")
    if CHECKSUM_KEY in header:
        return Finding.note(path, f"is whole, of the unknown kind {shorten(header.get('kind'))}; {size}")
    return Finding.note(path, f"can be read, but carries no checksum, and Tessera did not write it; {size}")


def _read_header(path: Path) -> Header:
    """Return the metadata in a file's header; empty if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            header: Header = file.metadata() or {}
            return header
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def _integrity(header: Header) -> str:
    """Say how far a file that was read without an error can be trusted, and its format."""
    trust = "whole by its checksum" if CHECKSUM_KEY in header else "can be read, but carries no checksum"
    return f"{trust}, format {header.get('format')}"


def _codes(loaded: LoadedTokenizer) -> str:
    """Return the shape of a tokenizer's codes in words."""
    try:
        return loaded.tokenizer.shape.in_words
    except ConfigError:
        return "a continuous latent"


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name the first tensor that holds NaN or infinity, and the number of others; empty if all are finite."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"is as it was written, but {names[0]}{more} is not finite" if names else ""
