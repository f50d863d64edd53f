"""The page in a real browser, over the real command: what a user does in each tab."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sampling.completion import CompletionTask, Margins, complete, grow
from sampling.completion_source import read_originals
from sampling.sampler import Sampler
from tests.helpers.app_server import App, running
from tests.helpers.artefacts import IMAGE_SIZE
from tests.helpers.browser import browser as open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest.importorskip("gradio", reason="the extra `app` is not installed")
pytestmark = pytest.mark.slow
WAIT = 60_000
"""Milliseconds: the machine may be busy."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, browser: "Browser") -> Iterator[App]:
    with running(tmp_path_factory.mktemp("app"), "--pictures", "6") as app:
        yield app


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(app: App, browser: "Browser") -> Iterator[Any]:
    """The page, loaded; afterwards, nothing may have been asked of anybody else, and no script have failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(WAIT)
    page.goto(app.address)
    page.get_by_role("button", name="Sample", exact=True).wait_for()
    yield page
    page.close()
    assert requests
    assert {urlparse(url.removeprefix("blob:")).netloc for url in requests if not url.startswith("data:")} == {
        urlparse(app.address).netloc
    }
    assert errors == []


def shown(page: Any, gallery: str, number: int) -> list[NDArray[np.uint8]]:
    """The images in a gallery, once there are so many: (H, W, C) each, as their files have them."""
    page.wait_for_function(f"document.querySelectorAll('{gallery} .grid-container img').length == {number}")
    found = []
    for image in page.locator(f"{gallery} .grid-container img").all():
        body = page.request.get(image.get_attribute("src")).body()
        assert body.startswith(b"\x89PNG")
        found.append(np.array(Image.open(io.BytesIO(body))))
    return found


def choose(page: Any, index: int) -> None:
    page.locator(".choice:visible .thumbnail-lg").nth(index).click()


def test_a_user_samples_and_gets_what_python_gives(app: App, page: Any) -> None:
    page.get_by_label("Number", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).first.fill("7")
    page.get_by_role("button", name="Sample", exact=True).click()
    expected = Sampler.load(app.prior).sample(3, seed=7)
    assert (np.stack(shown(page, "#samples", 3)) == expected).all()
    assert (
        page.locator("#command textarea, #command input")
        .input_value()
        .endswith("-n 3 --prior " + str(app.prior) + " --seed 7")
    )
    smooth = page.locator("#samples .grid-container img").first.evaluate("e => getComputedStyle(e).imageRendering")
    assert smooth == "pixelated"
    page.get_by_label("Class").first.click()
    page.get_by_role("option", name="dog").click()
    before = page.get_by_label("Seed", exact=True).first.input_value()
    page.get_by_role("button", name="New seed").first.click()
    page.wait_for_function(f"document.querySelector('.seed input').value != '{before}'")
    seed = int(page.get_by_label("Seed", exact=True).first.input_value())
    old = page.locator("#samples img").first.get_attribute("src")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_function(f"document.querySelector('#samples .grid-container img').src != '{old}'")
    assert (np.stack(shown(page, "#samples", 3)) == Sampler.load(app.prior).sample(3, "dog", seed)).all()


def test_a_user_paints_and_completes(app: App, page: Any) -> None:
    page.get_by_role("tab", name="Complete").click()
    choose(page, 1)
    canvas = page.locator(".painter canvas")
    canvas.wait_for()
    page.wait_for_function(f"document.querySelector('.painter canvas').width == {IMAGE_SIZE[1]}")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    side = box["width"] / IMAGE_SIZE[1]
    page.mouse.move(box["x"] + 10 * side, box["y"] + 0.5 * side)  # down along the right
    page.mouse.down()
    page.mouse.move(box["x"] + 10 * side, box["y"] + 7.5 * side, steps=5)
    page.mouse.up()
    page.get_by_label("Completions", exact=True).fill("2")
    page.get_by_role("button", name="Complete", exact=True).click()
    original, kept, *made = shown(page, "#completions", 4)
    sampler = Sampler.load(app.prior)
    chosen = read_originals(sampler, None, 2, None, 0)
    assert (original == chosen.images[1]).all()
    hidden = (kept == 128).all(axis=2) & (original != 128).any(axis=2)
    assert hidden[:, 10].all()
    assert not hidden[:, :8].any()
    two = np.ones(2, dtype=np.int64)
    task = CompletionTask(np.stack([original] * 2), two, chosen.labels[[1, 1]], 0, np.arange(2))
    mask = np.array([[bool(cell) for cell in row] for row in painted_by(page)])
    assert (mask[hidden]).all()
    assert (np.stack(made) == complete(sampler, task, ~mask, True)).all()
    page.get_by_label("Paint over the bottom half").click()
    bottom = (np.arange(IMAGE_SIZE[0]) >= IMAGE_SIZE[0] // 2)[:, None]
    assert (np.array(painted_by(page)) == (bottom | mask)).all()  # halves add up
    page.get_by_role("radio", name="Erase").check()
    canvas.click(position={"x": 0.5 * side, "y": 6.5 * side})  # the page may have scrolled
    erased = np.array(painted_by(page))
    assert not erased[6, 0]
    assert erased[6, 6:].all()
    page.get_by_text("clear all").click()
    assert not np.array(painted_by(page)).any()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("nothing is painted").wait_for()


def test_a_user_without_a_mouse_chooses_and_paints(page: Any) -> None:
    """By names and keys alone; and the page says how much is painted."""
    page.get_by_role("tab", name="Complete").click()
    page.get_by_role("button", name="validation image 2").first.focus()
    page.keyboard.press("Enter")
    canvas = page.get_by_role("application")
    canvas.wait_for()
    page.get_by_text("0 of 96 pixels painted").wait_for()
    canvas.focus()
    page.get_by_label("Size of the brush").fill("1")
    for key in ("ArrowUp", "ArrowLeft", "Space", "ArrowLeft", "Space"):
        canvas.press(key)
    assert page.locator(".brush").is_visible()
    expected = np.zeros(IMAGE_SIZE, dtype=np.bool_)
    expected[3, 4:6] = True
    assert (np.array(painted_by(page)) == expected).all()
    page.get_by_text("2 of 96 pixels painted").wait_for()
    page.get_by_role("radio", name="Erase").check()
    for _ in range(20):  # it stays on the picture
        canvas.press("ArrowRight")
    canvas.press("Space")
    page.get_by_text("2 of 96 pixels painted").wait_for()
    for half in ("left", "right"):
        page.get_by_label(f"Paint over the {half} half").click()
    page.get_by_text("96 of 96 pixels painted").wait_for()


def test_the_command_and_the_images_have_names(page: Any) -> None:
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#samples .grid-container img").first.wait_for()
    command = page.get_by_role("textbox", name="Command that makes the same images")
    assert command.is_enabled()
    assert not command.is_editable()
    assert page.get_by_role("button", name="Sample", exact=True).bounding_box()["y"] < 860  # above the fold


def painted_by(page: Any) -> list[list[int]]:
    """What the canvas shows as painted: rows of 0 and 1."""
    rows: list[list[int]] = page.evaluate(
        """() => {
          const canvas = document.querySelector('.painter canvas');
          const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          const at = (y, x) => Number(data[4 * (y * canvas.width + x) + 3] > 0);
          return [...Array(canvas.height).keys()].map(y => [...Array(canvas.width).keys()].map(x => at(y, x)));
        }"""
    )
    return rows


def test_a_user_uploads_an_image_and_grows_it(app: App, page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Grow").click()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG no picture")
    page.locator("input[type=file]").last.set_input_files(bad)
    page.get_by_text("bad.png: cannot be read").wait_for()
    good = tmp_path / "good.png"
    Image.fromarray(np.full((*IMAGE_SIZE, 3), (20, 200, 90), dtype=np.uint8)).save(good)
    page.locator("input[type=file]").last.set_input_files(good)
    page.locator(".preview img").wait_for()
    page.get_by_label("Up", exact=True).fill("4")
    page.get_by_label("Right", exact=True).fill("8")
    page.get_by_label("Results", exact=True).fill("1")
    page.get_by_role("button", name="Grow", exact=True).click()
    original, made = shown(page, "#grown", 2)
    sampler = Sampler.load(app.prior)
    label = np.array([sampler.prior.model.null_label])
    alone = original[4:, : IMAGE_SIZE[1]]
    task = CompletionTask(alone[None], np.zeros(1, dtype=np.int64), label, 0, np.zeros(1, dtype=np.int64))
    assert (original[4:, : IMAGE_SIZE[1]] == (20, 200, 90)).all()
    assert original.shape == made.shape
    assert (made == grow(sampler, task, Margins(up=1, right=2), True)[0]).all()


def test_a_refused_value_shows_a_message(page: Any) -> None:
    page.get_by_label("Number", exact=True).fill("7")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("7 images are more than the 6 that this page makes at once").wait_for()


def test_it_can_be_used_on_a_phone(page: Any) -> None:
    """Nothing is wider than the screen, in any tab, with results too."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#samples .grid-container img").first.wait_for()
    for name in ("Sample", "Complete", "Grow"):
        page.get_by_role("tab", name=name).click()
        button = page.get_by_role("button", name=name, exact=True)
        button.scroll_into_view_if_needed()
        assert button.bounding_box()["width"] > 200
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
