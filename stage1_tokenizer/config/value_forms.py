"""Types of values that are taken in several forms, as people type them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt


def _as_pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and (sides := re.fullmatch(r"\s*(\d+)\s*[xX\u00d7,]\s*(\d+)\s*", value, re.ASCII)):
        return sides.groups()
    return (value, value) if isinstance(value, (int, str)) else value


def _none_for_zero(value: Any) -> Any:
    return None if value in (0, "0") and value is not False else value


def _as_texts(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return _as_texts(value[0]) if len(value) == 1 else tuple(map(_as_texts, value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Side = Annotated[PositiveInt, Field(le=65_536)]
"""Pixels."""
Size = Annotated[tuple[Side, Side], BeforeValidator(_as_pair)]
"""Height and width in pixels; a single number means a square. On the command line: `64`, `64,96` or `64x96`."""
Limit = Annotated[PositiveInt | None, BeforeValidator(_none_for_zero)]
"""A greatest number; 0 and null: no limit."""
Texts = Annotated[str | tuple[str, ...], BeforeValidator(_as_texts)]
"""One text or several. On the command line the option is given several times, and a comma is a part of a text."""
