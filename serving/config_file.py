"""Reads the configuration file, and says of every mistake where it is and what is allowed instead.

Promises: a file that cannot be used is a ConfigError with one line for each problem, such as
`demo.yaml:12: models[0].engin: unknown field; did you mean 'engine'? allowed: …`. Values are not repeated in
them, model names aside, because a secret may stand in the wrong place. A hostile or broken file costs bounded
time and memory.

YAML 1.1 as PyYAML's safe loader reads it (libyaml's, ten times the speed), but: a key stands once in a
mapping, keys are strings, anchors and aliases expand within bounds, and there is no merge key (`<<`).
Environment variables are not interpolated.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.reader import Reader

from serving.config import ENV_RELEASE, MODEL_ID, NAME, SHA256, GalerneConfig, Misplaced
from serving.config.live import LIVE
from serving.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024
# Values after aliases are expanded; a cluster of a thousand tenants has fewer.
MAX_VALUES = 100_000
MAX_DEPTH = 32


Path_ = tuple[str | int, ...]

_PATTERNS: Final = {
    MODEL_ID: "letters, digits, '.', '_' and '-', with at most one '/' inside",
    NAME: "1 to 63 lower-case letters, digits and '-', without '-' at either end",
    SHA256: "the 64 lower-case hexadecimal digits that 'galerne keys' prints, in quotes",
}
# By pydantic's error type; the braces are filled from the error's context.
_SENTENCES: Final = {
    "missing": "is missing",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must not be empty",
    "value_error": "{error}",
    "ip_any_network": "must be a network such as 10.20.0.0/16 or 2001:db8::/32, without bits beyond its length",
}
# What a field takes, by the first word of pydantic's error type; and what the file gives.
_ALLOWED: Final = {
    "int": "an integer",
    "float": "a number",
    "string": "text (put it in quotes)",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "date": "a date such as 2027-01-31",
}
_GIVEN: Final[dict[type, str]] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "empty",
}
_YAML_HINTS: Final = {
    "cannot start any token": "a character that YAML reserves; quote the value, indent with spaces",
    "mapping values are not allowed": "a ':' where no key can stand; check the indentation or quote it",
    "could not find expected ':'": "a key without ':', or wrong indentation",
    "did not find expected key": "a key without ':', or wrong indentation",
    "did not find expected '-' indicator": "wrong indentation",
    "expected a single document": "a second document; one file holds one configuration",
    "undefined alias": "an alias ('*name') without its anchor ('&name') above it",
}


def load(path: Path, environment: Mapping[str, str] = os.environ) -> GalerneConfig:
    """The configuration in a file, with the environment's name of the release where it has none; raises ConfigError."""
    config = parse(_text(path), str(path))
    named = environment.get(ENV_RELEASE, "")
    return config if config.release or not named else config.model_copy(update={"release": named})


@dataclass(frozen=True, slots=True)
class Located:
    """Where something stands."""

    file: str
    line: int


def locate(path: Path, config: GalerneConfig, where: Path_) -> Located:
    """The file and line of a part of a configuration that was loaded from `path`."""
    file = parts(path, config.tenants_file)[-1] if where[0] in LIVE else path
    reader, _ = _mapping(_text(file), str(file), "a configuration is a mapping")
    if not reader.has(where):
        file = path
        reader, _ = _mapping(_text(file), str(file), "a configuration is a mapping")
    return Located(str(file), reader.line(where))


def parts(path: Path, tenants_file: str | None) -> tuple[Path, ...]:
    """The files a configuration is made of; `tenants_file` is relative to the first."""
    return (path,) if tenants_file is None else (path, path.parent / tenants_file)


def _text(path: Path) -> str:
    name = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError((f"{name}: there is no such file",)) from None
    except IsADirectoryError:
        raise ConfigError((f"{name}: this is a directory; name the YAML file in it",)) from None
    except OSError as error:
        raise ConfigError((f"{name}: cannot be read: {error.strerror}",)) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError((f"{name}: larger than {MAX_FILE_BYTES} bytes",))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError((f"{name}:{line}: not UTF-8 text; save the file as UTF-8",)) from None


