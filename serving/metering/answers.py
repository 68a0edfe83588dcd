"""Usage out of answers: what the engine says it counted, read from the bytes that pass, and taken out of a stream again
where the client did not ask for it.

Promises: a client that did not ask gets, byte for byte, what the engine would have sent without being asked; one that
did gets `"usage":null` in every event before the last, as OpenAI's servers send it; however the stream is cut into
chunks. Where a client asked for no token at all (`max_tokens: 0`), the one that the engine writes nevertheless is not
counted. A token costs a look at the end of its event; only the last event is parsed. Of a whole
answer a bounded part is kept.

The engine leaves its fingerprint out of a stream's last token when a usage event follows, and puts it there. A stream
that loses its usage event gets the fingerprint back where it belongs. An engine says it once a connection; until then
(the first stream of a connection) a last token is kept back until the usage event, which follows at once.
"""

from __future__ import annotations

import re
from typing import Any, Final, Protocol

import msgspec

from serving.metering.usage import Usage

EVENT_END: Final = b"\n\n"
LINE_END: Final = b"\n"
# vLLM's last event before the end: no choices. Quotes inside texts are escaped, so no text holds these bytes.
USAGE_EVENT: Final = b'"choices":[],'
FINISHED: Final = b'"finish_reason":"'
UNFINISHED: Final = b'"finish_reason":null'
# The end of no event.
NEVER: Final = b"\0"
RESPONSE_ENDS: Final = (b"event: response.completed\n", b"event: response.incomplete\n", b"event: response.failed\n")
FINGERPRINT: Final = b',"system_fingerprint":'
USAGE_KEY: Final = b'"usage":{'
# Of an event that says of its usage nothing, or something: behind its last field, and what no text holds.
NO_USAGE: Final = b',"usage":null}\n\n'
ANY_USAGE: Final = b'"usage":'
_WRITTEN: Final = re.compile(rb'("prompt_tokens":(\d+),"total_tokens":)(\d+)(,"completion_tokens":)(\d+)')
# Up to here a whole answer is kept and parsed; of a larger one what follows `"usage":{`.
WHOLE_BYTES: Final = 64 * 1024
USAGE_BYTES: Final = 2048
# A stream's last tokens that wait for the fingerprint.
HELD_BYTES: Final = 1024 * 1024
MOST_CLOSINGS: Final = 8
NOTHING: Final = Usage(0, 0)
# How vLLM says in a stream that it cannot go on: before the first token or after any.
ERROR_EVENT: Final = b'data: {"error"'
SERVER_ERROR: Final = 500


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Said(msgspec.Struct):
    """`usage` as completions, pooling and responses write it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None

    def usage(self) -> Usage | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        prompt = self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens
        if prompt is None:
            return None
        cached = 0 if details is None else details.cached_tokens or 0
        return Usage(prompt, self.completion_tokens or self.output_tokens or 0, cached)


class _Event(msgspec.Struct):
    usage: _Said | None = None
    choices: list[msgspec.Raw] | None = None
    system_fingerprint: str | None = None


class _Response(msgspec.Struct):
    usage: _Said | None = None


class _ResponseEvent(msgspec.Struct):
    response: _Response | None = None


_event = msgspec.json.Decoder(_Event)
_whole = msgspec.json.Decoder(_Response)
_response_event = msgspec.json.Decoder(_ResponseEvent)
_said = msgspec.json.Decoder(_Said)


class _Code(msgspec.Struct):
    code: int | str | None = None


class _ErrorEvent(msgspec.Struct):
    error: _Code


class EngineFailed(Exception):
    """An engine says in the middle of its stream that it cannot go on; `before`: what the client is to have of it,
    `event`: how it says so, which is no client's.
    """

    def __init__(self, before: bytes, event: bytes) -> None:
        super().__init__(before, event)
        self.before = before
        self.event = event


def is_server_error(chunk: bytes) -> bool:
    """Whether a stream's event says that the engine failed, and not that the request is wrong."""
    line = chunk.removeprefix(b"data: ").partition(b"\n")[0]
    try:
        code = msgspec.json.decode(line, type=_ErrorEvent).error.code
    except msgspec.DecodeError:
        return False
    return isinstance(code, int) and code >= SERVER_ERROR


class Peer(Protocol):
    """The connection an answer comes from: remembers what its engine calls itself. None: it has not said so yet."""

    fingerprint: bytes | None


