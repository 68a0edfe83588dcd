"""The gateway's recording side: children of the table's metrics, looked up once per label set.

Looking a labelled child up costs as much as incrementing it; the label sets are bounded by the configuration,
so the children are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector

from serving import __version__
from serving.config import LIMITS, GalerneConfig, ModelConfig
from serving.metrics.recorded import Metrics
from serving.metrics.scraped import (
    Backlog,
    EjectedCollector,
    EjectedReplicas,
    Gaps,
    HoldCollector,
    Holds,
    LedgerCollector,
    Loads,
    ReplicaCollector,
)
from serving.metrics.table import (
    EJECTION_REASONS,
    HEDGE_WINNERS,
    HELD,
    HOLD_ENDS,
    MET,
    MISSED,
    NO_TENANT,
    NOT_HELD,
    RELOADS,
    RENEWALS,
    RETRY_ENDS,
    RETRY_KINDS,
    SHED_REASONS,
    TOKEN_KINDS,
    UPSTREAM_KINDS,
)

OUTCOMES = ("completed", "rejected", "failed", "cancelled")
ERROR_STATUS = 400


class Accepted(Protocol):
    """What the metrics read of a relayed request when it has ended."""

    @property
    def model(self) -> str: ...
    @property
    def body(self) -> bytes: ...
    @property
    def tenant(self) -> str: ...
    @property
    def stream(self) -> bool: ...
    @property
    def started_s(self) -> float: ...
    @property
    def first_byte_s(self) -> float | None: ...
    @property
    def last_byte_s(self) -> float | None: ...
    @property
    def later_events(self) -> int: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def result(self) -> str: ...
    @property
    def cut(self) -> bool: ...


class Chosen(Protocol):
    """What is counted of a choice."""

    @property
    def reason(self) -> str: ...
    @property
    def cached_tokens(self) -> int: ...


class Prompted(Protocol):
    """What is counted of what was chosen for."""

    @property
    def prompt_tokens(self) -> int: ...


class Billed(Protocol):
    """What the metrics read of a request's row in the ledger."""

    @property
    def model(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


class GatewayMetrics:
    """Records what the gateway sees, on a registry of its own."""

    def __init__(self, clock: Callable[[], float], registry: CollectorRegistry | None = None) -> None:
        metrics = self._table = Metrics(registry)
        self.registry = metrics.registry
        self._clock = clock
        # Bounded by configuration: routes x models x tenants x statuses.
        self._requests = lru_cache(maxsize=None)(metrics.counter("galerne_requests").labels)
        self._accepted = lru_cache(maxsize=None)(metrics.counter("galerne_requests_accepted").labels)
        self._finished = lru_cache(maxsize=None)(metrics.counter("galerne_requests_finished").labels)
        # Codes are constants of this program: no client makes one up.
        self._refused = lru_cache(maxsize=None)(metrics.counter("galerne_requests_refused").labels)
        self._denied = metrics.counter("galerne_requests_denied")
        self._in_flight = lru_cache(maxsize=None)(metrics.gauge("galerne_requests_in_flight").labels)
        self._ttft = lru_cache(maxsize=None)(metrics.histogram("galerne_time_to_first_token_seconds").labels)
        self._gaps = Gaps()
        self.registry.register(self._gaps)
        self._seconds = lru_cache(maxsize=None)(metrics.histogram("galerne_request_seconds").labels)
        self._bytes_in = lru_cache(maxsize=None)(metrics.counter("galerne_request_bytes").labels)
        self._bytes_out = lru_cache(maxsize=None)(metrics.counter("galerne_response_bytes").labels)
        self._upstream = lru_cache(maxsize=None)(metrics.counter("galerne_upstream_errors").labels)
        self._holds = lru_cache(maxsize=None)(metrics.counter("galerne_holds").labels)
        self._queue_place = lru_cache(maxsize=None)(metrics.histogram("galerne_queue_place").labels)
        self._hold_seconds = lru_cache(maxsize=None)(metrics.histogram("galerne_hold_seconds").labels)
        self._routes = lru_cache(maxsize=None)(metrics.counter("galerne_route_choices").labels)
        self._route_tokens = lru_cache(maxsize=None)(metrics.counter("galerne_route_prompt_tokens").labels)
        self._retries = lru_cache(maxsize=None)(metrics.counter("galerne_retries").labels)
        self._hedges = lru_cache(maxsize=None)(metrics.counter("galerne_hedges").labels)
        self._ejections = lru_cache(maxsize=None)(metrics.counter("galerne_replica_ejections").labels)
        self._slow_readers = lru_cache(maxsize=None)(metrics.counter("galerne_slow_readers").labels)
        self._shed = lru_cache(maxsize=None)(metrics.counter("galerne_requests_shed").labels)
        self._quota_refusals = lru_cache(maxsize=None)(metrics.counter("galerne_quota_refusals").labels)
        self._quota_use = lru_cache(maxsize=None)(metrics.gauge("galerne_quota_use").labels)
        self._limits_store = metrics.gauge("galerne_limits_store_up")
        self._cut = lru_cache(maxsize=None)(metrics.counter("galerne_streams_cut").labels)
        self._slo_ttft = lru_cache(maxsize=None)(metrics.counter("galerne_slo_ttft_requests").labels)
        self._slo_itl = lru_cache(maxsize=None)(metrics.counter("galerne_slo_itl_requests").labels)
        self._tokens = lru_cache(maxsize=None)(metrics.counter("galerne_tokens").labels)
        self._gpus = metrics.gauge("galerne_replica_gpus")
        self._loop_lag = metrics.histogram("galerne_event_loop_lag_seconds")
        # Memory, processor time and open files of this process, under their usual names.
        ProcessCollector(registry=self.registry)
        self._ttft_targets_s: dict[str, float] = {}
        self._itl_targets_s: dict[str, float] = {}
        self._config = metrics.gauge("galerne_config_info")
        self._config_ok = metrics.gauge("galerne_config_reload_ok")
        self._config_reloads = metrics.counter("galerne_config_reloads")
        self._config_at = metrics.gauge("galerne_config_applied_timestamp_seconds")
        self._config_waiting = metrics.gauge("galerne_config_sections_waiting")
        self._revision = ""
        # Bounded by the tenants that the file has named since this process began, as their series are.
        self._expected: set[tuple[str, tuple[str, ...] | None]] = set()
        self._renewals = metrics.counter("galerne_issuer_keys_renewals")
        self._keys_at = metrics.gauge("galerne_issuer_keys_timestamp_seconds")
        metrics.gauge("galerne_build_info").labels(__version__).set(1)

    def expect(self, config: GalerneConfig) -> None:
        """Take the models' targets, and have the counters that rates are made of exist from the start.

        Prometheus' `rate` does not see how a series begins: a tenant's first burst would be none.
        """
        for reason in SHED_REASONS:
            self._shed(reason)
        # A reload of a long list of tenants must not hold the event loop up for those that were there before.
        fresh = [one for one in config.tenants if (one.id, one.models) not in self._expected]
        self._expected.update((one.id, one.models) for one in fresh)
        for tenant, limit in product((t.id for t in config.tenants if t.quota.limited), LIMITS):
            self._quota_refusals(tenant, limit)
        for issuer in config.oidc:
            self._keys_at.labels(issuer.id)
            for outcome in RENEWALS:
                self._renewals.labels(issuer.id, outcome)
        for model in config.models:
            self._expect_model(model)
            for one in fresh:
                names = [name for name in model.names if one.models is None or name in one.models]
                if names:
                    self._expect(model.id, one.id)
                for name, kind in product(names, TOKEN_KINDS):
                    self._tokens(name, one.id, kind)

    def _expect_model(self, model: ModelConfig) -> None:
        if model.slo.itl_p95_s is not None:
            self._itl_targets_s[model.id] = model.slo.itl_p95_s
        if model.slo.ttft_p95_s is not None:
            self._ttft_targets_s[model.id] = model.slo.ttft_p95_s
        self._cut(model.id)
        self._slow_readers(model.id)
        for kind in UPSTREAM_KINDS:
            self._upstream(model.id, kind)
        for kind, end in product(RETRY_KINDS, RETRY_ENDS):
            self._retries(model.id, kind, end)
        for won in HEDGE_WINNERS:
            self._hedges(model.id, won)
        for reason in EJECTION_REASONS:
            self._ejections(model.id, reason)

    def _expect(self, model: str, tenant: str) -> None:
        self._accepted(model, tenant)
        for outcome in OUTCOMES:
            self._finished(model, tenant, outcome)
        for end in HOLD_ENDS:
            self._holds(model, tenant, end)
        if model in self._ttft_targets_s:
            self._slo_ttft(model, tenant, MET)
            self._slo_ttft(model, tenant, MISSED)
        if model in self._itl_targets_s:
            self._slo_itl(model, tenant, MET)
            self._slo_itl(model, tenant, MISSED)

    def counts(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of one of the table's counters and gauges."""
        return [
            (sample.labels, sample.value)
            for family in self._table.of(name).collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]

    def gpus(self, by_model: Mapping[str, float]) -> None:
        """What one replica of each model takes: with the replicas it tells GPU-hours."""
        for model, gpus in by_model.items():
            self._gpus.labels(model).set(gpus)

    def loop_lag(self, seconds: float) -> None:
        """How late the event loop woke a timer."""
        self._loop_lag.observe(seconds)

    def config_applied(self, revision: str, at_s: float) -> None:
        """A state of the configuration file came into force."""
        before, self._revision = self._revision, revision
        self._config.labels(revision).set(1)
        if before not in {"", revision}:
            self._config.remove(before)
        for outcome in RELOADS:
            self._config_reloads.labels(outcome)
        self._config_reloads.labels("applied").inc()
        self._config_at.set(at_s)
        self._config_ok.set(1)

    def config_failed(self) -> None:
        """The configuration file as it is now cannot be used."""
        self._config_reloads.labels("failed").inc()
        self._config_ok.set(0)

    def config_restored(self) -> None:
        """It is again what is in force."""
        self._config_ok.set(1)

    def config_waiting(self, sections: int) -> None:
        """So many of its sections wait for a restart."""
        self._config_waiting.set(sections)

    def issuer_keys(self, issuer: str, renewed: bool) -> None:
        """An issuer's public keys were asked for."""
        self._renewals.labels(issuer, RENEWALS[not renewed]).inc()
        if renewed:
            self._keys_at.labels(issuer).set_to_current_time()

    def watch(self, loads: Loads, holds: Holds) -> None:
        """Export the state of the replica set and of the holds as it is at each scrape."""
        self.registry.register(ReplicaCollector(loads))
        self.registry.register(HoldCollector(holds))

    def watch_ledger(self, state: Callable[[], Backlog]) -> None:
        """Export the ledger's state as it is at each scrape."""
        self.registry.register(LedgerCollector(state))

    def billed(self, row: Billed) -> None:
        """A request has its row in the ledger."""
        self._tokens(row.model, row.tenant, "prompt").inc(row.prompt_tokens)
        self._tokens(row.model, row.tenant, "cached").inc(row.cached_tokens)
        self._tokens(row.model, row.tenant, "completion").inc(row.completion_tokens)

    def hold_began(self, model: str, tenant: str, place: int) -> None:
        """A request began to wait, in this place among its tenant's own."""
        self._queue_place(model, tenant).observe(place)

    def hold_ended(self, model: str, tenant: str, end: str, seconds: float) -> None:
        """A request's wait for a replica is over: released, full, displaced, late or left."""
        self._holds(model, tenant, end).inc()
        self._hold_seconds(model, tenant).observe(seconds)

    def quota_refused(self, tenant: str, limit: str) -> None:
        """A request was refused by a limit: requests, tokens, concurrent, day, month, or store."""
        self._quota_refusals(tenant, limit).inc()

    def quota_used(self, tenant: str, limit: str, part: float) -> None:
        """How much of a limit is used, 1: all of it."""
        self._quota_use(tenant, limit).set(part)

    def limits_store(self, *, up: bool) -> None:
        """Whether the store of limits answers."""
        self._limits_store.set(up)

    def answered(self, route: str, model: str, tenant: str, status: str, seconds: float) -> None:
        """One request ended towards its client."""
        self._requests(route, model, tenant, status).inc()
        self._seconds(route, model, tenant).observe(seconds)

    def refused(self, model: str, tenant: str, code: str) -> None:
        """A request was answered with an error of the gateway's own."""
        self._refused(model, tenant, code).inc()

    def denied(self, tenant: str, reason: str) -> None:
        """A request was not let in, or not there; `tenant` is "" where nobody knows whose it was."""
        self._denied.labels(tenant or NO_TENANT, reason).inc()

    def upstream_failed(self, model: str, kind: str) -> None:
        """An engine failed: connect, broken, timeout or server_error."""
        self._upstream(model, kind).inc()

    def retried(self, model: str, kind: str, end: str) -> None:
        """A replica lost a request before it answered: sent to another, or not (no_replica, no_budget)."""
        self._retries(model, kind, end).inc()

    def hedged(self, model: str, won: str) -> None:
        """Two replicas had a request: whose answer was relayed (first, second, neither)."""
        self._hedges(model, won).inc()

    def ejected(self, model: str, replica: str, reason: str) -> None:  # noqa: ARG002 - a replica's id is for the log
        """A replica is judged unfit: failures, stalled or probes."""
        self._ejections(model, reason).inc()

    def slow_reader(self, model: str) -> None:
        """A client that does not read its answer was cut off."""
        self._slow_readers(model).inc()

    def shed(self, reason: str) -> None:
        """A request was refused because of too many requests, a late event loop or memory."""
        self._shed(reason).inc()

    def watch_ejections(self, health: EjectedReplicas) -> None:
        """Export how many replicas are ejected at each scrape."""
        self.registry.register(EjectedCollector(health))

    def gap(self, model: str, seconds: float) -> None:
        """Time between two chunks of an answer."""
        self._gaps.observe(model, seconds)

    def routed(self, model: str, choice: Chosen, wanted: Prompted) -> None:
        """A replica was chosen for a request."""
        self._routes(model, choice.reason).inc()
        if tokens := wanted.prompt_tokens:
            self._route_tokens(model, HELD).inc(choice.cached_tokens)
            self._route_tokens(model, NOT_HELD).inc(tokens - choice.cached_tokens)

    def first_byte(self, exchange: Accepted, status: int) -> None:
        """The first byte of an answer went to the client: now, not when a long stream ends, is when it is news."""
        if not exchange.stream or exchange.first_byte_s is None or status >= ERROR_STATUS:
            return
        waited_s = exchange.first_byte_s - exchange.started_s
        self._ttft(exchange.model, exchange.tenant).observe(waited_s)
        target_s = self._ttft_targets_s.get(exchange.model)
        if target_s is not None:
            self._slo_ttft(exchange.model, exchange.tenant, MET if waited_s <= target_s else MISSED).inc()

    @contextmanager
    def accepted(self, exchange: Accepted, tenant: str, stream: bool) -> Iterator[None]:
        """Around a relayed request: counts it as accepted and, whatever happens, once as ended."""
        labels = (exchange.model, tenant)
        self._accepted(*labels).inc()
        self._bytes_in(*labels).inc(len(exchange.body))
        in_flight = self._in_flight(*labels)
        in_flight.inc()
        try:
            yield
        finally:
            in_flight.dec()
            outcome = exchange.result
            self._finished(*labels, outcome).inc()
            self._bytes_out(*labels).inc(exchange.sent_bytes)
            if exchange.cut:
                self._cut(exchange.model).inc()
            if stream and exchange.first_byte_s is None:
                self._unanswered(exchange, tenant, outcome)
            if stream:
                self._paced(exchange, tenant)

    def _paced(self, exchange: Accepted, tenant: str) -> None:
        """Count a stream by the mean time between its events: what its reader felt, not each single gap.

        A pass with somebody else's prompt makes one long gap; a target for gaps would be missed by a healthy engine.
        """
        target_s = self._itl_targets_s.get(exchange.model)
        first_s, last_s = exchange.first_byte_s, exchange.last_byte_s
        if target_s is None or first_s is None or last_s is None or not exchange.later_events:
            return
        met = last_s - first_s <= target_s * exchange.later_events
        self._slo_itl(exchange.model, tenant, MET if met else MISSED).inc()

    def _unanswered(self, exchange: Accepted, tenant: str, outcome: str) -> None:
        """No first byte at all: missed, unless the client left while it could still have come in time."""
        target_s = self._ttft_targets_s.get(exchange.model)
        if target_s is None or (outcome == "cancelled" and self._clock() - exchange.started_s <= target_s):
            return
        self._slo_ttft(exchange.model, tenant, MISSED).inc()
