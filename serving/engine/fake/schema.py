"""The smallest JSON value that a JSON schema admits, for answers that must follow one.

Handles type, enum, const, object properties, array items, lower and upper bounds of length and number,
anyOf/oneOf/allOf and local $refs. What it does not know (pattern, format, conditionals …) it ignores; a
schema without a known type gives null.
"""

from __future__ import annotations

import math
from typing import Any

# A schema that requires itself has no finite instance, and two such properties double at every level.
MAX_DEPTH = 32
MAX_VALUES = 4096
MAX_LENGTH = 4096

Schema = dict[str, Any] | bool


def instance(schema: Schema) -> Any:
    """A minimal instance: required properties only, as few items as allowed. Same schema, same value.

    Beyond the bounds above a value is null or too short. Raises ValueError for keywords of wrong types.
    """
    try:
        return _Builder(schema).build(schema, 0)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"not a JSON schema: {error}") from error


class _Builder:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._values_left = MAX_VALUES

    def build(self, schema: Any, depth: int) -> Any:
        self._values_left -= 1
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self._values_left < 0:
            return None
        if "$ref" in schema:
            return self.build(self._resolve(schema["$ref"]), depth + 1)
        for key in ("anyOf", "oneOf", "allOf"):
            if parts := schema.get(key):
                whole = {k: v for k, v in schema.items() if k != key}
                return self.build(self._merged(whole, parts if key == "allOf" else parts[:1]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][0]
        return self._by_type(schema, depth)

    def _by_type(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        if kind == "object":
            properties = schema.get("properties", {})
            required = schema.get("required", [])
            return {name: self.build(properties.get(name), depth + 1) for name in required}
        if kind == "array":
            fixed, items = schema.get("prefixItems", []), schema.get("items")
            number = min(int(schema.get("minItems", 0)), MAX_LENGTH)
            return [self.build(fixed[i] if i < len(fixed) else items, depth + 1) for i in range(number)]
        if kind == "string":
            text = "text"[: int(schema.get("maxLength", MAX_LENGTH))]
            return text.ljust(min(int(schema.get("minLength", 0)), MAX_LENGTH), "x")
        if kind in ("integer", "number"):
            return _number(schema, whole=kind == "integer")
        return False if kind == "boolean" else None

    def _merged(self, schema: dict[str, Any], parts: list[Any]) -> dict[str, Any]:
        """Schemas as one: properties and required names joined, other keywords by the last."""
        merged = schema
        for part in parts:
            resolved = part
            for _ in range(MAX_DEPTH):
                if not isinstance(resolved, dict) or "$ref" not in resolved:
                    break
                resolved = self._resolve(resolved["$ref"])
            if not isinstance(resolved, dict):
                continue
            properties = {**merged.get("properties", {}), **resolved.get("properties", {})}
            required = [*merged.get("required", []), *resolved.get("required", [])]
            merged = {**merged, **resolved}
            if properties:
                merged |= {"properties": properties, "required": list(dict.fromkeys(required))}
        return merged

    def _resolve(self, reference: Any) -> Any:
        """What a local reference ("#", "#/$defs/Name") points at; None where there is nothing."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        node: Any = self._root
        for part in reference[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return node


def _number(schema: dict[str, Any], *, whole: bool) -> float:
    """0 where the bounds admit it, else the multiple that is nearest to it and within them."""
    step = schema.get("multipleOf") or 1
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    low, high = max(schema.get("minimum", -math.inf), above), min(schema.get("maximum", math.inf), below)
    value: float = 0
    if low > 0 or above == 0:
        value = math.ceil(low / step) * step
        value += step if value <= above else 0
    elif high < 0 or below == 0:
        value = math.floor(high / step) * step
        value -= step if value >= below else 0
    if whole:
        return int(value)
    # Bounds with no whole number between them: the middle is within both, exclusive or not.
    return value if low <= value <= high and above < value < below else (low + high) / 2
