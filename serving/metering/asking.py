"""The gateway's questions to its ledger: asked off the event loop, one at a time, each within a time.

Promises: `ask` returns or raises within `WAIT_S` + `ANSWER_S` (more where a question allows its database more),
whatever the database does; a tenant has one question
under way at a gateway; a gateway has one process that asks, and none where nobody has asked for `IDLE_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from serving.metering.questions import WITHIN_S, NoAnswer, Question, Reply, Sums
from serving.metering.settings import LedgerSettings

READER: Final = ("-m", "serving.metering.reader")
# Others' questions come first, for so long.
WAIT_S: Final = 10.0
# From the question's line to the answer's: a process that starts, a connection and the database's own time.
START_S: Final = 10.0
ANSWER_S: Final = WITHIN_S + START_S
IDLE_S: Final = 60.0
END_S: Final = 2.0
READ_BYTES: Final = 1 << 16

_encode = msgspec.json.Encoder().encode
_reply = msgspec.json.Decoder(Reply)


class LedgerQuestions:
    """Asks one ledger; used from one event loop."""

    def __init__(
        self,
        settings: LedgerSettings,
        *,
        program: Sequence[str] = READER,
        answer_s: float = ANSWER_S,
        wait_s: float = WAIT_S,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`program`: this interpreter's arguments. Nothing is started before the first question."""
        self.covers_cluster = settings.is_shared
        self._url = settings.url
        self._program = program
        self._answer_s, self._wait_s, self._idle_s = answer_s, wait_s, idle_s
        self._clock = clock
        # Each with whether it is the tenant's own question.
        self._asked: set[tuple[str, bool]] = set()
        self._turn = asyncio.Lock()
        # The one thread that knows the process.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._process: subprocess.Popen[bytes] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    async def ask(self, question: Question) -> tuple[Sums, ...]:
        """The sums; raises NoAnswer."""
        whose = question.tenant, question.ended_before_s is None
        if whose in self._asked:
            raise NoAnswer("busy")
        self._asked.add(whose)
        try:
            return await self._in_turn(question)
        finally:
            self._asked.discard(whose)

    def close(self) -> None:
        """End the process, once. A question under way hears that the ledger is away."""
        if self._closed:
            return
        self._closed = True
        self._stop_idling()
        # What the thread waits for comes to its end with this; it does the rest itself.
        process = self._process
        if process is not None:
            process.kill()
        self._thread.submit(self._end)
        self._thread.shutdown(wait=True)

    async def _in_turn(self, question: Question) -> tuple[Sums, ...]:
        try:
            async with asyncio.timeout(self._wait_s):
                await self._turn.acquire()
        except TimeoutError:
            raise NoAnswer("slow", "others' questions take long") from None
        loop = asyncio.get_running_loop()
        try:
            self._stop_idling()
            answer_s = self._answer_s + question.within_s - WITHIN_S
            reply = await loop.run_in_executor(self._thread, self._exchange, _encode(question) + b"\n", answer_s)
        except RuntimeError as error:
            # The executor takes nothing after `close`.
            raise NoAnswer("away", str(error)) from None
        finally:
            self._turn.release()
            if not self._closed:
                self._idle = loop.call_later(self._idle_s, self._thread.submit, self._end)
        if reply.trouble is not None:
            raise NoAnswer(reply.trouble, reply.reason)
        return reply.sums

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    # -- in the thread

    def _exchange(self, line: bytes, answer_s: float) -> Reply:
        deadline_s = self._clock() + answer_s
        # A process may have ended since the last question, for want of memory for example: then once with a new one.
        for _ in range(2 if self._process is not None else 1):
            try:
                return self._ask_process(line, deadline_s)
            except TimeoutError:
                self._end()
                return Reply(trouble="slow", reason="the reader did not answer in time")
            except (OSError, msgspec.DecodeError):
                self._end()
        return Reply(trouble="away", reason="the ledger's reader ended")

    def _ask_process(self, line: bytes, deadline_s: float) -> Reply:
        if self._closed:
            raise BrokenPipeError
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, a constant program
                [sys.executable, *self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            if self._closed:
                # `close` may have looked for it a moment too early.
                self._process.kill()
            line = json.dumps({"url": self._url}).encode() + b"\n" + line
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise BrokenPipeError
        # Less than a pipe holds: it is not waited for.
        process.stdin.write(line)
        return _reply.decode(self._line(process.stdout.fileno(), deadline_s))

    def _line(self, descriptor: int, deadline_s: float) -> bytes:
        found = bytearray()
        while not found.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - self._clock()))
            if not readable:
                raise TimeoutError
            part = os.read(descriptor, READ_BYTES)
            if not part:
                raise BrokenPipeError
            found += part
        return bytes(found)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # It has nothing to finish: its end of the line is its end.
        with process:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
