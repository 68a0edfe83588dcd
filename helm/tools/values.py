"""Reads a commented values.yaml: every value with its default, what is said above it, and its narrowing.

The file is the only source; `schema` and `table` make the schema and README's table of what is read here. A value
without a comment, or whose default does not show its type (an empty list or mapping) and that has no `+schema:`, is
refused, so that neither output has a gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SCHEMA = "+schema:"
DEFINE = "+define:"


class ValuesError(Exception):
    """The file cannot be documented as it stands; the message names the line."""


@dataclass(frozen=True)
class Value:
    """One value; `children` where its default is a mapping that is described key by key."""

    path: tuple[str, ...]
    default: Any
    text: str
    narrowing: dict[str, Any]
    definition: str | None
    children: tuple[Value, ...]


def read(path: Path) -> tuple[Value, ...]:
    """Every top-level value, in the file's order; raises ValuesError."""
    text = path.read_text()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValuesError(f"{path}: not a mapping")
    return tuple(_values(root, (), text.splitlines(), path))


def _values(node: yaml.MappingNode, parent: tuple[str, ...], lines: list[str], file: Path) -> Iterator[Value]:
    for key, child in node.value:
        path = (*parent, str(key.value))
        comment = _comment_above(lines, key.start_mark.line)
        prose = " ".join(line for line in comment if not line.startswith("+"))
        marks = {word: rest for word, _, rest in (line.partition(" ") for line in comment if line.startswith("+"))}
        narrowing = yaml.safe_load(marks.get(SCHEMA, "{}")) or {}
        default = yaml.safe_load(yaml.serialize(child))
        described = isinstance(child, yaml.MappingNode) and child.value and not narrowing
        at = f"{file}:{key.start_mark.line + 1}: {'.'.join(path)}"
        if not prose and not described:
            raise ValuesError(f"{at} has no comment above it")
        if default in ({}, []) and not narrowing:
            raise ValuesError(f"{at}: an empty default shows no type; add `# {SCHEMA} {{…}}`")
        children = tuple(_values(child, path, lines, file)) if described else ()
        yield Value(path, default, prose, narrowing, marks.get(DEFINE), children)


def _comment_above(lines: list[str], line: int) -> list[str]:
    """The block of comment lines right above, without their signs."""
    found: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().removeprefix("#").strip())
    return found
