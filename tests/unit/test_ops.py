"""The ops page: who is let in, what it tells, and how it reads Prometheus without hammering it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

import serving.api.ops
from serving.api.app import Gateway
from serving.api.auth import digest
from serving.api.ops import PATHS
from serving.api.ops.app import KEPT_S, POLICY, STATE
from serving.api.ops.cluster import DECISIONS, MAX_CHANGES, REFRESH_S, TARGET, Change, Cluster, history, queries, read
from serving.config import GalerneConfig
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint

ADMIN, OLD_ADMIN, TENANT = "sk-admin-0123", "sk-admin-old", "sk-tenant-0123"
PAGE = Path(serving.api.ops.__file__).parent / "page"
NOW_S = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()


def configuration(**changes: Any) -> GalerneConfig:
    return GalerneConfig.model_validate(
        {
            "models": [
                {
                    "id": "chat",
                    "source": "fake:chat",
                    "slo": {"ttft_p95_s": 1.0},
                    "replicas": {"min": 0, "max": 4},
                    "autoscaling": {},
                },
                {"id": "vectors", "source": "fake:vectors", "task": "embed"},
            ],
            "tenants": [
                {"id": "press", "keys": [{"id": "desk", "sha256": digest(TENANT)}], "models": ["chat"]},
                {"id": "port", "keys": [{"id": "desk", "sha256": digest("sk-port")}]},
            ],
            "admins": [
                {"id": "nadia", "sha256": digest(ADMIN)},
                {"id": "old", "sha256": digest(OLD_ADMIN), "expires": date(2026, 5, 31)},
            ],
        }
        | changes
    )


def gateway(config: GalerneConfig, clock: Callable[[], float] = lambda: 0.0) -> tuple[Gateway, GatewayMetrics]:
    metrics = GatewayMetrics(clock)
    return Gateway(config, engine_token="engine-token", metrics=metrics, clock=clock, wall=lambda: NOW_S), metrics


def ask(app: Gateway, path: str, key: str | None = None, method: str = "GET") -> httpx.Response:
    async def go() -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(go())


# -- who is let in


def test_without_admins_there_is_no_such_page() -> None:
    app, _ = gateway(configuration(admins=[]))
    for path in PATHS:
        assert ask(app, path, TENANT).status_code == 404
        assert ask(app, path, ADMIN).status_code == 401


def test_an_admin_sees_the_state_and_nothing_of_the_tenants() -> None:
    app, _ = gateway(configuration())
    assert ask(app, STATE, ADMIN).status_code == 200
    for path in ("/v1/models", "/version", "/v1/models/chat", "/metrics"):
        assert ask(app, path, ADMIN).status_code == 401
    assert ask(app, "/v1/chat/completions", ADMIN, "POST").status_code == 401


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        (TENANT, 403, "permission_denied"),
        ("sk-port", 403, "permission_denied"),
        (None, 401, "invalid_api_key"),
        ("sk-wrong", 401, "invalid_api_key"),
        (OLD_ADMIN, 401, "invalid_api_key"),
        (digest(ADMIN), 401, "invalid_api_key"),
        (f"{ADMIN},{TENANT}", 401, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_no_other_key_gets_a_fact(key: str | None, status: int, code: str, method: str) -> None:
    app, metrics = gateway(configuration())
    answer = ask(app, STATE, key, method)
    assert answer.status_code == status
    if method != "HEAD":
        assert answer.json()["error"]["code"] == code
        assert "chat" not in answer.text
    requests = [(labels, n) for labels, n in metrics.counts("galerne_requests") if labels["route"] == STATE]
    assert [(labels["status"], n) for labels, n in requests] == [(str(status), 1)]


@pytest.mark.parametrize(
    "path", ["/ops/", "/ops/state/", "/ops//state", "/ops/page/page.js", "/ops/../ops/state", "/OPS"]
)
def test_nothing_else_below_it_answers(path: str) -> None:
    app, _ = gateway(configuration())
    scope_path: list[int] = []

    async def send(message: Any) -> None:
        scope_path.append(message.get("status", 0))

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    headers = [(b"authorization", f"Bearer {TENANT}".encode())]
    asyncio.run(app({"type": "http", "path": path, "method": "GET", "headers": headers}, receive, send))
    assert scope_path[0] == 404


def test_a_key_is_an_admins_or_a_tenants() -> None:
    with pytest.raises(ValidationError, match="stands twice"):
        configuration(admins=[{"id": "nadia", "sha256": digest(TENANT)}])
    with pytest.raises(ValidationError, match="stands twice"):
        configuration(admins=[{"id": "a", "sha256": digest("1")}, {"id": "a", "sha256": digest("2")}])
    assert digest(ADMIN) not in repr(configuration().admins)


# -- the page itself


def test_the_page_is_served_to_anybody_and_locked_down() -> None:
    app, _ = gateway(configuration())
    kinds = {"/ops": "text/html", "/ops/page.js": "text/javascript", "/ops/page.css": "text/css"}
    for path, kind in kinds.items():
        answer = ask(app, path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert ask(app, path, method="POST").status_code == 405
    assert "'unsafe" not in POLICY
    assert "http" not in POLICY


def test_the_page_refers_to_nothing_outside_and_writes_no_markup() -> None:
    sources = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert set(sources) == {"page.html", "page.js", "page.css"}
    for text in sources.values():
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|sessionStorage|cookie",
        sources["page.js"],
    )
    assert not re.search(r"\son[a-z]+=|style=|<style|<script>", sources["page.html"])
    # A form that is sent without the script would put the key into the address.
    assert "name=" not in re.search(r"<form.*?</form>", sources["page.html"], re.S)[0]  # type: ignore[index]


# -- the state


def test_the_state_tells_of_replicas_holds_targets_and_tenants_and_keeps_secrets() -> None:
    app, metrics = gateway(configuration(), clock=lambda: 7.0)
    app.update_replicas("chat", (Endpoint("r1", "10.0.0.9", 30123), Endpoint("r2", "10.0.0.9", 30124)))
    lease = app.replicas.lease("chat")
    assert lease is not None
    with lease:
        metrics.answered("/v1/chat/completions", "chat", "press", "200", 1.0)
        metrics.answered("/v1/chat/completions", "chat", "press", "429", 0.0)
        metrics.answered("/v1/chat/completions", "chat", "press", "499", 0.0)
        metrics._slo_ttft("chat", "press", "true").inc(3)
        metrics._slo_ttft("chat", "press", "false").inc()
        app.health["chat"].ejections.stalled("r1")
        metrics._cut("chat").inc(2)
        metrics.shed("memory")
        answer = ask(app, STATE, ADMIN)
    state = answer.json()
    chat, vectors = state["models"]
    assert sorted(r["in_flight"] for r in chat["replicas"]) == [0, 1]
    assert (chat["state"], vectors["state"]) == ("ready", "no replica")
    assert [(m["ejected"], m["streams_cut"]) for m in (chat, vectors)] == [(1, 2), (0, 0)]
    assert state["gateway"]["shed"] == {"memory": 1}
    assert chat["slo"] == [{"name": "ttft", "target_s": 1.0, "requests": 4, "attainment": 0.75, "attainment_1h": None}]
    press = state["tenants"][0]
    assert (press["requests"], press["refused"]) == (3, {"429": 1})
    assert state["prometheus"] == {"configured": False, "age_s": None, "problem": ""}
    for secret in ("engine-token", "10.0.0.9", "30123", digest(ADMIN), digest(TENANT), "fake:chat"):
        assert secret not in answer.text


def test_a_model_that_sleeps_is_asleep_and_one_that_is_waited_for_is_not() -> None:
    async def go() -> list[str]:
        app, _ = gateway(configuration())
        states = []
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            client.headers["authorization"] = f"Bearer {ADMIN}"
            states.append((await client.get(STATE)).json()["models"][0]["state"])
        app, _ = gateway(configuration())
        ticket = app.hold["chat"].enter("press", 10, 0.0)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            client.headers["authorization"] = f"Bearer {ADMIN}"
            found = (await client.get(STATE)).json()["models"][0]
            states.append(found["state"])
            assert found["held"] == {"press": 1}
        ticket.end()
        return states

    assert asyncio.run(go()) == ["asleep", "no replica"]


def test_many_pages_cost_one_state_in_a_while() -> None:
    now = [0.0]
    app, metrics = gateway(configuration(), clock=lambda: now[0])

    def requests() -> int:
        return int(ask(app, STATE, ADMIN).json()["tenants"][0]["requests"])

    assert requests() == 0
    metrics.answered("/v1/chat/completions", "chat", "press", "200", 1.0)
    now[0] = KEPT_S - 0.1
    assert requests() == 0
    now[0] = KEPT_S
    assert requests() == 1


# -- Prometheus


def vector(*rows: tuple[dict[str, str], float]) -> list[Any]:
    return [{"metric": labels, "value": [100.0, str(value)]} for labels, value in rows]


def matrix(name: str, points: list[tuple[float, float]], **labels: str) -> dict[str, Any]:
    return {"metric": {"__name__": name, **labels}, "values": [[t, str(v)] for t, v in points]}


ANSWERS: dict[str, list[Any]] = {
    "now": vector(
        ({"__name__": "model:galerne_arrivals:rate30s", "model": "chat"}, 2.5),
        ({"__name__": "vllm:num_requests_running", "model": "chat", "replica": "r1"}, 3),
        ({"__name__": "galerne_replica_in_flight", "model": "chat", "replica": "r1", "instance": "a"}, 1),
        ({"__name__": "galerne_replica_in_flight", "model": "chat", "replica": "r1", "instance": "b"}, 2),
        ({"__name__": "model:galerne_slo_missed:ratio_rate1h", "model": "chat", "objective": "ttft"}, 0.25),
        ({"__name__": "model:galerne_kv_use:avg", "model": "chat"}, float("nan")),
    ),
    "gateways": vector(({}, 2)),
    "tenants": vector(({"tenant": "press", "status": "200"}, 10.0), ({"tenant": "press", "status": "503"}, 2.0)),
    "prompt_tokens": vector(({"model": "chat"}, 1000.0)),
    "output_tokens": vector(({"model": "chat"}, 500.0)),
    "decisions": [
        matrix(TARGET, [(0, 1), (30, 1), (60, 3), (90, 3)], model="chat"),
        matrix(DECISIONS, [(0, 5), (30, 5), (60, 6), (90, 6)], model="chat", reason="demand"),
        matrix(DECISIONS, [(0, 5), (30, 9), (60, 9), (90, 14)], model="chat", reason="steady"),
        matrix(DECISIONS, [(60, 1), (90, 1)], model="chat", reason="rate"),
        matrix(DECISIONS, [(0, 5), (90, 5)], model="chat", reason="idle"),
    ],
}


def test_what_prometheus_says_becomes_facts() -> None:
    facts = read(ANSWERS)
    assert facts.gateways == 2
    assert facts.models["chat"] == {"arrivals_rps": 2.5, "prompt_tokens": 1000.0, "output_tokens": 500.0}
    assert facts.replicas["chat", "r1"] == {"running": 3.0, "in_flight": 3.0}
    assert facts.attainment["chat", "ttft"] == 0.75
    assert facts.tenants["press"] == {"200": 10.0, "503": 2.0}
    assert facts.changes == (Change(60.0, "chat", 1, 3, ("demand", "rate")),)
    assert facts.reasons == {"chat": ("steady",)}


def test_a_sleeping_model_is_woken_and_what_only_holds_is_no_reason() -> None:
    steady = matrix(DECISIONS, [(0.0, 1.0), (30.0, 3.0), (60.0, 6.0), (90.0, 9.0)], model="chat", reason="cooldown")
    idle = matrix(DECISIONS, [(90.0, 1.0)], model="chat", reason="idle")
    changes, _ = history(
        [matrix(TARGET, [(0.0, 0.0), (30.0, 1.0), (60.0, 1.0), (90.0, 0.0)], model="chat"), steady, idle]
    )
    assert [(c.before, c.after, c.reasons) for c in changes] == [(1, 0, ("idle",)), (0, 1, ("wake",))]


def test_changes_are_bounded_and_newest_first() -> None:
    points = [(30.0 * i, i % 2) for i in range(100)]
    changes, _ = history([matrix(TARGET, [(t, float(v)) for t, v in points], model="chat")])
    assert len(changes) == MAX_CHANGES
    assert changes[0].at_s == 30.0 * 99


class Prometheus:
    """Answers of a Prometheus, counted; `start` keeps a refresh until the test runs it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.kept: list[Callable[[], None]] = []
        self.now_s = 0.0
        self.broken: Exception | None = None
        self.cluster = Cluster("http://prometheus/", 1.0, lambda: self.now_s, self.fetch, self.kept.append)

    def fetch(self, url: str, timeout_s: float) -> bytes:
        self.asked.append(url)
        if self.broken is not None:
            raise self.broken
        import urllib.parse

        query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)["query"][0]
        name = next(n for n, q in queries("").items() if q == query)
        return json.dumps({"status": "success", "data": {"result": ANSWERS[name]}}).encode()

    def run(self) -> None:
        while self.kept:
            self.kept.pop()()


