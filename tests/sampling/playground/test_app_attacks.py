"""What a stranger may try with the real command: requests that no page of it sends."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.app_server import App, ask, called, running
from tests.helpers.commands import ROOT

pytest.importorskip("gradio", reason="the extra `app` is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with running(tmp_path_factory.mktemp("attacked"), "--pictures", "6") as app:
        yield app


class Call(NamedTuple):
    """A function of the page, as its configuration offers it to anybody."""

    number: int
    labels: list[str]
    """Of its inputs."""


def calls(app: App) -> list[Call]:
    config = json.loads(ask(app, "GET", "/config").body)
    labels = {each["id"]: each["props"].get("label") for each in config["components"]}
    return [
        Call(each["id"], [labels[i] for i in each["inputs"]]) for each in config["dependencies"] if each["backend_fn"]
    ]


SECRET = b"-----BEGIN A KEY----- 8f2c"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.key"
    file.write_bytes(SECRET)
    return file


def no_copy_in(app: App) -> bool:
    files = [file for file in app.temporary.rglob("*") if file.is_file()]
    return bool(files) and not any(SECRET in file.read_bytes() or "secret" in file.name for file in files)


def file_data(path: Any, **more: Any) -> dict[str, Any]:
    """What Gradio takes for a file, and copies."""
    return {"path": str(path) if isinstance(path, Path) else path, "meta": {"_type": "gradio.FileData"}, **more}


def joined(app: App, number: int, data: list[Any], **more: Any) -> tuple[int, bytes]:
    content = {"data": data, "fn_index": number, "session_hash": "stranger", **more}
    return ask(app, "POST", "/gradio_api/queue/join", json.dumps(content).encode())


def test_no_file_of_the_machine_can_be_named_in_any_value(app: App, secret: Path) -> None:
    """Gradio would copy it to where the page's files are served from, and say where that is."""
    folder = next(app.temporary.glob("tessera-app-*"))
    pipe = secret.with_name("pipe")
    os.mkfifo(pipe)  # who reads it waits forever
    (secret.parent / "link").symlink_to(secret)
    paths = [secret, secret.parent / "link", pipe, Path("/dev/zero"), folder, folder / "../../secret.key"]
    paths += [Path("/proc/self/environ"), folder / ".." / ".." / ".." / secret.name]
    asked: list[Any] = [file_data(path) for path in paths]
    odd: list[Any] = [f"{secret}\0", "../../secret.key", "secret.key", "", 7, [str(secret)], {}]
    asked += [file_data(each) for each in odd]
    asked += [[file_data(secret)], {"a": {"b": [file_data(secret)]}}, {"path": str(secret)}]
    for call in calls(app):
        for place in range(len(call.labels)):
            for value in asked if place == 0 else asked[:1]:
                data = [None] * len(call.labels)
                data[place] = value
                status, body = joined(app, call.number, data)
                assert (status, b"secret" in body) == (400, False), (call, value)
        status, _ = joined(app, call.number, [None] * len(call.labels), event_data={"value": file_data(secret)})
        assert status == 400
    assert no_copy_in(app)
    assert ask(app, "GET", f"/gradio_api/file={secret}").status == 404


def test_a_key_that_stands_twice_or_another_encoding_hides_no_file(app: App, secret: Path) -> None:
    call = next(each for each in calls(app) if "Number" in each.labels)
    plain = json.dumps(
        {"data": [file_data("GOOD"), *[None] * (len(call.labels) - 1)], "fn_index": call.number, "session_hash": "two"}
    )
    twice = plain.replace('"path": "GOOD"', f'"path": null, "path": "{secret}", "path": null')
    escaped = plain.replace('"path": "GOOD"', f'"p\\u0061th": "{secret}"')
    named = plain.replace("GOOD", str(secret))
    for body in (twice.encode(), escaped.encode(), named.encode("utf-16"), named.encode("utf-8-sig"), b"\xff"):
        assert ask(app, "POST", "/gradio_api/queue/join", body).status == 400
        assert ask(app, "POST", "/gradio_api/queue/join/", body).status == 400
        assert ask(app, "POST", "/gradio_api/queue/join", body, **{"Content-Type": "text/plain"}).status == 400
    assert no_copy_in(app)


