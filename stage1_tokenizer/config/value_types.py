"""Types of config values: sizes and numbers with bounds, and values that people type in several forms.

The bounds of layers and codebooks keep the header of a foreign file from making a command build for ever. They are far
above what anybody trains.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt


def _as_pair(value: Any) -> Any:
    """Return height and width of a number, of `64,96` or of `64x96`."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and (sides := re.fullmatch(r"\s*(\d+)\s*[xX\u00d7,]\s*(\d+)\s*", value, re.ASCII)):
        return sides.groups()
    return (value, value) if isinstance(value, (int, str)) else value


def _none_for_zero(value: Any) -> Any:
    return None if value in (0, "0") and value is not False else value


def _as_texts(value: Any) -> Any:
    """Return numbers as texts, and a list of one text as the text."""
    if isinstance(value, (list, tuple)):
        return _as_texts(value[0]) if len(value) == 1 else tuple(map(_as_texts, value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Side = Annotated[PositiveInt, Field(le=65_536)]
"""Height or width in pixels."""
Size = Annotated[tuple[Side, Side], BeforeValidator(_as_pair)]
"""Height and width in pixels; a single number means a square. On the command line: `64`, `64,96` or `64x96`."""
Limit = Annotated[PositiveInt | None, BeforeValidator(_none_for_zero)]
"""Upper limit; 0 and null: no limit."""
Texts = Annotated[str | tuple[str, ...], BeforeValidator(_as_texts)]
"""One text or several. On the command line the option is given several times; a comma is a part of the text."""

Count = Annotated[PositiveInt, Field(le=512)]
"""A number of layers, attention heads or codebooks."""
Blocks = Annotated[NonNegativeInt, Field(le=32)]
"""A number of residual blocks per level."""
Channels = Annotated[PositiveInt, Field(le=65_536)]
"""The width of a layer."""
CodebookSize = Annotated[PositiveInt, Field(le=2**24)]
"""The number of vectors of a codebook: float32 counts exactly up to 2^24."""
