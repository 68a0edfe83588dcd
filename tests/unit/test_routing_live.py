"""Routing in the gateway, before simulated engines with prefix caches: what engines find, what is told, what is kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from serving.api.auth import digest
from serving.api.engine_facts import kv_tokens
from serving.cli import app
from serving.config import FakeEngineConfig, GalerneConfig
from tests.unit.test_gateway import AUTH, COMPLETIONS, NO_HOLD, Rig, rig

ADMIN = "sk-admin"
# 4,096 tokens of cache: less than the conversations below take together, and more than half of them.
SMALL = FakeEngineConfig(decode_ms=1, kv_blocks=256, block_tokens=16)
SEVERAL: dict[str, Any] = NO_HOLD | {"replicas": {"min": 2}}


def chat(policy: str, **more: Any) -> dict[str, Any]:
    return SEVERAL | {"routing": {"policy": policy} | more}


def text(name: int, words: int) -> str:
    rng = Random(name)
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(words))


async def ask(made: Rig, *contents: str, **fields: Any) -> int:
    """Sends a conversation; tokens that the engine found in its cache."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    answer = await made.http.post(
        COMPLETIONS, headers=AUTH, json={"model": "chat", "messages": messages, "max_tokens": 2} | fields
    )
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def talk(made: Rig, conversations: int, turns: int) -> int:
    """Conversations that take turns and grow; all tokens found."""
    found = 0
    told: list[list[str]] = [[text(i, 200)] for i in range(conversations)]
    order = Random(3)
    for _ in range(turns):
        for contents in order.sample(told, conversations):
            found += await ask(made, *contents)
            contents += [text(len(contents), 5), text(len(contents) * 100, 5)]
    return found


async def test_engines_find_more_than_by_turns() -> None:
    found = {}
    for policy in ("cost", "round-robin"):
        async with rig(SMALL, SMALL, chat=chat(policy, kv_tokens=SMALL.kv_blocks * SMALL.block_tokens)) as made:
            found[policy] = await talk(made, conversations=20, turns=5)
    assert found["cost"] > 2 * found["round-robin"] > 0


async def test_what_is_told_of_choices() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost")) as made:
        await talk(made, conversations=3, turns=3)
        assert made.total("galerne_route_choices_total", model="chat", reason="prefix") == 6
        assert made.total("galerne_route_choices_total", model="chat") == 9
        assert made.total("galerne_route_prompt_tokens_total", held="true") > 0
        assert made.total("galerne_route_index_blocks", model="chat") > 0
        router = made.gateway.replicas.router("chat")
        assert router.sharing_blocks == 0
        assert all(seat.waiting_tokens == 0 == seat.in_flight_tokens for seat in router.seats)


async def test_a_replica_that_goes_is_forgotten() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost")) as made:
        await talk(made, conversations=4, turns=1)
        made.gateway.update_replicas("chat", made.endpoints[:1])
        router = made.gateway.replicas.router("chat")
        assert {seat.name for seat in router.seats} == {"r0"}
        for _ in range(3):
            await ask(made, text(0, 200))
        made.gateway.update_replicas("chat", ())
        assert router.index.blocks == 0


async def test_a_request_that_the_engine_refuses_leaves_nothing_in_the_index() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost")) as made:
        messages = [{"role": "user", "content": text(1, 20_000)}]
        answer = await made.http.post(COMPLETIONS, headers=AUTH, json={"model": "chat", "messages": messages})
        assert answer.status_code == 400
        await made.settled()
        assert made.gateway.replicas.router("chat").index.blocks == 0


async def test_a_dead_replica_is_passed_over_whatever_it_is_thought_to_hold() -> None:
    async with rig(SMALL, dead=1, chat=chat("cost")) as made:
        for i in range(6):
            await ask(made, text(i, 50))
        router = made.gateway.replicas.router("chat")
        assert all(seat.waiting_tokens == 0 for seat in router.seats)


async def test_a_replicas_cache_is_learned_from_the_engine() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost")) as made:
        async with asyncio.timeout(5):
            while made.gateway.replicas.wants_kv_tokens("chat") and not made.gateway.replicas.told_kv_tokens("chat"):
                await asyncio.sleep(0.01)
        assert made.gateway.replicas.told_kv_tokens("chat") == 256 * 16


def test_what_an_engine_says_of_its_cache() -> None:
    line = b'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="%s",x="}"} 1.0\n'
    assert kv_tokens(b"# HELP\n" + line % b"1024") == 16384
    assert kv_tokens(line % b"None") is None
    assert kv_tokens(line % b"0") is None
    assert kv_tokens(b"vllm:other 5\n") is None
    assert kv_tokens(b"") is None


async def test_sessions_stay_on_their_replica() -> None:
    async with rig(SMALL, SMALL, chat=chat("session")) as made:
        for session in ("a", "b", "c", "d"):
            for _ in range(3):
                answer = await made.http.post(
                    COMPLETIONS,
                    headers=AUTH | {"x-session-id": session},
                    json={"model": "chat", "messages": [{"role": "user", "content": text(9, 50)}], "max_tokens": 1},
                )
                assert answer.status_code == 200
        assert made.total("galerne_route_choices_total", reason="session") == 12


