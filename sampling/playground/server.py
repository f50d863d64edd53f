"""How the page is served: on which address and port, and how it ends."""

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from stage1_tokenizer.engine.errors import ConfigError

FIRST_PORT = 7860
PORTS = 100
"""How many are tried."""


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
