"""What an engine refuses, in OpenAI's words: one pure function from its status and body to an error of this API.

vLLM answers a bad request with `{"error": {"message", "type": "BadRequestError", "param", "code": 400}}`: the code is a
number, the message may hold pydantic's Python dicts, exception suffixes such as `(parameter=top_p, value=0.0)` or flags
of its command line. Typed clients cannot decode the first, and the rest is nobody's business.

Promises: `code` is a text and never empty; `param` is the field as the client spells it, where the engine names one; a
message that is known is told in OpenAI's own words, so that clients which match on them work (a conversation that does
not fit any more is cut by many agents on `context_length_exceeded`); one that is not known keeps its sentence, without
paths, addresses, class names, URLs and settings of the engine; nothing raises, whatever the body.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, get_args

import msgspec

from serving.admission import shapes
from serving.errors import BadRequest, NotFound, PayloadTooLarge, RequestError, UpstreamFailed

# Of an engine's refusal so much is read; what it echoes of the request may be as long as the request.
MOST_BYTES: Final = 64 * 1024
# A message is cut here: a sentence is far shorter.
MOST_CHARACTERS: Final = 500
UNKNOWN: Final = "The engine refused the request."
INVALID: Final = "invalid_value"
CONTEXT: Final = "context_length_exceeded"
NOT_FOUND, TOO_LARGE, NOT_IMPLEMENTED = 404, 413, 501
# What the engine says to the gateway, not to the client: the gateway asked in a wrong way.
GATEWAYS_OWN: Final = frozenset({401, 403, 405, 407, 408, 411, 415, 421, 426, 431})

# What the prompt is called on each route.
PROMPTS: Final = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
    "/v1/rerank": "documents",
    "/v1/score": "text_2",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}
# Names of the engine's own for what a client wrote elsewhere.
_PROMPT_NAMES: Final = frozenset({"input_tokens", "input_text", "prompt_token_ids"})
_OTHER_NAMES: Final = {
    ("/v1/responses", "max_tokens"): "max_output_tokens",
    ("/v1/responses", "logprobs"): "top_logprobs",
    ("/v1/chat/completions", "logprobs"): "top_logprobs",
}
# Fields that the engine names at the head of its sentence alone.
_FIELDS: Final = frozenset(name for kind in get_args(shapes.AnyBody) for name in kind.__struct_fields__)


class _Error(msgspec.Struct):
    message: Any = None
    param: Any = None
    code: Any = None


class _Body(msgspec.Struct):
    error: _Error | None = None
    # Starlette's own.
    detail: Any = None


_body = msgspec.json.Decoder(_Body)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An engine's refusal: what the client hears, and whether `max_tokens` alone is in the way."""

    error: RequestError
    # The prompt may fit: it is the answer asked for that does not.
    answer_too_long: bool = False


def translated(status: int, body: bytes, path: str) -> Refusal:
    """The refusal that an engine's answer of 4xx on this route is."""
    found = _decoded(body)
    message = found.message if isinstance(found.message, str) else ""
    param = _param(found.param if isinstance(found.param, str) else None, path)
    if status in GATEWAYS_OWN:
        return Refusal(UpstreamFailed("The engine did not take the request from the gateway."))
    for pattern, rule in _RULES:
        if (match := pattern.search(message)) is not None:
            return rule(match, param, path)
    if param is None and (match := _HEAD.match(message)) is not None and match["name"] in _FIELDS:
        param = match["name"]
    return Refusal(_plain(status, message, param))


def event_status(event: bytes) -> int | None:
    """The status that an error event of a stream (`data: {"error": …}`) carries; None where it is no such event."""
    code = _decoded(_line(event)).code
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600 else None  # noqa: PLR2004


def of_event(event: bytes, path: str) -> Refusal:
    """The refusal in an error event of a stream."""
    return translated(event_status(event) or BadRequest.status, _line(event), path)


def _line(event: bytes) -> bytes:
    return event.removeprefix(b"data: ").partition(b"\n")[0]


def _decoded(body: bytes) -> _Error:
    try:
        found = _body.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Perhaps longer than what was read of it: its sentence comes first.
        begun = _BEGUN.match(body)
        return _Error() if begun is None else _Error(message=_text(begun[1]))
    return found.error or _Error(message=found.detail)


