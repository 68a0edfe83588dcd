"""GET /v1/usage: the ledger's figures of one's own tenant, within bounds, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from serving.api.auth import digest
from serving.api.usage import DAY_S, MOST_DAYS, Asked, buckets, read, refusal
from serving.config import SCOPES, FakeEngineConfig, GalerneConfig
from serving.errors import BadRequest
from serving.metering import store
from serving.metering.asking import LedgerQuestions
from serving.metering.ledger import Ledger
from serving.metering.questions import MOST_ROWS, NoAnswer, Question, Sums
from serving.metering.reader import Reader
from serving.metering.settings import LedgerSettings
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, KEY, Rig, rig
from tests.unit.test_ledger import NOW_S, made, reading, row

USAGE = "/v1/usage"
OTHER_KEY = "sk-other"
OTHER = {"authorization": f"Bearer {OTHER_KEY}"}
WAIT_S = 30
QUOTA = {"requests_per_minute": 100, "tokens_per_day": 10_000}
START_S = int(datetime(2026, 9, 21, tzinfo=UTC).timestamp())


# -- what is asked for


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", (datetime(2026, 9, 1, tzinfo=UTC), int(NOW_S) + 1, (), ())),
        ("to=2026-09-01", (datetime(2026, 8, 1, tzinfo=UTC), datetime(2026, 9, 1, tzinfo=UTC), (), ())),
        (
            "from=2026-09-21T02:00:00%2B02:00&to=1790000000&group_by=model,day&group_by=api_key_id",
            (START_S, 1790000000, ("day", "model", "key_id"), ()),
        ),
        (
            "from=2026-09-20&to=2026-09-21&model=acme/v&model=chat&model=chat",
            (START_S - DAY_S, START_S, (), ("acme/v", "chat")),
        ),
    ],
)
def test_what_is_asked_for(query: str, expected: tuple[Any, ...]) -> None:
    since, until, by, models = expected
    moments = [int(m.timestamp()) if isinstance(m, datetime) else m for m in (since, until)]
    assert read(query.encode(), NOW_S) == Asked(*moments, by, models)


BAD = [
    ("from=yesterday", "from"),
    ("from=2026-13-01", "from"),
    ("from=", "from"),
    ("from=2026-09-01T00:00:00+01:00", "from"),  # a plus sign in a query is a space
    ("from=2026-09-01T00:00:00.5", "from"),
    ("from=-5", "from"),
    ("from=99999999999999999999", "from"),
    ("from=1969-12-31", "from"),
    ("to=9999-12-31T23:59:59-23:59", "to"),
    ("from=0001-01-01T00:00:00%2B23:59", "from"),
    ("from=2026-09-02&to=2026-09-02", "from"),
    ("from=2026-09-03&to=2026-09-02", "from"),
    ("from=2025-01-01&to=2026-09-02", "from"),
    ("from=2026-09-01&from=2026-09-02", "from"),
    ("group_by=tenant", "group_by"),
    ("group_by=", "group_by"),
    ("group_by=day%2Cengine", "group_by"),
    ("model=", "model"),
    ("model=" + "x" * 129, "model"),
    ("model=a%00b", "model"),
    ("&".join(f"model=m{i}" for i in range(17)), "model"),
    ("tenant=other", "tenant"),
    ("limit=5", "limit"),
    ("%00=1", "\0"),
    ("model", None),
    ("model=%ff", None),
    ("model=%ed%a0%80", None),
    ("&".join(["group_by=day"] * 33), None),
    ("model=" + "x" * 5000, None),
]


@pytest.mark.parametrize(("query", "param"), BAD)
def test_what_cannot_be_asked_for(query: str, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        read(query.encode(), NOW_S)
    assert refused.value.param == param


@given(st.binary(max_size=200))
def test_any_bytes_are_a_question_or_a_refusal(query: bytes) -> None:
    with contextlib.suppress(BadRequest):
        asked = read(query, NOW_S)
        assert 0 <= asked.since_s < asked.until_s <= 10**10
        assert asked.until_s - asked.since_s <= MOST_DAYS * DAY_S


@given(st.integers(START_S - 3 * DAY_S, START_S + 3 * DAY_S), st.integers(1, 5 * DAY_S))
def test_days_follow_one_another(since_s: int, length_s: int) -> None:
    asked = Asked(since_s, since_s + length_s, ("day",), ())
    day = Sums(requests=2, prompt_tokens=3, cached_tokens=1, completion_tokens=4, estimated=0, day="2026-09-21")
    found = buckets(asked, [day])
    assert [found[0]["start_time"], found[-1]["end_time"]] == [since_s, since_s + length_s]
    assert [b["end_time"] for b in found[:-1]] == [b["start_time"] for b in found[1:]]
    assert all(b["start_time"] // DAY_S == (b["end_time"] - 1) // DAY_S for b in found)
    with_results = [b["start_time"] // DAY_S * DAY_S for b in found if b["results"]]
    assert with_results == ([START_S] if since_s < START_S + DAY_S and since_s + length_s > START_S else [])


# -- the process that reads


def question(**fields: Any) -> Question:
    return Question(**({"tenant": "press", "since_s": START_S, "until_s": START_S + DAY_S} | fields))


def filled(directory: Path, rows: int = 3) -> LedgerSettings:
    """A ledger with rows of this tenant and one of another."""
    told = made(directory)
    spill = Spill(told.spill_dir)
    spill.write([*(row(n) for n in range(rows)), row(rows, tenant="other", completion_tokens=70)], "x", NOW_S)
    assert Writer(spill, told.url, print).drain()
    return told


def test_the_reader_answers_what_the_ledger_holds(tmp_path: Path) -> None:
    reader = Reader(filled(tmp_path).url)
    (total,) = reader.answer(question()).sums
    assert (total.requests, total.prompt_tokens, total.cached_tokens, total.completion_tokens) == (3, 30, 12, 3)
    assert (total.day, total.model, total.key_id) == (None, None, None)
    (group,) = reader.answer(question(by=("day", "model", "key_id"), models=("chat",))).sums
    assert (group.day, group.model, group.key_id, group.requests) == ("2026-09-21", "chat", "a", 3)
    assert reader.answer(question(by=("model",), models=("none",))).sums == ()
    assert reader.answer(question(until_s=int(NOW_S), by=("model",))).sums == ()
    reader.close()


def test_the_reader_keeps_its_bounds(tmp_path: Path) -> None:
    told = filled(tmp_path)
    reader = Reader(told.url)
    with reading(told.url) as connection:
        # Statements of SQLite are looked at every so many steps: this takes more.
        store.insert(connection, [row(n, id=f"many-{n}", model=f"m{n}") for n in range(5000)])
    assert reader.answer(question(by=("model",), most_rows=5000)).trouble == "many"
    assert len(reader.answer(question(by=("model",), most_rows=5001)).sums) == 5001
    assert reader.answer(question(by=("model",), within_s=0.0)).trouble == "slow"
    # One that took too long is no trouble to the next.
    assert reader.answer(question()).trouble is None
    reader.close()


def test_a_ledger_that_is_away_is_not_made_anew(tmp_path: Path) -> None:
    told = made(tmp_path)
    reply = Reader(told.url).answer(question())
    assert reply.trouble == "away"
    assert not (tmp_path / "ledger.db").exists()
    (tmp_path / "ledger.db").write_bytes(b"no database" * 1000)
    assert Reader(told.url).answer(question()).trouble == "away"


# -- the gateway's side of it


@contextlib.asynccontextmanager
async def asking(told: LedgerSettings, script: str | None = None, **times: float) -> AsyncIterator[LedgerQuestions]:
    made_questions = LedgerQuestions(told, **({} if script is None else {"program": ("-c", script)}), **times)
    try:
        yield made_questions
    finally:
        made_questions.close()
        assert made_questions._process is None


async def trouble(questions: LedgerQuestions, asked: Question) -> str:
    with pytest.raises(NoAnswer) as found:
        await questions.ask(asked)
    return found.value.trouble


async def test_the_process_comes_when_asked_and_goes_when_idle(tmp_path: Path) -> None:
    async with asking(filled(tmp_path), idle_s=0.05) as questions:
        assert questions._process is None
        assert (await questions.ask(question()))[0].requests == 3
        deadline_s = time.monotonic() + WAIT_S
        while questions._process is not None:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
    async with asking(filled(tmp_path / "again")) as questions:
        await questions.ask(question())
        # Killed for want of memory, for example: the next question finds another.
        assert questions._process is not None
        questions._process.kill()
        questions._process.wait()
        assert (await questions.ask(question()))[0].requests == 3


async def test_one_question_of_a_tenant_at_a_time(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    # It answers when the gate is open.
    script = (
        "import pathlib, sys, time\n"
        "sys.stdin.readline()\n"
        "for line in sys.stdin:\n"
        f"    while not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)\n"
        "    print('{\"sums\": []}', flush=True)\n"
    )
    async with asking(made(tmp_path), script, wait_s=0.05) as questions:
        first = asyncio.create_task(questions.ask(question()))
        await asyncio.sleep(0)
        assert await trouble(questions, question()) == "busy"
        # Another tenant waits its turn, but not for ever.
        assert await trouble(questions, question(tenant="other")) == "slow"
        gate.touch()
        assert await first == ()
        assert await questions.ask(question()) == ()


async def test_whatever_the_process_does_there_is_an_end(tmp_path: Path) -> None:
    told = made(tmp_path)
    async with asking(told, "import time; time.sleep(600)", answer_s=0.3) as questions:
        assert await trouble(questions, question()) == "slow"
        assert questions._process is None
    async with asking(told, "raise SystemExit(1)") as questions:
        assert await trouble(questions, question()) == "away"
    async with asking(told, "import sys; sys.stdin.readline(); sys.stdin.readline(); print('nonsense')") as questions:
        assert await trouble(questions, question()) == "away"
    async with asking(told, "import time; time.sleep(600)") as questions:
        waiting = asyncio.create_task(trouble(questions, question()))
        deadline_s = time.monotonic() + WAIT_S
        while questions._process is None:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
    assert await waiting == "away"


# -- through the gateway


def with_scopes(config: GalerneConfig) -> GalerneConfig:
    """Both tenants' keys may ask for usage, and one more of the first may not."""
    document = config.model_dump(mode="json", exclude_unset=True)
    press, other = document["tenants"]
    press["keys"] = [
        {"id": "a", "sha256": digest(KEY), "scopes": SCOPES},
        {"id": "app", "sha256": digest("sk-app")},
    ]
    other["keys"] = [{"id": "b", "sha256": digest(OTHER_KEY), "scopes": ["inference", "usage"]}]
    return GalerneConfig.model_validate(document)