def test_no_address_is_fetched_for_a_client(app: App) -> None:
    """Whether it is given as a file's path or as where it lies."""
    upload = next(each for each in calls(app) if each.labels == ["Upload an image"])
    folder = next(app.temporary.glob("tessera-app-*"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for value in (
            file_data(f"{address}/leak.png"),
            file_data("http://pictures.invalid/leak.png"),
            file_data(None, url=f"{address}/leak.png"),
            file_data(folder / "x.png", url=f"{address}/gradio_api/file={folder}/x.png"),
            file_data(folder / "x.png", url=f"{app.address}/gradio_api/proxy={address}"),
            file_data(folder / "x.png", url=f"{app.address}/gradio_api/file={folder}/%2e%2e/x.png"),
            file_data(folder / "x.png", url=["http://pictures.invalid/"]),
        ):
            assert joined(app, upload.number, [value])[0] == 400, value
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_file_of_the_page_that_is_not_there_is_a_message(app: App) -> None:
    upload = next(each for each in calls(app) if each.labels == ["Upload an image"])
    folder = next(app.temporary.glob("tessera-app-*"))
    odd: list[Any] = [file_data(folder / "none.png"), None, "x", [], {"meta": 1}]
    for place, value in enumerate(odd):
        answer = called(app, upload.number, [value], f"none{place}")
        assert not answer.get("success"), value


WITHOUT_GUARD = """
import sys
from pathlib import Path
from gradio.context import LocalContext
from gradio.exceptions import InvalidPathError
from gradio.processing_utils import move_files_to_cache
from sampling.playground.page import Page
from sampling.playground.tasks import Limits, Playground
from sampling.sampler import Sampler
prior, folder, secret = map(Path, sys.argv[1:])
playground = Playground(Sampler.load(prior).prior, "float32", Limits(6, 24))
page = Page(playground, folder, 4, {playground.name: ""})
page.app()
LocalContext.blocks.set(page.blocks)
value = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
try:
    move_files_to_cache(value, next(iter(page.blocks.blocks.values())), check_in_upload_folder=True)
except InvalidPathError as error:
    print("refused", error)
"""


def test_without_the_guard_gradio_itself_refuses_such_a_file(app: App, tmp_path: Path, secret: Path) -> None:
    """The second lock: a mounted page is told that it has launched, without which Gradio checks no path."""
    settings = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path / "page"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_GUARD, str(app.prior), str(tmp_path / "page"), str(secret)]
    (tmp_path / "page").mkdir()
    ended = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.splitlines()[-1].startswith("refused"), ended.stderr
    assert not list((tmp_path / "page").rglob("secret*"))


@pytest.mark.parametrize(
    "changed",
    [
        lambda body: body | {"fn_index": 999},
        lambda body: body | {"fn_index": -1},
        lambda body: body | {"fn_index": "1"},
        lambda body: body | {"fn_index": None},
        lambda body: body | {"data": []},
        lambda body: body | {"data": body["data"][:-1]},
        lambda body: body | {"data": {"a": 1}},
        lambda body: body | {"session_hash": None},
        lambda body: body | {"session_hash": "a/../b"},
        lambda body: body | {"batched": True},
        lambda body: body | {"event_data": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]},
        lambda body: [body],
        lambda body: None,
    ],
)
def test_a_request_that_is_none_of_the_page_is_refused(app: App, changed: Callable[[Any], Any]) -> None:
    """Without a traceback in the terminal, which the end of the command looks for."""
    call = next(each for each in calls(app) if "Number" in each.labels)
    body = {"data": [None] * len(call.labels), "fn_index": call.number, "session_hash": "odd"}
    sent = json.dumps(changed(body)).encode()
    assert ask(app, "POST", "/gradio_api/queue/join", sent).status == 400


def test_a_choice_that_the_page_did_not_offer_is_a_message(app: App) -> None:
    for place, call in enumerate(each for each in calls(app) if each.labels == []):
        for index in (99, -1, "x", [0, 0], None):
            session = f"pick{place}{str(index).strip('-[]').replace(', ', '')}"
            assert "there is no such" in str(called(app, call.number, [], session, event_data={"index": index}))


def test_a_script_that_makes_up_requests_gets_a_message_and_the_page_goes_on(app: App) -> None:
    """Values that no widget would send, straight to the server; then an ordinary request."""
    function = next(each for each in calls(app) if "Number" in each.labels)
    names = function.labels
    usual = {
        "Class": "",
        "Number": 1,
        "Seed": 0,
        "Height (≤ 24)": 8,
        "Width (≤ 24)": 12,
        "Temperature": 1,
        "Top-p": 0.9,
    }
    usual |= {"Guidance": 1, "Min-p": 0, "Top-k (0: all codes)": 0}
    assert usual.keys() == set(names)
    made_up: list[tuple[dict[str, Any], str]] = [
        ({"Number": 10**9}, "1,000,000,000 images are more than the 6"),
        ({"Height (≤ 24)": 10**6}, "size.0"),
        ({"Seed": "x"}, "seed: "),
        ({"Temperature": float("nan")}, "temperature: "),
        ({"Class": "<img src=x onerror=alert(1)>"}, "&lt;img"),
        ({"Class": ["cat"]}, "Class: must be a single value"),
        ({"Number": {"a": [1] * 1000}}, "Number: must be a single value"),
        ({"Number": "40"}, "40 images are more than the 6"),
        ({"Class": "a" * 500_000}, "aaa"),
    ]
    for place, (change, message) in enumerate(made_up):
        answer = called(app, function.number, [(usual | change)[name] for name in names], f"made{place}")
        assert not answer["success"]
        assert message in answer["output"]["error"], answer
        assert len(answer["output"]["error"]) < 600
    assert called(app, function.number, [usual[name] for name in names], "usual")["success"]


@pytest.mark.parametrize("path", ["/gradio_api/info", "/gradio_api/openapi.json", "/docs", "/monitoring/summary"])
def test_what_the_page_does_not_need_is_closed(app: App, path: str) -> None:
    assert ask(app, "GET", path).status == 404
    assert ask(app, "POST", "/gradio_api/run/sample", b"{}").status == 404


def test_another_site_is_refused(app: App) -> None:
    assert ask(app, "GET", "/config", Host="evil.example").status == 421
    assert ask(app, "POST", "/gradio_api/queue/join", b"{}", Origin="http://evil.example").status == 403
    assert ask(app, "GET", f"/gradio_api/file={app.prior}/prior.safetensors").status == 404


def test_an_upload_that_is_too_large_is_refused(app: App) -> None:
    assert ask(app, "POST", "/gradio_api/upload", b"x" * (22 * 1024 * 1024)).status == 413