class Meter:
    """Reads one answer. This one reads nothing: an answer of a kind that is not known."""

    __slots__ = ("usage", "usage_events")

    def __init__(self) -> None:
        self.usage: Usage | None = None
        # Events that carried usage and no token.
        self.usage_events = 0

    def feed(self, chunk: bytes) -> bytes:
        """Bytes of the answer, of a stream whole events; returns those that go to the client now."""
        return chunk

    def end(self) -> bytes:
        """The answer is over; what is left for the client."""
        return b""


class StreamMeter(Meter):
    """A stream of completions: its usage event, taken out unless `keep`. Where the engine itself fails in the middle
    of it, `feed` raises EngineFailed: how it says so, and in what words, is no client's.
    """

    __slots__ = ("_held", "_keep", "_nothing", "_peer", "_plain")

    def __init__(self, peer: Peer, *, keep: bool, nothing: bool = False) -> None:
        """`nothing`: no token was asked for."""
        super().__init__()
        self._peer = peer
        self._keep = keep
        self._nothing = nothing
        self._held: list[bytes] | None = None
        # How an event ends that is neither a choice's last nor usage: one such event needs no search.
        self._plain = NEVER

    def feed(self, chunk: bytes) -> bytes:
        # One byte is found at memory's speed, two are not; JSON has no line end within.
        if chunk.endswith(self._plain) and chunk.find(LINE_END, 0, -2) < 0 and self._held is None:
            return _without_usage(chunk) if self._keep else chunk
        if not self._keep:
            return self._searched(chunk)
        return b"".join(map(_without_usage, _events(self._searched(chunk))))

    def _searched(self, chunk: bytes) -> bytes:
        if USAGE_EVENT in chunk:
            return self._last(chunk)
        # Within a text its quotes would be escaped.
        if (at := chunk.find(ERROR_EVENT)) >= 0:
            before = chunk[:at]
            if self._keep:
                before = b"".join(map(_without_usage, _events(before)))
            raise EngineFailed(self.end() + before, chunk[at:])
        if self._held is not None:
            return self._hold(chunk)
        if FINISHED in chunk and not self._keep:
            if self._peer.fingerprint is None:
                return self._hold(chunk)
            return _marked(chunk, self._peer.fingerprint)
        unfinished = chunk.rfind(UNFINISHED)
        if unfinished >= 0:
            self._plain = chunk[unfinished:]
        return chunk

    def end(self) -> bytes:
        held, self._held = self._held, None
        return b"".join(held) if held else b""

    def _hold(self, chunk: bytes) -> bytes:
        held = self._held = self._held or []
        held.append(chunk)
        if sum(map(len, held)) <= HELD_BYTES:
            return b""
        self._peer.fingerprint = self._peer.fingerprint or b""
        return self.end()

    def _last(self, chunk: bytes) -> bytes:
        kept = []
        for event in _events(chunk):
            said = _decoded(event) if USAGE_EVENT in event else None
            if said is None or said.choices or said.usage is None:
                kept.append(event)
                continue
            self.usage = said.usage.usage()
            self.usage_events += 1
            if self._keep:
                kept.append(_unwritten(event) if self._nothing else event)
            else:
                mark = said.system_fingerprint
                self._peer.fingerprint = b"" if mark is None else FINGERPRINT + msgspec.json.encode(mark)
        rest = b"".join(kept)
        if self._keep or not self.usage_events:
            return rest
        return _marked(self.end() + rest, self._peer.fingerprint or b"")


class ResponsesMeter(Meter):
    """A stream of /v1/responses: its last event holds the whole response, usage included, asked for or not."""

    __slots__ = ()

    def feed(self, chunk: bytes) -> bytes:
        if any(name in chunk for name in RESPONSE_ENDS):
            for event in _events(chunk):
                if event.startswith(RESPONSE_ENDS):
                    try:
                        found = _response_event.decode(event.partition(b"\ndata: ")[2])
                    except msgspec.DecodeError:
                        continue
                    if found.response is not None and found.response.usage is not None:
                        self.usage = found.response.usage.usage()
        return chunk


