"""Counters as Prometheus has them against rows: exact between scrapes, honest at the edges, and what is lost is found."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from serving.cli import app, scraped, state
from serving.errors import ClusterError
from serving.metering import prometheus_counters
from serving.metering.prometheus_counters import Counters
from serving.metering.reconcile import COMPLETION, PROMPT, Tokens
from serving.metering.scrapes import Balance, Follower, Increase, Ran, balance
from serving.metering.spill import Spill
from serving.metering.store import ran
from serving.metering.writer import Writer
from tests.unit.test_ledger import NOW_S, made, reading, row

SCRAPE_S = 5.0
# What counters stood at before: that they began anew is seen by it.
HISTORY = 10.0**6


@dataclass
class Life:
    """A replica's life: requests that made tokens at moments, a restart, and what scrapes saw of it."""

    rng: Random
    length_s: float = 300.0
    rows: list[Ran] = field(default_factory=list)
    # (moment, tokens of prompts, tokens of answers)
    made: list[tuple[float, int, int]] = field(default_factory=list)
    restart_s: float | None = None

    def request(self) -> None:
        began_s = self.rng.uniform(-40, self.length_s)
        ended_s = began_s + self.rng.uniform(0.1, 30)
        steps = sorted(self.rng.uniform(began_s, ended_s) for _ in range(self.rng.randint(1, 20)))
        prompt = self.rng.randint(1, 500)
        self.made += [(at_s, prompt if not index else 0, 1) for index, at_s in enumerate(steps)]
        self.rows.append(Ran(began_s, ended_s, Tokens(prompt, len(steps))))

    def follow(self, until_s: float, looked_s: float, ranks: int = 1) -> Follower:
        """Scrapes up to `looked_s`; the tokens are those of one of the ranks each."""
        follower = Follower(until_s)
        at_s = self.rng.uniform(0, SCRAPE_S)
        while at_s < looked_s:
            anew = self.restart_s is not None and self.restart_s <= at_s
            began_s = self.restart_s or 0.0 if anew else -1000.0
            start = {str(rank): 0.0 if anew else HISTORY for rank in range(ranks)}
            counted: list[dict[str, float]] = [dict(start), dict(start)]
            for index, (made_s, *tokens) in enumerate(self.made):
                if began_s < made_s <= at_s:
                    for series, count in zip(counted, tokens, strict=True):
                        series[str(index % ranks)] += count
            running = sum(r.began_s <= at_s < r.ended_s for r in self.rows)
            follower.scrape(at_s, counted[0], counted[1], running)
            at_s += SCRAPE_S
        return follower


@given(st.integers(0, 10**9), st.integers(0, 40), st.booleans(), st.integers(1, 3), st.booleans())
def test_what_ran_is_always_explained(seed: int, requests: int, restarts: bool, ranks: int, ended: bool) -> None:
    rng = Random(seed)
    life = Life(rng)
    for _ in range(requests):
        life.request()
    life.restart_s = rng.uniform(0, life.length_s) if restarts else None
    # Either everything has ended by the time of looking, or the window reaches to where things still run.
    found = life.follow(life.length_s, life.length_s + (60 if ended else 0), ranks).increase(gone=False)
    assert found is not None
    written = [r for r in life.rows if ended or r.ended_s < life.length_s]
    result = balance("r", found, written, margin_s=0.0)
    if not found.under_way:
        assert result.unexplained == Tokens(), result
    lost = [r for r in written if _within(r, found)]
    if lost and not found.under_way and not result.edges.prompt:
        gone = rng.choice(lost)
        missing = balance("r", found, [r for r in written if r is not gone], margin_s=0.0)
        assert missing.unexplained == gone.tokens
        assert not missing.balanced
        # And a row of which nothing was counted.
        more = balance("r", found, [*written, gone], margin_s=0.0)
        assert more.unexplained == Tokens() - gone.tokens
        assert balance("r", found, [*written, replace(gone, exact=False)], margin_s=0.0).balanced


