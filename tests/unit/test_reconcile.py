"""`galerne usage`: sums as a bill needs them, and engines' counters held against the ledger to the token."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from serving.cli import app, state, usage
from serving.config import FakeEngineConfig
from serving.engine import work
from serving.engine.fake.faults import BrokenOffError
from serving.metering import store
from serving.metering.ledger import Ledger
from serving.metering.reconcile import Evidence, Lost, Tokens, counters, lost_of, verdict
from serving.metering.settings import LedgerSettings
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, NO_HOLD, TOKEN, Rig, rig
from tests.unit.test_ledger import NOW_S, made, reading, row

some = st.builds(Tokens, st.integers(0, 10**9), st.integers(0, 10**9))


@given(st.lists(some, min_size=5, max_size=5), st.sampled_from([Tokens(), Tokens(1, 0), Tokens(0, -1)]))
def test_every_cause_counts_once(causes: list[Tokens], lost: Tokens) -> None:
    total = sum(causes, lost)
    found = verdict(Evidence("e", total, *causes))
    assert found.unexplained == lost
    assert found.balanced is (lost == Tokens())
    assert verdict(Evidence("e", total, *causes, guesses=1)).balanced


@given(some, some, some, st.integers(-3, 3), st.integers(-3, 3))
def test_lost_attempts_explain_what_is_between_their_bounds(
    ledger: Tokens, least: Tokens, beyond: Tokens, prompt: int, completion: int
) -> None:
    most = least + beyond
    nothing = Tokens()

    def unexplained(rest: Tokens) -> Tokens:
        found = Evidence("e", ledger + rest, ledger, nothing, nothing, nothing, nothing, lost=Lost(least, most))
        return verdict(found).unexplained

    assert unexplained(least) == unexplained(most) == nothing
    assert unexplained(most + Tokens(max(0, prompt), max(0, completion))) == Tokens(max(0, prompt), max(0, completion))
    assert unexplained(least - Tokens(max(0, prompt), max(0, completion))) == nothing - Tokens(
        max(0, prompt), max(0, completion)
    )
    inside = Tokens(
        min(max(least.prompt, least.prompt + prompt), most.prompt),
        min(max(least.completion, least.completion + completion), most.completion),
    )
    assert unexplained(inside) == nothing


def test_bounds_of_rows() -> None:
    rows = [
        row(1),
        row(2, lost_engine="r1", lost_prompt_tokens=10, lost_completion_tokens=2),
        row(3, lost_engine="r1", lost_prompt_tokens=10, lost_completion_tokens=6, lost_exact=False),
        row(4, lost_engine="r1", lost_prompt_tokens=7, lost_completion_tokens=None, lost_exact=False),
    ]
    expected = Lost(Tokens(10, 2), Tokens(27, 8), unbounded=1)
    assert lost_of(rows) == expected
    e = Evidence("e", Tokens(99, 99), *(Tokens() for _ in range(5)))
    assert not verdict(e).balanced
    # As with rows that are guesses.
    assert verdict(replace(e, lost=expected)).balanced


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
    assert json.loads(found.stdout)[0]["requests"] == 2
    # 14:13:20 UTC is when they began.
    found = run.invoke(app, ["usage", "--from", "2026-09-21T16:13:21+02:00", "--format", "json", "--by", "key"])
    assert [(r["key_id"], r["requests"]) for r in json.loads(found.stdout)] == [("a", 1)]
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
            "POST", COMPLETIONS, headers=AUTH, json=CHAT | {"stream": True, "max_tokens": 9000, "ignore_eos": True}
        ) as s:
            await anext(s.aiter_bytes())
            found = await invoke("usage", "reconcile", "--json")
            assert found.exit_code == 0, found.output
        await made_rig.settled()
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 0, found.output
        balances = json.loads(found.stdout)
        assert sum(b["not_through_a_gateway"]["completion"] for b in balances) == 6
        assert sum(b["not_billed"]["prompt"] for b in balances) > 0
        assert "balanced" in (await invoke("usage", "reconcile")).output
        # A row that is lost is found out.
        with reading(told.url) as connection:
            connection.execute(store.USAGE.delete().where(store.USAGE.c.id == "g-1"))
        monkeypatch.setattr(usage, "SETTLE_S", 0)
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 1
        assert sum(b["unexplained"]["completion"] for b in json.loads(found.stdout)) == 6


class Losing:
    """Engines that compute requests and give nothing of the first (until it is left), of the third (it breaks off) …"""

    def __init__(self) -> None:
        self.came = 0

    def wrap(self, app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            number = self.came
            self.came += scope.get("method") == "POST"
            if scope.get("method") != "POST" or number % 2:
                await app(scope, receive, send)
                return
            gone = asyncio.Event()

            async def received() -> Any:
                event = await receive()
                if event["type"] == "http.disconnect":
                    gone.set()
                return event

            async def sent(event: Any) -> None:
                if event["type"] == "http.response.body":
                    if number % 4 == 0:
                        await gone.wait()
                    raise BrokenOffError
                await send(event)

            await app(scope, received, sent)

        return wrapped


HEDGED: dict[str, Any] = NO_HOLD | {"faults": {"hedge_after_s": 0.05}}


async def test_attempts_that_were_lost_are_a_cause(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = LedgerSettings(f"sqlite:///{home}/galerne.db", home / "ledger-spill", 2.0, 2**24)
    ledger = Ledger(told, "g")
    ledger.start()
    engines = [FakeEngineConfig(decode_ms=3)] * 2
    async with rig(*engines, ledger=ledger, wrap=Losing().wrap, chat=HEDGED) as made_rig:
        cluster_of(made_rig, home)
        # Hedged, tried again, hedged …
        for n in (1, 1, 2, 3, 1, 1):
            body = CHAT | {"stream": True, "n": n}
            assert (await made_rig.http.post(COMPLETIONS, headers=AUTH, json=body)).status_code == 200
        await made_rig.settled()
        assert made_rig.total("galerne_hedges_total", won="second") >= 3
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 0, found.output
        balances = json.loads(found.stdout)
        assert all(b["unexplained"] == {"prompt": 0, "completion": 0} for b in balances)
        assert all(b["lost_attempts_at_least"] == b["lost_attempts_at_most"] for b in balances)
        lost = sum(b["lost_attempts_at_most"]["prompt"] for b in balances)
        assert lost > 0
        assert sum(b["guessed_rows"] for b in balances) == 0
        assert "lost attempts" in (await invoke("usage", "reconcile")).output
        # Nobody pays for them.
        sums = json.loads((await invoke("usage", "--format", "json")).stdout)
        with reading(told.url) as connection:
            rows = connection.execute(store.USAGE.select()).all()
            assert sums[0]["prompt_tokens"] == sum(r.prompt_tokens for r in rows)
            assert all(r.lost_engine != r.engine for r in rows)
            # Without them it is found out.
            connection.execute(store.USAGE.update().values(lost_engine=""))
        monkeypatch.setattr(usage, "SETTLE_S", 0)
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 1
        assert sum(b["unexplained"]["prompt"] for b in json.loads(found.stdout)) == lost


async def test_a_lost_attempt_that_its_engine_has_forgotten_has_a_bound(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "KEPT", 0)
    told = LedgerSettings(f"sqlite:///{home}/galerne.db", home / "ledger-spill", 0.2, 2**24)
    ledger = Ledger(told, "g")
    ledger.start()
    losing = Losing()
    losing.came = 2
    async with rig(*[FakeEngineConfig(decode_ms=3)] * 2, ledger=ledger, wrap=losing.wrap) as made_rig:
        cluster_of(made_rig, home)
        body = CHAT | {"stream": True}
        assert (await made_rig.http.post(COMPLETIONS, headers=AUTH, json=body)).status_code == 200
        await made_rig.settled()
        found = await invoke("usage", "reconcile", "--json")
        assert found.exit_code == 0, found.output
        (lost,) = (b for b in json.loads(found.stdout) if b["lost_attempts_at_most"]["prompt"])
        assert lost["lost_attempts_at_least"] == {"prompt": 0, "completion": 0}
        assert lost["lost_attempts_at_most"]["completion"] == CHAT["max_tokens"]
        assert lost["unexplained"] == {"prompt": 0, "completion": 0}
        assert lost["engine_counted"]["prompt"] == lost["lost_attempts_at_most"]["prompt"]
        assert f"0 to {CHAT['max_tokens']}" in (await invoke("usage", "reconcile")).output
