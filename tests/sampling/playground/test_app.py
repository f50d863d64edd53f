"""The page's logic without a browser: what is made, what is refused, and whom the server answers."""

import asyncio
import base64
import importlib.util
import io
import re
import shlex
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sampling.completion import CompletionTask, complete
from sampling.playground.painter import data_url, decode_mask
from sampling.playground.tasks import Chosen, Limits, Playground, one_line_message
from sampling.sampler import Sampler, SamplingConfig
from sampling.saved_images import save_png
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, InterruptionError
from stage1_tokenizer.networks.mlp import MlpNetworkConfig
from tests.helpers.artefacts import IMAGE_SIZE, files_of, pictures_of, write_prior
from tests.helpers.commands import ROOT, names_of, run

LIMITS = Limits(images=6, side=24)
HALF = np.arange(IMAGE_SIZE[1])[None, :].repeat(IMAGE_SIZE[0], axis=0) >= 8
"""(H, W): the right third is painted, one column of codes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    write_prior(folder, label_dropout=0.5)
    return folder


@pytest.fixture
def playground(folder: Path) -> Playground:
    return Playground(Sampler.load(folder).prior, "float32", LIMITS)


def quiet(_: float) -> None:
    """Nobody looks at the progress."""


def nothing_painted() -> NDArray[np.bool_]:
    return np.zeros(IMAGE_SIZE, dtype=np.bool_)


def test_the_shown_command_makes_the_same_files(playground: Playground, tmp_path: Path) -> None:
    """Byte for byte: who likes an image on the page can have it, and a thousand more, from the command."""
    values = {"n": 3, "seed": 5, "class": "dog", "temperature": 0.8, "top_k": 9, "guidance": 1.5, "size": [12, 16]}
    made = playground.sample(values, quiet)
    (tmp_path / "page").mkdir()
    for index, picture in enumerate(made.images):
        save_png(tmp_path / "page" / f"{index:06d}.png", picture)
    words = shlex.split(made.command)
    assert words[:2] == ["python", "sampling/generate.py"]
    ended = run(names_of(words[1])["main"], *words[2:], "--out", tmp_path / "command")
    assert ended.code == 0, ended.err
    assert pictures_of(tmp_path / "page") == pictures_of(tmp_path / "command")
    assert made.classes == ["dog"] * 3


def test_settings_at_their_defaults_are_those_of_the_sampler(playground: Playground) -> None:
    made = playground.sample({"n": 4, "seed": 1}, quiet)
    assert (made.images == Sampler(playground.prior).sample(4, seed=1)).all()
    assert made.classes == ["cat", "dog", "cat", "dog"]
    options = made.command.split()
    assert "--guidance" not in options
    assert "--top_p" not in options


def test_completion_is_that_of_the_command_and_leaves_the_rest(playground: Playground) -> None:
    """As complete.py makes it of the same image, whose number and class go into it."""
    chosen = playground.offered()[2]
    kept, made = playground.complete(chosen, HALF, {"variants": 3, "seed": 4, "temperature": 2.0}, quiet)
    label = playground.prior.model.null_label if chosen.label is None else chosen.label
    three = np.full(3, label, dtype=np.int64)
    task = CompletionTask(chosen.image[None].repeat(3, axis=0), np.full(3, 2), three, 4, np.arange(3))
    sampler = Sampler(playground.prior, SamplingConfig(temperature=2.0))
    assert (made == complete(sampler, task, ~HALF, True)).all()
    assert (made[:, ~HALF] == chosen.image[~HALF]).all()
    assert (kept[HALF] == 128).all()
    assert (kept[~HALF] == chosen.image[~HALF]).all()
    assert len({each.tobytes() for each in made}) > 1


def test_a_grown_image_holds_the_one_it_began_with(playground: Playground) -> None:
    chosen = playground.offered()[0]
    values = {"variants": 2, "grow": {"up": 4, "down": 0, "left": 0, "right": 8}}
    shares: list[float] = []
    placed, made = playground.grow(chosen, values, shares.append)
    assert made.shape == (2, 12, 20, 3)
    assert (made[:, 4:, :12] == chosen.image).all()
    assert placed.shape == made.shape[1:]  # beside each other they have one scale
    assert (placed[4:, :12] == chosen.image).all()
    assert (placed[:4] == 128).all()
    assert (placed[:, 12:] == 128).all()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 10**9}, "1,000,000,000 images are more than the 6"),
        ({"n": 7}, "7 images are more than the 6"),
        ({"n": "7"}, "7 images are more than the 6"),
        ({"n": " 40 "}, "40 images are more than the 6"),
        ({"n": "1_0"}, "10 images are more than the 6"),
        ({"n": -1}, "n: "),
        ({"n": 2.5}, "n: "),
        ({"n": [1]}, "n: "),
        ({"seed": "x"}, "seed: "),
        ({"seed": 2**70}, "64 bits"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: "),
        ({"top_p": -0.1}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"guidance": 1e9}, "guidance: "),
        ({"size": [10**6, 10**6]}, "size.0: "),
        ({"size": [28, 8]}, "size: 28x8 pixels is larger than this page makes, which is up to 24 a side"),
        ({"size": [10, 12]}, "factor"),
        ({"class": "cow"}, "0 cat, 1 dog"),
        ({"class": {"a": 1}}, "class.str: "),
        ({"class": "cat\0"}, "code 0"),
        ({"colour": 1}, "colour: there is no such key"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_message(
    playground: Playground, folder: Path, values: Mapping[str, Any], message: str
) -> None:
    """Whatever the page's widgets would have let through; and nothing is written."""
    before = files_of(folder)
    with pytest.raises(ConfigError) as refused:
        playground.sample({"n": 1, **values}, quiet)
    assert message in one_line_message(refused.value)
    assert "\n" not in one_line_message(refused.value)
    assert len(one_line_message(refused.value)) < 600
    assert files_of(folder) == before


