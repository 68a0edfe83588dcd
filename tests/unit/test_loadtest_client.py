"""The streaming client against a small server of our own: counts, order, and every way a stream can fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from loadtest.client import FailureKind, RequestResult, StreamClient
from loadtest.interleave import closed_loop
from loadtest.request import Target, chat_templates

TOKENS = 5
TIMEOUT_S = 5.0
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

Answer = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(text: str) -> bytes:
    return chunk(b'data: {"choices":[{"index":0,"delta":{"content":%s}}]}\n\n' % json.dumps(text).encode())


ROLE = chunk(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
USAGE = chunk(b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n' % TOKENS)
DONE = chunk(b"data: [DONE]\n\n")
END = b"0\r\n\r\n"


class Server:
    """Answers every request with `answer`; keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(length))
                self.heads.append(head)
                await self._answer(writer, len(self.bodies))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        await listening.wait_closed()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[StreamClient]:
    client = StreamClient("127.0.0.1", port)
    try:
        yield client
    finally:
        await client.close()


def raw(port: int, prompts: tuple[str, ...] = ("hello",)) -> bytes:
    target = Target("t", "127.0.0.1", port, key="secret")
    (template,) = chat_templates(target, model="m", prompts=prompts, output_tokens=TOKENS, extra={"ignore_eos": True})
    return template.numbered(7)


async def whole(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + ROLE)
    for _ in range(TOKENS):
        await asyncio.sleep(0.002)
        writer.write(token("a"))
    writer.write(USAGE + DONE + END)


async def ask(answer: Answer, timeout_s: float = TIMEOUT_S) -> RequestResult:
    async with serving(answer) as server, connected(server.port) as client:
        return await client.request(raw(server.port), timeout_s=timeout_s)


async def test_a_whole_stream_is_counted_and_ordered() -> None:
    result = await ask(whole)
    assert result.failure is None
    assert result.status == 200
    assert len(result.content_ns) == TOKENS
    assert (result.tokens, result.prompt_tokens) == (TOKENS, 9)
    assert result.response_ns is not None
    stamps = [result.send_ns, result.response_ns, *result.content_ns, result.end_ns]
    assert stamps == sorted(stamps)
    assert result.ttft_s is not None
    # The server slept before the first token and between tokens: time was seen to pass, however much.
    assert 0 < result.ttft_s < result.e2e_s
    assert len(result.itl_s) == TOKENS - 1
    assert sum(result.itl_s) > 0


async def test_one_connection_serves_request_after_request() -> None:
    async with serving(whole) as server, connected(server.port) as client:
        await client.open()
        results = [await client.request(raw(server.port), timeout_s=TIMEOUT_S) for _ in range(3)]
        assert [result.failure for result in results] == [None] * 3
        assert server.connections == client.connects == 1
        assert results[0].end_ns <= results[1].send_ns


async def test_a_connection_closed_by_the_server_is_opened_again_before_the_next_request() -> None:
    async def closes(writer: asyncio.StreamWriter, _number: int) -> None:
        writer.write(HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + token("a") + DONE + END)
        await writer.drain()
        writer.close()

    async with serving(closes) as server, connected(server.port) as client:
        for _ in range(2):
            assert (await client.request(raw(server.port), timeout_s=TIMEOUT_S)).failure is None
        assert server.connections == client.connects == 2


async def test_events_in_one_read_share_their_time_and_without_usage_events_count() -> None:
    async def burst(writer: asyncio.StreamWriter, _number: int) -> None:
        writer.write(HEAD + token("a") + token("b") + token("c") + DONE + END)

    result = await ask(burst)
    assert result.failure is None
    assert result.completion_tokens is None
    assert result.tokens == 3
    assert result.itl_s == [0.0, 0.0]


async def test_the_request_is_what_the_server_needs() -> None:
    async with serving(whole) as server, connected(server.port) as client:
        await client.request(raw(server.port), timeout_s=TIMEOUT_S)
        body = json.loads(server.bodies[0])
        assert b"Authorization: Bearer secret\r\n" in server.heads[0]
        assert server.heads[0].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (TOKENS, True, 0)
    assert body["messages"][0]["content"] == "000000000007 hello"


async def error_event(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + token("a") + chunk(b'data: {"error":{"message":"engine died"}}\n\n') + DONE + END)


async def unavailable(writer: asyncio.StreamWriter, _number: int) -> None:
    body = b'{"error":{"message":"no replica yet"}}'
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


async def cut(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + token("a") + b"40\r\ndata: {")
    await writer.drain()
    writer.close()


async def without_done(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + token("a") + END)


async def broken_chunk(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + token("a") + b"zz\r\n")


async def malformed(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + chunk(b"data: {oops}\n\n") + DONE + END)


