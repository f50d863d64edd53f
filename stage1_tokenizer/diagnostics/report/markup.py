"""HTML from small calls: whatever is not markup already is escaped, since names, messages and configs may say anything.

tag("p", "a < b", class_="note")      -> <p class="note">a &lt; b</p>
"""

import html
import json
import re
from collections.abc import Iterable
from typing import TypeAlias

VOID = frozenset({"img", "meta", "br", "link", "input"})
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that an HTML file may not hold, or that UTF-8 cannot."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
Attribute = str | int | float | bool | None


def escaped(text: object) -> Markup:
    """Text as HTML shows it."""
    return Markup(html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))))


def join(*children: Child) -> Markup:
    """Children one after the other; what is no Markup is escaped, None is left out."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escaped(child))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """An element. An attribute that is None or False is left out, True stands without a value; `class_` is `class`,
    and other underscores are hyphens."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(word if value is True else f'{word}="{escaped(value)}"')
    opening = f"<{' '.join(words)}>"
    return Markup(opening if name in VOID else f"{opening}{join(*children)}</{name}>")


def data_block(name: str, value: object) -> Markup:
    """JSON that a script reads, found by its id; it is never run."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(f'<script type="application/json" id="{escaped(name)}">{text}</script>')


def table(
    caption: str, head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str | None = None, hide: bool = False
) -> Markup:
    """A table in a box of its own to scroll in. The first cell of a row is its header.

    hide: the caption is for screen readers alone, where a heading says the same.
    """
    columns = [tag("th", cell, scope="col") for cell in head]
    body = []
    for row in rows:
        first, *others = row
        body.append(tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in others]))
    inner = tag(
        "table",
        tag("caption", caption, class_="unseen" if hide else None),
        tag("thead", tag("tr", columns)) if columns else None,
        tag("tbody", body),
        class_=class_,
    )
    return scrolling(caption, inner)


def scrolling(label: str, content: Markup) -> Markup:
    """A box to scroll in. Where its content is too wide page.js makes it a region of this name, and a tab stop."""
    return tag("div", content, class_="scroll", data_label=label)


def listed(pairs: Iterable[tuple[Child, Child]], class_: str = "facts") -> Markup:
    """A description list."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_=class_)


def fold(summary: Child, *children: Child) -> Markup:
    """What is there for whoever asks."""
    return tag("details", tag("summary", summary), *children)
