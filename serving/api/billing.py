"""From a request's end to its row: every accepted request has exactly one, and all that is charged for it is the row's.

Where an answer said what it used, its row is made at once. Where it broke off (the client left, the engine's
connection broke) the engine still knows: it is asked, for at most half a flush of the ledger, and what it says is
exact. Only where it cannot tell, because it died or there are too many to ask for, the row is a guess and says so. An
engine that had the request too, and of which the client got nothing, is asked the same: nobody is billed for what it
computed, and the row says how much that was. A request that no engine answered, and whose client did not leave, is
billed nothing either.

The row goes to the ledger, to the metrics and to whoever charges the tenant (quotas, the fair queue), at one moment:
until then what was expected of the request stays charged. Without a ledger rows are made and charged all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, Protocol

import msgspec

from serving.api.body import ClientLeft
from serving.api.exchange import Exchange, Sent
from serving.api.upstream import Pool, UpstreamError
from serving.engine.work import ACCOUNTS
from serving.errors import RequestError
from serving.metering.answers import NOTHING
from serving.metering.best_known import best_known, most_lost
from serving.metering.row import Row
from serving.metering.usage import Usage

FIRST_PAUSE_S: Final = 0.02
# As long as with a ledger's default, where there is none.
FLUSH_S: Final = 1.0
# Questions under way; beyond it rows are guesses.
MOST_QUESTIONS: Final = 2048
MOST_ANSWER_BYTES: Final = 4096
OK: Final = 200


class _Account(msgspec.Struct):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    counted_prompt_tokens: int
    final: bool


_account = msgspec.json.Decoder(_Account)


class Rows(Protocol):
    """The ledger, as far as rows go."""

    @property
    def gateway_id(self) -> str: ...
    @property
    def flush_s(self) -> float: ...

    def record(self, row: Row) -> None:
        """Take one row; returns at once."""


class NoLedger:
    """Rows charge tenants and are kept nowhere."""

    gateway_id = ""
    flush_s = FLUSH_S

    def record(self, row: Row) -> None:
        """Take one row."""


class Billing:
    """Makes rows; one per gateway process, on its event loop."""

    def __init__(
        self,
        rows: Rows,
        pool: Pool,
        *,
        engine_token: str,
        clock: Callable[[], float],
        now: Callable[[], float] = time.time,
        on_row: Callable[[Row], None] = lambda _: None,
    ) -> None:
        """`now`: seconds since 1970; `on_row` hears of every row too."""
        self._rows = rows
        self._pool = pool
        self._token = engine_token
        self._clock = clock
        self._now = now
        self._on_row = on_row
        self._number = 0
        self._asking: dict[asyncio.Task[None], Callable[[], None]] = {}

    @contextmanager
    def request(self, exchange: Exchange, charge: Callable[[Row], None] = lambda _: None) -> Iterator[None]:
        """Around a relayed request: one row, however it ends. `charge` is called with it, once."""
        # When the exchange began, so that beginning and duration tell the end.
        started_at = self._now() - (self._clock() - exchange.started_s)
        status: int | None = None
        try:
            yield
        except RequestError as error:
            status = error.status
            raise
        except ClientLeft:
            status = ClientLeft.status
            raise
        finally:
            self._ended(exchange, status or exchange.status or RequestError.status, started_at, charge)

    async def asked(self) -> None:
        """Return when every request that has ended has its row; engines are asked for no longer than ever."""
        while self._asking:
            await asyncio.wait(self._asking)

    def close(self) -> None:
        """Make the rows that still wait for an engine's word: guesses."""
        for task, guess in list(self._asking.items()):
            task.cancel()
            guess()
        self._asking.clear()

    def _ended(self, exchange: Exchange, status: int, started_at: float, charge: Callable[[Row], None]) -> None:
        ended_s = self._clock()
        self._number += 1
        row_id = f"{self._rows.gateway_id}-{self._number:x}"
        if exchange.usage is None:  # it never came as far as the relay
            exchange.usage, exchange.usage_exact = best_known(exchange)

        def record(told: _Account | None, lost: _Account | None) -> None:
            row = _row(exchange, row_id, self._rows.gateway_id, status, started_at, ended_s, told, lost)
            self._rows.record(row)
            self._on_row(row)
            charge(row)

        own = None
        if not exchange.usage_exact and exchange.engine is not None:
            own = Sent(exchange.engine, exchange.engine_request_id)
        if (own is None and exchange.lost is None) or len(self._asking) >= MOST_QUESTIONS:
            record(None, None)
            return
        task = asyncio.get_running_loop().create_task(self._ask_both(own, exchange.lost, record))
        self._asking[task] = lambda: record(None, None)
        task.add_done_callback(self._asked)

    def _asked(self, task: asyncio.Task[None]) -> None:
        guess = self._asking.pop(task, None)
        # Cancelled by somebody else, or failed on something that is not the engine's fault: never without a row.
        if guess is not None and (task.cancelled() or task.exception() is not None):
            guess()

    async def _ask_both(
        self, own: Sent | None, lost: Sent | None, record: Callable[[_Account | None, _Account | None], None]
    ) -> None:
        record(*await asyncio.gather(self._ask(own, unknown=_NEVER_READ), self._ask(lost, unknown=None)))

    async def _ask(self, sent: Sent | None, *, unknown: _Account | None) -> _Account | None:
        """What the engine says of a request, asked until nothing will be added; None where it cannot be asked.

        `unknown`: what it means that the engine, asked for all the time there is, knows nothing of it.
        """
        told: _Account | None = None
        if sent is None:
            return told
        pause_s, answers = FIRST_PAUSE_S, False
        try:
            async with asyncio.timeout(self._rows.flush_s / 2):
                while told is None or not told.final:
                    answers = False
                    found = await self._account(sent)
                    answers = True
                    if found is None and (told is not None or unknown is None):
                        break
                    told = found
                    if told is None or not told.final:
                        await asyncio.sleep(pause_s)
                        pause_s *= 2
        except TimeoutError:
            if told is None and answers:
                told = unknown
        except UpstreamError:
            pass
        return told

    async def _account(self, sent: Sent) -> _Account | None:
        path = f"{ACCOUNTS}/{sent.request_id}"
        status, body = await self._pool.get(sent.engine, path, self._token, most_bytes=MOST_ANSWER_BYTES)
        try:
            return _account.decode(body) if status == OK else None
        except msgspec.DecodeError:
            return None


