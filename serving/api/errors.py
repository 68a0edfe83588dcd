"""A `RequestError` as a client sees it: OpenAI's error object, over HTTP or at the end of a broken stream.

Promises: the body holds the four fields of OpenAI's error object and nothing else, so no path, stack or
host can slip in beside the message; every SDK that raises typed errors from OpenAI's answers raises the
same from these.
"""

from __future__ import annotations

import msgspec

from serving.errors import MethodNotAllowed, RequestError, UnsupportedEncoding

_encode = msgspec.json.Encoder().encode


def body(error: RequestError) -> bytes:
    """The response body: `{"error": {"message", "type", "param", "code"}}`."""
    return _encode(
        {
            "error": {
                "message": _encodable(error.message),
                "type": error.type,
                "param": None if error.param is None else _encodable(error.param),
                "code": error.code,
            }
        }
    )


def headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    """The response headers, names in lower case as ASGI asks for."""
    pairs = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body(error))).encode()),
    ]
    if error.retry_after_s is not None:
        pairs.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status == 401:  # noqa: PLR2004 - RFC 9110: a 401 names the scheme it asks for
        pairs.append((b"www-authenticate", b"Bearer"))
    # RFC 9110: a 405 names the methods, and a 415 for a body's coding the codings, that would have been taken.
    if isinstance(error, MethodNotAllowed):
        pairs.append((b"allow", ", ".join(error.allow).encode()))
    if isinstance(error, UnsupportedEncoding):
        pairs.append((b"accept-encoding", b"identity"))
    return pairs


def sse_event(error: RequestError) -> bytes:
    """The last event of a stream that breaks after its status was sent; OpenAI SDKs raise APIError on it."""
    return b"data: " + body(error) + b"\n\n"


def _encodable(text: str) -> str:
    """What UTF-8 cannot carry (a lone surrogate out of a percent-encoded path) as a question mark."""
    return text.encode(errors="replace").decode()
