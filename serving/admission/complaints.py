"""The sentences that refuse a request, in OpenAI's wording and with OpenAI's codes.

Every sentence names the field and the limit; none repeats the client's value, which may be private or huge.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from serving.errors import BadRequest

T = TypeVar("T")

_ABSENT = msgspec.Raw(b"")
_NULL = msgspec.Raw(b"null")
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"Expected `([a-z |]+)`, got `(\w+)`")
_BOUND = re.compile(r"Expected `(\w+)` (?:of length )?(>=|<=|>|<) (\S+)")
_WHERE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_BYTE = re.compile(r"\(byte (\d+)\)$")
_BOUND_WORDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
# JavaScript's and Python's non-numbers, which JSON does not have but many encoders write.
_NON_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"nan", b"inf")


def decode(decoder: msgspec.json.Decoder[T], text: bytes | msgspec.Raw, at: str = "") -> T:
    """Decode or raise BadRequest; `at` is the field that `text` was taken from ("" for the whole body)."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), at) from None
    except msgspec.DecodeError as error:
        raise _not_json(str(error), bytes(text)) from None
    except UnicodeDecodeError:
        raise BadRequest("The request body is not valid UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The request body nests lists and objects too deep.", code="json_too_deep") from None


def missing(param: str) -> BadRequest:
    return BadRequest(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)


def unsupported(param: str, reason: str) -> BadRequest:
    return BadRequest(f"'{param}' is not supported: {reason}.", code="unsupported_parameter", param=param)


def above(param: str, limit: int, got: int) -> BadRequest:
    return BadRequest(
        f"Invalid '{param}': expected a value of at most {limit}, but got {got}.",
        code="integer_above_max_value",
        param=param,
    )


def too_many(param: str, limit: int, got: int, what: str = "elements") -> BadRequest:
    return BadRequest(
        f"Invalid '{param}': expected at most {limit} {what}, but got {got}.",
        code="array_above_max_length",
        param=param,
    )


def too_long(param: str, limit: int, got: int) -> BadRequest:
    return BadRequest(
        f"Invalid '{param}': expected at most {limit} bytes, but got {got}.",
        code="string_above_max_length",
        param=param,
    )


def _wrong_type(message: str, at: str) -> BadRequest:
    where = _WHERE.search(message)
    inner = where.group(1) if where else ""
    dot = "." if at and inner and not inner.startswith("[") else ""
    param = at + dot + inner
    if match := _EXPECTED.search(message):
        expected = [t for t in match.group(1).split(" | ") if t != "null"]
        words = " or ".join(_TYPES.get(t, t) for t in expected)
        got = _TYPES.get(match.group(2), match.group(2))
        if not param:
            return BadRequest(f"The request body must be a JSON object, but it is {got}.", code="invalid_type")
        return BadRequest(
            f"Invalid type for '{param}': expected {words}, but got {got} instead.",
            code="invalid_type",
            param=param,
        )
    if match := _BOUND.search(message):
        kind, operator, limit = match.groups()
        unit = " characters" if "of length" in message and kind == "str" else ""
        expectation = f"{_TYPES.get(kind, kind)} of {_BOUND_WORDS[operator]} {limit}{unit}"
        return BadRequest(
            f"Invalid '{param}': expected {expectation}.",
            code=f"{_code_noun(kind)}_{'below_min' if operator[0] == '>' else 'above_max'}_value",
            param=param,
        )
    # What remains are numbers that no machine type holds ("Number out of range").
    return BadRequest(f"Invalid '{param}': the number is out of range.", code="invalid_value", param=param)


def _code_noun(kind: str) -> str:
    return {"int": "integer", "float": "decimal"}.get(kind, "string")


def _not_json(message: str, text: bytes) -> BadRequest:
    reason = message.removeprefix("JSON is malformed: ")
    if byte := _BYTE.search(message):
        position = int(byte.group(1))
        near = text[max(0, position - 1) : position + 9]
        if text.startswith(b"\xef\xbb\xbf"):
            reason = "it starts with a byte order mark"
        elif any(word in near for word in _NON_NUMBERS):
            reason += "; NaN and Infinity are not JSON"
    elif "truncated" in message:
        reason = "it ends too early"
    if b"\\ud" in text or b"\\uD" in text:
        reason += ", or an unpaired surrogate (\\ud800 to \\udfff) stands in a string"
    return BadRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json")


def is_given(raw: msgspec.Raw) -> bool:
    """Whether a field was sent with a value: null is the same as absent, as in the engine."""
    return raw not in (_ABSENT, _NULL)
