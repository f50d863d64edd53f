"""The report in a real browser: two widths, light and dark, pointer, touch and keys, with and without the script."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.tokenizer import LoadedTokenizer
from tests.helpers.browser import browser
from tests.helpers.commands import names_of, run
from tests.helpers.report_runs import LOG, prior_run, tokenizer_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CONTRAST = """() => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = numbers(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter((node) => node.nodeType === 3);
    const words = own.map((node) => node.data.trim()).join("");
    if (!words || element.closest(".stage, script, style") || !element.getClientRects().length) continue;
    const [a, b] = [light(numbers(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), words.slice(0, 40), element.className]);
  }
  return found;
}"""
"""[contrast by WCAG 2, words, class] of each element with words of its own that is shown."""


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a tokenizer's run and of a prior's, and one that compares two runs."""
    root = tmp_path_factory.mktemp("pages")
    better = [{**entry, **({"validation/psnr": 27.75} if "validation/psnr" in entry else {})} for entry in LOG]
    tokenizer_run(root / "first")
    tokenizer_run(root / "second", better, seed=1)
    prior_run(root / "prior")
    main = names_of("sampling/report.py")["main"]
    for names, out in ((["first"], "first"), (["prior"], "prior"), (["first", "second"], "both")):
        ended = run(main, *(root / name for name in names), "--out", root / f"{out}.html")
        assert ended.code == 0, ended.err
    return root


Open = Callable[..., "Page"]


@pytest.fixture
def show(chromium: "Browser", folder: Path) -> Iterator[Open]:
    """Open a page; messages on the console and requests to the network fail the test at its end."""
    wrong: list[str] = []
    with ExitStack() as stack:

        def open_page(name: str = "first", width: int = 1280, **options: Any) -> "Page":
            context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: wrong.append(request.url) if leaves(request.url) else None)
            page.goto((folder / f"{name}.html").as_uri())
            return page

        yield open_page
    assert not wrong


def leaves(url: str) -> bool:
    return not url.startswith(("file:", "data:"))


def codes_of(run_folder: Path) -> list[list[list[int]]]:
    """Encode the validation images with the tokenizer itself: (N, h, w)."""
    loaded = LoadedTokenizer.load(run_folder)
    split = open_data(parse_data_config(loaded.data, "")).image_batches("validation", 0)
    with torch.inference_mode():
        codes = loaded.tokenizer.encode_codes(normalise(split.batch(np.arange(len(split)))[0]))
    found: list[list[list[int]]] = codes[..., 0].tolist()
    return found


@pytest.mark.parametrize("name", ["first", "prior", "both"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(show: Open, name: str, width: int) -> None:
    """Also with all folds open."""
    page = show(name, width)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 1280])
def test_only_boxes_that_scroll_are_tab_stops_with_unique_names(show: Open, width: int) -> None:
    """With all folds open."""
    page = show("first", width)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.wait_for_timeout(100)
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((box) => "
        "[box.scrollWidth > box.clientWidth + 1, box.tabIndex === 0, box.getAttribute('aria-label')])"
    )
    assert boxes
    assert [stop for _, stop, _ in boxes] == [scrolls for scrolls, _, _ in boxes]
    names = [name for _, stop, name in boxes if stop]
    assert all(names)
    assert len(names) == len(set(names))


def test_a_comparison_on_a_phone_has_one_value_per_line(show: Open) -> None:
    """Each value follows the run's name; nothing scrolls sideways."""
    page = show("both", 360)
    cells = page.locator("#figures tr", has_text="PSNR").locator("td")
    first, second = cells.nth(0).bounding_box(), cells.nth(1).bounding_box()
    assert first
    assert second
    assert second["y"] >= first["y"] + first["height"] - 1
    assert cells.nth(1).evaluate("each => getComputedStyle(each, '::before').content") == '"second: "'
    assert page.evaluate("[...document.querySelectorAll('.stacked')].every((each) => each.scrollWidth <= 360)")


