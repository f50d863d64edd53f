"""The web server of the page: its address and port, and its end."""

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from stage1_tokenizer.engine.errors import ConfigError

FIRST_PORT = 7860
PORTS = 100
"""Number of ports that are tried."""


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on a port; None: on the first free port from 7860 on.

    Raises:
        ConfigError: this machine does not have the address, or the port is in use or not allowed.
    """
    ports = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS)
    reason = ""
    for number in ports:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            server_socket = socket.socket(family)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"host {host}: is no address of this machine ({error})") from None
        try:
            server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server_socket.bind(address)
            server_socket.listen()
            return server_socket
        except OSError as error:
            server_socket.close()
            reason = str(error.strerror)
    which = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise ConfigError(f"{which} on {host}: cannot be used ({reason}); give another --port, or none for a free one")


class Server(uvicorn.Server):
    """A server that Ctrl-C and SIGTERM end without an error; uvicorn's own would raise the signal again."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], object]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the server after a signal; a second signal does not wait for open requests."""
        self._stop()
        logging.getLogger("uvicorn.error").disabled = True  # it would report each connection that has to be cut
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(app: ASGIApp, server_socket: socket.socket, stop: Callable[[], object]) -> None:
    """Answer requests until Ctrl-C or SIGTERM. Then `stop` is called, and requests have a second to end."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1
    )
    Server(config, stop).run(sockets=[server_socket])
