"""HTML elements from function calls, and numbers formatted for people.

tag("p", "a < b", class_="note")      -> <p class="note">a &lt; b</p>

Text that is not Markup is escaped, since names, messages and configs may contain anything.
"""

import html
import json
import math
import re
from collections.abc import Iterable
from typing import TypeAlias

VOID = frozenset({"img", "meta", "br", "link", "input"})
"""Elements without content and without a closing tag."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that an HTML file may not contain, or that UTF-8 cannot encode."""


class Markup(str):
    """Text that is HTML already and is not escaped."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
Attribute = str | int | float | bool | None


def escape(text: object) -> Markup:
    """Escape text for HTML and replace characters that it may not contain."""
    return Markup(html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))))


def join(*children: Child) -> Markup:
    """Join children; text is escaped, None is skipped."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """Return an element.

    An attribute that is None or False is left out, and True has no value. `class_` is `class`; other underscores become
    hyphens.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(word if value is True else f'{word}="{escape(value)}"')
    opening = f"<{' '.join(words)}>"
    return Markup(opening if name in VOID else f"{opening}{join(*children)}</{name}>")


def data_block(name: str, value: object) -> Markup:
    """Return a script element with the id `name` that holds a value as JSON; browsers do not run it."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def table(
    caption: str, head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str | None = None, hide: bool = False
) -> Markup:
    """Return a table in a box that scrolls. The first cell of a row is its header; other cells may be <td> already.

    hide: show the caption only to screen readers, where a heading says the same.
    """
    columns = [tag("th", cell, scope="col") for cell in head]
    body = []
    for row in rows:
        first, *others = row
        cells = [cell if isinstance(cell, Markup) and cell.startswith("<td") else tag("td", cell) for cell in others]
        body.append(tag("tr", tag("th", first, scope="row"), cells))
    inner = tag(
        "table",
        tag("caption", caption, class_="unseen" if hide else None),
        tag("thead", tag("tr", columns)) if columns else None,
        tag("tbody", body),
        class_=class_,
    )
    # If the table is too wide, page.js makes the box a region with this label, and a tab stop.
    return tag("div", inner, class_="scroll", data_label=caption)


def description_list(pairs: Iterable[tuple[Child, Child]]) -> Markup:
    """Return a list of names and values."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_="facts")


def fold(summary: Child, *children: Child) -> Markup:
    """Return an element that shows a summary, and the children when it is opened."""
    return tag("details", tag("summary", summary), *children)


def format_number(value: float, digits: int = 4) -> str:
    """Format a number with `digits` significant digits, and an exponent only for very large or very small ones."""
    if not math.isfinite(value):
        return "not a number"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 9:
        return f"{value:,.{max(0, digits - 1 - size)}f}"
    return f"{value:.{digits - 1}e}"


def format_percent(share: float) -> str:
    """Format a share in 0..1 as per cent; only exactly 0 gives 0 %, and only exactly 1 gives 100 %."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    text = f"{100 * share:.{1 if share >= 0.01 else 2}f}".rstrip("0").rstrip(".")
    return f"{text} %"
