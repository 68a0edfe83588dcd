"""When a request that its replica lost goes to another one, and what its loss says about the replica.

A POST is sent again only while not a byte of an answer has come. That is safe for inference: a request changes
nothing in an engine but its cache, no two requests depend on each other, and what the lost replica computed is lost
with it or ended by the closed connection. It costs tokens computed twice at most, which is why it is counted and
bounded by a budget; the client sees one answer, of one replica. After the first byte nothing is sent again: the rest
of another answer would be another text.

A request of which two replicas have died is not given to a third: it may be what they die of. One that is only late is
`serving.api.hedge`'s.
"""

from __future__ import annotations

from typing import Final, Protocol

from serving.api.upstream import FailureKind
from serving.errors import RequestError, UpstreamFailed, UpstreamTimeout
from serving.metering.answers import ERROR_EVENT, SERVER_ERROR, is_server_error
from serving.metrics.table import RETRY_KINDS
from serving.routing.ejection import Ejections
from serving.routing.health import ModelHealth
from serving.routing.retry_budget import Turn

# So many replicas have a request in all.
MAX_REPLICAS: Final = 2
# A dead replica's requests come all at once; they wait so long for their turns.
TURN_WAIT_S: Final = 30.0


class Lost(Protocol):
    """What is read and written of a request that is tried."""

    replica: str
    suspect: str


def lost(ejections: Ejections, request: Lost, kind: FailureKind) -> None:
    """A replica gave no byte of an answer."""
    if kind == "server_error":
        # Perhaps the request is at fault: whoever answers it shows that it is not.
        request.suspect = request.replica
    elif kind in {"timeout", "stalled"}:
        ejections.stalled(request.replica)
    else:
        ejections.failed(request.replica)


def answered(ejections: Ejections, request: Lost) -> None:
    """A replica's answer has begun, and is no failure."""
    ejections.answered(request.replica)
    if request.suspect:
        ejections.failed(request.suspect)


async def again_allowed(
    health: ModelHealth, spent: frozenset[str], kind: FailureKind
) -> tuple[str | None, Turn | None]:
    """Whether another replica may get the request: ("sent", a turn), or why not and none.

    A timeout is no loss: the replica may still compute, and what was too long once is too long twice.
    """
    if kind not in RETRY_KINDS:
        return None, None
    excluded = spent | health.ejections.out
    if len(spent) >= MAX_REPLICAS or all(e.replica_id in excluded for e in health.endpoints):
        return "no_replica", None
    # Answers of 500 may go on coming: nobody waits with one for another try.
    turn = await health.budget.turn(0.0 if kind == "server_error" else TURN_WAIT_S)
    return ("no_budget", None) if turn is None else ("sent", turn)


def failed_engine(kind: FailureKind) -> RequestError:
    """What a client hears when no replica answered its request."""
    if kind in {"timeout", "stalled"}:
        return UpstreamTimeout("The engine did not answer in time.")
    if kind == "server_error":
        return UpstreamFailed("The engine failed on this request. It may work when sent again.")
    return UpstreamFailed("The engine broke off before it answered. The request may work when sent again.")


def is_failure(status: int, chunk: bytes) -> bool:
    """Whether an answer that begins so is a failure of the engine's, and none to relay."""
    return status >= SERVER_ERROR or (chunk.startswith(ERROR_EVENT) and is_server_error(chunk))
