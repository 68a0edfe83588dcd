"""The ops page's facts as one JSON object: what this gateway sees, and beside it what Prometheus says of the cluster.

Pure: from the configuration and what is read of the gateway to a dictionary without secrets. Of keys there are the
ids, of models what the configuration says they are called; no address, no digest, no path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from serving import __version__
from serving.api.body import ClientLeft
from serving.api.ops.cluster import Facts
from serving.config import GalerneConfig, ModelConfig, TenantConfig
from serving.metrics.table import MET, MISSED, TOKEN_KINDS

CLIENT_LEFT = str(ClientLeft.status)
FIRST_ERROR = 400
OBJECTIVES = {"ttft": "galerne_slo_ttft_requests", "itl": "galerne_slo_itl_requests"}


class Loads(Protocol):
    """What is read of the replica set."""

    def snapshot(self) -> Mapping[str, Mapping[str, int]]:
        """Requests in flight by model and replica."""


class HeldRequests(Protocol):
    """What is read of a model's hold."""

    def held(self) -> Mapping[str, int]:
        """Waiting requests by tenant."""

    def oldest_s(self) -> float:
        """How long the oldest has waited."""


class Holds(Protocol):
    """The holds of all models."""

    def items(self) -> Iterable[tuple[str, HeldRequests]]:
        """Every model with its hold."""


class Ejected(Protocol):
    """What is read of the replicas' health."""

    def ejected(self) -> Iterable[tuple[str, int]]:
        """Each model with the number of its ejected replicas."""


