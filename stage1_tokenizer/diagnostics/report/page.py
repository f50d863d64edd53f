"""The page: its head, contents and sections, with the style sheet and the script inside the file."""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, escape, join, tag
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, StorageError


class NothingToShowError(Exception):
    """A part of the page does not apply to this run. The message says why, without capital letter and full stop."""


EXPECTED_ERRORS = (NothingToShowError, ConfigError, BadFileError, StorageError, OSError)
"""Errors of one part of the page, after which the rest is still made. A stop by the user is not one."""
HERE = Path(__file__).parent
STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
LOGO = Markup(
    '<svg class="mark" viewBox="0 0 20 20" aria-hidden="true"><path d="M1 1h8v8H1z"/><path d="M11 1h8v8h-8z" '
    'opacity=".55"/><path d="M1 11h8v8H1z" opacity=".35"/><path d="M11 11h8v8h-8z" opacity=".8"/></svg>'
)


class Section(NamedTuple):
    """A part of the page under its own heading."""

    name: str
    """The address on the page, without #."""
    title: str
    body: Markup


class PageHead(NamedTuple):
    """The top of the page."""

    kind: str
    """The subject's kind, e.g. `Tokenizer`."""
    title: str
    lead: Child
    """A sentence or two."""


def notice(*words: Child) -> Markup:
    """Return a paragraph that says what is missing."""
    return tag("p", *words, class_="note")


def or_notice(build: Callable[[], Child]) -> Child:
    """Build a part of the page, or a notice with the reason if it does not apply or cannot be read."""
    try:
        return build()
    except EXPECTED_ERRORS as error:
        return notice(f"Not shown: {one_line(str(error))[:600]}")


def try_section(name: str, title: str, build: Callable[[], Child]) -> Section:
    """Build a section, or a notice in its place: an error in one section leaves the others."""
    return Section(name, title, join(or_notice(build)))


def render_page(head: PageHead, sections: Sequence[Section], footer: str) -> str:
    """Return the whole HTML file."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    # Sections bring styles with their sprites; HTML allows <style> only in the head.
    styles = [style, *(own for section in sections for own in STYLE.findall(section.body))]
    sections = [section._replace(body=Markup(STYLE.sub("", section.body))) for section in sections]
    contents = tag(
        "nav",
        tag("p", "On this page", class_="nav-title", id="contents"),
        tag("ol", [tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections]),
        class_="contents",
        aria_labelledby="contents",
    )
    main = tag(
        "main",
        [
            tag("section", tag("h2", section.title, id=f"{section.name}-title"), section.body, id=section.name,
                aria_labelledby=f"{section.name}-title")
            for section in sections
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
