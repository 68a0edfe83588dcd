"""What gateways do about replicas that fail, readers that do not read, and too much of everything."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.config.base import Frozen, PositiveInt, Seconds

Share = Annotated[float, Field(gt=0, le=1)]


class ModelFaultsConfig(Frozen):
    """One model's replicas that die, hang or lie."""

    # So large a share of the requests under way may be on their second replica at once, and always three of them:
    # replicas that fail one after the other must not be met by everybody's second try.
    retry_share: Share = 0.2
    # A request without a first byte for so long goes to a second replica too, within the same share, and the answer
    # that begins first is relayed; absent: never. Set it above what nearly all requests wait at a busy hour, for what
    # is hedged is computed twice.
    hedge_after_s: Seconds | None = None
    # Of a model's replicas at most so many are ejected at once, and never the last: a fault of our own, or of the
    # network, looks like a fault of all of them.
    ejected_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    # An answer of which nothing comes for so long is given up, if the replica's health probes fail as long: a long
    # prefill is silent too, and its replica answers probes.
    stall_s: Seconds = 15.0


class GatewayFaultsConfig(Frozen):
    """A gateway's own watch over its engines, its clients and itself."""

    # Each replica is asked for its health so often by each gateway; three answers that fail to come eject it.
    probe_interval_s: Seconds = 1.0
    probe_timeout_s: Seconds = 1.0
    # A client that takes nothing of what waits for it for so long is cut off, its engine and memory freed. Longer than
    # a laptop sleeps through, or a proxy between would have cut it first.
    slow_reader_s: Seconds = 300.0
    # New requests get 503 while the event loop is late by more than this: every stream waits as long for each token.
    shed_lag_s: Seconds = 0.5
    # And while the process is larger than this: the kernel would end it, and every stream with it.
    shed_memory_bytes: PositiveInt = 2 * 1024 * 1024 * 1024
