"""What may stand in a request's body.

Gradio copies any file whose path stands in a request into the folder that the page's files are served from, and fetches
any address that does. So neither gets to it: the only files that a request may name are those of that folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

DEEPEST = 16
"""Lists and objects within each other."""
KEYS = {"data", "event_data", "fn_index", "session_hash", "trigger_id"}
"""Of a request that calls a function."""


class BadBodyError(ValueError):
    """A body that the page does not send; its message is for who made it up."""


def check_body(body: bytes, folder: Path, prefixes: tuple[str, ...]) -> Any:
    """What a body's JSON says.

    Args:
        body: as it arrived.
        folder: resolved; the only one whose files may be named.
        prefixes: what the addresses of these files begin with.

    Raises:
        BadBodyError: it is no JSON, is too deep, says a key twice, or names any other file or address.
    """
    try:
        content = json.loads(body.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise BadBodyError("the request is not the JSON that this page sends") from None
    _check_files(content, folder, prefixes)
    return content


def check_join(content: Any, functions: Mapping[int, int]) -> None:
    """Check a request that calls one of the page's functions; functions: the number of inputs of each.

    Raises:
        BadBodyError: there is no such function, or it has not so many inputs.
    """
    if not isinstance(content, dict) or not content.keys() <= KEYS:
        raise BadBodyError("the request does not have the keys that this page sends")
    session, number, data = content.get("session_hash"), content.get("fn_index"), content.get("data")
    if not isinstance(session, str) or not session.isalnum() or len(session) > 64:
        raise BadBodyError("the request names no session")
    if type(number) is not int or number not in functions:
        raise BadBodyError("the request names no function of this page; load it again")
    if not isinstance(data, list) or len(data) != functions[number]:
        raise BadBodyError("the request does not have as many values as its function; load the page again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # which one counts, others may see differently
        raise BadBodyError("a key stands twice in an object")
    return found


def _check_files(value: Any, folder: Path, prefixes: tuple[str, ...], depth: int = 0) -> None:
    if depth > DEEPEST:
        raise BadBodyError("the request is nested too deeply")
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "path" and each is not None and not is_inside(each, folder):
                raise BadBodyError("path: only files that were uploaded to this page may be named")
            if key == "url" and each is not None and not _is_address(each, folder, prefixes):
                raise BadBodyError("url: only files that were uploaded to this page may be named")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_files(each, folder, prefixes, depth + 1)


def is_inside(path: Any, folder: Path) -> bool:
    """Whether a path, whatever was sent as one, is that of something in a folder, links followed."""
    if not isinstance(path, str):
        return False
    try:
        found = Path(path).resolve()
    except (OSError, RuntimeError, ValueError):
        return False
    return Path(path).is_absolute() and found != folder and found.is_relative_to(folder)


def _is_address(url: Any, folder: Path, prefixes: tuple[str, ...]) -> bool:
    if not isinstance(url, str):
        return False
    return any(url.startswith(each) and is_inside(unquote(url.removeprefix(each)), folder) for each in prefixes)