async def test_one_replica_is_no_choice_and_reads_no_prompt() -> None:
    async with rig(SMALL) as made:
        await ask(made, text(1, 100))
        assert made.total("galerne_route_choices_total", reason="only") == 1
        assert made.total("galerne_route_index_blocks") == 0


# -- for administrators


def with_admin(config: GalerneConfig) -> GalerneConfig:
    return GalerneConfig.model_validate(
        config.model_dump() | {"admins": [{"id": "ops", "sha256": digest(ADMIN)}]},
    )


async def test_only_an_administrator_is_told_where_an_answer_came_from() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost"), change=with_admin) as made:
        body = {"model": "chat", "messages": [{"role": "user", "content": text(1, 100)}], "max_tokens": 1}

        async def headers(**more: str) -> Any:
            return await made.http.post(
                COMPLETIONS, headers=AUTH | {k.replace("_", "-"): v for k, v in more.items()}, json=body
            )

        assert "x-galerne-route" not in (await headers()).headers
        told = await headers(x_galerne_admin=ADMIN)
        assert told.headers["x-galerne-route"].startswith("replica=r")
        assert "reason=prefix" in told.headers["x-galerne-route"]
        for other in ("sk-wrong", "sk-press", ""):
            untold = await headers(x_galerne_admin=other)
            assert (untold.status_code, "x-galerne-route" in untold.headers) == (200, False)


async def test_a_decision_is_explained_without_being_taken() -> None:
    async with rig(SMALL, SMALL, chat=chat("cost"), change=with_admin) as made:
        admin = {"authorization": f"Bearer {ADMIN}"}
        body = {"model": "chat", "messages": [{"role": "user", "content": text(1, 100)}], "max_tokens": 2}
        question = {"tenant": "press", "path": COMPLETIONS, "body": body}

        async def explained(**changed: Any) -> dict[str, Any]:
            answer = await made.http.post("/ops/route", headers=admin, json=question | changed)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        before = await explained()
        assert before["chosen"]["reason"] in {"tie", "load"}
        await ask(made, text(1, 100))
        held = await explained()
        assert held["chosen"]["reason"] == "prefix"
        rows = {row["replica"]: row for row in held["candidates"]}
        assert rows[held["chosen"]["replica"]]["cached_tokens"] > 0
        assert min(rows.values(), key=lambda row: float(row["cost_s"]))["replica"] == held["chosen"]["replica"]
        assert (await explained(tenant="other"))["chosen"]["cached_tokens"] == 0
        assert (await explained()) == held, "asking changes nothing"
        assert made.total("galerne_route_choices_total") == 1
        for changed, status in (
            ({"tenant": "nobody"}, 404),
            ({"path": "/v1/models"}, 404),
            ({"body": body | {"model": "none"}}, 404),
            ({"body": {"model": "chat"}}, 400),
        ):
            answer = await made.http.post("/ops/route", headers=admin, json=question | changed)
            assert answer.status_code == status, answer.text
        assert (await made.http.post("/ops/route", headers=AUTH, json=question)).status_code == 403
        assert (await made.http.post("/ops/route", json=question)).status_code == 401
        assert (await made.http.get("/ops/route", headers=admin)).status_code == 405


async def test_the_command_asks_a_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "chat", "messages": [{"role": "user", "content": text(1, 100)}]}))
    async with rig(SMALL, SMALL, chat=chat("cost"), change=with_admin) as made:
        await ask(made, text(1, 100))

        async def command(*more: str, key: str = ADMIN) -> Any:
            monkeypatch.setenv("GALERNE_ADMIN_KEY", key)
            arguments = ["explain", str(body), "--url", str(made.http.base_url), *more]
            return await asyncio.to_thread(CliRunner().invoke, app, arguments)

        shown = await command("--tenant", "press")
        assert shown.exit_code == 0, shown.output
        assert "(prefix)" in shown.stdout
        assert "2 of 2 replicas" in shown.stdout
        told = json.loads((await command("--tenant", "press", "--json")).stdout)
        assert told["chosen"]["cached_tokens"] > 0
        assert "no such tenant" in str((await command("--tenant", "nobody")).exception)
        assert "403" in str((await command("--tenant", "press", key="sk-press")).exception)


async def test_without_administrators_there_is_nothing_to_ask() -> None:
    async with rig(SMALL) as made:
        assert (await made.http.post("/ops/route", headers=AUTH, content=json.dumps({}))).status_code == 404


@pytest.mark.parametrize("policy", ["power-of-two", "round-robin"])
async def test_other_policies_keep_no_index(policy: str) -> None:
    async with rig(SMALL, SMALL, chat=chat(policy)) as made:
        await talk(made, conversations=2, turns=2)
        assert made.total("galerne_route_index_blocks") == 0