def parse(text: str, name: str) -> GalerneConfig:
    """The configuration in a YAML text; `name` stands before each problem. Raises ConfigError."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError((f"{name}: larger than {MAX_FILE_BYTES} bytes",))
    reader, value = _mapping(text, name, "a configuration is a mapping ('models: …')")
    beside: _NodeReader | None = None
    if isinstance(file := value.get("tenants_file"), str):
        beside, found = _beside(Path(name), file, reader, value)
        value |= found
    try:
        return GalerneConfig.model_validate(value)
    except ValidationError as error:
        # A list whose items are all wrong is reported as empty, too; the items say more.
        details = [d for d in error.errors(include_url=False) if d["type"] != "too_short" or not d["input"]]
        problems = []
        for detail in details:
            where = _where(detail)
            source = beside if beside is not None and beside.has(where) else reader
            problems.append((source is beside, source.line(where), f"{source.name}:", _problem(detail)))
        raise ConfigError(tuple(f"{at}{line}: {text}" for _, line, at, text in sorted(problems))) from None


def _mapping(text: str, name: str, form: str) -> tuple[_NodeReader, dict[str, Any]]:
    root = _compose(text, name)
    if root is None:
        raise ConfigError((f"{name}: the file is empty; a configuration has at least 'models' and 'tenants'",))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError((f"{name}:{root.start_mark.line + 1}: {form}, not {_kind(root)}",))
    reader = _NodeReader(name)
    value = reader.value(root, ())
    if reader.problems:
        raise ConfigError(tuple(reader.problems))
    return reader, value


def _beside(path: Path, file: str, main: _NodeReader, value: dict[str, Any]) -> tuple[_NodeReader, dict[str, Any]]:
    """What `tenants_file` holds, and where; a part stands in one of both files."""
    at = f"{main.name}:{main.line(('tenants_file',))}: tenants_file"
    other = parts(path, file)[-1]
    try:
        text = _text(other)
    except ConfigError as error:
        raise ConfigError(tuple(f"{at}: {problem}" for problem in error.problems)) from None
    reader, found = _mapping(text, str(other), "a file of tenants is a mapping ('tenants: …')")
    problems = [
        f"{reader.name}:{reader.line((part,))}: {part}: unknown field; allowed: {', '.join(LIVE)}"
        for part in found
        if part not in LIVE
    ]
    problems += [
        f"{reader.name}:{reader.line((part,))}: {part}: stands in {main.name}:{main.line((part,))}, too; keep one"
        for part in LIVE
        if part in found and part in value
    ]
    if problems:
        raise ConfigError(tuple(problems))
    return reader, found


def _compose(text: str, name: str) -> yaml.Node | None:
    if bad := Reader.NON_PRINTABLE.search(text):
        line, column = _position(text, bad.start())
        raise ConfigError((f"{name}:{line}:{column}: a control character, which YAML does not allow",))
    try:
        # Bounds first, on the flat stream of events: composing recurses.
        depth = 0
        for count, event in enumerate(yaml.parse(text, Loader=yaml.CSafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or count > 2 * MAX_VALUES:
                line = 1 if event.start_mark is None else event.start_mark.line + 1
                limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_VALUES} values"
                raise ConfigError((f"{name}:{line}: the file holds more than {limit}",))
        return yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError((f"{name}{_yaml_mark(error)}: {_yaml_sentence(error, text)}",)) from None


def _position(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _yaml_mark(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"


def _yaml_sentence(error: yaml.MarkedYAMLError, text: str) -> str:
    lines = text.splitlines()
    mark = error.problem_mark
    if mark is not None and mark.line < len(lines):
        line = lines[mark.line]
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return "a tab in the indentation; YAML is indented with spaces"
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    hint = next((hint for sign, hint in _YAML_HINTS.items() if sign in problem), problem)
    return f"not valid YAML: {hint}"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a single value"


@dataclass
class _NodeReader:
    """Turns nodes into values and remembers the line of each path."""

    name: str
    problems: list[str] = field(default_factory=list)
    _lines: dict[Path_, int] = field(default_factory=dict)
    _values: int = 0
    _scalars: SafeConstructor = field(default_factory=SafeConstructor)

    def line(self, where: Path_) -> int:
        """The line of a path, or of the nearest one above it that the file has; 1-based."""
        while where and where not in self._lines:
            where = where[:-1]
        return self._lines.get(where, 1)

    def has(self, where: Path_) -> bool:
        """Whether this file is where a path stands, or would."""
        return where[:1] in self._lines and bool(where)

    def value(self, node: yaml.Node, where: Path_) -> Any:
        self._lines.setdefault(where, node.start_mark.line + 1)
        self._values += 1
        if self._values > MAX_VALUES or len(where) > MAX_DEPTH:
            # Only aliases get here; the file itself was counted before.
            self._refuse(node, where, f"aliases expand to more than {MAX_VALUES} values or {MAX_DEPTH} levels")
            raise ConfigError(tuple(self.problems))
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(child, (*where, key)) for key, child in self._pairs(node, where)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*where, i)) for i, child in enumerate(node.value)]
        try:
            return self._scalars.construct_object(node)
        except (ConstructorError, ValueError):
            # A tag that is not YAML's own, or a value that does not fit the tag it looks like (2027-13-45).
            self._refuse(node, where, "not a plain value: remove the tag ('!…'), or put the value in quotes")
            return None

    def _pairs(self, node: yaml.MappingNode, where: Path_) -> Iterator[tuple[str, yaml.Node]]:
        own: dict[str, int] = {}
        for key, child in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                self._refuse(key, where, "'<<' is not supported: it hides which value counts; repeat them")
                continue
            if key.tag != "tag:yaml.org,2002:str":
                self._refuse(key, where, "a key must be text; put it in quotes")
                continue
            if key.value in own:
                first = own[key.value]
                self._refuse(key, (*where, key.value), f"stands twice; it was first given in line {first}")
                continue
            own[key.value] = key.start_mark.line + 1
            self._lines.setdefault((*where, key.value), key.start_mark.line + 1)
            yield key.value, child

    def _refuse(self, node: yaml.Node, where: Path_, sentence: str) -> None:
        at = f"{_dotted(where)}: " if where else ""
        self.problems.append(f"{self.name}:{node.start_mark.line + 1}: {at}{sentence}")


def _dotted(where: Path_) -> str:
    """`("models", 0, "id")` as `models[0].id`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")


