"""Requests that engines die of, told from those that were only there: what has ended replicas is not sent again.

A client that hears 502 sends its request again, and then the next replicas compute it. So each gateway remembers, of
requests that a replica lost without a byte of an answer, a keyed hash and which replicas those were. A request is
refused once it has been lost on `ENDED` replicas that have ended, on one of them alone or nearly so, or on
`ENDED_CROWDED` whoever else was there: replicas end for other reasons too, and then many innocent requests are lost
with them. Equal requests that many send at once (probes, load tests) are no suspects: whoever repeats what ended a
replica has waited for that end. An answer to the same request clears it at once, and time does.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from serving.api.upstream import FailureKind
from serving.errors import BadRequest

# Replicas that a request was lost on before it is refused.
ENDED: Final = 2
ENDED_CROWDED: Final = 3
# So many requests lost with a replica are few enough to suspect each.
FEW: Final = 2
KEEP_S: Final = 300.0
# Some 200 bytes each; the oldest goes first.
MOST: Final = 4096
_PURPOSE: Final = "quarantine"


@dataclass(slots=True)
class _Suspect:
    since_s: float
    # Times that each replica lost it, and those whose connection broke off, which by itself shows that they have ended.
    replicas: dict[str, int] = field(default_factory=dict)
    broke: set[str] = field(default_factory=set)


class Quarantine:
    """One gateway's memory of requests that were lost."""

    def __init__(self, key: bytes, clock: Callable[[], float]) -> None:
        """`key`: of the hashes, so that nobody finds a body to match another's."""
        self._key = key
        self._clock = clock
        self._suspects: OrderedDict[bytes, _Suspect] = OrderedDict()

    def lost(self, model: str, body: bytes, replica: str, kind: FailureKind) -> None:
        """A replica gave no byte of an answer to it. One that is only late is no suspicion."""
        if kind not in {"broken", "server_error"}:
            return
        now_s = self._clock()
        name = self._name(model, body)
        suspect = self._suspects.get(name)
        if suspect is None or now_s - suspect.since_s > KEEP_S:
            suspect = self._suspects[name] = _Suspect(now_s)
        suspect.since_s = now_s
        suspect.replicas[replica] = suspect.replicas.get(replica, 0) + 1
        if kind == "broken":
            suspect.broke.add(replica)
        self._suspects.move_to_end(name)
        while len(self._suspects) > MOST:
            self._suspects.popitem(last=False)

    def answered(self, model: str, body: bytes) -> None:
        """A replica's answer to it has begun."""
        if self._suspects:
            self._suspects.pop(self._name(model, body), None)

    def check(self, model: str, body: bytes, gone: Callable[[str], bool]) -> None:
        """Raise BadRequest where it is to be sent to no replica; `gone`: whether a replica is there no more."""
        if not self._suspects:
            return
        name = self._name(model, body)
        suspect = self._suspects.get(name)
        if suspect is None:
            return
        if self._clock() - suspect.since_s > KEEP_S:
            del self._suspects[name]
            return
        if max(suspect.replicas.values()) > FEW:
            return
        ended = [replica for replica in suspect.replicas if replica in suspect.broke or gone(replica)]
        nearly_alone = any(self._lost_with(replica) <= FEW for replica in ended)
        if len(ended) >= (ENDED if nearly_alone else ENDED_CROWDED):
            raise BadRequest(
                f"{len(ended)} replicas of the model '{model}' have ended while they computed this request, so it is "
                f"not computed again for {KEEP_S / 60:.0f} minutes. Change it, or tell the operator its x-request-id.",
                code="request_quarantined",
            )

    def _lost_with(self, replica: str) -> int:
        return sum(suspect.replicas.get(replica, 0) for suspect in self._suspects.values())

    def _name(self, model: str, body: bytes) -> bytes:
        digest = hmac.new(self._key, f"{_PURPOSE} {model}\n".encode(), "sha256")
        digest.update(body)
        return digest.digest()
