"""Numbers as people read them."""

import math


def plain(value: float, digits: int = 4) -> str:
    """As many significant digits as asked for, without an exponent where the number is of a human size."""
    if not math.isfinite(value):
        return "not a number"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 9:
        return f"{value:,.{max(0, digits - 1 - size)}f}"
    return f"{value:.{digits - 1}e}"


def percent(share: float) -> str:
    """A share of 0..1; only none is 0 %, and only all is 100 %."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    text = f"{100 * share:.{1 if share >= 0.01 else 2}f}".rstrip("0").rstrip(".")
    return f"{text} %"


def plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
