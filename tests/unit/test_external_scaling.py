"""A number of replicas from elsewhere: asked for with its age, believed while it is fresh, kept within the bounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.autoscaling.controller import scaler
from serving.autoscaling.external import NUMBER, PART, SAMPLED, ExternalReader, parse, query
from serving.autoscaling.live import View
from serving.autoscaling.policy import REASONS, Memory, decide
from serving.autoscaling.settings import Settings
from serving.autoscaling.snapshot import Signal, Snapshot
from serving.config import ExternalConfig, ModelConfig

NOW_S = 1_700_000_000.0
SELECTOR = 'kube_deployment_spec_replicas{namespace="galerne",deployment="g-keda-chat"}'


def model(least: int = 1, most: int = 8, **section: Any) -> ModelConfig:
    external = {"query": SELECTOR, "stale_after_s": 60}
    return ModelConfig.model_validate(
        {
            "id": "m",
            "source": "fake:m",
            "replicas": {"min": least, "max": most},
            "autoscaling": {"external": external, "idle_s": 300} | section,
        }
    )


def seen(value: float | None, age_s: float = 5.0, *, target: int = 2, at_s: float = 1000.0, **more: Any) -> Snapshot:
    """What a snapshot is where nothing but the number is known."""
    return Snapshot(at_s=at_s, ready=target, target=target, external=Signal(value, age_s), **more)


@pytest.mark.parametrize(
    ("value", "target", "reason"),
    [
        (2.0, 2, "external"),
        (5.0, 5, "external"),  # as far as it says, at once
        (1.0, 1, "external"),
        (3.2, 4, "external"),
        (3.0000000001, 3, "external"),
        (0.0, 1, "minimum"),
        (9.0, 8, "maximum"),
        (1e300, 8, "maximum"),
    ],
)
def test_the_number_is_the_target_within_the_bounds(value: float, target: int, reason: str) -> None:
    decision, _ = decide(seen(value), Memory(), Settings.of(model()))
    assert (decision.target, decision.reason) == (target, reason)
    assert f"external query says {value:g}"[:20] in decision.explanation
    assert dict(decision.terms)["wanted"] == min(value, 1e9)


@pytest.mark.parametrize(
    ("value", "age_s"), [(None, 5.0), (math.nan, 5.0), (math.inf, 5.0), (6.0, 61.0), (6.0, math.nan), (6.0, -1.0)]
)
def test_what_is_missing_old_or_no_number_holds(value: float | None, age_s: float) -> None:
    # Its own age counts, not that of Galerne's signals.
    decision, memory = decide(seen(value, age_s), Memory(), Settings.of(model(stale_after_s=1000)))
    assert (decision.target, decision.reason) == (2, "stale")
    assert "external" in decision.explanation
    assert memory == Memory()


@given(st.one_of(st.none(), st.floats()), st.floats(), st.integers(0, 30), st.integers(0, 3), st.integers(3, 9))
def test_bounds_hold_whatever_is_said(value: float | None, age_s: float, target: int, least: int, most: int) -> None:
    decision, _ = decide(seen(value, age_s, target=target), Memory(), Settings.of(model(least, most)))
    assert least <= decision.target <= most
    assert decision.reason in REASONS


def test_the_floor_of_a_schedule_holds() -> None:
    all_day = [{"from": "00:00", "to": "24:00", "min": 3}]
    decision, _ = decide(seen(1.0), Memory(), Settings.of(model(schedule=all_day)))
    assert (decision.target, decision.reason) == (3, "schedule")


def test_the_last_replica_goes_when_nobody_has_asked_for_so_long() -> None:
    configured, memory = Settings.of(model(0)), Memory()
    rates = {"arrivals_rps": Signal(1.0, 2.0), "running": Signal(0.0, 2.0), "waiting": Signal(0.0, 2.0)}
    targets = []
    for step in range(8):
        at_s = 1000.0 + 50 * step
        decision, memory = decide(seen(0.0, target=1, at_s=at_s, **rates), memory, configured)
        targets.append((decision.target, decision.reason))
        rates["arrivals_rps"] = Signal(0.0, 2.0)
    assert targets[:6] == [(1, "steady")] * 6
    assert targets[6:] == [(0, "idle")] * 2
    # Without knowing whether somebody asks it stays.
    decision, _ = decide(seen(0.0, target=1, at_s=1500.0), memory, configured)
    assert (decision.target, decision.reason) == (1, "stale")
    assert "arrivals_rps" in decision.explanation


def test_who_waits_for_a_model_that_sleeps_wakes_it_whatever_is_said() -> None:
    asleep = replace(seen(0.0, target=0), held=Signal(2.0, 1.0))
    for value in (0.0, None):
        decision, memory = decide(replace(asleep, external=Signal(value, 5.0)), Memory(), Settings.of(model(0)))
        assert (decision.target, decision.reason) == (1, "wake")
    # And is not sent back by a number that does not know of it yet.
    after = replace(seen(0.0, target=1, at_s=1005.0), arrivals_rps=Signal(0.0, 1.0))
    assert decide(after, memory, Settings.of(model(0)))[0].target == 1


# -- the query


def test_a_bare_metric_says_itself_how_old_it_is() -> None:
    external = ExternalConfig(query=SELECTOR)
    assert external.sampled_query == f"timestamp({SELECTOR})"
    for part in (SELECTOR, external.sampled_query, NUMBER, SAMPLED):
        assert part in query(external)


@pytest.mark.parametrize(
    "computed",
    [
        "sum(a)",
        "a + b",
        "a / 2",
        "a offset 5m",
        "a{b='}'}",  # more than is looked at
        'a{b="}"} or vector(1)',
        "vector(3)",
        "a[5m]",
        "a # now",
    ],
)
def test_what_is_computed_needs_to_say_how_old_it_is(computed: str) -> None:
    with pytest.raises(ValidationError, match="`sampled` is needed"):
        ExternalConfig(query=computed)
    assert ExternalConfig(query=computed, sampled="min(timestamp(a))").sampled_query == "min(timestamp(a))"


@pytest.mark.parametrize(
    "bare", ["a", "a:b:c", "a{b='c'}", 'a{b="c"}', 'a{b="}", c=~"x.*"}', 'a{b="\\""}', f" {SELECTOR} "]
)
def test_a_metric_with_its_labels_does_not(bare: str) -> None:
    assert ExternalConfig(query=bare).sampled is None


# -- the answer


def row(part: str | None, value: object) -> dict[str, Any]:
    labels = {"instance": "ksm", "model": "other"} | ({} if part is None else {PART: part})
    return {"metric": labels, "value": [NOW_S, value]}


def body(*rows: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": list(rows)}} | more).encode()


GOOD = (row(NUMBER, "4"), row(SAMPLED, str(NOW_S - 20)))


def test_number_and_age_come_together() -> None:
    assert parse(body(*GOOD)) == {"": {"external": Signal(4.0, 20.0)}}


@pytest.mark.parametrize(
    "rows",
    [
        (),
        GOOD[:1],
        GOOD[1:],
        (*GOOD, row(NUMBER, "4")),  # of two nobody knows which is meant
        (*GOOD, row(SAMPLED, str(NOW_S))),
        (row(NUMBER, "NaN"), GOOD[1]),
        (row(NUMBER, "+Inf"), GOOD[1]),
        (row(NUMBER, "-1"), GOOD[1]),
        (row(NUMBER, "many"), GOOD[1]),
        (GOOD[0], row(SAMPLED, "NaN")),
        (row(None, "4"), GOOD[1]),
        ({"metric": None}, GOOD[1]),
    ],
)
def test_half_an_answer_is_none(rows: tuple[dict[str, Any], ...]) -> None:
    assert parse(body(*rows)) == {}


def test_an_answer_that_is_no_answer() -> None:
    for bad in (body(*GOOD, status="error"), body(*GOOD, warnings=["partial"]), b"{}", b"no"):
        with pytest.raises(ValueError, match=r".*"):
            parse(bad)


def test_trouble_shows_as_age() -> None:
    now_s, bodies = [1000.0], [body(*GOOD)]

    def fetch(url: str, timeout_s: float) -> bytes:
        assert SELECTOR.split("{")[0] in url
        if not bodies:
            raise OSError("gone")
        return bodies.pop()

    external = ExternalConfig(query=SELECTOR)
    reader = ExternalReader("http://p", 1.0, external, clock=lambda: now_s[0], fetch=fetch, refresh_s=3600)
    # The background thread of the first use asks for the same.
    reader.reader.refresh()
    bodies.append(body(*GOOD))
    assert reader.signals()["external"].value == 4.0
    now_s[0] += 100.0
    assert reader.signals()["external"].age_s >= 120.0
    reader.reader.stop()


def test_without_an_answer_there_is_no_number() -> None:
    def fetch(url: str, timeout_s: float) -> bytes:
        raise OSError("nobody listens")

    reader = ExternalReader("http://p", 1.0, ExternalConfig(query="a"), fetch=fetch, refresh_s=3600)
    assert reader.signals() == {"external": Signal()}
    reader.reader.stop()


def test_a_controller_without_prometheus_holds() -> None:
    scale = scaler(model(), None, "127.0.0.1")
    assert scale(View(1000.0, frozenset({"a"}), 3)) == 3