async def hangs(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.write(HEAD + token("a"))


async def drops(writer: asyncio.StreamWriter, _number: int) -> None:
    writer.close()


@pytest.mark.parametrize(
    ("answer", "kind", "detail", "tokens"),
    [
        (unavailable, FailureKind.HTTP_STATUS, "HTTP 503: .*no replica yet", 0),
        (error_event, FailureKind.SSE_ERROR, "engine died", 1),
        (cut, FailureKind.BROKEN_STREAM, "closed before the response's end", 1),
        (without_done, FailureKind.BROKEN_STREAM, r"without \[DONE\]", 1),
        (broken_chunk, FailureKind.BROKEN_STREAM, "not HTTP", 1),
        (malformed, FailureKind.BROKEN_STREAM, "oops", 0),
        (drops, FailureKind.BROKEN_STREAM, "closed before the response's end", 0),
    ],
)
async def test_a_failure_is_named_and_what_came_before_is_kept(
    answer: Answer, kind: FailureKind, detail: str, tokens: int
) -> None:
    result = await ask(answer)
    assert result.failure is not None
    assert result.failure.kind is kind
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(result.failure.detail)
    assert len(result.content_ns) == tokens


async def test_a_stream_that_does_not_end_times_out_and_its_connection_is_not_used_again() -> None:
    async with serving(hangs) as server, connected(server.port) as client:
        for expected in (1, 2):
            result = await client.request(raw(server.port), timeout_s=0.1)
            assert result.failure is not None
            assert result.failure.kind is FailureKind.TIMEOUT
            assert len(result.content_ns) == 1
            assert client.connects == expected


async def test_a_refused_connection_is_a_result() -> None:
    async with serving(whole) as server:
        port = server.port
    async with connected(port) as client:
        with pytest.raises(ConnectionRefusedError):
            await client.open()
        result = await client.request(raw(port), timeout_s=TIMEOUT_S)
    assert result.failure is not None
    assert result.failure.kind is FailureKind.CONNECT
    assert result.ttft_s is None


def counting() -> Iterator[int]:
    return iter(range(10**6))


async def test_the_closed_loop_repeats_the_first_prompt_until_all_have_started_and_then_takes_turns() -> None:
    async with serving(whole) as server:
        target = Target("t", "127.0.0.1", server.port)
        templates = chat_templates(target, model="m", prompts=("x", "y"), output_tokens=TOKENS, extra={})
        clients = [StreamClient("127.0.0.1", server.port) for _ in range(3)]
        streams = await closed_loop(clients, templates, 4, counting(), spread_s=0.0, timeout_s=TIMEOUT_S)
        await asyncio.gather(*(client.close() for client in clients))
        assert server.connections == 3
        prompts = sorted(json.loads(body)["messages"][0]["content"].split() for body in server.bodies)
    # The last stream starts when the two others have sent one request each.
    assert [len(stream) for stream in streams] == [5, 5, 4]
    assert all(result.failure is None for stream in streams for result in stream)
    assert all(a.end_ns <= b.send_ns for stream in streams for a, b in pairwise(stream))
    assert [number for number, _ in prompts] == [f"{number:012d}" for number in range(14)]
    assert sorted(text for _, text in prompts) == ["x"] * 7 + ["y"] * 7


async def test_streams_start_one_after_another() -> None:
    async with serving(whole) as server:
        target = Target("t", "127.0.0.1", server.port)
        templates = chat_templates(target, model="m", prompts=("x",), output_tokens=TOKENS, extra={})
        clients = [StreamClient("127.0.0.1", server.port) for _ in range(4)]
        streams = await closed_loop(clients, templates, 2, counting(), spread_s=0.08, timeout_s=TIMEOUT_S)
        await asyncio.gather(*(client.close() for client in clients))
    starts = [stream[0].send_ns for stream in streams]
    assert starts == sorted(starts)
    # A timer never fires early (uvloop and asyncio may by one millisecond of rounding).
    assert starts[-1] - starts[0] >= 50_000_000
    # Whoever started before the last one kept working, and did its share after that.
    assert all(sum(result.end_ns > starts[-1] for result in stream) >= 2 for stream in streams)
    assert len(streams[-1]) == 2


async def test_the_closed_loop_makes_no_further_request_after_a_failure() -> None:
    async def third_fails(writer: asyncio.StreamWriter, number: int) -> None:
        await (unavailable if number == 3 else whole)(writer, number)

    async with serving(third_fails) as server, connected(server.port) as client:
        target = Target("t", "127.0.0.1", server.port)
        templates = chat_templates(target, model="m", prompts=("x",), output_tokens=TOKENS, extra={})
        (stream,) = await closed_loop([client], templates, 100, counting(), spread_s=0.0, timeout_s=TIMEOUT_S)
    assert len(stream) == 3
    assert stream[-1].failure is not None
