"""Which requests the page answers: from whom, with what in them.

A page on localhost is not out of the world's reach: any site that the user opens can send requests to it, and a name
that is made to point to 127.0.0.1 ("DNS rebinding") even lets it read the answers. So a request has to name this
server, and come from its own page. What the page does not need is not there.

Gradio copies any file whose path stands in a request into the folder that the page's files are served from, and fetches
any address that does. So neither gets to it: the only files that a request may name are those of that folder.
"""

import ipaddress
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DEEPEST = 16
"""Lists and objects within each other."""
KEYS = {"data", "event_data", "fn_index", "session_hash", "trigger_id"}
"""Of a request that calls a function."""
LARGEST_UPLOAD = 20 * 1024 * 1024
"""Bytes of a picture that is sent."""
LARGEST_BODY = 1024 * 1024
"""Bytes of any other request."""
LARGEST_FOLDER = 512 * 1024 * 1024
"""Bytes of all uploads and results that are kept at once."""
UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json")
READ = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/queue/data", "/gradio_api/upload_progress")
SENT = (JOIN, UPLOAD, "/gradio_api/cancel", "/gradio_api/reset")
FILES = "/gradio_api/file="
HEADERS = {
    # Nothing is fetched from elsewhere, whatever the page's scripts would like to; nor is it shown inside another page.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses requests that are not of this page, and says in every answer that nothing else may be loaded."""

    def __init__(self, app: ASGIApp, host: str, files: Path, functions: Mapping[int, int]) -> None:
        """host: the address that is bound; files: the folder (resolved) that pictures may be fetched from; functions:
        the number of inputs of each function that the page calls, by its number."""
        self._app, self._files, self._functions = app, files, functions
        self._anywhere = not is_loopback(host)
        self._names = {"localhost", "127.0.0.1", "::1", host.lower(), *([own_name()] if self._anywhere else [])}
        self._arriving = 0
        """Bytes of the uploads that are under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no other connections
            await send({"type": "websocket.close"})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        refused = self._refused(scope["method"], scope["path"], headers)
        if refused is not None:
            await refused(scope, receive, with_headers)
        elif scope["method"] != "POST":
            await self._app(scope, receive, with_headers)
        elif scope["path"] == UPLOAD:
            await self._upload(int(headers["content-length"]), scope, receive, with_headers)
        else:
            await self._call(headers["host"], scope, receive, with_headers)

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Take an upload, where there is room for it."""
        if folder_size(self._files) + self._arriving + length > LARGEST_FOLDER:
            text = "too much was uploaded; what is older than an hour is removed, so try again later"
            await PlainTextResponse(text, 507)(scope, receive, send)
            return
        self._arriving += length
        try:
            await self._app(scope, receive, send)
        finally:
            self._arriving -= length

    async def _call(self, host: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body names no file but the page's own, and no address at all."""
        body = await body_of(receive)
        if body is None:  # who asked is gone
            return
        try:
            content = check_body(body, self._files, (f"http://{host}{FILES}", f"https://{host}{FILES}", FILES))
            if scope["path"].rstrip("/") == JOIN:
                check_join(content, self._functions)
        except BadBodyError as error:
            await PlainTextResponse(str(error), 400)(scope, receive, send)
            return
        unread = [body]

        async def again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._app(scope, again, send)

    def _refused(self, method: str, path: str, headers: Headers) -> PlainTextResponse | None:
        """The answer to a request that is not let through."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(name_in(host)):
            return PlainTextResponse("this page is not known under that name; use its address", 421)
        foreign = origin is not None and origin.split("://")[-1].lower() != host.lower()
        site, mode = headers.get("sec-fetch-site", "same-origin"), headers.get("sec-fetch-mode")
        opened = method == "GET" and (site == "none" or mode == "navigate")  # a link, or an address that was typed
        if foreign or (site != "same-origin" and not opened):
            return PlainTextResponse("this request comes from another site", 403)
        if not self._is_needed(method, path):
            return PlainTextResponse("there is no such page", 404)
        if method == "POST":
            length = headers.get("content-length", "")
            largest = LARGEST_UPLOAD + LARGEST_BODY if path == UPLOAD else LARGEST_BODY
            if not length.isdecimal() or len(length) > 18 or int(length) > largest:
                return PlainTextResponse(f"a request of more than {largest:,} bytes", 413)
        return None

    def _is_own(self, name: str) -> bool:
        return name in self._names or (self._anywhere and is_address(name))

    def _is_needed(self, method: str, path: str) -> bool:
        if method == "POST":
            return path.rstrip("/") in SENT
        if method not in ("GET", "HEAD"):
            return False
        is_own_file = path.startswith(f"{FILES}{self._files}/") and ".." not in path.split("/")
        return path in PAGES or path.startswith(READ) or is_own_file


async def body_of(receive: Receive) -> bytes | None:
    """A request's whole body, as far as it may be large; or none where it was broken off."""
    body = b""
    while len(body) <= LARGEST_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body
    return None


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder and its folders."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def name_in(host: str) -> str:
    """The name or address in a Host header, without the port and an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether what is bound there can be reached from this machine alone."""
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def own_name() -> str:
    return socket.gethostname().lower()


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
