"""YAML whose values remember their lines, so that an error in a file can be found in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic_core import ErrorDetails
from yaml.constructor import SafeConstructor

from loadtest.errors import LoadtestError
from loadtest.strict import UNKNOWN_FIELD

# Far above any scenario; more is a mistake, and aliases could make it endless.
_MAX_VALUES = 20_000

_Place = tuple[str | int, ...]


@dataclass
class LinedValue:
    """What a YAML text says, with the line of every value."""

    name: str
    value: Any = None
    _lines: dict[_Place, int] = field(default_factory=dict)

    def sentence(self, error: ErrorDetails) -> str:
        """`file:line: field: what is wrong` for one of pydantic's errors about the value."""
        place: _Place = ()
        for part in error["loc"]:
            # Pydantic also names the chosen kind of a union, which stands nowhere in the file.
            if (*place, part) in self._lines:
                place = (*place, part)
        line = self._lines.get(place, 1)
        if error["type"] == UNKNOWN_FIELD:
            place = (*place, error["ctx"]["field"])
            line = self._lines.get(place, line)
        elif error["type"] == "missing":
            place = (*place, error["loc"][-1])
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        return f"{self.name}:{line}: {f'{dotted}: ' if dotted else ''}{error['msg'].removeprefix('Value error, ')}"

    def note(self, place: _Place, line: int) -> None:
        """Remember the line of a value, its key's where it has one."""
        if len(self._lines) >= _MAX_VALUES:
            raise LoadtestError(f"{self.name}:{line}: more than {_MAX_VALUES} values")
        self._lines.setdefault(place, line)


def read(text: str, name: str) -> LinedValue:
    """The value of a YAML text; raises LoadtestError with file and line for text that is not plain YAML."""
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise LoadtestError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise LoadtestError(f"{name}: not valid YAML: {error}") from None
    if root is None:
        raise LoadtestError(f"{name}: the file is empty")
    lined = LinedValue(name)
    lined.value = _value(root, (), lined, SafeConstructor())
    return lined


def _value(node: yaml.Node, place: _Place, lined: LinedValue, scalars: SafeConstructor) -> Any:
    line = node.start_mark.line + 1
    lined.note(place, line)
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*place, i), lined, scalars) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node.value, place, lined, scalars)
    try:
        return scalars.construct_object(node)
    except (yaml.YAMLError, ValueError):
        raise LoadtestError(f"{lined.name}:{line}: not a plain value; put it in quotes") from None


def _mapping(
    pairs: Sequence[tuple[yaml.Node, yaml.Node]], place: _Place, lined: LinedValue, scalars: SafeConstructor
) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for key, child in pairs:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise LoadtestError(f"{lined.name}:{line}: a key must be text; put it in quotes")
        if key.value in held:
            raise LoadtestError(f"{lined.name}:{line}: {key.value} stands twice")
        lined.note((*place, key.value), line)
        held[key.value] = _value(child, (*place, key.value), lined, scalars)
    return held