def _where(detail: ErrorDetails) -> Path_:
    cause = detail.get("ctx", {}).get("error")
    return (*detail["loc"], *cause.where) if isinstance(cause, Misplaced) else detail["loc"]


def _problem(detail: ErrorDetails) -> str:
    where = _where(detail)
    at = f"{_dotted(where)}: " if where else ""
    return at + _sentence(detail, where)


def _sentence(detail: ErrorDetails, where: Path_) -> str:
    context = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "extra_forbidden":
        # A field is named as the file names it: `from` is no name in Python.
        fields = sorted(field.alias or name for name, field in _model_at(where[:-1]).model_fields.items())
        close = difflib.get_close_matches(str(where[-1]), fields, n=1)
        guess = f"did you mean '{close[0]}'? " if close else ""
        return f"unknown field; {guess}allowed: {', '.join(fields)}"
    if kind == "string_pattern_mismatch":
        return f"must be {_PATTERNS.get(context['pattern'], 'text of the form ' + context['pattern'])}"
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(**context)
    if allowed := _ALLOWED.get(kind.split("_")[0]):
        return f"must be {allowed}, but it is {_GIVEN.get(type(detail['input']), 'something else')}"
    return detail["msg"]


def _model_at(where: Path_) -> type[BaseModel]:
    """The configuration model at a path of the file."""
    model: type[BaseModel] = GalerneConfig
    for part in where:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
