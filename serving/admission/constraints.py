"""What a request has its answer constrained by: schemas, patterns, grammars, tools that must be called.

Each has a bound in bytes, and all of a request together one in what they cost to compile (`serving.admission.
schema_cost`): the engine compiles before it computes, on the cores that all tenants share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from serving.admission import content, shapes
from serving.admission.complaints import decode, is_given, too_long
from serving.admission.schema_cost import SchemaCost
from serving.config import LimitsConfig
from serving.errors import BadRequest

# JSON schemas, grammars and the like, as they are compiled by the engine.
_SCHEMAS: Final = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "tool_choice",
    "text",
)
_any = msgspec.json.Decoder()
_structured_outputs = msgspec.json.Decoder(shapes.StructuredOutputs)
_string = msgspec.json.Decoder(str)
# With these no tool is forced on the model.
_FREE_CHOICES: Final = frozenset({b'"auto"', b'"none"'})


def states(found: shapes.Generation, limits: LimitsConfig) -> int:
    """What a request has compiled, in wide states of an automaton; raises BadRequest beyond a bound."""
    cost = SchemaCost()

    def add(param: str, count: Callable[[], None]) -> None:
        count()
        if cost.states > limits.schema_states:
            raise BadRequest(
                f"'{param}' takes too long to compile: about {cost.states} states of an automaton, where "
                f"{limits.schema_states} are allowed. Lengths and counted repetitions (maxLength, {{1,100}}) cost "
                "most, equal ones once; optional properties and parts of a pattern cost the square of their number.",
                code="schema_too_costly",
                param=param,
            )

    for name in _SCHEMAS:
        raw = getattr(found, name, shapes.ABSENT)
        if (size := len(bytes(raw))) > limits.schema_bytes:
            raise too_long(name, limits.schema_bytes, size)
    for name in ("response_format", "text", "guided_json"):
        if is_given(raw := getattr(found, name, shapes.ABSENT)):
            add(name, lambda raw=raw: cost.schema(_any.decode(raw), len(bytes(raw))))  # type: ignore[misc]
    for name, count in (("guided_regex", cost.pattern), ("guided_grammar", cost.grammar)):
        if is_given(raw := getattr(found, name)) and isinstance(text := _any.decode(raw), str):
            add(name, lambda count=count, text=text: count(text))  # type: ignore[misc]
    if is_given(found.structured_outputs):
        _structured(decode(_structured_outputs, found.structured_outputs, "structured_outputs"), cost, add, limits)
    if isinstance(found, shapes.Chat | shapes.Responses) and found.tools:
        chosen = is_given(found.tool_choice) and bytes(found.tool_choice) not in _FREE_CHOICES
        for i, tool in enumerate(found.tools):
            # Sizes are bounded beside this; a tool that the model may leave is no constraint, unless it is strict.
            if len(bytes(tool)) <= limits.schema_bytes and (chosen or b'"strict"' in bytes(tool)):
                add(f"tools[{i}]", lambda tool=tool: cost.schema(_any.decode(tool), len(bytes(tool))))  # type: ignore[misc]
    return cost.states


def _structured(
    outputs: shapes.StructuredOutputs,
    cost: SchemaCost,
    add: Callable[[str, Callable[[], None]], None],
    limits: LimitsConfig,
) -> None:
    at = "structured_outputs"
    texts = {"structural_tag": outputs.structural_tag}
    if bytes(outputs.json)[:1] == b'"':
        texts["json"] = decode(_string, outputs.json)
    elif is_given(outputs.json):
        add(f"{at}.json", lambda: cost.schema(_any.decode(outputs.json), len(bytes(outputs.json))))
    for name, text in texts.items():
        # JSON inside a string, which the engine parses again.
        if content.json_in_string(text, f"{at}.{name}", limits) and (value := _parsed(text)) is not None:
            add(f"{at}.{name}", lambda value=value, text=text: cost.schema(value, len(text)))  # type: ignore[misc]
    for name, found in (("regex", outputs.regex), ("whitespace_pattern", outputs.whitespace_pattern)):
        if found is not None:
            add(f"{at}.{name}", lambda found=found: cost.pattern(found))  # type: ignore[misc]
    if outputs.grammar is not None:
        grammar = outputs.grammar
        add(f"{at}.grammar", lambda: cost.grammar(grammar))
    if outputs.choice is not None:
        choices = outputs.choice
        add(f"{at}.choice", lambda: cost.choices(choices))


def _parsed(text: str | None) -> Any:
    """What JSON in a string says; None where it is none, which the engine refuses."""
    try:
        return _any.decode(text or "null")
    except (msgspec.DecodeError, UnicodeDecodeError, UnicodeEncodeError, RecursionError):
        return None