def test_prometheus_is_asked_once_in_a_while_by_one_thread_and_never_waited_for() -> None:
    made = Prometheus()
    assert made.cluster.facts().problem == "not asked yet"
    for _ in range(50):
        made.cluster.facts()
    assert len(made.kept) == 1
    made.now_s = 10 * REFRESH_S
    made.cluster.facts()
    assert len(made.kept) == 1, "a second thread while the first still waits"
    made.run()
    assert len(made.asked) == len(queries(""))
    made.cluster.facts()
    made.run()
    assert made.cluster.facts().gateways == 2
    asked = len(made.asked)
    made.now_s += REFRESH_S - 0.1
    for _ in range(50):
        made.cluster.facts()
    made.run()
    assert len(made.asked) == asked
    made.now_s += 0.1
    made.cluster.facts()
    made.run()
    assert len(made.asked) == asked + len(queries(""))


@pytest.mark.parametrize("error", [OSError("http://user:secret@prometheus"), ValueError("x"), KeyError("data")])
def test_a_broken_prometheus_leaves_the_last_facts_and_says_so_without_its_address(error: Exception) -> None:
    made = Prometheus()
    made.cluster.facts()
    made.run()
    made.broken = error
    made.now_s = REFRESH_S
    made.cluster.facts()
    made.run()
    facts = made.cluster.facts()
    assert facts.gateways == 2
    assert facts.asked_at_s == 0.0
    assert type(error).__name__ in facts.problem
    assert "secret" not in facts.problem
    made.broken = None
    made.now_s = 2 * REFRESH_S
    made.cluster.facts()
    made.run()
    assert made.cluster.facts().problem == ""


def test_the_page_follows_the_configuration() -> None:
    app, _ = gateway(configuration(admins=[]))
    assert ask(app, STATE, ADMIN).status_code == 401
    app.reload(configuration())
    assert [t["id"] for t in ask(app, STATE, ADMIN).json()["tenants"]] == ["press", "port"]
    newer = configuration(tenants=[{"id": "news", "keys": [{"id": "k", "sha256": digest("sk-news")}]}])
    app.reload(newer)
    # At once, although a state is kept for a while.
    assert [t["id"] for t in ask(app, STATE, ADMIN).json()["tenants"]] == ["news"]
    assert ask(app, STATE, TENANT).status_code == 401
    assert ask(app, STATE, "sk-news").status_code == 403
    app.reload(configuration(admins=[]))
    assert ask(app, STATE, ADMIN).status_code == 401