@pytest.fixture
def told(tmp_path: Path) -> LedgerSettings:
    """A ledger with its table; what comes later is written by `until_written`."""
    found = LedgerSettings(f"sqlite:///{tmp_path}/ledger.db", tmp_path / "spill", 0.1, 2**24)
    writer = Writer(Spill(found.spill_dir), found.url, print)
    assert writer.drain()
    writer.close()
    return found


@contextlib.asynccontextmanager
async def billed(told: LedgerSettings, *engines: FakeEngineConfig) -> AsyncIterator[Rig]:
    ledger = Ledger(told, "g", program=None)
    ledger.start()
    chat = {"hold": {"in_flight_per_replica": 1}}
    async with rig(*engines, ledger=ledger, change=with_scopes, tenant={"quota": QUOTA}, chat=chat) as made_rig:
        yield made_rig


async def page(made_rig: Rig, headers: dict[str, str] = AUTH, **params: Any) -> dict[str, Any]:
    answer = await made_rig.http.get(USAGE, headers=headers, params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_tenant_sees_its_own(told: LedgerSettings) -> None:
    async with billed(told, FAST) as made_rig:
        for headers, body in (
            (AUTH, CHAT),
            (AUTH, CHAT | {"stream": True}),
            ({"authorization": "Bearer sk-app"}, CHAT | {"n": 2}),
            (OTHER, CHAT | {"max_tokens": 50}),
        ):
            assert (await made_rig.http.post(COMPLETIONS, headers=headers, json=body)).status_code == 200
        await until_written(told, 4)
        with reading(told.url) as connection:
            sums = {f["tenant"]: f for f in store.totals(connection, ["tenant"])}
        for headers, tenant in ((AUTH, "press"), (OTHER, "other")):
            found = await page(made_rig, headers)
            ((result,),) = [bucket["results"] for bucket in found["data"]]
            assert result == {
                "object": "galerne.usage.result",
                "input_tokens": sums[tenant]["prompt_tokens"],
                "input_cached_tokens": sums[tenant]["cached_tokens"],
                "output_tokens": sums[tenant]["completion_tokens"],
                "num_model_requests": sums[tenant]["requests"],
                "num_estimated_requests": 0,
                "model": None,
                "api_key_id": None,
            }
            assert found["covers"] == "host"
        assert sums["press"]["requests"] == 3
        assert "press" not in json.dumps(await page(made_rig, OTHER, group_by="model,api_key_id,day"))
        grouped = await page(made_rig, group_by=["day", "api_key_id", "model"])
        results = [r for bucket in grouped["data"] for r in bucket["results"]]
        assert [(r["model"], r["api_key_id"], r["num_model_requests"]) for r in results] == [
            ("chat", "a", 2),
            ("chat", "app", 1),
        ]
        assert (await page(made_rig, model="acme/vectors", group_by="model"))["data"][0]["results"] == []
        # The other tenant has no quota, and this one what its requests took.
        await made_rig.gateway.quotas.settled()
        assert (await page(made_rig, OTHER))["quota"] == {}
        quota = (await page(made_rig))["quota"]
        assert (quota["requests_per_minute"]["limit"], quota["requests_per_minute"]["used"]) == (100, 3)
        spent = sums["press"]["prompt_tokens"] + sums["press"]["completion_tokens"]
        assert quota["tokens_per_day"]["used"] == spent
        assert quota["tokens_per_day"]["remaining"] == 10_000 - spent
        assert 0 < quota["tokens_per_day"]["resets_in_s"] <= DAY_S
        assert set(quota) == set(QUOTA)


async def until_written(told: LedgerSettings, rows: int) -> None:
    """Wait until so many rows are in the database."""
    writer = Writer(Spill(told.spill_dir), told.url, print)
    deadline_s = time.monotonic() + WAIT_S
    written = 0
    while written < rows:
        assert time.monotonic() < deadline_s
        assert await asyncio.to_thread(writer.drain)
        with reading(told.url) as connection:
            written = sum(int(f["requests"]) for f in store.totals(connection, ["tenant"]))
        await asyncio.sleep(0.05)
    writer.close()


async def test_what_waits_and_is_in_flight_is_ones_own(told: LedgerSettings) -> None:
    async with billed(told, FakeEngineConfig(decode_ms=5)) as made_rig:
        body = CHAT | {"stream": True, "max_tokens": 9000, "ignore_eos": True}
        async with made_rig.http.stream("POST", COMPLETIONS, headers=AUTH, json=body) as running:
            assert running.status_code == 200
            chunks = running.aiter_bytes()
            await anext(chunks)
            waiting = asyncio.create_task(made_rig.http.post(COMPLETIONS, headers=OTHER, json=CHAT))
            deadline_s = time.monotonic() + WAIT_S
            while not (await page(made_rig, OTHER))["queue"]["waiting"]:
                assert time.monotonic() < deadline_s
            own = {"waiting": 0, "in_flight": 1}
            assert (await page(made_rig))["queue"] == own | {"models": [{"model": "chat"} | own]}
            theirs = {"waiting": 1, "in_flight": 0}
            assert (await page(made_rig, OTHER))["queue"] == theirs | {"models": [{"model": "chat"} | theirs]}
        assert (await waiting).status_code == 200
        await made_rig.settled()
        assert (await page(made_rig))["queue"] == {"waiting": 0, "in_flight": 0, "models": []}


async def test_who_may_not_and_what_may_not(told: LedgerSettings) -> None:
    async with billed(told, FAST) as made_rig:

        async def error(method: str = "GET", key: str = KEY, query: str = "") -> tuple[int, Any]:
            headers = {"authorization": f"Bearer {key}"}
            answer = await made_rig.http.request(method, f"{USAGE}{query}", headers=headers)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            return answer.status_code, answer.json()["error"]["code"]

        assert await error(key="sk-app") == (403, "permission_denied")
        assert await error(key="sk-app", query="?from=never") == (403, "permission_denied")
        assert await error(key="sk-wrong") == (401, "invalid_api_key")
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert await error(method) == (405, "method_not_allowed")
        for query, _ in BAD:
            assert (await error(query=f"?{query}"))[0] == 400, query
        assert made_rig.total("galerne_requests_denied_total", tenant="press", reason="scope") == 2


async def test_while_the_ledger_is_away_it_says_when_to_ask_again(told: LedgerSettings) -> None:
    async with billed(told, FAST) as made_rig:
        Path(told.url.removeprefix("sqlite:///")).rename(told.spill_dir / "elsewhere.db")
        with capture_logs() as logs:
            for _ in range(3):
                answer = await made_rig.http.get(USAGE, headers=AUTH)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                assert answer.json()["error"]["code"] == "usage_unavailable"
                assert str(told.spill_dir.parent) not in answer.text
        # The operator hears why, once.
        assert ["there is no ledger" in log["reason"] for log in logs] == [True]
        # Whoever asks for answers gets them.
        assert (await made_rig.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200


async def test_without_a_ledger_nothing_is_known() -> None:
    async with rig(FAST, change=with_scopes) as made_rig:
        answer = await made_rig.http.get(USAGE, headers=AUTH)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "usage_unavailable")


@pytest.mark.parametrize(
    ("kind", "status", "retry_after_s"), [("busy", 429, 1), ("many", 400, None), ("slow", 503, 5), ("away", 503, 5)]
)
def test_every_trouble_has_its_answer(kind: Any, status: int, retry_after_s: int | None) -> None:
    error = refusal(NoAnswer(kind, "postgresql://galerne:secret@db"))
    assert (error.status, error.retry_after_s) == (status, retry_after_s)
    assert "secret" not in error.message
    assert (str(MOST_ROWS) in error.message) is (kind == "many")
