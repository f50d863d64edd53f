"""Which requests the page answers: from whom, with what in them.

A page on localhost is not out of the world's reach: any site that the user opens can send requests to it, and a name
that is made to point to 127.0.0.1 ("DNS rebinding") even lets it read the answers. So a request has to name this
server, and come from its own page. What the page does not need is not there.
"""

import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sampling.playground.bodies import BadBodyError, check_body, check_join

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
