"""Whose series a query means: every release that a Prometheus watches has its own, by one label.

Two releases may serve models of the same name. Their series differ by the label `galerne_release` alone, which
targets get where they are listed: NAMESPACE/RELEASE from the chart, `release` of the configuration elsewhere. A
release without a name has series without the label, which PromQL writes as the empty value: for whoever runs one alone
nothing changes.

So no expression is written with the label: `scoped` puts it on every selector of one, and whoever wants another
release, or all of them, says so in one place. What sums over releases is told by `groupings`, for tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

LABEL: Final = "galerne_release"
# Every release, each by itself; series without the label, too.
ANY: Final = f'{LABEL}=~".*"'

_TOKEN: Final = re.compile(
    r"""
      (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<comment>\#[^\n]*)
    | (?P<range>\[[^\]]*\])
    | (?P<braces>\{(?:[^{}"']|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')*\})
    | (?P<number>\d[\w.]*)
    | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
    | (?P<other>\s+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_LISTS: Final = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_WORDS: Final = _LISTS | {"and", "or", "unless", "bool", "offset", "atan2", "inf", "nan"}


def matcher(release: str) -> str:
    """The label matcher of one release; "" is the one without a name."""
    escaped = release.replace("\\", "\\\\").replace('"', '\\"')
    return f'{LABEL}="{escaped}"'


def matcher_of(releases: Iterable[str]) -> str:
    """The label matcher of some releases; of none, of every one."""
    names = sorted(set(releases))
    if len(names) < 2:  # noqa: PLR2004  # one needs no pattern
        return matcher(names[0]) if names else ANY
    # A dot is the only character of a name that a pattern reads as more than itself.
    return f'{LABEL}=~"{"|".join(name.replace(".", "[.]") for name in names)}"'


def scoped(expr: str, only: str) -> str:
    """PromQL with a matcher on every selector that has none for the label yet."""
    tokens = list(_tokens(expr))
    following = [kind for kind, _ in tokens[1:]] + [""]
    return "".join(_narrowed(*token, after, only) for token, after in zip(tokens, following, strict=True))


def _narrowed(kind: str, text: str, following: str, only: str) -> str:
    if kind == "braces" and LABEL not in text:
        inner = text[1:-1].strip().rstrip(",")
        return f"{{{inner},{only}}}" if inner else f"{{{only}}}"
    return f"{text}{{{only}}}" if kind == "metric" and following != "braces" else text


def groupings(expr: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """Every list of labels with the word before it: by, on, group_left and so on."""
    return tuple(
        (word, frozenset(label.strip() for label in labels[1:-1].split(",") if label.strip()))
        for word, labels in _lists(expr)
    )


def scope(labels: Mapping[str, str]) -> str:
    """The release that a series is of."""
    return labels.get(LABEL, "")


def _tokens(expr: str) -> Iterator[tuple[str, str]]:
    """Kinds and texts; a name that is a metric's is of kind `metric`, a list of labels is one token."""
    position = 0
    while position < len(expr):
        found = _TOKEN.match(expr, position)
        if found is None:
            raise ValueError(f"{expr!r} is no PromQL at {position}")
        kind, text = str(found.lastgroup), found.group()
        position = found.end()
        if kind == "name":
            rest = expr[position:].lstrip()
            if text.lower() in _LISTS and rest.startswith("("):
                end = expr.index(")", position) + 1
                yield "list", expr[found.start() : end]
                position = end
                continue
            kind = "word" if text.lower() in _WORDS or rest.startswith("(") or _aggregates(rest) else "metric"
        yield kind, text


def _aggregates(rest: str) -> bool:
    """Whether what follows makes the name before it an aggregation: sum by (…) (…)."""
    return re.match(r"(by|without)\s*\(", rest) is not None


def _lists(expr: str) -> Iterator[tuple[str, str]]:
    for kind, text in _tokens(expr):
        if kind == "list":
            word, _, labels = text.partition("(")
            yield word.strip(), f"({labels}"
