"""The ledger on a real PostgreSQL, as a cluster has it: outages, several writers, and no password in any text."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from serving.cli import app
from serving.metering import schema, store
from serving.metering.ledger import Ledger
from serving.metering.questions import Question
from serving.metering.reader import Reader
from serving.metering.reconcile import Lost, Tokens
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.postgres import PASSWORD, Postgres
from tests.unit.test_ledger import NOW_S, made, reading, row, rows_of


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    directory = Path(tempfile.mkdtemp(prefix="galerne-pg-"))
    try:
        server = Postgres(directory)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(AssertionError):
                server.stop()
    finally:
        shutil.rmtree(directory)


def test_rows_of_several_gateways(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spills = [Spill(tmp_path / str(i)) for i in range(4)]
    for i, spill in enumerate(spills):
        # Each holds a row that another has, too, as where a disk was copied or a file was read twice.
        spill.write([row(100 * i + k) for k in range(50)] + [row(0)], str(i), NOW_S)
    complaints: list[str] = []
    writers = [Writer(spill, postgres.url, complaints.append) for spill in spills]
    with ThreadPoolExecutor() as pool:
        # All of them find no table.
        assert all(pool.map(lambda writer: writer.drain(), writers))
    for writer in writers:
        writer.close()
    assert not complaints
    assert len(rows_of(postgres.url)) == 200
    monkeypatch.setenv("GALERNE_LEDGER_URL", postgres.url)
    found = CliRunner().invoke(app, ["usage", "--by", "day", "--by", "tenant", "--format", "json"])
    (total,) = json.loads(found.stdout)
    assert (total["day"], total["requests"], total["prompt_tokens"]) == ("2026-09-21", 200, 2000)


def test_a_table_of_before_and_attempts_that_were_lost(postgres: Postgres, tmp_path: Path) -> None:
    complaints: list[str] = []
    spill = Spill(tmp_path)
    writer = Writer(spill, postgres.url, complaints.append)
    assert writer.drain()
    with reading(postgres.url) as connection:
        # As the first version left it.
        later = (
            "lost_engine",
            "lost_prompt_tokens",
            "lost_completion_tokens",
            "lost_exact",
            "counted_completion_tokens",
        )
        for name in later:
            connection.execute(sa.text(f"ALTER TABLE usage DROP COLUMN {name}"))
        connection.execute(sa.text(f"UPDATE {schema.VERSIONS} SET version_num = '0001'"))  # noqa: S608 - a constant
    writer.close()
    lost = {"lost_engine": "lost-r1", "lost_prompt_tokens": 2**40, "lost_completion_tokens": 6}
    rows = [row(1, id="lost-1", **lost), row(2, id="lost-2", **lost, lost_exact=False)]
    spill.write([*rows, row(3, id="lost-3", **lost | {"lost_prompt_tokens": None}, lost_exact=False)], "x", NOW_S)
    writer = Writer(spill, postgres.url, complaints.append)
    assert writer.drain()
    writer.close()
    assert not complaints
    with reading(postgres.url) as connection:
        assert store.lost(connection) == {"lost-r1": Lost(Tokens(2**40, 6), Tokens(2**41, 18), unbounded=1)}


def test_an_outage(postgres: Postgres, tmp_path: Path) -> None:
    told = made(tmp_path, url=postgres.url)
    ledger = Ledger(told, "outage", program=None)
    complaints: list[str] = []
    writer = Writer(Spill(told.spill_dir), told.url, complaints.append)
    for number in range(3):
        ledger.record(row(number, id=f"outage-{number}"))
        ledger.flush()
        if number == 0:
            assert writer.drain()
            postgres.stop()
        elif number == 1:
            assert not writer.drain()
            assert ledger.state().behind == 1
    assert complaints
    assert not any(PASSWORD in text for text in complaints)
    postgres.start()
    assert writer.drain()
    writer.close()
    with reading(told.url) as connection:
        assert store.known(connection, [f"outage-{n}" for n in range(4)]) == {f"outage-{n}" for n in range(3)}


def test_a_question_and_its_bounds(postgres: Postgres, tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill")
    spill.write([row(n, id=f"asked-{n}", tenant="asks", model=f"m{n % 2}") for n in range(6)], "a", NOW_S)
    writer = Writer(spill, postgres.url, print)
    assert writer.drain()
    writer.close()
    reader = Reader(postgres.url)
    asked = Question(tenant="asks", since_s=int(NOW_S) - 1, until_s=int(NOW_S) + 1, by=("day", "model"))
    found = reader.answer(asked).sums
    assert [(s.day, s.model, s.requests, s.completion_tokens) for s in found] == [
        ("2026-09-21", "m0", 3, 0 + 2 + 4),
        ("2026-09-21", "m1", 3, 1 + 3 + 5),
    ]
    assert reader.answer(msgspec.structs.replace(asked, most_rows=1)).trouble == "many"
    # To the moment: these ran for half a second.
    for before_s, rows in ((0.499, 0), (0.501, 6)):
        ended = msgspec.structs.replace(asked, by=(), ended_before_s=NOW_S + before_s)
        assert sum(s.requests for s in reader.answer(ended).sums) == rows
    with reading(postgres.url) as connection:
        connection.execute(store.sa.text("LOCK TABLE usage IN ACCESS EXCLUSIVE MODE"))
        assert reader.answer(msgspec.structs.replace(asked, within_s=0.2)).trouble == "slow"
    # The connection is good for the next one, and a new one is made after an outage.
    assert reader.answer(asked).sums == found
    postgres.stop()
    reply = reader.answer(asked)
    assert reply.trouble == "away"
    assert PASSWORD not in reply.reason
    postgres.start()
    assert reader.answer(asked).sums == found
    reader.close()


def test_rows_of_a_window(postgres: Postgres, tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill")
    rows = [row(n, id=f"ran-{n}", started_at=NOW_S + 1e6 + 10 * n, duration_s=4.5) for n in range(8)]
    spill.write(rows, "a", NOW_S)
    writer = Writer(spill, postgres.url, print)
    assert writer.drain()
    writer.close()
    with reading(postgres.url) as connection:
        found = [r["completion_tokens"] for r in store.ran(connection, NOW_S + 1e6 + 6, NOW_S + 1e6 + 60)]
        assert sorted(found) == [1, 2, 3, 4, 5, 6]


def test_a_wrong_password_is_heard_of_and_not_said(postgres: Postgres, tmp_path: Path) -> None:
    complaints: list[str] = []
    spill = Spill(tmp_path / "spill")
    assert not Writer(spill, postgres.url.replace("a-pass%27word", "hunter2"), complaints.append).drain()
    assert "password authentication failed" in complaints[0]
    assert "hunter2" not in complaints[0]


def test_a_row_that_is_refused(postgres: Postgres, tmp_path: Path) -> None:
    told = made(tmp_path, url=postgres.url)
    spill = Spill(told.spill_dir)
    spill.write([row(1, id="short-1"), row(2, id="long-2", tenant="x" * 65)], "a", NOW_S)
    complaints: list[str] = []
    writer = Writer(spill, told.url, complaints.append)
    assert writer.drain()
    writer.close()
    assert "refused 1 rows" in complaints[0]
    with reading(told.url) as connection:
        assert store.known(connection, ["short-1", "long-2"]) == {"short-1"}