def _within(r: Ran, found: Increase) -> bool:
    gaps = any(r.ended_s > begin_s and r.began_s < end_s for begin_s, end_s in found.gaps)
    return found.from_s <= r.began_s and r.ended_s <= found.until_s and not gaps


def fed(*scrapes: tuple[float, float, float], until_s: float = 100.0) -> Follower:
    """(moment, tokens of answers, requests under way)."""
    follower = Follower(until_s)
    for at_s, tokens, under_way in scrapes:
        follower.scrape(at_s, {"a": 7.0}, {"a": tokens}, under_way)
    return follower


def test_warm_up_is_no_increase() -> None:
    assert fed((5, 64, 0), (10, 64, 0)).increase(gone=False) == Increase(5, 10, Tokens())
    assert Follower(1.0).increase(gone=True) is None


def test_a_counter_that_begins_anew_leaves_a_gap() -> None:
    found = fed((0, 100, 0), (5, 130, 1), (10, 20, 1), (15, 25, 0)).increase(gone=False)
    assert found == Increase(0, 15, Tokens(0, 30 + 5), gaps=((5, 10),), resets=1)
    # Of three rows, one lies wholly before, one wholly behind, and one is partly in the gap.
    rows = [Ran(1, 4, Tokens(0, 30)), Ran(4.5, 9, Tokens(0, 50)), Ran(11, 14, Tokens(0, 5))]
    result = balance("r", found, rows, margin_s=0.0)
    assert (result.ledger, result.edges, result.unexplained) == (Tokens(0, 35), Tokens(0, 50), Tokens())


def test_the_window_ends_where_all_has_its_row() -> None:
    busy = [(0.0, 10.0, 0.0), (50.0, 20.0, 0.0), (100.0, 60.0, 3.0)]
    # Nobody knows how the three go on: it ends where none ran.
    assert fed(*busy).increase(gone=False) == Increase(0, 50, Tokens(0, 10))
    # They have ended since, or their replica has.
    assert fed(*busy, (105, 90, 2), (110, 99, 0)).increase(gone=False) == Increase(0, 100, Tokens(0, 50))
    assert fed(*busy).increase(gone=True) == Increase(0, 100, Tokens(0, 50))
    # Where some always ran, so many at most may have no row.
    always = [(0.0, 10.0, 2.0), (100.0, 60.0, 3.0), (105.0, 61.0, 2.0), (110.0, 70.0, 4.0)]
    assert fed(*always).increase(gone=False) == Increase(0, 100, Tokens(0, 50), under_way=2)


@pytest.mark.parametrize(
    ("counted", "within", "edges", "left"),
    [(10, 10, 0, 0), (10, 8, 0, 2), (10, 12, 0, -2), (10, 8, 5, 0), (10, 4, 5, 1), (10, 12, 5, -2), (0, 0, 9, 0)],
)
def test_what_is_beyond_an_interval(counted: int, within: int, edges: int, left: int) -> None:
    rows = [Ran(20, 30, Tokens(within, within)), Ran(-5, 5, Tokens(edges, edges)), Ran(200, 210, Tokens(99, 99))]
    assert balance("r", Increase(0, 100, Tokens(counted, counted)), rows).unexplained == Tokens(left, left)


@pytest.mark.parametrize(
    ("counted", "exact", "left", "balanced"),
    [
        # Of what a bound says any part may have been computed.
        (10, True, 0, True),
        (15, True, 0, True),
        (16, True, 0, True),
        (9, True, -1, False),
        (17, True, 1, False),
        # Nobody can say how much it was.
        (99, False, 83, True),
    ],
)
def test_attempts_that_were_lost_explain_what_they_computed(
    counted: int, exact: bool, left: int, balanced: bool
) -> None:
    rows = [
        Ran(20, 30, Tokens(7, 7)),
        Ran(20, 30, Tokens(3, 3), lost=True),
        Ran(20, 30, Tokens(6, 6), exact, lost=True, at_most=True),
        Ran(200, 210, Tokens(99, 99), lost=True),
    ]
    found = balance("r", Increase(0, 100, Tokens(counted, counted)), rows)
    assert (found.ledger, found.lost, found.edges) == (Tokens(7, 7), Tokens(3, 3), Tokens(6, 6))
    assert (found.unexplained, found.balanced) == (Tokens(left, left), balanced)


