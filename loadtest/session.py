"""One load run from a scenario to its result: planned, sent, checked."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from loadtest import replicas, scenario, server
from loadtest.closed_loop import Users
from loadtest.errors import LoadtestError
from loadtest.processes import this_machine
from loadtest.reports.model import ReportRun, SloTarget
from loadtest.request import Target, target_at
from loadtest.scenario import Scenario, Slo
from loadtest.self_check import self_check
from loadtest.sender import LoopSettings, Tally
from loadtest.workers import RunOutcome, RunSettings, run

READY_POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a scenario is run; times in seconds."""

    # http://HOST:PORT of the gateway, or of any OpenAI server.
    url: str
    workers: int = 1
    # Rates are multiplied by it. The run's length stays: a replayed trace is read further.
    speed: float = 1.0
    # So many users who ask one request after another, in place of the scenario's arrivals.
    users: int | None = None
    think_s: float = 0.0
    timeout_s: float = 600.0
    drain_s: float = 120.0
    max_connections: int = 5000
    # Changes the words of every prompt: a run must not be answered from the prefix cache that the last one filled.
    salt: str | None = None
    # Where replicas over time are read from, if anywhere.
    prometheus: str | None = None
    # The engines are simulated even where the server does not say so.
    simulated: bool = False
    # How long a server that starts, and models that load, are waited for. 0: not at all.
    wait_ready_s: float = 0.0


def run_scenario(
    wanted: Scenario,
    settings: SessionSettings,
    on_progress: Callable[[Tally, float], None] = lambda _tally, _now_s: None,
) -> ReportRun:
    """Run the scenario against the server and give what a report is made from.

    Raises LoadtestError for a scenario that cannot be planned, a server that is not there, a model that it does not
    serve or a key that it does not admit: before anything is sent. What goes wrong later is in the records.
    """
    targets = {tenant: _target(wanted, tenant, settings.url) for tenant in sorted(wanted.tenants)}
    models = _models(wanted, targets, settings.wait_ready_s)
    stretched = wanted.model_copy(
        update={"duration_s": wanted.duration_s * settings.speed, "warm_up_s": wanted.warm_up_s * settings.speed}
    )
    salt = settings.salt or secrets.token_hex(4)
    plan = scenario.plan(stretched, salt=salt)
    users = None
    if settings.users is not None:
        users = Users(settings.users, settings.think_s, wanted.total_s)
    outcome = run(
        plan,
        lambda tenant: targets[tenant],
        RunSettings(
            loop=LoopSettings(
                timeout_s=settings.timeout_s,
                drain_s=settings.drain_s,
                max_connections=settings.max_connections,
                warm_up_s=wanted.warm_up_s,
            ),
            workers=settings.workers,
            users=users,
            speed=1.0 if users is not None else settings.speed,
        ),
        on_progress,
    )
    # The plan is written before the first request: wall-clock times count from the run's own start.
    age_s = (time.monotonic_ns() - outcome.start_ns) / 1e9
    began = datetime.now(UTC) - timedelta(seconds=age_s)
    reads, unread = _replicas(settings, began, age_s)
    return ReportRun(
        name=wanted.name if settings.speed == 1.0 else f"{wanted.name} × {settings.speed:g}",
        when=began,
        machine=asdict(this_machine()),
        scenario=_shown(wanted, settings, salt, (*plan.notes(), *unread)),
        records=outcome.records,
        simulated=settings.simulated or any(found.simulated for held in models.values() for found in held.values()),
        slo=slo_of(wanted.slo),
        replicas=reads,
        invalid=_invalid(outcome),
    )


def slo_of(slo: Slo) -> tuple[SloTarget, ...]:
    """A scenario's objective as a report judges it. Whatever did not complete is an error: it is a least share."""
    limits = {key: getattr(slo, key) for key in ("ttft_p95_s", "itl_p95_s", "e2e_p95_s")}
    targets = [SloTarget(key, limit) for key, limit in limits.items() if limit is not None]
    return (*targets, SloTarget("completed_share", 1 - slo.max_error_share))


def _target(wanted: Scenario, tenant: str, url: str) -> Target:
    return target_at(tenant, url, key=wanted.key_of(tenant))


def _models(wanted: Scenario, targets: dict[str, Target], wait_s: float) -> dict[str, dict[str, server.Model]]:
    """What the server has for each tenant; asked again where that may change within `wait_s`."""
    until_s = time.monotonic() + wait_s
    while True:
        try:
            found = {tenant: server.models(target) for tenant, target in targets.items()}
        except server.NotYet as problem:
            if not wait_s:
                raise
            missing = str(problem)
        else:
            _check_models(wanted, found)
            starting = sorted({s.model for s in wanted.streams if not found[s.tenant][s.model].ready})
            if not starting or not wait_s:
                return found
            missing = f"no replica yet of {', '.join(starting)}"
        if time.monotonic() >= until_s:
            raise LoadtestError(f"not ready within {wait_s:g} s: {missing}")
        time.sleep(min(READY_POLL_S, wait_s))


def _check_models(wanted: Scenario, found: dict[str, dict[str, server.Model]]) -> None:
    for stream in wanted.streams:
        if stream.model not in found[stream.tenant]:
            known = ", ".join(sorted(found[stream.tenant])) or "none"
            raise LoadtestError(
                f"the server has no model {stream.model!r} for tenant {stream.tenant}; it has: {known}. "
                "Name one of these in the scenario, or add the model to the server's configuration"
            )


def _invalid(outcome: RunOutcome) -> Sequence[str]:
    reasons = list(self_check(outcome.records, outcome.samples, waited=outcome.waited))
    if outcome.interrupted:
        reasons.insert(0, "the run was ended by hand before its time")
    return reasons


def _replicas(settings: SessionSettings, began: datetime, age_s: float) -> tuple[Sequence[Any], Sequence[str]]:
    if settings.prometheus is None:
        return (), ()
    try:
        return replicas.read(settings.prometheus, began, age_s), ()
    except LoadtestError as problem:
        # An hour of load is not thrown away because a plot has no data.
        return (), (f"replicas over time: {problem}",)


def _shown(wanted: Scenario, settings: SessionSettings, salt: str, notes: Sequence[str]) -> dict[str, Any]:
    # Secrets are written as asterisks by pydantic.
    shown = wanted.model_dump(mode="json", exclude_none=True)
    run_by = asdict(replace(settings, salt=salt))
    return {
        **shown,
        "loop": "open: requests are sent at their times, whatever became of earlier ones"
        if settings.users is None
        else "closed: each user waits for an answer; a slow server is asked less",
        "run": {key: value for key, value in run_by.items() if value is not None},
        "notes": list(notes),
    }