def _text(escaped: bytes) -> str | None:
    try:
        return msgspec.json.decode(b'"%b"' % escaped, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _plain(status: int, message: str, param: str | None) -> RequestError:
    sentence = told(message) or UNKNOWN
    if status == NOT_FOUND:
        return NotFound(sentence, code="model_not_found" if param == "model" else None, param=param)
    if status == TOO_LARGE:
        return PayloadTooLarge(sentence, param=param)
    return BadRequest(sentence, code=INVALID, param=param)


# -- messages that are known


def _context(match: re.Match[str], param: str | None, path: str) -> Refusal:
    limit, output, unit = int(match["limit"]), int(match["output"] or 0), match["unit"] or "tokens"
    prompt, least = int(match["prompt"]), bool(match["least"]) or unit != "tokens"
    name = PROMPTS.get(path, param or "prompt")
    if unit != "tokens":
        asked = f"your {name} resulted in more tokens than that"
    elif output:
        more = "at least " if least else ""
        asked = (
            f"you requested {more}{prompt + output} tokens ({more}{prompt} in the {name}, {output} in the completion)"
        )
    else:
        asked = f"your {name} resulted in {'at least ' if least else ''}{prompt} tokens"
    what = f"the {name} or completion" if output else f"the {name}"
    error = BadRequest(
        f"This model's maximum context length is {limit} tokens. However, {asked}. Please reduce the length of {what}.",
        code=CONTEXT,
        param=name,
    )
    # "At least" and characters are counted against the room that the answer leaves.
    return Refusal(error, answer_too_long=bool(output) and (least or prompt < limit))


def _answer_alone(match: re.Match[str], _param: str | None, _path: str) -> Refusal:
    name, asked, limit = match["name"], int(match["asked"]), int(match["limit"])
    error = BadRequest(
        f"Invalid '{name}': this model's maximum context length is {limit} tokens, but {asked} were requested "
        "for the completion alone.",
        code=CONTEXT,
        param=name,
    )
    return Refusal(error, answer_too_long=True)


def _too_long(match: re.Match[str], param: str | None, path: str) -> Refusal:
    name = PROMPTS.get(path, param or "prompt")
    error = BadRequest(
        f"This model's maximum context length is {match['limit']} tokens. However, your {name} resulted in "
        f"{match['prompt']} tokens. Please reduce the length of the {name}.",
        code=CONTEXT,
        param=name,
    )
    return Refusal(error)


def _prompt(match: re.Match[str], _param: str | None, path: str) -> Refusal:
    return Refusal(BadRequest(told(match.string), code=INVALID, param=PROMPTS.get(path)))


def _unsupported(match: re.Match[str], _param: str | None, _path: str) -> Refusal:
    return Refusal(BadRequest(told(match.string), code="unsupported_parameter", param=match["name"]))


def _no_model(match: re.Match[str], _param: str | None, _path: str) -> Refusal:
    return Refusal(NotFound(f"The model '{match['model']}' does not exist.", code="model_not_found", param="model"))


def _no_tools(_match: re.Match[str], _param: str | None, _path: str) -> Refusal:
    return Refusal(
        BadRequest(
            "This model is not set up to choose tools by itself. Name a function in 'tool_choice', or ask the operator "
            "to set a tool parser for the model.",
            code="unsupported_parameter",
            param="tool_choice",
        )
    )


_KINDS: Final = {"missing": "missing_required_parameter", "json_invalid": "invalid_json", "extra_forbidden": INVALID}


def _validation(match: re.Match[str], param: str | None, _path: str) -> Refusal:
    """Pydantic's: the first error's kind and message, as Python writes a dict."""
    kind, sentence = match["kind"], match["msg"]
    if sentence[:1] in {"'", '"'} and sentence[:1] == sentence[-1:]:
        sentence = _unquoted(sentence)
    code = _KINDS.get(kind) or ("invalid_type" if kind.endswith(("_type", "_parsing")) else INVALID)
    sentence = told(sentence.removeprefix("Value error, ").removeprefix("Assertion failed, "))
    if code == "missing_required_parameter" and param:
        return Refusal(BadRequest(f"Missing required parameter: '{param}'.", code=code, param=param))
    if code == "invalid_json":
        return Refusal(BadRequest("The request body is not valid JSON.", code=code))
    if kind == "value_error":
        return Refusal(BadRequest(sentence or UNKNOWN, code=code, param=param))
    if code == "missing_required_parameter":
        sentence = "a required field is missing"
    subject = "Invalid request" if param is None else f"Invalid '{param}'"
    sentence = sentence.rstrip(".") or "the value cannot be used"
    return Refusal(BadRequest(f"{subject}: {sentence}.", code=code, param=param))


def _validation_text(match: re.Match[str], param: str | None, path: str) -> Refusal:
    """Pydantic's as text: a line with the field, then its kind and message."""
    return _validation(match, param or _param(match["loc"], path), path)


_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_Rule = Callable[[re.Match[str], str | None, str], Refusal]
_RULES: Final[tuple[tuple[re.Pattern[str], _Rule], ...]] = (
    (
        re.compile(
            r"maximum context length is (?P<limit>\d{1,12}) tokens\. However, you requested (?P<output>\d{1,12}) "
            r"output tokens and your prompt contains (?P<least>at least )?(?P<prompt>\d{1,12}) "
            r"(?:input )?(?P<unit>tokens|characters)"
        ),
        _context,
    ),
    (
        re.compile(
            r"^(?P<name>max_\w{1,32})=(?P<asked>\d{1,20}) cannot be greater than \w{1,64}="
            r"(?:\w{1,64}=)?(?P<limit>\d{1,12})"
        ),
        _answer_alone,
    ),
    (
        re.compile(
            r"(?:prompt length|Input length) \(?(?P<prompt>\d{1,12})\)? exceeds "
            r"(?:the max_model_len|model's maximum context length) \(?(?P<limit>\d{1,12})"
        ),
        _too_long,
    ),
    (re.compile(r"^The model `(?P<model>[^`]{1,256})` does not exist\."), _no_model),
    (re.compile(r"--(?:enable-auto-tool-choice|tool-call-parser)"), _no_tools),
    (
        re.compile(
            r"^\d{1,6} validation errors?:\s*\{'type': '(?P<kind>\w{1,64})'.*?'msg': (?P<msg>" + _QUOTED + r")",
            re.DOTALL,
        ),
        _validation,
    ),
    (
        re.compile(
            r"^\d{1,6} validation errors? for \w{1,64}\s+(?P<loc>[\w.\-]{1,256})\n\s+(?P<msg>[^\n]{1,500}?) "
            r"\[type=(?P<kind>\w{1,64})"
        ),
        _validation_text,
    ),
    (re.compile(r"^(?:You must pass at least one prompt|The (?:decoder )?prompt cannot be empty|Token id )"), _prompt),
    (re.compile(r"(?:^|; )(?P<name>suffix|dimensions) (?:is not|must be unset)"), _unsupported),
)
# A sentence that begins with its field.
_HEAD: Final = re.compile(
    r"['`]?(?P<name>[a-z][a-z_]{0,40})['`]? (?:must|cannot|can only|is not|are not|contains|value)\b"
)
_BEGUN: Final = re.compile(rb'\s*\{\s*"error"\s*:\s*\{\s*"message"\s*:\s*"((?:[^"\\]|\\.){0,4096})', re.DOTALL)


# -- what is left of others

_REMOVED: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    # What vLLM's exceptions say behind their sentence.
    (re.compile(r"\s*\((?:parameter|value)=.*\)\s*$", re.DOTALL), ""),
    (re.compile(r"\s*\[type=\w+, input_value=.*", re.DOTALL), ""),
    (re.compile(r"https?://\S+"), ""),
    (re.compile(r"For further information visit.*", re.DOTALL), ""),
    (re.compile(r"<class '(?:\w+\.)*(\w+)'>"), r"\1"),
    (re.compile(r" at 0x[0-9a-fA-F]+"), ""),
    (re.compile(r"<path>|(?<![\w.])/(?:[\w.\-]+/)+[\w.\-]+"), ""),
    # Exceptions, with what leads to them.
    (re.compile(r"\b(?:\w+\.)*(?:[A-Z]\w*(?:Error|Exception))\b:?\s*"), ""),
    (
        re.compile(r"\b(?:vllm|pydantic|pydantic_core|transformers|torch|mistral_common|jinja2|ray)(?:\.\w+)+"),
        "the engine",
    ),
    (re.compile(r"[^.!?\n]*(?:--[a-z][\w\-]+|\bVLLM_\w+)[^.!?\n]*[.!?]?"), ""),
    (re.compile(r"\b(?:vLLM|EngineCore|AsyncLLM|LLMEngine)\b", re.I), "the engine"),
    (re.compile(r"`"), "'"),
    (re.compile(r"\s+"), " "),
)


