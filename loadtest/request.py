"""Requests made before the clock starts: whole HTTP messages in which only a number of fixed width changes.

The number makes every prompt unique from its first token on, so no engine answers the second target from
what it cached for the first. Decimal digits of fixed width, because tokenizers split them evenly:
every prompt has the same count of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loadtest.errors import LoadtestError

CHAT_PATH = "/v1/chat/completions"
ENGINE_TOKEN_HEADER = "X-Galerne-Engine-Token"  # noqa: S105  # the name of a header
# Requests of one conversation carry the same value; a router may use it for prefix affinity.
SESSION_HEADER = "x-session-id"

_NONCE_DIGITS = 12
# Stands in the prompt for the number; not a character that JSON escapes.
_NONCE_MARK = "@" * _NONCE_DIGITS

# Filler of prompts that only need a size: plain words of about four bytes a token.
_FILLER = "the wind turns over the harbour and the boats swing round to face it; "


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI endpoint: where it listens, and the secrets it asks for, if any."""

    name: str
    host: str
    port: int
    # API key, as a gateway asks for it.
    key: str | None = field(default=None, repr=False)
    # What an engine behind a Galerne gateway asks for in its place.
    engine_token: str | None = field(default=None, repr=False)


def target_at(name: str, url: str, *, key: str | None = None, engine_token: str | None = None) -> Target:
    """The target at a URL such as `http://127.0.0.1:8000` (a trailing /v1 is allowed).

    Raises LoadtestError for anything but plain http with a host.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in {"", "/v1"}:
        raise LoadtestError(f"{url!r} is no target; give http://HOST:PORT, without TLS (it would be measured too)")
    return Target(name=name, host=parts.hostname, port=parts.port or 80, key=key, engine_token=engine_token)


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """One HTTP request around its number."""

    head: bytes
    tail: bytes

    def numbered(self, number: int) -> bytes:
        """The whole message for this number; raises LoadtestError when it has too many digits."""
        digits = b"%0*d" % (_NONCE_DIGITS, number)
        if len(digits) != _NONCE_DIGITS:
            raise LoadtestError(f"request number {number} does not fit {_NONCE_DIGITS} digits")
        return b"".join((self.head, digits, self.tail))


def chat_templates(
    target: Target, *, model: str, prompts: Sequence[str], output_tokens: int, extra: Mapping[str, Any]
) -> tuple[RequestTemplate, ...]:
    """One streaming chat request a prompt, greedy, of exactly `output_tokens` tokens, usage asked for."""
    return tuple(
        _template(
            target,
            {
                "model": model,
                "messages": [{"role": "user", "content": f"{_NONCE_MARK} {prompt}"}],
                "max_tokens": output_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **extra,
            },
        )
        for prompt in prompts
    )


def chat_message(target: Target, *, model: str, prompt: str, output_tokens: int, session: str | None = None) -> bytes:
    """One whole streaming chat request, greedy, of exactly `output_tokens` tokens, usage asked for.

    The prompt is sent as it is: nothing makes it unique, so what an engine has cached of it counts.
    Raises LoadtestError for a session that cannot be a header's value.
    """
    payload = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if session is None:
        return _message(target, payload)
    if not session.isascii() or not session.isprintable():
        raise LoadtestError(f"session {session!r} cannot be sent as a header; use printable ASCII")
    return _message(target, payload, f"{SESSION_HEADER}: {session}")


def filler(size_bytes: int) -> str:
    """Plain text that makes, with the number in front of it, a prompt of `size_bytes`."""
    room = size_bytes - _NONCE_DIGITS - 1
    if room < 1:
        raise LoadtestError(f"a prompt of {size_bytes} bytes leaves no room after its number")
    return (_FILLER * (room // len(_FILLER) + 1))[:room]


def _template(target: Target, payload: Mapping[str, Any]) -> RequestTemplate:
    head, tail = _message(target, payload).split(_NONCE_MARK.encode())
    return RequestTemplate(head=head, tail=tail)


def _message(target: Target, payload: Mapping[str, Any], *headers: str) -> bytes:
    body = json.dumps(payload, separators=(",", ":")).encode()
    lines = [
        f"POST {CHAT_PATH} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    if target.key is not None:
        lines.append(f"Authorization: Bearer {target.key}")
    if target.engine_token is not None:
        lines.append(f"{ENGINE_TOKEN_HEADER}: {target.engine_token}")
    return "\r\n".join([*lines, "", ""]).encode() + body