# Of a request that has just ended: its client left before the engine had read it, or it would have an account.
_NEVER_READ: Final = _Account(0, 0, 0, 0, final=True)


def _row(
    exchange: Exchange,
    row_id: str,
    gateway_id: str,
    status: int,
    started_at: float,
    ended_s: float,
    told: _Account | None,
    lost: _Account | None,
) -> Row:
    """The row, with what engines told of the attempt that is billed and of one that was lost, where they were asked."""
    first_s = exchange.first_byte_s
    if told is not None:
        usage, exact = Usage(told.prompt_tokens, told.completion_tokens, told.cached_tokens), told.final
        counted = told.counted_prompt_tokens
    else:
        usage, exact = exchange.usage or best_known(exchange)[0], exchange.usage_exact
        counted = usage.prompt_tokens * (1 if exchange.facts is None else exchange.facts.n)
    computed: int | None = None
    if exchange.unanswered and usage != NOTHING:
        usage, computed = NOTHING, usage.completion_tokens
    elif exchange.wants_no_token and usage.completion_tokens:
        usage, computed = replace(usage, completion_tokens=0), usage.completion_tokens
    lost_tokens: tuple[int | None, int | None] = (0, 0)
    lost_exact = exchange.lost is None or (lost is not None and lost.final)
    if lost is not None and lost.final:
        lost_tokens = lost.counted_prompt_tokens, lost.completion_tokens
    elif exchange.lost is not None:
        lost_tokens = most_lost(exchange, counted, exact=exact)
    return Row(
        id=row_id,
        request_id=exchange.request_id,
        tenant=exchange.tenant,
        key_id=exchange.key_id,
        model=exchange.named,
        route=exchange.path,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        counted_prompt_tokens=counted,
        counted_completion_tokens=computed,
        exact=exact,
        status=status,
        outcome=exchange.result,
        stream=exchange.stream,
        started_at=started_at,
        ttft_s=None if first_s is None else first_s - exchange.started_s,
        duration_s=ended_s - exchange.started_s,
        gateway_id=gateway_id,
        engine="" if exchange.engine is None else exchange.engine.replica_id,
        lost_engine="" if exchange.lost is None else exchange.lost.engine.replica_id,
        lost_prompt_tokens=lost_tokens[0],
        lost_completion_tokens=lost_tokens[1],
        lost_exact=lost_exact,
    )