def told(message: str) -> str:
    """A sentence of the engine's without what is the engine's alone; empty where nothing is left."""
    text = message[:MOST_BYTES].encode(errors="replace").decode()
    for pattern, replacement in _REMOVED:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text[-1:].isalnum() or text[-1:] in {"'", '"', ")", "]"}:
        text += "."
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS].rstrip() + "…"


def _unquoted(literal: str) -> str:
    """The text of a Python string literal, near enough to be read."""
    return re.sub(r"\\(.)", lambda found: {"n": " ", "t": " "}.get(found[1], found[1]), literal[1:-1])


_SEGMENT: Final = re.compile(r"[A-Za-z_][\w\-]{0,63}|\d{1,9}")
_MOST_SEGMENTS: Final = 16


def _param(given: str | None, path: str) -> str | None:
    """`body.messages.0.content` as `messages[0].content`; the prompt by its name on this route."""
    if given is None:
        return None
    if given in _PROMPT_NAMES:
        return PROMPTS.get(path, given)
    given = _OTHER_NAMES.get((path, given), given)
    parts = given.removeprefix("body.").split(".")[:_MOST_SEGMENTS]
    shown = ""
    for part in parts:
        if part[:1].isupper():
            # One of several classes that it might have been.
            continue
        if not _SEGMENT.fullmatch(part):
            # A wrapper of the engine's, or a key that the client chose.
            break
        shown += f"[{part}]" if part.isdigit() else f".{part}" if shown else part
    return None if shown.startswith("[") else shown or None
