"""The guard before the page: it refuses requests that the page itself does not send.

A page on localhost can be attacked from outside: any site that the user opens can send requests to it, and a host name
that an attacker points to 127.0.0.1 ("DNS rebinding") even lets the site read the answers. So a request must name this
server in its Host header, and come from the page itself. Addresses that the page does not use are answered with 404.

Gradio copies any file whose path is in a request into the folder that the page's files are served from, and downloads
any URL in a request. So the guard refuses requests with paths or URLs of any file outside that folder.
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

MOST_LEVELS = 16
"""Levels of lists and objects in a request at most."""
JOIN_KEYS = {"data", "event_data", "fn_index", "session_hash", "trigger_id"}
"""Keys of a request that calls a function of the page."""
LARGEST_UPLOAD = 20 * 1024 * 1024
"""Bytes of an uploaded image at most."""
LARGEST_BODY = 1024 * 1024
"""Bytes of any other request at most."""
LARGEST_FOLDER = 512 * 1024 * 1024
"""Bytes of all uploads and results together at most."""
UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"
"""Path of a request that calls a function of the page."""
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json")
GET_PATHS = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/queue/data", "/gradio_api/upload_progress")
POST_PATHS = (JOIN, UPLOAD, "/gradio_api/cancel", "/gradio_api/reset")
FILES = "/gradio_api/file="
HEADERS = {
    # The browser loads nothing from other servers, and does not show the page inside another page.
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
    """An ASGI app around the page: refuses requests from elsewhere, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, host: str, files: Path, functions: Mapping[int, int], root: str = "") -> None:
        """Wrap `app`.

        Args:
            app: the page.
            host: address that the server listens on.
            files: folder (a resolved path) of the files that may be downloaded and named in requests.
            functions: number of inputs of each function of the page, by the function's number.
            root: beginning of the paths in the page's URLs; it is left out in the requests to this app.
        """
        self._app, self._files, self._functions, self._root = app, files, functions, root
        self._is_public = not is_loopback(host)
        self._names = {"localhost", "127.0.0.1", "::1", host.lower(), *([own_name()] if self._is_public else [])}
        self._bytes_arriving = 0
        """Bytes of the uploads in progress."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on to the page."""
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
        refusal = self.refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
        elif scope["method"] != "POST":
            await self._app(scope, receive, with_headers)
        elif scope["path"] == UPLOAD:
            await self._upload(int(headers["content-length"]), scope, receive, with_headers)
        else:
            await self._call(headers["host"], scope, receive, with_headers)

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on an upload if there is room for it."""
        if folder_size(self._files) + self._bytes_arriving + length > LARGEST_FOLDER:
            text = "there is no room for this upload now; uploads are removed after an hour, so try again later"
            await PlainTextResponse(text, 507)(scope, receive, send)
            return
        self._bytes_arriving += length
        try:
            await self._app(scope, receive, send)
        finally:
            self._bytes_arriving -= length

    async def _call(self, host: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request if its body names no other files than the page's own."""
        body = await body_of(receive)
        if body is None:  # the connection was closed
            return
        try:
            files = f"{self._root}{FILES}"
            content = check_body(body, self._files, (f"http://{host}{files}", f"https://{host}{files}", files))
            if scope["path"].rstrip("/") == JOIN:
                check_join(content, self._functions)
        except BadBodyError as error:
            await PlainTextResponse(str(error), 400)(scope, receive, send)
            return
        unread = [body]

        async def receive_again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._app(scope, receive_again, send)

    def refusal(self, scope: Scope) -> PlainTextResponse | None:
        """Return the answer to an HTTP request that is refused; None: it is not."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(name_in(host)):
            return PlainTextResponse("this page does not have that host name; use the address that app.py printed", 421)
        is_foreign = origin is not None and origin.split("://")[-1].lower() != host.lower()
        site, mode = headers.get("sec-fetch-site", "same-origin"), headers.get("sec-fetch-mode")
        is_opened = method == "GET" and (site == "none" or mode == "navigate")  # by a link, or by typing the address
        if is_foreign or (site != "same-origin" and not is_opened):
            return PlainTextResponse("this request comes from another site", 403)
        if not self._is_needed(method, path):
            return PlainTextResponse("there is no such page", 404)
        if method == "POST":
            length = headers.get("content-length", "")
            largest = LARGEST_UPLOAD + LARGEST_BODY if path == UPLOAD else LARGEST_BODY
            if not length.isdecimal() or len(length) > 18 or int(length) > largest:
                return PlainTextResponse(f"a request must state its length, at most {largest:,} bytes", 413)
        return None

    def _is_own(self, name: str) -> bool:
        return name in self._names or (self._is_public and is_address(name))

    def _is_needed(self, method: str, path: str) -> bool:
        if method == "POST":
            return path.rstrip("/") in POST_PATHS
        if method not in ("GET", "HEAD"):
            return False
        is_own_file = path.startswith(f"{FILES}{self._files}/") and ".." not in path.split("/")
        return path in PAGES or path.startswith(GET_PATHS) or is_own_file


async def body_of(receive: Receive) -> bytes | None:
    """Return a request's whole body; None if it is too large or was broken off."""
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
    """Return the bytes of all files in a folder and below."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def name_in(host: str) -> str:
    """Return the name or address in a Host header, without the port and the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_address(name: str) -> bool:
    """Return True for an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return True if a server on this address can be reached only from this machine."""
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def own_name() -> str:
    """Return this machine's host name."""
    return socket.gethostname().lower()