class Counts(Protocol):
    """What is read of the gateway's metrics."""

    def counts(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of a metric."""


@dataclass(frozen=True, slots=True)
class Own:
    """Where this gateway's own facts are read."""

    loads: Loads
    holds: Holds
    health: Ejected
    counts: Counts
    in_flight: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Counted:
    """This gateway's counters, summed; keys as `_by` makes them."""

    # By objective: by "met/model".
    objectives: Mapping[str, Mapping[str, float]]
    in_flight_by_model: Mapping[str, float]
    in_flight_by_tenant: Mapping[str, float]
    # Streams that broke off, by model.
    cut: Mapping[str, float]
    # Requests refused because the gateway has too much of something, by why.
    shed: Mapping[str, float]
    received_bytes: Mapping[str, float]
    sent_bytes: Mapping[str, float]
    # By kind/tenant.
    tokens: Mapping[str, float]
    # By tenant and HTTP status.
    statuses: Mapping[str, Mapping[str, float]]


def counted(counts: Counts) -> Counted:
    """Every series once; as long as a scrape's work, so it is for a thread, where metrics may be read."""
    statuses: dict[str, dict[str, float]] = {}
    for labels, value in counts.counts("galerne_requests"):
        found = statuses.setdefault(labels["tenant"], {})
        found[labels["status"]] = found.get(labels["status"], 0.0) + value
    in_flight = counts.counts("galerne_requests_in_flight")
    return Counted(
        objectives={name: _by(counts.counts(metric), "met", "model") for name, metric in OBJECTIVES.items()},
        in_flight_by_model=_by(in_flight, "model"),
        in_flight_by_tenant=_by(in_flight, "tenant"),
        cut=_by(counts.counts("galerne_streams_cut"), "model"),
        shed=_by(counts.counts("galerne_requests_shed"), "reason"),
        received_bytes=_by(counts.counts("galerne_request_bytes"), "tenant"),
        sent_bytes=_by(counts.counts("galerne_response_bytes"), "tenant"),
        tokens=_by(counts.counts("galerne_tokens"), "kind", "tenant"),
        statuses=statuses,
    )


def document(config: GalerneConfig, own: Own, sums: Counted, facts: Facts) -> dict[str, Any]:
    """The whole state; to be called on the gateway's event loop."""
    replicas, holds, ejected = own.loads.snapshot(), dict(own.holds.items()), dict(own.health.ejected())
    return {
        "version": __version__,
        "gateway": {
            "in_flight": own.in_flight(),
            "most_in_flight": config.gateway.max_ongoing_requests,
            "shed": {reason: int(count) for reason, count in sums.shed.items() if count},
            "of": facts.gateways,
            "may_be_several": config.gateway.bounds.max > 1,
        },
        "models": [
            _model(model, replicas.get(model.id, {}), ejected.get(model.id, 0), holds[model.id], sums, facts)
            for model in config.models
        ],
        "tenants": [_tenant(tenant, sums, facts) for tenant in config.tenants],
        "changes": [asdict(change) for change in facts.changes],
    }


def _model(
    model: ModelConfig,
    replicas: Mapping[str, int],
    ejected: int,
    hold: HeldRequests,
    sums: Counted,
    facts: Facts,
) -> dict[str, Any]:
    waiting = hold.held()
    return {
        "id": model.id,
        "task": model.task,
        "simulated": model.is_fake,
        "state": _state(model, len(replicas), sum(waiting.values())),
        "min": model.replicas.min,
        "max": model.replicas.max if model.autoscaling is not None else model.replicas.min,
        "scaled": model.autoscaling is not None,
        "replicas": [
            {"id": replica, "in_flight": count, "cluster": dict(facts.replicas.get((model.id, replica), {}))}
            for replica, count in replicas.items()
        ],
        "ejected": ejected,
        "in_flight": int(sums.in_flight_by_model.get(model.id, 0)),
        "streams_cut": int(sums.cut.get(model.id, 0)),
        "held": waiting,
        "held_oldest_s": round(hold.oldest_s(), 1),
        "slo": [
            _objective(model, name, target_s, sums.objectives[name], facts)
            for name, target_s in (("ttft", model.slo.ttft_p95_s), ("itl", model.slo.itl_p95_s))
            if target_s is not None
        ],
        "cluster": dict(facts.models.get(model.id, {})),
        "reasons": list(facts.reasons.get(model.id, ())),
    }


def _state(model: ModelConfig, ready: int, held: int) -> str:
    if ready:
        return "ready"
    if model.replicas.min == 0 and not held:
        return "asleep"
    return "no replica"


def _objective(
    model: ModelConfig, name: str, target_s: float, counts: Mapping[str, float], facts: Facts
) -> dict[str, Any]:
    met, missed = (counts.get(f"{word}/{model.id}", 0.0) for word in (MET, MISSED))
    return {
        "name": name,
        "target_s": target_s,
        "requests": int(met + missed),
        "attainment": met / (met + missed) if met + missed else None,
        "attainment_1h": facts.attainment.get((model.id, name)),
    }


def _tenant(tenant: TenantConfig, sums: Counted, facts: Facts) -> dict[str, Any]:
    statuses = sums.statuses.get(tenant.id, {})
    return {
        "id": tenant.id,
        "models": None if tenant.models is None else list(tenant.models),
        "in_flight": int(sums.in_flight_by_tenant.get(tenant.id, 0)),
        "requests": int(sum(statuses.values())),
        "refused": _refused(statuses),
        "request_bytes": int(sums.received_bytes.get(tenant.id, 0)),
        "response_bytes": int(sums.sent_bytes.get(tenant.id, 0)),
        "tokens": {kind: int(sums.tokens.get(f"{kind}/{tenant.id}", 0)) for kind in TOKEN_KINDS},
        "hour": _hour(facts.tenants.get(tenant.id)),
    }


def _hour(by_status: Mapping[str, float] | None) -> dict[str, Any] | None:
    if by_status is None:
        return None
    return {"requests": round(sum(by_status.values())), "refused": _refused(by_status)}


def _refused(by_status: Mapping[str, float]) -> dict[str, int]:
    """Requests by the status of a refusal or failure; a client that left was refused nothing."""
    return {
        status: round(count)
        for status, count in sorted(by_status.items())
        if status.isdecimal() and int(status) >= FIRST_ERROR and status != CLIENT_LEFT and round(count)
    }


def _by(counts: Iterable[tuple[dict[str, str], float]], *names: str) -> dict[str, float]:
    """Sums by the values of these labels, joined by slashes (only the last may hold one)."""
    found: dict[str, float] = {}
    for labels, value in counts:
        key = "/".join(labels[name] for name in names)
        found[key] = found.get(key, 0.0) + value
    return found