# -- out of Prometheus


class Prometheus:
    """Answers queries as one with these series does; `scraped`: of each the samples."""

    def __init__(self, *scraped: tuple[dict[str, str], list[tuple[float, float]]], behind: int = 0) -> None:
        self.scraped = scraped
        self.behind = behind
        self.queries: list[str] = []
        self.releases = [""]

    def __call__(self, url: str, timeout_s: float) -> bytes:
        parts = urllib.parse.urlsplit(url)
        assert (parts.netloc, parts.path) == ("prometheus:9090", "/api/v1/query")
        fields = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=True))
        self.queries.append(fields["query"])
        if "galerne_ledger_rows_behind" in fields["query"]:
            result: list[Any] = [{"metric": {}, "value": [0, str(self.behind)]}]
        elif fields["query"].startswith("group by (galerne_release)"):
            named = [{"galerne_release": name} if name else {} for name in self.releases]
            result = [{"metric": labels, "value": [0, "1"]} for labels in named]
        else:
            until_s = float(fields["time"])
            begin_s = until_s - float(fields["query"].rpartition("[")[2].removesuffix("ms]")) / 1000
            # As older versions do it: with both ends.
            samples = [
                (labels, [[at_s, str(v)] for at_s, v in values if begin_s - 1e-3 <= at_s <= until_s + 1e-3])
                for labels, values in self.scraped
            ]
            result = [{"metric": labels, "values": values} for labels, values in samples if values]
        return json.dumps({"status": "success", "data": {"result": result}}).encode()


def series(replica: str, tokens: list[tuple[float, float]], **labels: str) -> list[Any]:
    """A replica's series: as many tokens of prompts as of answers, and never a request at a scrape."""
    common = {"job": "vllm", "replica": replica} | labels
    idle = [(at_s, 0.0) for at_s, _ in tokens]
    return [
        (common | {"__name__": PROMPT}, tokens),
        (common | {"__name__": COMPLETION}, tokens),
        (common | {"__name__": prometheus_counters.RUNNING}, idle),
        (common | {"__name__": prometheus_counters.WAITING}, idle),
    ]


def test_scrapes_are_read_in_parts_and_each_once() -> None:
    moments = [5.0 * k for k in range(1, 400)]
    prometheus = Prometheus(
        *series("r0", [(at_s, 100 + at_s) for at_s in moments], engine="0"),
        *series("r0", [(at_s, 2 * at_s) for at_s in moments], engine="1"),
        *series("r1", [(at_s, at_s) for at_s in moments if 300 < at_s < 700]),
    )
    found = Counters("http://prometheus:9090/", 'namespace="a",', prometheus).increases(100.0, 1500.0, 1990.0)
    assert found == {
        "r0": Increase(105, 1500, Tokens(3 * 1395, 3 * 1395)),
        "r1": Increase(305, 695, Tokens(390, 390)),
    }
    assert all(query.count('namespace="a"}[') == 1 for query in prometheus.queries)
    assert len(prometheus.queries) == 4
    assert Counters("http://prometheus:9090", "", Prometheus(behind=3)).rows_behind() == 3


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"status": "error"}',
        b'{"status": "success", "data": {"result": {}}}',
        b'{"status": "success", "warnings": ["a store is away"], "data": {"result": []}}',
    ],
)
def test_another_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(ClusterError):
        Counters("http://prometheus:9090", "", lambda url, timeout_s: body).increases(0.0, 10.0, 10.0)


# -- the command


