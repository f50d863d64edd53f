"""The real `app.py` on a port of its own, for tests: started, asked, ended."""

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
    process: "subprocess.Popen[str]"
    address: str
    prior: Path
    temporary: Path


def started(prior: Path, temporary: Path, *options: str) -> App:
    """The command, once it says where its page is."""
    temporary.mkdir()
    settings = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sampling/app.py"), "--prior", str(prior), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )
    assert process.stdout is not None
    # What was found in the data is said before the page is up.
    line = next((line for line in process.stdout if not line.startswith(("data: ", "      note: "))), "")
    assert line.startswith("http://127.0.0.1:"), process.communicate(timeout=60)
    return App(process, line.split()[0], prior, temporary)


def ended(app: App) -> tuple[int, str, str]:
    """How it ends when Ctrl-C comes while a browser's connection is open, whose end is not waited for."""
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
    """The command with a small prior; at its end it must have said nothing, left nothing, and changed nothing."""
    prior = folder / "prior"
    prior.mkdir()
    write_prior(prior, label_dropout=0.5)
    before = files_of(prior)
    app = started(prior, folder / "tmp", *options)
    try:
        yield app
    finally:
        code, out, err = ended(app)
    assert (code, out, err) == (0, "", "")  # no traceback, whatever was asked for meanwhile
    assert files_of(prior) == before
    assert not list(app.temporary.glob("tessera-app-*"))


class Answer(NamedTuple):
    status: int
    body: bytes


def ask(app: App, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    parsed = urlparse(app.address)
    with closing(http.client.HTTPConnection(str(parsed.hostname), parsed.port, timeout=60)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        with connection.getresponse() as answer:
            return Answer(answer.status, answer.read())


def called(app: App, number: int, values: list[Any], session: str, **more: Any) -> dict[str, Any]:
    """What the server says at the end of a request that a script makes up."""
    body = json.dumps({"data": values, "fn_index": number, "session_hash": session, **more}).encode()
    joined = ask(app, "POST", "/gradio_api/queue/join", body)
    if joined.status != 200:
        return {"refused": joined.status}
    stream = ask(app, "GET", f"/gradio_api/queue/data?session_hash={session}").body.decode()
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    return next(event for event in events if event["msg"] in ("process_completed", "unexpected_error"))