class WholeMeter(Meter):
    """An answer in one piece, relayed as it comes."""

    __slots__ = ("_carry", "_first", "_found", "_parts", "_size")

    def __init__(self, *, first: bool) -> None:
        """`first`: usage stands before what the client wrote (rerank echoes documents), else behind it."""
        super().__init__()
        self._parts: list[bytes] = []
        self._size = 0
        self._first = first
        self._carry = b""
        self._found = b""

    def feed(self, chunk: bytes) -> bytes:
        self._size += len(chunk)
        if self._size <= WHOLE_BYTES:
            self._parts.append(chunk)
            return chunk
        if self._parts:
            window = b"".join([*self._parts, chunk])
            self._parts.clear()
        else:
            window = self._carry + chunk
        self._search(window)
        self._carry = window[-USAGE_BYTES:]
        return chunk

    def _search(self, window: bytes) -> None:
        if self._first and len(self._found) == USAGE_BYTES:
            return
        at = window.find(USAGE_KEY) if self._first else window.rfind(USAGE_KEY)
        if at >= 0:
            self._found = window[at : at + USAGE_BYTES]

    def end(self) -> bytes:
        if self._size <= WHOLE_BYTES:
            try:
                said = _whole.decode(b"".join(self._parts)).usage
            except msgspec.DecodeError:
                said = None
        else:
            said = _object_at(self._found)
        self.usage = None if said is None else said.usage()
        return b""


class NothingMeter(WholeMeter):
    """An answer in one piece of which no token was asked for: what it says of one is put right, length and all."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        super().__init__(first=False)
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        self._tail += super().feed(chunk)
        out, self._tail = self._tail[:-USAGE_BYTES], self._tail[-USAGE_BYTES:]
        return out

    def end(self) -> bytes:
        super().end()
        at = self._tail.rfind(USAGE_KEY)
        return self._tail if at < 0 else self._tail[:at] + _unwritten(self._tail[at:])


def _unwritten(usage: bytes) -> bytes:
    """A usage without the tokens of the answer, as long as before: the answer's length is told already."""

    def none(found: re.Match[bytes]) -> bytes:
        total, written = found[2].rjust(len(found[3])), b"0".rjust(len(found[5]))
        return found[1] + total + found[4] + written

    return _WRITTEN.sub(none, usage, count=1)


def _without_usage(event: bytes) -> bytes:
    """An event that says of usage that there is none yet; the end of a stream and the usage event as they are."""
    if not event.startswith(b"data: {") or not event.endswith(b"}\n\n") or ANY_USAGE in event:
        return event
    return event[:-3] + NO_USAGE


def _object_at(found: bytes) -> _Said | None:
    """The object that begins in `"usage":{`, whatever follows it."""
    start = len(USAGE_KEY) - 1
    end = start
    for _ in range(MOST_CLOSINGS):
        end = found.find(b"}", end) + 1
        if not end:
            return None
        try:
            return _said.decode(found[start:end])
        except msgspec.DecodeError:
            continue
    return None


def _events(chunk: bytes) -> list[bytes]:
    *whole, rest = chunk.split(EVENT_END)
    return [event + EVENT_END for event in whole] + ([rest] if rest else [])


def _decoded(event: bytes) -> _Event | None:
    try:
        return _event.decode(event.removeprefix(b"data: "))
    except msgspec.DecodeError:
        return None


def _marked(chunk: bytes, mark: bytes) -> bytes:
    """Last tokens with the engine's fingerprint, where it puts it when no usage event follows."""
    if not mark or FINISHED not in chunk:
        return chunk
    return b"".join(
        event[:-3] + mark + b"}" + EVENT_END
        if FINISHED in event and event.endswith(b"}\n\n") and FINGERPRINT not in event
        else event
        for event in _events(chunk)
    )


class Told(Protocol):
    """What decides how an answer is read."""

    @property
    def path(self) -> str: ...
    @property
    def facts(self) -> Any: ...


FREE_PATHS: Final = frozenset({"/tokenize", "/detokenize"})
RERANK: Final = "/v1/rerank"
RESPONSES: Final = "/v1/responses"
COMPLETIONS: Final = "/v1/completions"


def meter(exchange: Told, peer: Peer, *, events: bool) -> Meter:
    """The reader of an exchange's answer; `events`: it is a stream."""
    if exchange.facts is None or exchange.path in FREE_PATHS:
        return Meter()
    # vLLM writes one token at least, also where a completion is to echo its prompt alone.
    nothing = exchange.facts.max_output_tokens == 0 and exchange.path == COMPLETIONS
    if not events:
        return NothingMeter() if nothing else WholeMeter(first=exchange.path == RERANK)
    if exchange.path == RESPONSES:
        return ResponsesMeter()
    return StreamMeter(peer, keep=exchange.facts.include_usage, nothing=nothing)
