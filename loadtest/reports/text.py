"""How reports write numbers and foreign text: four significant figures with a unit, nothing a reader could not see.

Tenant names, model names and error details come from outside. Control and direction characters in them could forge
a line of a terminal or reorder a line of a page, so they are shown as escapes; HTML escaping comes on top.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Four figures: finer than any load run repeats, so rounding never decides what a reader concludes.
SIGNIFICANT = 4
_LONGEST = 300
# Other, control / format / surrogate / private use / unassigned, and the two line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_MOST_DIGITS = 17


def visible(text: str, longest: int = _LONGEST) -> str:
    """`text` with every invisible character as its escape, cut after `longest` characters with an ellipsis."""
    # Cut before escaping too, so that a huge detail costs nothing.
    shown = "".join(_seen(character) for character in text[: longest + 1])
    return shown if len(text) <= longest and len(shown) <= longest else f"{shown[: longest - 1]}…"


def _seen(character: str) -> str:
    if unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character


def escaped(text: str, longest: int = _LONGEST) -> str:
    """`text` made visible and safe in HTML, as text and inside a quoted attribute."""
    return html.escape(visible(text, longest), quote=True)


def number(value: float, digits: int = SIGNIFICANT) -> str:
    """`value` with so many significant figures; whole numbers are never rounded. Infinity is `∞`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if float(value).is_integer():
        return f"{value:,.0f}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def quantity(value: float | None, unit: str, digits: int = SIGNIFICANT) -> str:
    """`value` with its unit (`s`, `share`, `tok/s`, `req/s`, or "" for a count); a dash where there is none.

    Seconds under one are written as milliseconds, shares as per cent.
    """
    if value is None:
        return "–"
    if math.isinf(value):
        return number(value)
    if unit == "s" and 0 < abs(value) < 1:
        return f"{number(value * 1e3, digits)} ms"
    if unit == "share":
        return f"{number(value * 100, digits)} %"
    return f"{number(value, digits)} {unit}".rstrip()


def apart(first: float | None, second: float, unit: str) -> tuple[str, str]:
    """Both as quantities, with as many digits more as it takes to tell unequal values from each other."""
    for digits in range(SIGNIFICANT, _MOST_DIGITS + 1):
        shown = quantity(first, unit, digits), quantity(second, unit, digits)
        if first == second or shown[0] != shown[1]:
            return shown
    return repr(first), repr(second)


def flat(held: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as lines of `a.b.c` and value, in their order."""
    for key, value in held.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and any(map(_is_group, value)):
            for index, item in enumerate(value):
                yield from flat({str(index): item}, f"{name}.")
        else:
            yield name, _plain(value)


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping)


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)