def test_nothing_or_too_much_painted_and_no_image_are_refused(playground: Playground) -> None:
    chosen = playground.offered()[0]
    everything = ~nothing_painted()
    for picture, mask, message in (
        (chosen, nothing_painted(), "nothing is painted"),
        (chosen, everything, "too much is painted"),
        (None, HALF, "no image is chosen"),
    ):
        with pytest.raises(ConfigError, match=message):
            playground.complete(picture, mask, {"variants": 1}, quiet)
    for number in (7, "7", "7.0"):
        with pytest.raises(ConfigError, match="7 images are more than the 6"):
            playground.complete(chosen, HALF, {"variants": number}, quiet)
        with pytest.raises(ConfigError, match="7 images are more than the 6"):
            playground.grow(chosen, {"variants": number, "grow": {"up": 4}}, quiet)


@pytest.mark.parametrize(
    ("margins", "message"),
    [
        ({}, "all four margins are 0"),
        ({"up": 3}, "nearest that fit are 0 and 4"),
        ({"left": 10**9}, "larger than this page makes"),
        ({"left": -4}, "grow.left: "),
        ({"left": float("nan")}, "grow.left: "),
    ],
)
def test_margins_that_do_not_fit_are_refused(playground: Playground, margins: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        playground.grow(playground.offered()[0], {"variants": 1, "grow": margins}, quiet)
    assert message in one_line_message(refused.value)


def test_a_prior_that_needs_a_class_says_so(tmp_path: Path) -> None:
    write_prior(tmp_path, label_dropout=0.0)
    playground = Playground(Sampler.load(tmp_path).prior, "float32", LIMITS)
    assert not playground.can_guide
    chosen = Chosen(np.zeros((*IMAGE_SIZE, 3), dtype=np.uint8), 0, None, "mine")
    with pytest.raises(ConfigError, match="say which class"):
        playground.complete(chosen, HALF, {"variants": 1}, quiet)
    _, made = playground.complete(chosen, HALF, {"variants": 1, "class": "dog"}, quiet)
    assert (made[0][~HALF] == 0).all()


def test_a_prior_without_classes_needs_none(tmp_path: Path) -> None:
    write_prior(tmp_path, classes=())
    playground = Playground(Sampler.load(tmp_path).prior, "float32", LIMITS)
    assert playground.sample({"n": 2}, quiet).classes == []
    assert playground.complete(playground.offered()[0], HALF, {"variants": 1}, quiet)[1].shape == (1, *IMAGE_SIZE, 3)


def test_larger_images_are_offered_only_where_they_can_be_made(playground: Playground) -> None:
    assert playground.can_be_larger
    assert not Playground(playground.prior, "float32", Limits(6, 11)).can_be_larger
    config = playground.prior.tokenizer.tokenizer.config
    mlp = config.model_copy(update={"network": MlpNetworkConfig()})
    try:
        playground.prior.tokenizer.tokenizer.config = mlp
        assert not playground.can_be_larger
    finally:
        playground.prior.tokenizer.tokenizer.config = config


def test_an_upload_is_fitted_and_a_bad_one_is_named_as_its_owner_named_it(
    playground: Playground, tmp_path: Path
) -> None:
    """It is decoded with our limits: here a header that promises 10^10 pixels."""
    file = tmp_path / "file"
    Image.new("RGB", (80, 60), (9, 8, 7)).save(file, format="PNG")
    chosen = playground.uploaded(file, "holiday.png")
    assert chosen.image.shape == (*IMAGE_SIZE, 3)
    assert (chosen.image == (9, 8, 7)).all()
    assert (chosen.label, chosen.name) == (None, "holiday.png")
    header = bytearray(file.read_bytes())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    for content in (bytes(header), b"GIF89a", b"", b"<svg onload='alert(1)'/>", file.read_bytes()[:60]):
        file.write_bytes(content)
        with pytest.raises(BadFileError) as refused:
            playground.uploaded(file, "holiday.png")
        assert "holiday.png" in one_line_message(refused.value)
        assert str(tmp_path) not in one_line_message(refused.value)


def test_a_task_ends_when_the_page_is_closed(playground: Playground) -> None:
    playground.stopping.set()
    with pytest.raises(InterruptionError):
        playground.sample({"n": 2}, quiet)


def test_a_mask_arrives_as_it_was_painted() -> None:
    """As painter.js packs it: a bit for each pixel, row by row, the first one the highest of its byte."""
    mask = np.random.default_rng(0).random((5, 7)) < 0.4
    sent = base64.b64encode(np.packbits(mask.reshape(-1)).tobytes()).decode()
    assert (decode_mask(sent, (5, 7)) == mask).all()
    assert not decode_mask("", (5, 7)).any()
    assert not decode_mask(None, (5, 7)).any()
    for bad in (sent[:-4], sent * 2, "!", 7, ["a"], {"a": 1}, "ä"):
        with pytest.raises(ConfigError):
            decode_mask(bad, (5, 7))


def test_the_shown_image_is_the_image() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 1)).astype(np.uint8)
    data = base64.b64decode(data_url(picture).removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(io.BytesIO(data))) == picture[:, :, 0]).all()


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else known(name))
    ended = run(names_of("sampling/app.py")["main"], "--prior", folder)
    assert ended.code == 2
    assert "pip install 'tessera-images[app]'" in ended.err


