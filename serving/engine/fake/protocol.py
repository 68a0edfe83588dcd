"""What clients send to vLLM's OpenAI server and how it refuses: request bodies and the error object.

Only the fields that change a simulated answer are read; all others are accepted and ignored, as vLLM does.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import msgspec

FINGERPRINT = "galerne-fake"

# msgspec's `$.messages[0].role`, in parts, and the name of a field that is not there.
_PLACES = re.compile(r"[A-Za-z_]\w*|\d+")
_MISSING = re.compile(r"missing required field `(\w+)`")

Count = Annotated[int, msgspec.Meta(ge=0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]
# A prompt or input: text, several texts, token ids, or several lists of them.
Prompt = str | list[str | int | list[int]]


class RefusalError(Exception):
    """An answer other than 200, in vLLM's error shape."""

    def __init__(self, status: int, message: str, *, kind: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, kind, param)
        self.status = status
        self.message = message
        self.kind = kind or HTTPStatus(status).phrase
        self.param = param

    def body(self) -> dict[str, object]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


def bad_request(message: str, param: str | None = None) -> RefusalError:
    """400 as vLLM answers it for values that it cannot serve."""
    return RefusalError(400, message, kind="BadRequestError", param=param)


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Request(msgspec.Struct, kw_only=True):
    """What every inference body has."""

    model: str | None = None
    cache_salt: str | None = None


class GenerationRequest(Request, kw_only=True):
    """What chat and completions share."""

    max_tokens: PositiveCount | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    n: PositiveCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None


class Message(msgspec.Struct):
    """A turn of a conversation."""

    role: str
    content: str | list[str | dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: PositiveCount | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompt
    # vLLM's default, of this route alone; null is no bound.
    max_tokens: PositiveCount | None = 16


class ResponsesRequest(Request, kw_only=True):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: PositiveCount | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class EmbeddingRequest(Request, kw_only=True):
    """POST /v1/embeddings."""

    input: Prompt
    encoding_format: str | None = None
    dimensions: PositiveCount | None = None


class RerankRequest(Request, kw_only=True):
    """POST /v1/rerank."""

    query: str
    documents: str | list[str]
    top_n: Count = 0


class ScoreRequest(Request, kw_only=True):
    """POST /v1/score, under each pair of names that vLLM takes."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None


class TokenizeRequest(Request, kw_only=True):
    """POST /tokenize: a prompt or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Request, kw_only=True):
    """POST /detokenize."""

    tokens: list[Count]


Body = TypeVar("Body", bound=Request)


def parse(kind: type[Body], body: bytes) -> Body:
    """Reads a body; RefusalError 400 where it is not JSON or a field has the wrong type."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        place = _PLACES.findall(path)
        if missing := _MISSING.search(reason):
            raise invalid("missing", [*place, missing[1]], "Field required") from error
        raise invalid("value_type", place, reason.replace("`", "")) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid("json_invalid", [], f"JSON decode error: {error}") from error


def invalid(kind: str, place: list[str], reason: str) -> RefusalError:
    """400 as vLLM answers it for a body that is none of its own: pydantic's errors, each as Python writes a dict."""
    place = ["body", *place]
    shown = {"type": kind, "loc": tuple(int(part) if part.isdigit() else part for part in place), "msg": reason}
    return RefusalError(400, f"1 validation error:\n  {shown}", param=".".join(place))


def prompts(value: Prompt, name: str) -> list[str | list[int]]:
    """The single prompts of a prompt field; RefusalError 400 for an empty or mixed list."""
    if isinstance(value, str):
        return [value]
    ids = [item for item in value if isinstance(item, int)]
    if ids and len(ids) == len(value):
        return [ids]
    single = [item for item in value if not isinstance(item, int)]
    if not single or len(single) != len(value):
        raise bad_request(f"{name} must be a string, strings, token ids or lists of token ids", name)
    return single
