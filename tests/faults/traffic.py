"""Streams and whole answers without a pause, each with an id of its own; what came of each by its client and by the ledger.

A request ends in one of these ways for its client:

- `completed`: the whole answer, with `[DONE]` where it is a stream;
- `failed`: an error event at a stream's end, or an answer of 500 and above;
- `rejected`: 429, or a 503 of a gateway;
- `lost`: the connection broke, and the client can see that (no answer, or an incomplete one by its own framing);
- `silent`: a stream that ended as if it were whole, without `[DONE]` and without an error event. There must be none;
- `refused`: nobody took it (no connection, or the edge's own 503). It was accepted by nobody.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tests.faults.replicas import PATH

Outcome = Literal["completed", "failed", "rejected", "lost", "silent", "refused"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("completed", "failed", "rejected", "lost", "silent", "refused")
# A client that gives up: longer than anything but a hang.
GIVE_UP_S: Final = 150.0
# Codes of answers that the edge gives by itself, where no gateway took the request.
EDGE_REFUSES, EDGE_BROKE = "not_ready", "gateway_failed"
# Between two tries where nobody takes a connection.
REFUSED_PAUSE_S: Final = 0.2
WRITTEN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request."""

    request_id: str
    stream: bool
    outcome: Outcome
    # The status, the error's code, or what happened to the connection.
    detail: str
    # Since the load began: when it was sent, and when it ended.
    began_s: float
    ended_s: float


@dataclass
class Traffic:
    """Clients of one cluster, until `over` is set."""

    port: int
    key: str
    tokens: int
    answers: list[Answer] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    under_way: int = 0

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def client(self, *, stream: bool) -> None:
        """One client that asks again as soon as it has its answer."""
        while not self.over.is_set():
            request_id, began_s = f"f-{uuid.uuid4().hex}", self.now_s()
            self.under_way += 1
            try:
                outcome, detail = await ask(self.port, self.key, request_id, self.tokens, stream=stream)
            finally:
                self.under_way -= 1
            self.answers.append(Answer(request_id, stream, outcome, detail, began_s, self.now_s()))
            if outcome == "refused":
                await asyncio.sleep(REFUSED_PAUSE_S)

    def begun_since(self, moment_s: float) -> Counter[str]:
        """What came of requests that were sent after that moment."""
        return Counter(answer.outcome for answer in self.answers if answer.began_s >= moment_s)

    def counts(self) -> dict[str, int]:
        """Requests by what came of them."""
        found = Counter(answer.outcome for answer in self.answers)
        return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}

    def outage_s(self, since_s: float) -> float:
        """How long no request that was sent since then was answered whole: seconds until the first one was sent."""
        whole = [a.began_s for a in self.answers if a.outcome == "completed" and a.began_s >= since_s]
        return min(whole) - since_s if whole else float("inf")


@asynccontextmanager
async def traffic(port: int, key: str, clients: int, tokens: int) -> AsyncIterator[Traffic]:
    """So many clients, every other one with streams, while the block lasts; all have ended when it is left."""
    made = Traffic(port, key, tokens)
    tasks = [asyncio.create_task(made.client(stream=number % 2 == 0)) for number in range(clients)]
    try:
        yield made
    finally:
        made.over.set()
        await asyncio.gather(*tasks)


async def ask(port: int, key: str, request_id: str, tokens: int, *, stream: bool) -> tuple[Outcome, str]:
    """One request on a connection of its own, as its client sees it."""
    message = {"role": "user", "content": "hello there"}
    body = {"model": "chat", "messages": [message], "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: galerne\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        f"content-type: application/json\r\nx-request-id: {request_id}\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        return "refused", type(error).__name__
    received = bytearray()
    try:
        async with asyncio.timeout(GIVE_UP_S):
            writer.write(head + content)
            while part := await reader.read(1 << 16):
                received += part
    except TimeoutError:
        return "lost", "no end in time"
    except OSError as error:
        return "lost", type(error).__name__
    finally:
        writer.close()
    return judged(bytes(received), stream=stream)


def judged(received: bytes, *, stream: bool) -> tuple[Outcome, str]:
    """What an answer's bytes, up to the connection's end, say."""
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return "lost", "no answer"
    status = int(head.split(b" ", 2)[1])
    fields = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:])
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        content, whole = dechunked(body)
    else:
        content, whole = body, len(body) == int(fields.get(b"content-length", b"-1"))
    if not whole:
        return "lost", "incomplete"
    if status != 200:
        return _refusal(status, content)
    if not stream:
        return ("completed", "200") if json.loads(content).get("choices") else ("failed", "200")
    if content.rstrip().endswith(b"data: [DONE]") and b'data: {"error"' not in content:
        return "completed", "200"
    if b'data: {"error"' in content:
        return "failed", "stream_cut" if b"stream_cut" in content else "error event"
    return "silent", "no end of stream"


def _refusal(status: int, content: bytes) -> tuple[Outcome, str]:
    try:
        code = str(json.loads(content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "failed", f"{status} in no shape"
    if code == EDGE_REFUSES:
        return "refused", code
    return ("rejected" if status in {429, 503} else "failed"), f"{status} {code}"


def dechunked(body: bytes) -> tuple[bytes, bool]:
    """The content of a chunked body, and whether its last chunk is there."""
    found = bytearray()
    while True:
        size, end, rest = body.partition(b"\r\n")
        if not end:
            return bytes(found), False
        length = int(size.split(b";")[0], 16)
        if not length:
            return bytes(found), rest.startswith(b"\r\n")
        found += rest[:length]
        if len(rest) < length + 2:
            return bytes(found), False
        body = rest[length + 2 :]


@dataclass(frozen=True, slots=True)
class Booked:
    """A row of the ledger, as far as it is held against a client's count."""

    request_id: str
    outcome: str
    engine: str
    lost_engine: str


def rows(ledger: Path, request_ids: set[str]) -> list[Booked]:
    """The rows of these requests."""
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT request_id, outcome, engine, lost_engine FROM usage").fetchall()
    return [Booked(*row) for row in found if row[0] in request_ids]


async def booked(ledger: Path, answers: list[Answer], settled: Callable[[list[Booked]], bool]) -> list[Booked]:
    """The rows of these answers, once `settled` says that none is missing that will come."""
    ids = {answer.request_id for answer in answers}
    deadline_s = asyncio.get_running_loop().time() + WRITTEN_S
    while not settled(found := await asyncio.to_thread(rows, ledger, ids)):
        if asyncio.get_running_loop().time() > deadline_s:
            return found
        await asyncio.sleep(0.2)
    return found