def test_gradio_is_imported_by_the_page_alone() -> None:
    """It takes seconds, and is optional."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "sampling").rglob("*.py")}
    ours = r"sampling\.playground\.(page|controls|server|guard|choice)"
    apart = {"page.py", "controls.py", "server.py", "guard.py", "choice.py"}
    for name, text in sources.items():
        at_once = re.findall(rf"^(?:import|from) (?:gradio|fastapi|starlette|uvicorn|{ours})\b", text, flags=re.M)
        assert not at_once or name in apart, name
    assert "import gradio" in sources["page.py"]


@pytest.mark.parametrize("option", ["--share", "--port 0", "--port 70000", "--pictures 0", "--queue 100000"])
def test_an_option_that_is_not_allowed_is_refused(option: str) -> None:
    with pytest.raises(ConfigError):
        parse_command_line(names_of("sampling/app.py")["AppConfig"], option.split())


def test_a_port_is_the_one_given_or_a_free_one() -> None:
    server = pytest.importorskip("sampling.playground.server", reason="the extra `app` is not installed")
    with server.listen("127.0.0.1", None) as first:
        taken = first.getsockname()[1]
        assert server.FIRST_PORT <= taken < server.FIRST_PORT + server.PORTS
        with server.listen("127.0.0.1", None) as second:
            assert second.getsockname()[1] != taken
        with pytest.raises(ConfigError, match=f"port {taken}"):
            server.listen("127.0.0.1", taken)
    with pytest.raises(ConfigError, match="no address of this machine"):
        server.listen("no.such.host.invalid", None)
    with pytest.raises(ConfigError):
        server.listen("192.0.2.1", None)


CROSS = {"sec-fetch-site": "cross-site"}
GOOD = {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", GOOD, 200),
        ("GET", "/", {"host": "localhost:7860"}, 200),
        ("GET", "/", {"host": "[::1]:7860"}, 200),
        ("GET", "/", {"host": "evil.example:7860"}, 421),  # a name that was made to point to 127.0.0.1
        ("GET", "/", {"host": "127.0.0.1.evil.example"}, 421),
        ("GET", "/", {}, 421),
        ("GET", "/", GOOD | {"origin": "http://evil.example"}, 403),
        ("GET", "/", GOOD | {"origin": "http://127.0.0.1:8000"}, 403),
        ("GET", "/", GOOD | {"origin": "null"}, 403),
        ("GET", "/", GOOD | CROSS | {"sec-fetch-mode": "navigate"}, 200),  # a link on another page
        ("GET", "/config", {"host": "localhost"} | CROSS, 403),
        ("GET", "/config", {"host": "localhost"} | CROSS | {"sec-fetch-mode": "no-cors"}, 403),
        ("GET", "/config", {"host": "localhost", "sec-fetch-site": "same-site"}, 403),  # another port
        ("GET", "/config", {"host": "localhost", "sec-fetch-site": "none"}, 200),
        ("POST", "/gradio_api/queue/join", GOOD | CROSS | {"sec-fetch-mode": "navigate"}, 403),  # a form
        ("POST", "/gradio_api/queue/join", GOOD | {"content-length": "10"}, 200),
        ("POST", "/gradio_api/queue/join", {"host": "localhost", "content-length": "9"}, 200),  # no browser
        ("POST", "/gradio_api/queue/join", {"host": "localhost", "sec-fetch-site": "cross-site"}, 403),
        ("POST", "/gradio_api/queue/join", GOOD, 413),  # of unknown length
        ("POST", "/gradio_api/queue/join", GOOD | {"content-length": "9" * 12}, 413),
        ("POST", "/gradio_api/queue/join", GOOD | {"content-length": "-1"}, 413),
        ("POST", "/gradio_api/upload", GOOD | {"content-length": str(10**7)}, 200),
        ("POST", "/gradio_api/upload", GOOD | {"content-length": str(10**8)}, 413),
        ("POST", "/gradio_api/run/predict", GOOD | {"content-length": "9"}, 404),
        ("POST", "/gradio_api/vibe-edit", GOOD | {"content-length": "9"}, 404),
        ("GET", "/gradio_api/info", GOOD, 404),
        ("GET", "/gradio_api/file=/srv/page/a.png", GOOD, 200),
        ("GET", "/gradio_api/file=/etc/passwd", GOOD, 404),
        ("GET", "/gradio_api/file=/srv/page/../../etc/passwd", GOOD, 404),
        ("GET", "/gradio_api/file=https://evil.example/", GOOD, 404),
        ("GET", "/gradio_api/proxy=http://evil.example/", GOOD, 404),
        ("DELETE", "/", GOOD, 404),
    ],
)
def test_only_the_page_itself_is_answered(method: str, path: str, headers: dict[str, str], status: int) -> None:
    """Another site's request, a rebound name, and all that Gradio offers beside what the page needs, is refused."""
    answers, answer_headers = ask("127.0.0.1", method, path, headers)
    assert answers == status
    assert "default-src 'self'" in answer_headers["content-security-policy"]


