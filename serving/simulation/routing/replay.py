"""Plays a trace against simulated replicas, each request sent where the live router sends it; virtual time, one seed.

A router is told what its gateway would learn: a request's beginning, its first byte, its end. What it believes of the
caches is its own mirror; what counts here is what the simulated engines found. Several gateways get requests at random,
each with a router of its own, and learn of others' at the replicas (serving.simulation.routing.gateways).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import numpy as np

from serving.config import RoutingConfig, RoutingPolicy
from serving.routing.choice import Wanted
from serving.routing.policies import Speeds
from serving.routing.prefix_index import Prefix
from serving.routing.router import Turn
from serving.simulation.engine import Engine
from serving.simulation.routing.gateways import AFFINITY, EXCHANGE_INTERVAL_S, Gateways
from serving.simulation.routing.replica import Replica, Request
from serving.simulation.routing.trace import PromptTrace

POLICIES: Final[tuple[RoutingPolicy, ...]] = get_args(RoutingPolicy)
ALL: Final = (*POLICIES, AFFINITY)
QUANTILES: Final = (0.5, 0.9, 0.95, 0.99)
WORK: Final = "prompt tokens computed"


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated: so many replicas of one engine, so many blocks of cache each, before so many gateways."""

    engine: Engine
    replicas: int
    blocks: int
    seed: int = 0
    gateways: int = 1
    # Whether gateways learn of one another's requests at the replicas, and how often beside answers' heads.
    feedback: bool = True
    exchange_interval_s: float = EXCHANGE_INTERVAL_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy came to; everything simulated. Imbalances: the most of any replica over the mean of all."""

    policy: str
    requests: int
    # Of all prompt tokens, the share that replicas found in their caches.
    token_hit: float
    # Of prompt tokens computed, requests, and seconds that engines were busy.
    imbalance: float
    imbalance_requests: float
    imbalance_busy: float
    ttft_mean_s: float
    ttft_quantiles_s: tuple[float, ...]
    # Choices by their reason.
    reasons: dict[str, int]

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        quantiles = {f"p{q * 100:g}": round(s, 4) for q, s in zip(QUANTILES, self.ttft_quantiles_s, strict=True)}
        return {
            "policy": self.policy,
            "simulated": True,
            "requests": self.requests,
            "token_hit": round(self.token_hit, 5),
            "imbalance": round(self.imbalance, 4),
            "imbalance_of": WORK,
            "imbalance_requests": round(self.imbalance_requests, 4),
            "imbalance_busy": round(self.imbalance_busy, 4),
            "ttft_s": {"mean": round(self.ttft_mean_s, 4), **quantiles},
            "reasons": self.reasons,
        }


def speeds(engine: Engine) -> Speeds:
    """A profile's, as the live policy takes them."""
    return Speeds(
        prefill_tokens_per_s=engine.rate,
        decode_s=engine.step_s,
        decode_s_per_sequence=engine.step_s_per_sequence,
        decode_s_per_context_token=engine.step_s_per_token,
        chunk_tokens=engine.chunk_tokens,
    )


def play(trace: PromptTrace, cluster: Cluster, policy: str, config: RoutingConfig | None = None) -> Outcome:
    """One policy on a trace. `config` gives the weights of a policy that has some."""
    n = cluster.replicas
    live: RoutingPolicy = next((p for p in POLICIES if p == policy), "cost")
    settings = (config or RoutingConfig()).model_copy(update={"policy": live, "index_blocks": n * cluster.blocks})
    turns: dict[Request, Turn] = {}
    replicas = [
        Replica(
            cluster.engine,
            cluster.blocks,
            trace.block_tokens,
            lambda request, _: turns[request].answered(),
            lambda request, _: turns.pop(request).end(),
        )
        for _ in range(n)
    ]
    gateways = Gateways(
        cluster.gateways,
        settings,
        speeds=speeds(cluster.engine),
        replicas=replicas,
        kv_tokens=cluster.blocks * trace.block_tokens,
        seed=cluster.seed,
        affinity=policy == AFFINITY,
        feedback=cluster.feedback,
        exchange_interval_s=cluster.exchange_interval_s,
    )
    ends = _ends(trace)
    served: list[tuple[Request, int]] = []
    reasons: dict[str, int] = {}
    for prompt in trace.prompts:
        gateways.advance(prompt.at_s)
        request = Request(prompt.at_s, prompt.tokens, prompt.output_tokens, prompt.blocks)
        wanted = Wanted(Prefix(prompt.blocks, ends, prompt.tokens), str(prompt.session))
        turns[request], place = gateways.send(wanted)
        reason = turns[request].choice.reason
        reasons[reason] = reasons.get(reason, 0) + 1
        replicas[place].put(request, prompt.at_s)
        served.append((request, place))
    for replica in replicas:
        replica.advance(math.inf)
    return _outcome(policy, served, replicas, reasons)


def _ends(trace: PromptTrace) -> Sequence[int]:
    """Where blocks end, in tokens; a last block that is not full counts as one in the router's mirror."""
    most = max(len(prompt.blocks) for prompt in trace.prompts)
    return range(trace.block_tokens, (most + 1) * trace.block_tokens, trace.block_tokens)


def _outcome(
    policy: str, served: list[tuple[Request, int]], replicas: list[Replica], reasons: dict[str, int]
) -> Outcome:
    computed, requests = [0.0] * len(replicas), [0.0] * len(replicas)
    for request, place in served:
        computed[place] += request.prompt_tokens - request.cached_tokens
        requests[place] += 1
    waits_s = np.array([request.first_s - request.at_s for request, _ in served])
    return Outcome(
        policy=policy,
        requests=len(served),
        token_hit=sum(r.cached_tokens for r, _ in served) / sum(r.prompt_tokens for r, _ in served),
        imbalance=_imbalance(computed),
        imbalance_requests=_imbalance(requests),
        imbalance_busy=_imbalance([replica.busy_s for replica in replicas]),
        ttft_mean_s=float(waits_s.mean()),
        ttft_quantiles_s=tuple(float(s) for s in np.quantile(waits_s, QUANTILES)),
        reasons=dict(sorted(reasons.items())),
    )


def _imbalance(work: Sequence[float]) -> float:
    return max(work) * len(work) / sum(work) if sum(work) else 1.0
