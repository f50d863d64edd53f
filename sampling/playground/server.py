"""How the page can be reached: by whom, with which requests, and how it ends.

A page on localhost is not out of the world's reach: any site that the user opens can send requests to it, and a name
that is made to point to 127.0.0.1 ("DNS rebinding") even lets it read the answers. So a request has to name this
server, and come from its own page. What the page does not need is not there.
"""

import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stage1_tokenizer.errors import ConfigError

FIRST_PORT = 7860
PORTS = 100
"""How many are tried."""
LARGEST_UPLOAD = 20 * 1024 * 1024
"""Bytes of a picture that is sent."""
LARGEST_BODY = 1024 * 1024
"""Bytes of any other request."""
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json")
READ = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/queue/data", "/gradio_api/upload_progress")
SENT = ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/cancel", "/gradio_api/reset")
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
}


class Guard:
    """Refuses requests that are not of this page, and says in every answer that nothing else may be loaded."""

    def __init__(self, app: ASGIApp, host: str, files: Path) -> None:
        """host: the address that is bound; files: the folder that pictures may be fetched from."""
        self._app, self._files = app, str(files)
        self._anywhere = not is_loopback(host)
        self._names = {"localhost", "127.0.0.1", "::1", host.lower(), *([own_name()] if self._anywhere else [])}

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

        refused = self._refused(scope["method"], scope["path"], Headers(scope=scope))
        await (refused or self._app)(scope, receive, with_headers)

    def _refused(self, method: str, path: str, headers: Headers) -> PlainTextResponse | None:
        """The answer to a request that is not let through."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(name_in(host)):
            return PlainTextResponse("this page is not known under that name; use its address", 421)
        foreign = origin is not None and origin.split("://")[-1].lower() != host.lower()
        if foreign or (method not in ("GET", "HEAD") and headers.get("sec-fetch-site", "same-origin") != "same-origin"):
            return PlainTextResponse("this request comes from another site", 403)
        if not self._is_needed(method, path):
            return PlainTextResponse("there is no such page", 404)
        if method == "POST":
            length = headers.get("content-length", "")
            largest = LARGEST_UPLOAD + LARGEST_BODY if path == "/gradio_api/upload" else LARGEST_BODY
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


def listen(host: str, port: int | None) -> socket.socket:
    """A socket bound to a port, or to the first free one from 7860 on.

    Raises:
        ConfigError: the address is none of this machine, or the port is taken or not allowed.
    """
    ports = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS)
    reason = ""
    for number in ports:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            bound = socket.socket(family)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"host {host}: is no address of this machine ({error})") from None
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
            return bound
        except OSError as error:
            bound.close()
            reason = str(error.strerror)
    which = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise ConfigError(f"{which} on {host}: cannot be used ({reason}); give another --port, or none for a free one")


class Server(uvicorn.Server):
    """Ctrl-C and SIGTERM are the ordinary way to end it; uvicorn would raise them again when all is done."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], object]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop()
        logging.getLogger("uvicorn.error").disabled = True  # it would report each connection that has to be cut
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(app: ASGIApp, bound: socket.socket, stop: Callable[[], object]) -> None:
    """Answer requests until Ctrl-C or SIGTERM; `stop` is called then, and what is under way has a second to end."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1
    )
    Server(config, stop).run(sockets=[bound])