def test_on_another_address_names_are_not_believed_either() -> None:
    here = socket.gethostname().lower()
    for host, status in (("192.168.1.7:7860", 200), (f"{here}:7860", 200), ("evil.example:7860", 421)):
        assert ask("0.0.0.0", "GET", "/", {"host": host})[0] == status


def ask(bound: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    """The status and headers with which a guarded server, which would answer everything, does answer."""
    guard = pytest.importorskip("sampling.playground.guard", reason="the extra `app` is not installed")
    sent: list[Any] = []

    async def anything(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        body = b'{"data": [], "fn_index": 1, "session_hash": "a"}'
        return {"type": "http.request", "body": body, "more_body": False}

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded}
    asyncio.run(guard.Guard(anything, bound, Path("/srv/page"), {1: 0})(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_uploads_are_refused_where_all_together_would_be_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the folder counts, and so does what is still arriving beside it."""
    guard = pytest.importorskip("sampling.playground.guard", reason="the extra `app` is not installed")
    monkeypatch.setattr(guard, "LARGEST_FOLDER", 100)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(b"x" * 40)
    answers: list[int] = []

    async def upload(length: int) -> int:
        sent: list[Any] = []
        headers = [(b"host", b"localhost"), (b"content-length", str(length).encode())]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}

        async def send(message: Any) -> None:
            sent.append(message)

        await guarded(scope, None, send)
        return int(sent[0]["status"])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not answers:  # another one while this one arrives
            answers.append(0)
            answers.append(await upload(31))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guarded = guard.Guard(app, "127.0.0.1", tmp_path, {})
    assert asyncio.run(upload(61)) == 507
    assert asyncio.run(upload(30)) == 200
    assert answers == [0, 507]
    assert asyncio.run(upload(60)) == 200
