"""What a schema costs to compile is known from its text: ordinary ones pass, small ones that take minutes do not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.bounds import BodyKind, RequestFacts, read
from serving.admission.schema_cost import SchemaCost
from serving.config import LimitsConfig
from serving.errors import BadRequest

LIMITS = LimitsConfig()
TEXT = {"type": "string"}


def fields(properties: dict[str, Any], *, required: bool = True, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties} | more
    return found | {"required": list(properties)} if required else found


def chat(**more: Any) -> RequestFacts:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | more
    return read(BodyKind.CHAT, json.dumps(body).encode(), LIMITS)


def formatted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tool(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema} | more}


ORDINARY = {
    "a model of 100 fields": fields({f"field_{i}": {"title": f"Field {i}", "type": "string"} for i in range(100)}),
    "100 nullable fields with defaults": fields(
        {f"f{i}": {"anyOf": [TEXT, {"type": "null"}], "default": None} for i in range(100)}, required=False
    ),
    "a text of 2000": fields({"body": {"type": "string", "maxLength": 2000}}),
    "a title and a text": fields({"title": TEXT | {"maxLength": 200}, "text": TEXT | {"maxLength": 2000}}),
    "20 names of up to 255": fields({f"name_{i}": TEXT | {"maxLength": 255} for i in range(20)}),
    "an enum of 200": {"enum": [f"value {i}" for i in range(200)]},
    "a list of 1000 texts": {"type": "array", "items": TEXT, "maxItems": 1000, "minItems": 1},
    "a union of 20 objects": {"anyOf": [fields({"kind": {"const": f"k{i}"}, "v": TEXT}) for i in range(20)]},
    "a tree": {"$defs": {"n": fields({"c": {"type": "array", "items": {"$ref": "#/$defs/n"}}})}, "$ref": "#/$defs/n"},
    "formats": fields({f: TEXT | {"format": f} for f in ("date-time", "email", "uuid", "uri", "ipv4")}),
    "a phone number": TEXT | {"pattern": r"^(\+?\d{1,3}[ -]?)?\(?\d{3}\)?[ -]?\d{3}[ -]?\d{4}$"},
    "a date": TEXT | {"pattern": r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?(Z|[+-]\d{2}:?\d{2})?)?$"},
    "a property of any name": {"type": "object", "additionalProperties": {"type": "number"}},
    "properties named like keywords": fields({"maxLength": TEXT, "pattern": TEXT, "properties": TEXT, "enum": TEXT}),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_schemas_pass(name: str) -> None:
    schema = ORDINARY[name]
    found = chat(**formatted(schema))
    assert 0 < found.schema_states <= LIMITS.schema_states
    assert chat(structured_outputs={"json": schema}).schema_states > 0
    assert chat(tools=[tool(schema)], tool_choice="required").schema_states > 0


# Each took the compiler seconds to minutes of all cores (`python -m tests.benches.schemas`).
COSTLY = {
    "three texts": fields({f"f{i}": TEXT | {"maxLength": 1000 + i} for i in range(3)}),
    "long at least": fields({f"f{i}": TEXT | {"minLength": 10**8 + i} for i in range(3)} | {"g": {"minLength": 1e9}}),
    "a union of lengths": {"anyOf": [TEXT | {"maxLength": i} for i in range(1, 50)]},
    "1800 properties": fields({f"f{i}": {} for i in range(1800)}, required=False),
    "600 of an open object": fields({f"f{i}": TEXT for i in range(600)}, additionalProperties=True),
    "10,000 classes": TEXT | {"pattern": "[a-z]" * 10_000},
    "wide repetition": TEXT | {"pattern": "(.{1,100}x){1,100}"},
    "a row that may be left out": TEXT | {"pattern": ".?" * 100},
    "the same in groups": TEXT | {"pattern": "(.|)" * 100},
    "keys": {"type": "object", "patternProperties": {f"^.{{{i},200}}$": {} for i in range(5)}},
}


@pytest.mark.parametrize("name", COSTLY)
def test_small_schemas_that_take_minutes_are_refused(name: str) -> None:
    schema = COSTLY[name]
    for more in (
        formatted(schema),
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"structured_outputs": {"structural_tag": json.dumps({"structures": [{"begin": "a", "schema": schema}]})}},
        {"tools": [tool(schema)], "tool_choice": "required"},
        {"tools": [tool(schema)], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [tool(schema, strict=True)]},
    ):
        with pytest.raises(BadRequest) as caught:
            chat(**more)
        assert caught.value.code in {"schema_too_costly", "string_above_max_length"}, caught.value.message
        assert caught.value.param is not None
        assert caught.value.param.split(".")[0].split("[")[0] in more


def test_a_tool_that_the_model_may_leave_is_not_compiled() -> None:
    for more in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": None}):
        assert chat(tools=[tool(COSTLY["three texts"])], **more).schema_states == 0


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": ".{1,300}.{1,300}x.{1,300}"},
        {"regex": ".?" * 60},
        {"whitespace_pattern": "[^x]{1,300}" * 3},
        {"grammar": "root ::= " + "a? " * 60 + '\na ::= [^"]'},
        {"grammar": "root ::= a{1,250} b{1,250} a{1,250}\na ::= [^\"]\nb ::= [^']"},
        {"grammar": "start: a ~ 1..250 b ~ 1..250 a~250\na: /[^x]/\nb: /./"},
        {"choice": ["x" * 1000] * 70},
    ],
)
def test_other_constraints_have_the_same_bound(constraint: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(structured_outputs=constraint)
    assert caught.value.code in {"schema_too_costly", "string_above_max_length"}


def test_a_request_has_one_budget() -> None:
    half = {"type": "string", "maxLength": 250}
    assert chat(**formatted(half)).schema_states <= 256
    with pytest.raises(BadRequest):
        chat(**formatted(half), structured_outputs={"regex": ".{1,300}x"}, guided_regex=".{1,90}")


def test_responses_have_it_too() -> None:
    body = {"model": "m", "input": "x", "text": {"format": {"type": "json_schema", "schema": COSTLY["three texts"]}}}
    with pytest.raises(BadRequest) as caught:
        read(BodyKind.RESPONSES, json.dumps(body).encode(), LIMITS)
    assert (caught.value.code, caught.value.param) == ("schema_too_costly", "text")


PATTERN = st.text(st.sampled_from(list("ab.[]^-\\()|?*+{}1,9 \"'~:=\n")), max_size=60)


@settings(max_examples=300)
@given(PATTERN)
def test_any_text_has_a_cost(text: str) -> None:
    cost = SchemaCost()
    cost.pattern(text)
    cost.grammar(text)
    assert cost.states >= 0


def test_the_estimate_is_linear_in_the_text() -> None:
    # Whatever is nested: the largest text that passes is read in far less than a request's own time.
    for text in ("(" * 32768 + ")" * 32768, "[^" * 32768, "a?" * 32768, "{1,9}" * 13000, "(a|" * 20000, "~" * 65536):
        began_s = time.process_time()
        SchemaCost().pattern(text)
        SchemaCost().grammar(text)
        assert time.process_time() - began_s < 5
