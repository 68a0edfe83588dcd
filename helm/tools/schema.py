"""values.schema.json: closed, so that a misspelt value is refused and not ignored.

The part below `config` is Galerne's own configuration model, as pydantic describes it, without what pods decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from helm.tools.values import Value
from serving.config import GalerneConfig

DRAFT = "http://json-schema.org/draft-07/schema#"
DEFINITIONS = Path(__file__).with_name("definitions.yaml")
CONFIG = "GalerneConfig"
# Pods listen where the chart's Services look, and public keys have no place in a cluster.
DECIDED_BY_THE_CHART = ("listen", "demo_keys", "tenants_file")
ASKED_FOR_BY_TEMPLATES = ("models", "tenants")
# Read from text too, which pydantic's description of a validated integer does not say.
TIMES_OF_DAY = ("from", "to")
_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)


def schema(values: tuple[Value, ...]) -> dict[str, Any]:
    """The whole document."""
    defs: dict[str, Any] = yaml.safe_load(DEFINITIONS.read_text()) | _config()
    properties: dict[str, Any] = {}
    for value in values:
        described = _schema(value)
        if value.definition:
            defs[value.definition] = described
            described = {"$ref": f"#/$defs/{value.definition}"}
        properties[value.path[-1]] = described
    # Helm adds it for charts that have this one among their parts.
    properties["global"] = {"type": "object"}
    return {
        "$schema": DRAFT,
        "title": "Values of the Galerne chart",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": dict(sorted(defs.items())),
    }


def _schema(value: Value) -> dict[str, Any]:
    found: dict[str, Any] = {"description": value.text} if value.text else {}
    if "$ref" in value.narrowing:
        # Validators of draft 7 ignore what stands beside a reference; editors show it.
        return found | value.narrowing | {"default": value.default}
    if value.children:
        return found | {
            "type": "object",
            "additionalProperties": False,
            "properties": {child.path[-1]: _schema(child) for child in value.children},
        }
    return found | {"type": _type(value.default)} | value.narrowing | {"default": value.default}


def _type(default: Any) -> str:
    return next(name for kind, name in _TYPES if isinstance(default, kind))


def _config() -> dict[str, Any]:
    """Galerne's configuration and its parts, as definitions."""
    described = GalerneConfig.model_json_schema(ref_template="#/$defs/{model}")
    parts: dict[str, Any] = described.pop("$defs")
    for name in DECIDED_BY_THE_CHART:
        described["properties"].pop(name, None)
    parts = {name: part for name, part in parts.items() if name != "ListenConfig"}
    # What is missing is asked for by the templates, in words.
    described.pop("required", None)
    for name in ASKED_FOR_BY_TEMPLATES:
        described["properties"][name].pop("minItems")
    for part in parts.values():
        for name in TIMES_OF_DAY:
            if name in part.get("properties", {}):
                part["properties"][name] = {"type": ["integer", "string"]}
    return {name: _without_titles(part) for name, part in (parts | {CONFIG: described}).items()}


def _without_titles(part: Any) -> Any:
    """Pydantic's titles repeat the names."""
    if isinstance(part, dict):
        return {k: _without_titles(v) for k, v in part.items() if not (k == "title" and isinstance(v, str))}
    if isinstance(part, list):
        return [_without_titles(item) for item in part]
    return part
