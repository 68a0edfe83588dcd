"""One finding of a preflight: what was looked at, what was found, why it matters, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serving.cluster.kubernetes.facts import Unknown

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` is a short name that stays the same over releases; `fix` is "" where there is nothing to do."""

    level: Level
    what: str
    found: str
    why: str = ""
    fix: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def ok(what: str, found: str) -> Finding:
    """As it should be."""
    return Finding("ok", what, found)


def warn(what: str, found: str, why: str, fix: str) -> Finding:
    """It may work, or could not be looked at."""
    return Finding("warn", what, found, why, fix)


def fail(what: str, found: str, why: str, fix: str) -> Finding:
    """It will not work."""
    return Finding("fail", what, found, why, fix)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them; ok of none."""
    levels = {finding.level for finding in findings}
    return "fail" if "fail" in levels else "warn" if "warn" in levels else "ok"


def not_seen(what: str, unknown: Unknown) -> Finding:
    """The finding of a check that could not look."""
    return warn(what, "not looked at", unknown.why, unknown.fix)
