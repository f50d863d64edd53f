"""The page itself: head, contents, sections, and the style and script that it carries within."""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, escape, join, tag
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, StorageError

EXPECTED_ERRORS = (ConfigError, BadFileError, StorageError, OSError)
"""What may be wrong with a run and its data, and keeps a part of the page from being made. (Not a stop by the user.)"""
HERE = Path(__file__).parent
STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
LOGO = Markup(
    '<svg class="mark" viewBox="0 0 20 20" aria-hidden="true"><path d="M1 1h8v8H1z"/><path d="M11 1h8v8h-8z" '
    'opacity=".55"/><path d="M1 11h8v8H1z" opacity=".35"/><path d="M11 11h8v8h-8z" opacity=".8"/></svg>'
)


class Section(NamedTuple):
    """A part of the page under a heading of its own."""

    name: str
    """Its address on the page."""
    title: str
    body: Markup


class PageHead(NamedTuple):
    """What stands on top."""

    kind: str
    """What the page is about, e.g. `Tokenizer`."""
    title: str
    lead: Child
    """A sentence or two."""


def section(name: str, title: str, *body: Child) -> Section:
    return Section(name, title, join(*body))


def notice(*words: Child) -> Markup:
    """A sentence about what is missing."""
    return tag("p", *words, class_="note")


def try_section(name: str, title: str, build: Callable[[], Child]) -> Section:
    """A section, or in its place a sentence that says why it cannot be made: data that are gone, a file that is
    damaged. One section's trouble is not the others'."""
    try:
        return section(name, title, build())
    except EXPECTED_ERRORS as error:
        return section(name, title, notice(f"This cannot be shown: {one_line(str(error))[:600]}"))


def or_notice(build: Callable[[], Child]) -> Child:
    """A part of a section, or why it cannot be shown."""
    try:
        return build()
    except EXPECTED_ERRORS as error:
        return notice(f"This cannot be shown: {one_line(str(error))[:300]}")


def render_page(head: PageHead, sections: Sequence[Section], footer: str) -> str:
    """The whole file."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    # Sections bring the style of their own pictures; its place is in the head.
    styles = [style, *(found for each in sections for found in STYLE.findall(each.body))]
    sections = [each._replace(body=Markup(STYLE.sub("", each.body))) for each in sections]
    contents = tag(
        "nav",
        tag("p", "On this page", class_="nav-title", id="contents"),
        tag("ol", [tag("li", tag("a", each.title, href=f"#{each.name}")) for each in sections]),
        class_="contents",
        aria_labelledby="contents",
    )
    main = tag(
        "main",
        [
            tag("section", tag("h2", each.title, id=f"{each.name}-title"), each.body, id=each.name,
                aria_labelledby=f"{each.name}-title")
            for each in sections
        ],
        id="main",
    )  # fmt: skip
    top = tag(
        "header",
        tag("p", LOGO, "Tessera", tag("span", head.kind), class_="brand"),
        tag("h1", head.title),
        tag("p", head.lead, class_="lead"),
    )
    return (
        "<!DOCTYPE html>\n"
        + tag(
            "html",
            tag(
                "head",
                tag("meta", charset="utf-8"),
                tag("meta", http_equiv="Content-Security-Policy", content=policy),
                tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
                tag("meta", name="color-scheme", content="light dark"),
                tag("meta", name="referrer", content="no-referrer"),
                tag("title", f"{head.title} - {head.kind} - Tessera"),
                tag("link", rel="icon", href="data:,"),
                Markup(f"<style>{''.join(styles)}</style>"),
            ),
            tag(
                "body",
                tag("a", "Skip to the content", class_="skip", href="#main"),
                top,
                tag("div", contents, main, class_="columns"),
                tag("footer", escape(footer)),
                Markup(f"<script>{script}</script>"),
            ),
            lang="en",
        )
        + "\n"
    )
