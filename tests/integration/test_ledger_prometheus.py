"""The ledger against counters that a real Prometheus has scraped, as on a cluster of several machines.

It comes before `test_prometheus`, at whose end the shared cluster's Prometheus is killed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.cli import state
from tests.integration.running import GALERNE, KEY, RunningCluster
from tests.integration.test_prometheus import OUTPUT_TOKENS, stream, until
from tests.system_parts import required

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STREAMS = 40
REPLICAS = 2
# The margin of rows that count as wholly within is a scrape's interval.
SCRAPES_BEFORE = 3


def reconcile(url: str, from_s: float, ledger: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command, as on a machine that has no state of the cluster: Prometheus and a database are all it knows."""
    since = datetime.fromtimestamp(from_s, UTC).isoformat()
    command = [str(GALERNE), "usage", "reconcile", "--prometheus", url, "--match", 'model="chat"', "--from", since]
    environment = os.environ | {"GALERNE_LEDGER_URL": f"sqlite:///{ledger}", "GALERNE_LEDGER_DIR": str(ledger.parent)}
    return subprocess.run(
        [*command, *more, "--port", "1", "--json"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_every_token_has_its_row(fake_cluster: RunningCluster, tmp_path: Path) -> None:
    required("prometheus")
    url: str = fake_cluster.state()["prometheus_url"]
    ledger = state.state_dir(int(fake_cluster.url.rpartition(":")[2])) / "galerne.db"
    from_s = time.time()

    def scraped() -> bool:
        window = f"{1 + int(1000 * (time.time() - from_s))}ms"
        query = f'count_over_time(vllm:prompt_tokens_total{{model="chat"}}[{window}]) >= {SCRAPES_BEFORE}'
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}).json()
        return len(answer["data"]["result"]) >= REPLICAS

    until("both replicas are scraped", scraped)
    # One whose client leaves: billed for what was computed.
    with httpx.stream(
        "POST",
        f"{fake_cluster.url}/v1/chat/completions",
        json={
            "model": "chat",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        },
        headers={"authorization": f"Bearer {KEY}"},
        timeout=60,
    ) as left:
        chunks = left.iter_bytes()
        next(chunks)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: stream(fake_cluster.url, number), range(STREAMS)))

    def balanced() -> dict[str, Any] | None:
        done = reconcile(url, from_s, ledger)
        # Scrapes are looked at some seconds late, and rows near the end count as partly within.
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"replicas": []}
        within = sum(replica["ledger"]["completion"] for replica in found["replicas"])
        return found if within >= STREAMS * OUTPUT_TOKENS and done.returncode == 0 else None

    found = until("the load lies in the window and is balanced", balanced)
    assert len(found["replicas"]) >= REPLICAS
    for replica in found["replicas"]:
        assert replica["balanced"], replica
        assert replica["unexplained"] == {"prompt": 0, "completion": 0}
        assert replica["guessed_rows"] == 0
    # A row that is lost is found, to the token.
    copy = tmp_path / "ledger.db"
    with closing(sqlite3.connect(ledger)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        engine, row_id, prompt, completion = target.execute(
            "SELECT engine, id, counted_prompt_tokens, completion_tokens FROM usage "
            "WHERE model = 'chat' AND completion_tokens = ? ORDER BY started_at DESC LIMIT 1",
            (OUTPUT_TOKENS,),
        ).fetchone()
        target.execute("DELETE FROM usage WHERE id = ?", (row_id,))
        target.commit()
    end = max(replica["until"] for replica in found["replicas"])
    done = reconcile(url, from_s, copy, "--to", end)
    assert done.returncode == 1, done.stdout + done.stderr
    left_over = {r["engine"]: r["unexplained"] for r in json.loads(done.stdout)["replicas"] if not r["balanced"]}
    assert left_over == {engine: {"prompt": prompt, "completion": completion}}