class BadBodyError(ValueError):
    """A request body that the page does not send."""


def check_body(body: bytes, folder: Path, prefixes: tuple[str, ...]) -> Any:
    """Parse the JSON of a request body and check the files that it names.

    Args:
        body: the bytes of the request.
        folder: resolved path of the only folder whose files may be named.
        prefixes: the beginnings of these files' URLs.

    Raises:
        BadBodyError: the body is not JSON, has too many levels or a key twice, or names another file or URL.
    """
    try:
        content = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        raise BadBodyError("the request is not the JSON that this page sends") from None
    _check_files(content, folder, prefixes)
    return content


def check_join(content: Any, functions: Mapping[int, int]) -> None:
    """Check a request that calls a function of the page. `functions`: number of inputs by the function's number.

    Raises:
        BadBodyError: there is no such function, or the number of inputs is wrong.
    """
    if not isinstance(content, dict) or not content.keys() <= JOIN_KEYS:
        raise BadBodyError("the request does not have the keys that this page sends")
    session, number, data = content.get("session_hash"), content.get("fn_index"), content.get("data")
    if not isinstance(session, str) or not session.isalnum() or len(session) > 64:
        raise BadBodyError("the request names no valid session")
    if type(number) is not int or number not in functions:
        raise BadBodyError("the request names no function of this page; load it again")
    if not isinstance(data, list) or len(data) != functions[number]:
        raise BadBodyError("the request does not have as many values as its function; load the page again")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):  # another JSON parser may read the other value
        raise BadBodyError("the request has an object with the same key twice")
    return tree


def _check_files(value: Any, folder: Path, prefixes: tuple[str, ...], depth: int = 0) -> None:
    """Raise BadBodyError if any `path` or `url` at any level names a file outside the folder."""
    if depth > MOST_LEVELS:
        raise BadBodyError(f"the request has more than {MOST_LEVELS} levels")
    if isinstance(value, dict):
        if (path := value.get("path")) is not None and not is_inside(path, folder):
            raise BadBodyError("path: only files that were uploaded to this page may be named")
        if (url := value.get("url")) is not None and not _is_own_url(url, folder, prefixes):
            raise BadBodyError("url: only files that were uploaded to this page may be named")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_files(child, folder, prefixes, depth + 1)


def is_inside(path: Any, folder: Path) -> bool:
    """Return True if a value, of any type, is the absolute path of something in a folder, links followed."""
    if not isinstance(path, str):
        return False
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError, ValueError):
        return False
    return Path(path).is_absolute() and resolved != folder and resolved.is_relative_to(folder)


def _is_own_url(url: Any, folder: Path, prefixes: tuple[str, ...]) -> bool:
    if not isinstance(url, str):
        return False
    return any(url.startswith(prefix) and is_inside(unquote(url.removeprefix(prefix)), folder) for prefix in prefixes)
