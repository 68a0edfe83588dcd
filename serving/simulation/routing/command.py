"""What `galerne simulate routing` does, from names to outcomes; every failure is one SimulationError."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from loadtest.errors import LoadtestError
from loadtest.profiles.model import load_profile
from serving.config import RoutingConfig
from serving.errors import SimulationError
from serving.simulation.engine import Engine
from serving.simulation.routing.gateways import EXCHANGE_INTERVAL_S
from serving.simulation.routing.replay import ALL, QUANTILES, WORK, Cluster, Outcome, play
from serving.simulation.routing.trace import PromptTrace, find

HEADINGS: Final = (
    "policy",
    "token hit",
    "imbalance",
    "of requests",
    "of busy time",
    "TTFT mean",
    *(f"p{q * 100:g}" for q in QUANTILES),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """The command's options."""

    trace: str
    policies: tuple[str, ...]
    replicas: int
    blocks: int
    profile: str
    rate_scale: float
    reuse_weight: float | None
    seed: int
    gateways: int = 1
    feedback: bool = True
    exchange_interval_s: float = EXCHANGE_INTERVAL_S
    spread: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """Policies on one trace."""

    asked: Asked
    trace: PromptTrace
    outcomes: tuple[Outcome, ...]

    def document(self) -> dict[str, Any]:
        """As JSON holds it; of one policy its figures stand beside the rows too."""
        rows = [outcome.document() for outcome in self.outcomes]
        alone = rows[0] if len(rows) == 1 else {}
        return alone | {
            "simulated": True,
            "trace": self.trace.name,
            "requests": len(self.trace.prompts),
            "duration_s": round(self.trace.duration_s, 3),
            "block_tokens": self.trace.block_tokens,
            "profile": self.asked.profile,
            "replicas": self.asked.replicas,
            "blocks": self.asked.blocks,
            "rate_scale": self.asked.rate_scale,
            "seed": self.asked.seed,
            "gateways": self.asked.gateways,
            "feedback": self.asked.feedback,
            "exchange_interval_s": self.asked.exchange_interval_s,
            "spread_arrivals": self.asked.spread,
            "imbalance_of": WORK,
            "rows": rows,
        }

    def _gateways(self) -> str:
        if self.asked.gateways == 1:
            return ""
        return f"{self.asked.gateways} gateways {'with' if self.asked.feedback else 'without'} feedback before "

    def preface(self) -> str:
        """One line over the table."""
        return (
            f"simulated: {self.trace.name}, {len(self.trace.prompts):,} requests in {self.trace.duration_s:,.0f} s on "
            f"{self._gateways()}{self.asked.replicas} replicas of {self.asked.profile}, {self.asked.blocks:,} blocks "
            f"of {self.trace.block_tokens} tokens each; imbalance: most over mean of a replica's {WORK}"
        )


def run(asked: Asked) -> Comparison:
    """Reads and plays. Raises SimulationError with what is wrong."""
    policies = tuple(dict.fromkeys(asked.policies)) or ALL
    if unknown := [name for name in policies if name not in ALL]:
        raise SimulationError(f"no policy {', '.join(unknown)}; allowed: {', '.join(ALL)}")
    try:
        engine = Engine.of(load_profile(asked.profile))
        trace = find(asked.trace, asked.rate_scale, spread=asked.spread)
    except LoadtestError as error:
        raise SimulationError(str(error)) from error
    longest = max(-(-(p.tokens + p.output_tokens) // trace.block_tokens) for p in trace.prompts)
    if longest > asked.blocks:
        raise SimulationError(f"--blocks {asked.blocks}: the longest request takes {longest} blocks on one replica")
    config = RoutingConfig() if asked.reuse_weight is None else RoutingConfig(reuse_weight=asked.reuse_weight)
    cluster = Cluster(
        engine, asked.replicas, asked.blocks, asked.seed, asked.gateways, asked.feedback, asked.exchange_interval_s
    )
    return Comparison(asked, trace, tuple(play(trace, cluster, policy, config) for policy in policies))


def cells(outcome: Outcome) -> tuple[str, ...]:
    """A row as text, under HEADINGS."""
    return (
        outcome.policy,
        f"{outcome.token_hit:.3f}",
        f"{outcome.imbalance:.3f}",
        f"{outcome.imbalance_requests:.3f}",
        f"{outcome.imbalance_busy:.3f}",
        *(f"{seconds:,.3f} s" for seconds in (outcome.ttft_mean_s, *outcome.ttft_quantiles_s)),
    )


def as_json(comparison: Comparison) -> str:
    """One object on one line."""
    return json.dumps(comparison.document())