def test_rows_of_a_window(tmp_path: Path) -> None:
    told = made(tmp_path)
    spill = Spill(told.spill_dir)
    rows = [row(n, started_at=NOW_S + 10 * n, duration_s=4.5, engine="" if n == 5 else "r0") for n in range(8)]
    spill.write(rows, "x", NOW_S)
    assert Writer(spill, told.url, print).drain()
    with reading(told.url) as connection:
        # The first had ended, the last begins later, one was sent to no engine.
        found = [int(r["completion_tokens"]) for r in ran(connection, NOW_S + 6, NOW_S + 60)]
        assert found == [1, 2, 3, 4, 6]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    monkeypatch.delenv("GALERNE_LEDGER_URL", raising=False)
    directory = state.state_dir(8000)
    state.make_private(directory)
    return directory


def test_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = made(home, url=f"sqlite:///{home}/galerne.db")
    spill = Spill(told.spill_dir)
    rows = [row(n, started_at=NOW_S + n, prompt_tokens=10, counted_prompt_tokens=n) for n in range(20, 40)]
    # What it computed for this one was lost: another answered it.
    lost = {"lost_engine": "r0", "lost_prompt_tokens": 7, "lost_completion_tokens": 7}
    spill.write([*rows, row(99, started_at=NOW_S + 20, engine="never-scraped", **lost)], "x", NOW_S)
    assert Writer(spill, told.url, print).drain()
    total = sum(range(20, 40))
    moments = [NOW_S + 5 * k for k in range(21)]
    prometheus = Prometheus(*series("r0", [(at_s, 50.0 if at_s < NOW_S + 20 else 57.0 + total) for at_s in moments]))
    monkeypatch.setattr(scraped, "Counters", lambda url, match: Counters(url, match, prometheus))
    at = [datetime.fromtimestamp(NOW_S + s, UTC).isoformat() for s in (-10, 90)]
    command = ["usage", "reconcile", "--prometheus", "http://prometheus:9090", "--from", at[0], "--to", at[1]]
    run = CliRunner()
    found = run.invoke(app, [*command, "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["rows_of_replicas_not_scraped"] == 1
    (replica,) = document["replicas"]
    both = {"prompt": total, "completion": total}
    assert replica["ledger"] == both
    assert replica["lost_attempts"] == {"prompt": 7, "completion": 7}
    assert replica["engine_counted"] == {"prompt": total + 7, "completion": total + 7}
    assert replica["unexplained"] == {"prompt": 0, "completion": 0}
    output = run.invoke(app, command).output
    assert "balanced" in output
    assert "1 rows are of replicas that Prometheus did not scrape" in output
    # Tokens without a row.
    prometheus.scraped = tuple(series("r0", [(at_s, at_s - NOW_S + (at_s > NOW_S + 20) * total) for at_s in moments]))
    found = run.invoke(app, command)
    assert found.exit_code == 1
    assert "NOT balanced" in found.output
    assert run.invoke(app, ["usage", "reconcile", "--from", at[0]]).exit_code == 2
    assert run.invoke(app, [*command[:-1], at[0]]).exit_code == 2
    # Of two releases that were scraped it does not add up both.
    prometheus.releases = ["prod/galerne", "test/galerne"]
    found = run.invoke(app, command)
    assert isinstance(found.exception, ClusterError)
    assert "('prod/galerne', 'test/galerne'): name yours with --release" in str(found.exception)
    prometheus.queries.clear()
    assert run.invoke(app, [*command, "--release", "prod/galerne"]).exit_code == 1
    assert prometheus.queries
    assert all('galerne_release="prod/galerne"' in query for query in prometheus.queries)
    prometheus.scraped, prometheus.releases = (), [""]
    found = run.invoke(app, command)
    assert isinstance(found.exception, ClusterError)
    assert "is it this cluster's?" in str(found.exception)


def test_remarks_say_what_may_be_unexplained() -> None:
    increase = Increase(0, 9, Tokens(5, 5), resets=1, under_way=3)
    remarks = scraped._remarks(Balance("r", increase, Tokens(), Tokens(), Tokens(5, 5), guesses=2))
    assert [any(word in r for r in remarks) for word in ("anew 1 times", "Up to 3 requests", "2 rows are guesses")] == [
        True
    ] * 3
