"""How pages, sheets and captions write numbers: three significant digits."""

from __future__ import annotations

import math

DIGITS = 3
PLAIN_FROM = 1e-4  # smaller numbers are written with an exponent
ZERO_BELOW = 1e-12  # what rounding leaves of a difference of equal numbers


def significant(value: float) -> str:
    """`value` with three significant digits, such as 0.0561, 7.78 or 12,300; a dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    if abs(value) < ZERO_BELOW:
        return "0"
    size = abs(float(f"{value:.{DIGITS - 1}e}"))  # rounded first: 0.9996 is written as 1.00
    if size < PLAIN_FROM:
        return f"{value:.{DIGITS - 1}e}".replace("-", "−")
    places = DIGITS - 1 - math.floor(math.log10(size))
    return f"{round(value, places):,.{max(0, places)}f}".replace("-", "−")


def signed(value: float) -> str:
    """As `significant`, with a plus sign where the value is above 0."""
    return ("+" if value >= ZERO_BELOW else "") + significant(value)