@pytest.mark.parametrize("name", ["first", "prior", "both"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(show: Open, name: str, scheme: Any) -> None:
    """WCAG AA: 4.5 to 1 for text, axis labels and links."""
    page = show(name, color_scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert len(found) > 80
    assert [each for each in found if each[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", background)[:3]]
    assert (max(levels) < 60) == (scheme == "dark")


def test_the_arrow_keys_walk_over_the_codes(show: Open, folder: Path) -> None:
    """Each position shows the tokenizer's code; one position at a time is a tab stop."""
    page = show()
    codes = codes_of(folder / "first")
    grid = page.locator(".overlay:not([hidden]) table")
    assert grid.get_attribute("role") == "grid"
    assert grid.locator('td[tabindex="0"]').count() == 1
    grid.locator('td[tabindex="0"]').focus()
    said = page.locator(".said")
    page.keyboard.press("Control+Home")
    flat = [code for row in codes[0] for code in row]
    uses = {code: sum(row.count(code) for image in codes for row in image) for code in flat}
    for row in range(2):
        for column in range(3):
            code = codes[0][row][column]
            here = {1: "once", 2: "twice"}.get(flat.count(code), f"{flat.count(code)} times")
            words = said.inner_text()
            assert words.startswith(f"Row {row + 1}, column {column + 1}: code {code}. It occurs {here} in this")
            assert re.search(
                {1: r"and once in", 2: r"and twice in"}.get(uses[code], rf"and {uses[code]} times in"), words
            )
            assert page.locator(".inspector .number").inner_text() == str(code)
            assert page.locator("td:focus").inner_text() == str(code)
            assert page.locator(".overlay:not([hidden]) td.same, .overlay:not([hidden]) td.now").count() == flat.count(
                code
            )
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowDown")
    assert said.get_attribute("aria-live") == "polite"


def test_pointing_and_tapping_show_the_code_and_its_other_positions(show: Open, folder: Path) -> None:
    """Also in another image, chosen by its button; on a phone by touch."""
    codes = codes_of(folder / "first")
    page = show(width=390, has_touch=True)
    page.locator(".picker button").nth(2).tap()
    assert page.locator('.picker button[aria-pressed="true"]').count() == 1
    page.locator(".overlay:not([hidden]) td").nth(4).tap()
    assert f"Row 2, column 2: code {codes[2][1][1]}." in page.locator(".said").inner_text()
    others = sum(any(codes[2][1][1] in row for row in image) for number, image in enumerate(codes) if number != 2)
    assert page.locator(".elsewhere span").count() == min(8, others)
    page = show()
    page.locator(".overlay:not([hidden]) td").nth(5).hover()
    assert f"Row 2, column 3: code {codes[0][1][2]}." in page.locator(".said").inner_text()
    page.get_by_label("show the reconstruction").check()
    assert page.locator(".overlay:not([hidden]) img.reconstruction").is_visible()
    assert not page.locator(".overlay:not([hidden]) img.original").is_visible()
    page.get_by_label("show all numbers").check()
    assert (
        page.locator(".overlay:not([hidden]) td span").first.evaluate("each => getComputedStyle(each).opacity") == "1"
    )


def test_a_chart_is_read_by_keys_and_by_pointer(show: Open) -> None:
    """The step and its values, as text and for a screen reader."""
    page = show()
    chart = page.locator("figure.chart", has=page.get_by_role("heading", name="PSNR", exact=True))
    area = chart.get_by_role("slider")
    words = chart.locator("svg").get_attribute("aria-label") or ""
    assert "lowest 20.25 at 30" in words
    described = f"document.getElementById('{area.get_attribute('aria-describedby')}').getAttribute('aria-label')"
    assert page.evaluate(described) == words
    area.focus()
    assert chart.locator(".readout").inner_text() == "step 30: validation 20.25"
    page.keyboard.press("ArrowLeft")
    assert area.get_attribute("aria-valuetext") == "step 20: validation 21.5"
    box = area.bounding_box()
    assert box
    area.hover(position={"x": 0.98 * box["width"], "y": 20})
    assert chart.locator(".readout").inner_text() == "step 30: validation 20.25"


def test_without_the_script_only_the_readouts_are_missing(show: Open, folder: Path) -> None:
    """Metrics, curves and images are shown, codes are numbers over the images, and there are no dead controls."""
    page = show(java_script_enabled=False)
    assert page.get_by_text("20.25 dB").first.is_visible()
    assert page.locator("svg path.line").first.is_visible()
    shown = [int(text) for text in page.locator(".overlay td span").all_inner_texts()]
    assert shown == [code for picture in codes_of(folder / "first") for row in picture for code in row]
    assert page.locator(".overlay td span").first.is_visible()
    assert page.locator("button:visible, input:visible, [role=slider]").count() == 0
    page.locator("summary").first.click()
    assert page.locator("details[open] table").first.is_visible()


def test_the_focus_is_visible(show: Open) -> None:
    """The first stop skips the contents; each stop has an outline; the tokens are one stop."""
    page = show()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    stops = []
    for _ in range(120):
        page.keyboard.press("Tab")
        style, name = page.evaluate(
            "[getComputedStyle(document.activeElement).outlineStyle, document.activeElement.tagName]"
        )
        if name == "BODY":
            break
        stops.append(name)
        assert style != "none", name
    assert stops.count("TD") == 1
    assert stops.count("SUMMARY") > 3


def test_every_image_loads(show: Open) -> None:
    """The browser decodes each image, and each has alternative text."""
    page = show("prior")
    broken = "[...document.images].filter((each) => !each.complete || !each.naturalWidth || !each.alt).length"
    assert page.evaluate("document.images.length") > 8
    assert page.evaluate(broken) == 0


def test_a_comparison_has_the_metrics_of_both(show: Open) -> None:
    page = show("both")
    row = page.get_by_role("row", name="PSNR")
    assert row.get_by_role("cell").all_inner_texts()[:2] == ["20.25 dB", "27.75 dB"]
