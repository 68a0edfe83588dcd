"""Every panel's PromQL returns data from a real Prometheus that scrapes the cluster under load.

What it asks is what the shipped files hold, with every variable at its value for All.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from helm.dashboards.documents import ShownQuery, read
from helm.dashboards.prometheus import Prometheus, Span
from tests.integration.running import KEY, OTHER_KEY, RunningCluster
from tests.system_parts import required

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

WAIT_S = 180
RANGE_S, WINDOW_S = 900, 60
PAUSE_S = 0.2
CHAT, DEMO, VECTORS = "chat", "smollm2-135m-instruct", "vectors"
# Of the size of those in test_prometheus, whose means look back two minutes.
PROMPT, OUTPUT_TOKENS = "word " * 40, 12


def _chat(model: str, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": model, "messages": messages, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": stream}


# key, path, body: what tenants do, and what they do wrong.
MIX: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    (KEY, "/v1/chat/completions", _chat(CHAT, stream=True), 200),
    (KEY, "/v1/chat/completions", _chat(DEMO, stream=True), 200),
    (OTHER_KEY, "/v1/chat/completions", _chat(DEMO, stream=True), 200),
    (OTHER_KEY, "/v1/embeddings", {"model": VECTORS, "input": PROMPT}, 200),
    (KEY, "/v1/chat/completions", _chat(CHAT, stream=False), 200),
    ("sk-nobody", "/v1/chat/completions", _chat(CHAT, stream=True), 401),
    (OTHER_KEY, "/v1/chat/completions", _chat(CHAT, stream=True), 404),
    (KEY, "/v1/chat/completions", _chat(CHAT, stream=True) | {"n": 99}, 400),
    (KEY, "/v1/chat/completions", {"padding": "x" * (5 << 20)}, 413),
)


@contextlib.contextmanager
def load(url: str) -> Iterator[list[str]]:
    """All of the mix again and again; yields what went otherwise than it should."""
    stopping = threading.Event()
    odd: list[str] = []

    def send(key: str, path: str, body: dict[str, Any], status: int) -> None:
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            while not stopping.wait(PAUSE_S):
                answer = client.post(path, json=body)
                if answer.status_code != status:
                    odd.append(
                        f"{body.get('model')} {path}: {answer.status_code} instead of {status}: {answer.text[:200]}"
                    )

    threads = [threading.Thread(target=send, args=one) for one in MIX]
    for thread in threads:
        thread.start()
    try:
        yield odd
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def filled(prometheus: Prometheus, query: ShownQuery) -> int:
    """Series of the answer that have a number in them; ValueError for a query that Prometheus refuses."""
    now_s = time.time()
    return sum(bool(series.points) for series in prometheus.ask(query, Span(now_s - WINDOW_S, now_s, 5)))


def test_every_panel_has_data_under_load(fake_cluster: RunningCluster) -> None:
    required("prometheus")
    address = fake_cluster.state()["prometheus_url"]
    asked = [
        (f"{dashboard.title}: {panel.title}", query)
        for dashboard in read(RANGE_S, WINDOW_S)
        for panel in dashboard.panels
        for query in panel.queries
    ]
    assert len(asked) > 100
    deadline_s = time.monotonic() + WAIT_S
    prometheus = Prometheus(address)
    with load(fake_cluster.url) as odd:
        missing = asked
        while missing and time.monotonic() < deadline_s:
            time.sleep(2)
            missing = [(where, query) for where, query in missing if not filled(prometheus, query)]
    assert [f"{where}: {query.expr}" for where, query in missing] == []
    assert odd == []


def test_a_query_without_data_is_told_apart(fake_cluster: RunningCluster) -> None:
    required("prometheus")
    prometheus = Prometheus(fake_cluster.state()["prometheus_url"])
    assert filled(prometheus, ShownQuery("galerne_no_such_metric", "", instant=True)) == 0
    assert filled(prometheus, ShownQuery("vector(0) / 0", "", instant=False)) == 0
    assert filled(prometheus, ShownQuery("vector(1)", "", instant=True)) == 1
    with pytest.raises(ValueError, match="parse error"):
        filled(prometheus, ShownQuery("sum(", "", instant=True))
