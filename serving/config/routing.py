"""Which of a model's replicas a request goes to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serving.config.base import Frozen, PositiveInt

RoutingPolicy = Literal["cost", "power-of-two", "round-robin", "session"]


class RoutingConfig(Frozen):
    """How requests find their replica, where a model has more than one."""

    # cost: where the prompt's prefix is cached and the queue is short. power-of-two: the less loaded of two at random.
    # session: requests of one x-session-id to one replica, as far as load allows; others as power-of-two.
    policy: RoutingPolicy = "cost"
    # cost: how much longer than it takes to compute a cached prefix anew a request may wait for it, times. High values
    # save more computation, low ones shorten queues; for prefixes that several requests share at once it falls to 1.
    reuse_weight: Annotated[float, Field(ge=1)] = 24.0
    # Tokens of KV cache of one replica; absent: autoscaling.capacity.kv_tokens, or what the engine says, or 262144.
    kv_tokens: PositiveInt | None = None
    # Blocks that each gateway remembers of all replicas together, about 240 bytes each.
    index_blocks: PositiveInt = 500_000
    # session: no replica gets more than so many times the mean of requests in flight.
    session_load: Annotated[float, Field(gt=1)] = 1.25
