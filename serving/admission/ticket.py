"""One request's place in a hold, then its turn, then its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal, Protocol

from serving.admission.bounds import RequestFacts
from serving.admission.estimates import Cost
from serving.errors import RequestError
from serving.metering.usage import Usage

End = Literal["released", "displaced", "late", "left"]


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """It does not come."""


CallLater = Callable[[float, Callable[[], None]], Timer]


def on_the_loop(seconds: float, call: Callable[[], None]) -> Timer:
    """The running event loop's timer."""
    return asyncio.get_running_loop().call_later(seconds, call)


class Work(Protocol):
    """What is read of a request while it is under way, and at its end."""

    @property
    def facts(self) -> RequestFacts | None: ...
    @property
    def computes(self) -> bool: ...
    @property
    def stream(self) -> bool: ...
    @property
    def first_byte_s(self) -> float | None: ...
    @property
    def later_events(self) -> int: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def usage_exact(self) -> bool: ...
    @property
    def outcome(self) -> str: ...
    @property
    def client_left(self) -> bool: ...


class Holder(Protocol):
    """What a ticket calls of its hold."""

    def refusal(self, why: str, ticket: Ticket | None = None) -> RequestError:
        """The answer beyond a bound."""

    def forget(self, ticket: Ticket, end: End) -> None:
        """A wait has ended otherwise than by its turn."""

    def answering(self, ticket: Ticket) -> None:
        """The engine has begun to answer."""

    def turn_ended(self, ticket: Ticket) -> None:
        """A request that had its turn is over."""


class Ticket:
    """`end` gives place or turn back, as often as it is called. The future exists only where somebody waits."""

    __slots__ = (
        "_answered",
        "_end",
        "_future",
        "_hold",
        "_timer",
        "charged",
        "charged_output",
        "cost",
        "held_tokens",
        "own_fault",
        "ramped",
        "sent_s",
        "since_s",
        "size_bytes",
        "tenant",
        "work",
    )

    def __init__(
        self, hold: Holder, tenant: str, size_bytes: int, since_s: float, cost: Cost, work: Work | None
    ) -> None:
        self._hold: Holder | None = hold
        self._timer: Timer | None = None
        self._end: End | None = None
        self._future: asyncio.Future[End] | None = None
        self._answered = False
        self.tenant = tenant
        self.size_bytes = size_bytes
        self.since_s = since_s
        self.cost = cost
        self.work = work
        # The hold's own notes: when it was sent, what it counts as in flight, output charged so far, whether it is
        # one of those that meet a replica that has just come; and, of a wait that ended badly, whether that was its
        # tenant's own doing.
        self.sent_s = 0.0
        self.held_tokens = 0.0
        self.charged_output = 0.0
        # Whether what it took is known and charged.
        self.charged = False
        self.ramped = False
        self.own_fault = False

    @property
    def input_tokens(self) -> float:
        """Tokens of the prompt, estimated."""
        return self.cost.input_tokens

    @property
    def output_tokens(self) -> float:
        """Tokens of the answer, estimated."""
        return self.cost.output_tokens

    @property
    def released(self) -> bool:
        """Whether it is, or was, this request's turn."""
        return self._end == "released"

    @property
    def end_of_wait(self) -> asyncio.Future[End]:
        """How the wait ended, once it has."""
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
            if self._end is not None:
                self._future.set_result(self._end)
        return self._future

    async def wait(self, timeout_s: float | None) -> bool:
        """True when it is this request's turn, False after `timeout_s`; raises RequestError beyond the bounds."""
        if self._end is None:
            await asyncio.wait({self.end_of_wait}, timeout=timeout_s)
        if self._end is None:
            return False
        if self._end in {"late", "displaced"} and self._hold is not None:
            raise self._hold.refusal(self._end, self)
        return True

    def start_timer(self, timer: Timer) -> None:
        """Take the timer that ends the wait as too late."""
        self._timer = timer

    def release(self) -> None:
        """It is this request's turn; the hold has taken note."""
        self._finish("released")

    def finish_wait(self, end: End) -> None:
        """The wait is over without a turn; the first word counts."""
        if self._end is None:
            self._finish(end)
            if self._hold is not None:
                self._hold.forget(self, end)

    def leave(self) -> None:
        """The client has gone: nothing is to be sent for it."""
        self.finish_wait("left")

    def answered(self) -> None:
        """The engine has begun to answer."""
        if self._hold is not None and not self._answered:
            self._answered = True
            self._hold.answering(self)

    def end(self) -> None:
        """Give the place or the turn back."""
        self.finish_wait("left")
        hold, self._hold = self._hold, None
        if hold is not None and self._end == "released":
            hold.turn_ended(self)

    def _finish(self, end: End) -> None:
        self._end = end
        if self._future is not None and not self._future.done():
            self._future.set_result(end)
        if self._timer is not None:
            self._timer.cancel()
