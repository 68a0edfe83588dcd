"""`galerne usage`: sums as a bill needs them, and engines' counters held against the ledger to the token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from serving.cli import app, state, usage
from serving.config import FakeEngineConfig
from serving.metering.ledger import Ledger
from serving.metering.reconcile import Evidence, Tokens, counters, verdict
from serving.metering.settings import LedgerSettings
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, TOKEN, Rig, rig
from tests.unit.test_ledger import NOW_S, made, reading, row

some = st.builds(Tokens, st.integers(0, 10**9), st.integers(0, 10**9))


@given(st.lists(some, min_size=5, max_size=5), st.sampled_from([Tokens(), Tokens(1, 0), Tokens(0, -1)]))
def test_every_cause_counts_once(causes: list[Tokens], lost: Tokens) -> None:
    total = sum(causes, lost)
    found = verdict(Evidence("e", total, *causes))
    assert found.unexplained == lost
    assert found.balanced is (lost == Tokens())
    assert verdict(Evidence("e", total, *causes, guesses=1)).balanced


def test_counters_are_summed_over_ranks() -> None:
    text = """# HELP vllm:prompt_tokens_total x
vllm:prompt_tokens_total{engine="0",model_name="m"} 12.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 1.2e+03
vllm:prompt_tokens_created{engine="0",model_name="m"} 9.0
vllm:generation_tokens_total{engine="0",model_name="m"} 5.0
"""
    assert counters(text) == Tokens(1212, 5)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    monkeypatch.delenv("GALERNE_LEDGER_URL", raising=False)
    directory = state.state_dir(8000)
    state.make_private(directory)
    return directory


def test_sums_are_printed(home: Path) -> None:
    told = made(home, url=f"sqlite:///{home}/galerne.db")
    spill = Spill(told.spill_dir)
    spill.write([row(1), row(2), row(3, tenant="other", started_at=NOW_S + 86400)], "x", NOW_S)
    assert Writer(spill, told.url, print).drain()
    run = CliRunner()
    found = run.invoke(app, ["usage", "--format", "csv", "--by", "tenant", "--by", "day"])
    assert found.output.splitlines() == [
        "tenant,day,requests,prompt_tokens,cached_tokens,completion_tokens,estimated",
        "other,2026-09-22,1,10,4,3,0",
        "press,2026-09-21,2,20,8,3,0",
    ]
    found = run.invoke(
        app, ["usage", "--tenant", "press", "--from", "2026-09-21", "--to", "2026-09-22", "--format", "json"]
    )
    assert json.loads(found.output)[0]["requests"] == 2
    # 14:13:20 UTC is when they began.
    found = run.invoke(app, ["usage", "--from", "2026-09-21T16:13:21+02:00", "--format", "json", "--by", "key"])
    assert [(r["key_id"], r["requests"]) for r in json.loads(found.output)] == [("a", 1)]
    assert "press" in run.invoke(app, ["usage"]).output
    assert run.invoke(app, ["usage", "--from", "yesterday"]).exit_code == 2


def cluster_of(made_rig: Rig, directory: Path) -> None:
    """The state file of a cluster whose engines these are."""
    rows = tuple(state.EngineState(e.replica_id, e.host, e.port, 1) for e in made_rig.endpoints)
    state.write(directory, state.ClusterState("http://x", 1, TOKEN, 1, {"chat": "generate"}, engines={"chat": rows}))


async def invoke(*arguments: str) -> Any:
    return await asyncio.to_thread(CliRunner().invoke, app, list(arguments))


async def test_engines_and_ledger_agree(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = LedgerSettings(f"sqlite:///{home}/galerne.db", home / "ledger-spill", 0.2, 2**24)
    ledger = Ledger(told, "g")
    ledger.start()
    async with rig(FakeEngineConfig(decode_ms=3), FakeEngineConfig(decode_ms=3), ledger=ledger) as made_rig:
        cluster_of(made_rig, home)
        engine = made_rig.engines[0]
        async with httpx.AsyncClient() as direct:
            headers = {"x-galerne-engine-token": TOKEN}
            url = f"http://127.0.0.1:{engine.port}{COMPLETIONS}"
            assert (await direct.post(url, headers=headers, json=CHAT)).status_code == 200
        for body in (CHAT, CHAT | {"n": 3}, CHAT | {"stream": True, "n": 2}, CHAT | {"stream": True}):
            assert (await made_rig.http.post(COMPLETIONS, headers=AUTH, json=body)).status_code == 200
        async with made_rig.http.stream(
            "POST", COMPLETIONS, headers=AUTH, json=CHAT | {"stream": True, "max_tokens": 9000}
        ) as s:
            await anext(s.aiter_bytes())
            found = await invoke("usage", "reconcile", "--json")
            assert found.exit_code == 0, found.output
        await made_rig.settled()
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 0, found.output
        balances = json.loads(found.output)
        assert sum(b["not_through_a_gateway"]["completion"] for b in balances) == 6
        assert sum(b["prompt_of_further_answers"]["prompt"] for b in balances) > 0
        assert "balanced" in (await invoke("usage", "reconcile")).output
        # A row that is lost is found out.
        from serving.metering import store

        with reading(told.url) as connection:
            connection.execute(store.USAGE.delete().where(store.USAGE.c.id == "g-1"))
        monkeypatch.setattr(usage, "SETTLE_S", 0)
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 1
        assert sum(b["unexplained"]["completion"] for b in json.loads(found.output)) == 6
