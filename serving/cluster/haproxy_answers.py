"""What HAProxy answers by itself, in OpenAI's error shape, by each of its three ways to answer.

Its rules and its `errorfile` lines take a message from the configuration. Its HTTP/1 parser does not: for a request
that is not valid HTTP, or whose headers never end, it sends a page that is compiled into the program ("Your browser
sent an invalid request."), whatever the configuration says. `with_messages` gives a copy of the program other texts in
the same places; where the copy cannot run, the program itself does, with its own pages. The third way is an answer
that a gateway gave before the request had ended: `EARLY_ANSWERS` hands it on and closes the connection.

Only the standard library is imported: HAProxy's launcher does, at every reload.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from serving.cluster import edge

RETRY_AFTER_S: Final = 5


def error_body(message: str, code: str, kind: str = "invalid_request_error") -> str:
    """OpenAI's error object as one line of JSON."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}, separators=(",", ":"))


# Statuses that HAProxy answers by itself: (reason, body, further headers). The bodies are short, because they have to
# fit in the places of the built-in ones.
ERRORS: Final[dict[int, tuple[str, str, str]]] = {
    400: ("Bad Request", error_body("Malformed request.", "bad_request"), ""),
    408: ("Request Timeout", error_body("The request did not arrive in time.", "request_timeout"), ""),
    413: ("Payload Too Large", error_body("Too large.", "request_too_large"), ""),
    422: ("Unprocessable Content", error_body("Not processable.", "bad_request"), ""),
    500: ("Internal Server Error", error_body("Internal error.", "internal_error", "api_error"), ""),
    501: ("Not Implemented", error_body("Unsupported encoding.", "bad_request"), ""),
    502: ("Bad Gateway", error_body("The gateway broke off. Try again.", "gateway_failed", "api_error"), ""),
    503: (
        "Service Unavailable",
        error_body("No gateway is ready to take the request. Try again shortly.", "not_ready", "service_unavailable"),
        f"Retry-After: {RETRY_AFTER_S}\r\n",
    ),
    504: ("Gateway Timeout", error_body("The gateway took too long.", "gateway_timeout", "api_error"), ""),
}
# HAProxy's `errorfile` knows no others.
ERROR_FILES: Final = frozenset({400, 408, 413, 422, 500, 501, 502, 503, 504})
# Statuses of the parser and of what stands before a request has a stream; the others have their file.
BUILT_IN: Final = frozenset({400, 408, 413, 422, 500, 501})

LUA_FILE: Final = "early.lua"
LUA_ACTION: Final = "galerne_end_early"
LUA_BODY: Final = "txn.galerne_early_body"
# HAProxy goes on reading a request after its answer, for as long as the client sends or keeps silent: that held a
# connection for nothing. A reply of its own ends the connection where the request has not ended, and only there.
EARLY_ANSWERS: Final = f"""core.register_action("{LUA_ACTION}", {{"http-res"}}, function(txn)
  local own = {{["content-length"] = true, ["transfer-encoding"] = true, ["connection"] = true,
    ["{edge.EARLY}"] = true, ["server"] = true}}
  local reply = txn:reply{{status = txn.f:status()}}
  for name, values in pairs(txn.http:res_get_headers()) do
    if not own[name] then
      for _, value in pairs(values) do
        reply:add_header(name, value)
      end
    end
  end
  reply:set_body(txn:get_var("{LUA_BODY}") or "")
  txn:done(reply)
end)
"""


def whole(status: int) -> bytes:
    """The complete HTTP answer of a status, after which the connection is closed."""
    reason, body, headers = ERRORS[status]
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


def write_files(directory: Path) -> None:
    """Write what the configuration names: an answer for each status, and the Lua of early answers."""
    directory.mkdir(parents=True, exist_ok=True)
    for status in ERROR_FILES:
        (directory / f"{status}.http").write_bytes(whole(status))
    (directory / LUA_FILE).write_text(EARLY_ANSWERS)


def with_messages(program: bytes) -> bytes:
    """HAProxy's program with our texts in the places of its built-in pages, byte for byte as long.

    Raises ValueError where the program has no such page, or no room for the text: it is another version.
    """
    for status in sorted(BUILT_IN):
        found = list(re.finditer(rb"HTTP/1\.1 %d [^\0]*?Content-Type: text/html\r\n\r\n[^\0]*\0" % status, program))
        if len(found) != 1:
            raise ValueError(f"HAProxy's program has {len(found)} built-in pages for status {status}, not one")
        start, end = found[0].span()
        text = whole(status)
        if len(text) >= end - start:
            raise ValueError(f"HAProxy's program has {end - start} bytes for status {status}, not {len(text) + 1}")
        program = program[:start] + text.ljust(end - start, b"\0") + program[end:]
    return program
