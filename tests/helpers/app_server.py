"""The real `app.py` on a free port, for tests: start it, send requests, end it."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from tests.helpers.artefacts import files_of, write_prior
from tests.helpers.commands import ROOT


class App(NamedTuple):
    """A running app."""

    process: "subprocess.Popen[str]"
    address: str
    prior: Path
    temporary: Path


def started(prior: Path, temporary: Path, *options: str, runs: Path | None = None) -> App:
    """Start the command, and wait until it prints the address of its page.

    runs: the folder to start it in, without --prior; None: in this folder, with --prior.
    """
    temporary.mkdir()
    settings = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sampling/app.py"), *([] if runs else ["--prior", str(prior)]), *options],
        cwd=runs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )
    assert process.stdout is not None
    # Lines about the data come before the address.
    line = next((line for line in process.stdout if not line.startswith(("data: ", "      note: "))), "")
    assert line.startswith("http://127.0.0.1:"), process.communicate(timeout=60)
    return App(process, line.split()[0], prior, temporary)


def ended(app: App) -> tuple[int, str, str]:
    """Send Ctrl-C while a browser's connection is open, and return exit code, stdout and stderr."""
    parsed = urlparse(app.address)
    with closing(http.client.HTTPConnection(str(parsed.hostname), parsed.port, timeout=60)) as connection:
        connection.request("GET", "/gradio_api/heartbeat/abc")
        with connection.getresponse() as answer:
            assert answer.status == 200
            app.process.send_signal(signal.SIGINT)
            out, err = app.process.communicate(timeout=60)
    return app.process.returncode, out, err


@contextmanager
def running(folder: Path, *options: str) -> Iterator[App]:
    """Run the command with a small prior. At the end, assert that it printed, left and changed nothing."""
    prior = folder / "prior"
    prior.mkdir()
    write_prior(prior, label_dropout=0.5)
    before = files_of(prior)
    app = started(prior, folder / "tmp", *options)
    try:
        yield app
    finally:
        code, out, err = ended(app)
    assert (code, out, err) == (0, "", "")  # no traceback, whatever the requests were
    assert files_of(prior) == before
    assert not list(app.temporary.glob("tessera-app-*"))


class Answer(NamedTuple):
    """A response of the server."""

    status: int
    body: bytes


def ask(app: App, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """Send a request to the app."""
    parsed = urlparse(app.address)
    with closing(http.client.HTTPConnection(str(parsed.hostname), parsed.port, timeout=60)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        with connection.getresponse() as answer:
            return Answer(answer.status, answer.read())


def called(app: App, number: int, values: list[Any], session: str, root: str = "", **more: Any) -> dict[str, Any]:
    """Send a request to function `number` of the page under `root`, and return the server's last event."""
    body = json.dumps({"data": values, "fn_index": number, "session_hash": session, **more}).encode()
    joined = ask(app, "POST", f"{root}/gradio_api/queue/join", body)
    if joined.status != 200:
        return {"refused": joined.status}
    stream = ask(app, "GET", f"{root}/gradio_api/queue/data?session_hash={session}").body.decode()
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    return next(event for event in events if event["msg"] in ("process_completed", "unexpected_error"))
