"""Kubernetes' quantities ("500m", "16Gi") as numbers."""

from __future__ import annotations

import re
from typing import Any, Final

_FORM: Final = re.compile(r"^([+-]?[0-9.]+)([eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?$")
_FACTORS: Final = {
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "E": 1e18,
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", start=1)},
}


def quantity(value: Any) -> float:
    """The number; ValueError for what is no quantity."""
    match = _FORM.match(str(value).strip())
    if match is None:
        raise ValueError(f"{value!r} is no quantity such as 2, 500m or 16Gi")
    number, unit = match.groups()
    if unit and unit[0] in "eE" and len(unit) > 1:
        return float(number + unit)
    return float(number) * _FACTORS[unit or ""]


def written(number: float, resource: str) -> str:
    """A number as people read it: memory in GiB, all else plain."""
    if "memory" in resource or "storage" in resource:
        return f"{number / 1024**3:.4g}Gi"
    return f"{number:.6g}"
