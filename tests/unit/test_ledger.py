"""The ledger: what was given to it is in the database once, whatever happens on the way, and never lost in silence."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from structlog.testing import capture_logs

from serving.cluster.kubernetes.masking import Masker
from serving.config import GalerneConfig, LedgerConfig
from serving.errors import ClusterError
from serving.metering import schema, store
from serving.metering.ledger import Ledger
from serving.metering.questions import Question, Reply
from serving.metering.reader import Reader
from serving.metering.reconcile import Lost, Tokens
from serving.metering.row import Row
from serving.metering.settings import LedgerSettings, settings
from serving.metering.spill import Spill
from serving.metering.writer import Writer, run

NOW_S = 1_790_000_000.0


def row(number: int, **fields: Any) -> Row:
    return Row(
        **{
            "id": f"g-{number}",
            "request_id": f"r{number}",
            "tenant": "press",
            "key_id": "a",
            "model": "chat",
            "route": "/v1/chat/completions",
            "prompt_tokens": 10,
            "cached_tokens": 4,
            "completion_tokens": number,
            "counted_prompt_tokens": 10,
            "exact": True,
            "status": 200,
            "outcome": "completed",
            "stream": True,
            "started_at": NOW_S,
            "ttft_s": 0.1,
            "duration_s": 0.5,
            "gateway_id": "g",
            "engine": "r0",
        }
        | fields
    )


def made(tmp_path: Path, **fields: Any) -> LedgerSettings:
    found = {"url": f"sqlite:///{tmp_path}/ledger.db", "spill_dir": tmp_path / "spill", "flush_s": 0.05}
    return LedgerSettings(**(found | {"spill_bytes": 2**20} | fields))


@contextmanager
def reading(url: str) -> Iterator[Connection]:
    engine = store.connect(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def rows_of(url: str) -> list[tuple[Any, ...]]:
    with reading(url) as connection:
        return [tuple(found) for found in connection.execute(store.USAGE.select().order_by("id"))]


def test_rows_get_there_once(tmp_path: Path) -> None:
    told = made(tmp_path)
    ledger = Ledger(told, "g", program=None)
    for number in range(2500):
        ledger.record(row(number))
    ledger.flush()
    assert ledger.state().behind == ledger.state().spilled == 2500
    # The same file twice, as where a writer died between its commit and the file's removal.
    (batch,) = ledger._spill.batches()
    twin = batch.path.with_name(batch.path.name.replace("-g-", "-h-"))
    twin.write_bytes(batch.path.read_bytes())
    complaints: list[str] = []
    writer = Writer(Spill(told.spill_dir), told.url, complaints.append)
    assert writer.drain()
    writer.close()
    assert not complaints
    assert len(rows_of(told.url)) == 2500
    ledger.flush()
    assert (ledger.state().behind, ledger.state().lag_s) == (0, 0.0)


def test_sums(tmp_path: Path) -> None:
    told = made(tmp_path)
    spill = Spill(told.spill_dir)
    day_s = 86400
    spill.write([row(1), row(2, exact=False), row(3, tenant="other", started_at=NOW_S + day_s)], "x", NOW_S)
    assert Writer(spill, told.url, print).drain()
    with reading(told.url) as connection:
        found = store.totals(connection, ["tenant"])
        assert [(f["tenant"], f["requests"], f["completion_tokens"], f["estimated"]) for f in found] == [
            ("other", 1, 3, 0),
            ("press", 2, 3, 1),
        ]
        days = store.totals(connection, ["day"], tenant="press", until=datetime.fromtimestamp(NOW_S + 1, UTC))
        assert [(str(f["day"]), f["prompt_tokens"]) for f in days] == [("2026-09-21", 20)]
        assert not store.totals(connection, ["day"], until=datetime.fromtimestamp(NOW_S, UTC))


def test_while_the_database_is_away_rows_wait(tmp_path: Path) -> None:
    away = tmp_path / "away"
    told = made(tmp_path, url=f"sqlite:///{away}/ledger.db")
    now_s = NOW_S
    ledger = Ledger(told, "g", program=None, now=lambda: now_s)
    complaints: list[str] = []
    writer = Writer(Spill(told.spill_dir), told.url, complaints.append)
    ledger.record(row(1))
    ledger.flush()
    assert not writer.drain()
    assert "unable to open database file" in complaints[0]
    now_s += 90
    ledger.flush()
    assert (ledger.state().behind, ledger.state().lag_s) == (1, 90)
    away.mkdir()
    assert writer.drain()
    assert len(rows_of(told.url)) == 1


def test_a_full_disk_loses_rows_aloud(tmp_path: Path) -> None:
    told = made(tmp_path, spill_bytes=8192)
    ledger = Ledger(told, "g", program=None)
    with capture_logs() as logs:
        for number in range(5):
            ledger.record(row(number))
            ledger.flush()
    state = ledger.state()
    assert (state.spilled, state.dropped, state.behind) == (2, 3, 2)
    assert [(entry["log_level"], "usage is LOST" in entry["event"]) for entry in logs] == [("error", True)]
    assert Writer(Spill(told.spill_dir), told.url, print).drain()
    ledger.flush()
    ledger.record(row(9))
    ledger.flush()
    assert ledger.state().spilled == 3


def test_a_disk_that_takes_nothing_keeps_rows_in_memory(tmp_path: Path) -> None:
    told = made(tmp_path)
    ledger = Ledger(told, "g", program=None)
    (told.spill_dir / f"{int(NOW_S * 1000):015d}-1-g-1.new").mkdir()
    ledger._now = lambda: NOW_S
    ledger.record(row(1))
    ledger.flush()
    assert (ledger.state().spilled, ledger.state().behind) == (0, 1)
    ledger.flush()
    assert (ledger.state().spilled, ledger.state().behind) == (1, 1)


def test_what_is_no_row_is_put_aside(tmp_path: Path) -> None:
    told = made(tmp_path)
    spill = Spill(told.spill_dir)
    spill.write([row(1)], "a", NOW_S)
    (told.spill_dir / "000000000000001-1-b.rows").write_bytes(b'{"id": 1}\n')
    spill.write([row(2), row(3, tenant=None)], "c", NOW_S)  # as a later version might write it
    complaints: list[str] = []
    assert Writer(spill, told.url, complaints.append).drain()
    assert len(complaints) == 2
    assert [r[0] for r in rows_of(told.url)] == ["g-1"]
    assert len(list(told.spill_dir.glob("*.bad"))) == 2


def test_a_row_that_the_database_refuses_keeps_no_other(tmp_path: Path) -> None:
    told = made(tmp_path)
    spill = Spill(told.spill_dir)
    assert Writer(spill, told.url, print).drain()
    spill.write([row(1)], "a", NOW_S)
    assert Writer(spill, told.url, print).drain()
    with sqlite3.connect(told.url.removeprefix("sqlite:///")) as connection:
        connection.execute("CREATE UNIQUE INDEX made_up ON usage (request_id)")
    spill.write([row(2), row(3, request_id="r1")], "b", NOW_S)
    complaints: list[str] = []
    assert Writer(spill, told.url, complaints.append).drain()
    assert "refused 1 rows" in complaints[0]
    assert [r[0] for r in rows_of(told.url)] == ["g-1", "g-2"]


def test_the_spill_is_its_users_alone(tmp_path: Path) -> None:
    told = made(tmp_path)
    batch = Spill(told.spill_dir).write([row(1)], "a", NOW_S)
    assert stat.S_IMODE(batch.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(told.spill_dir.stat().st_mode) == 0o700


def test_the_writers_process(tmp_path: Path) -> None:
    told = made(tmp_path)
    # Whatever else the machine does, the writer's start included.
    ledger = Ledger(told, "g", stop_s=60)
    ledger.start()
    ledger.record(row(1))
    # Written at the end at the latest, also where the writer has not been started before.
    ledger.close()
    assert [r[0] for r in rows_of(told.url)] == ["g-1"]
    assert not Spill(told.spill_dir).batches()


def test_what_had_ended_by_a_moment(tmp_path: Path) -> None:
    told = made(tmp_path)
    reader = Reader(told.url)
    asked = Question(tenant="press", since_s=int(NOW_S) - 1, until_s=int(NOW_S) + 1, by=("day",))
    engine = store.connect(told.url)
    with engine.begin():
        pass
    # A writer is about to make the table.
    assert reader.answer(msgspec.structs.replace(asked, ended_before_s=NOW_S)) == Reply()
    schema.upgrade(engine)
    with engine.begin() as connection:
        store.insert(connection, [row(1)])
    for before_s, requests in ((0.499, []), (0.501, [1])):
        ended = msgspec.structs.replace(asked, ended_before_s=row(1).started_at + before_s)
        assert [s.requests for s in reader.answer(ended).sums] == requests
    reader.close()
    engine.dispose()


def test_a_writer_ends_with_its_gateway(tmp_path: Path) -> None:
    told = made(tmp_path)
    spill = Spill(told.spill_dir)
    spill.write([row(1)], "a", NOW_S)
    ended = threading.Event()
    ended.set()
    run(spill, told.url, ended, print)
    assert len(rows_of(told.url)) == 1


def test_settings(tmp_path: Path) -> None:
    home = {"HOME": "/home/x"}
    found = settings(LedgerConfig(), home)
    assert found.url == "sqlite:////home/x/ledger/galerne.db"
    assert found.spill_dir == Path("/home/x/ledger/ledger-spill")
    assert not found.is_shared
    secret = "postgresql://galerne:hunter2@db:5432/usage"
    found = settings(LedgerConfig(), home | {"GALERNE_LEDGER_URL": secret, "GALERNE_LEDGER_DIR": "/data"})
    assert (found.url, found.spill_dir) == (secret, Path("/data/ledger-spill"))
    assert found.is_shared
    assert "hunter2" not in repr(found)
    with pytest.raises(ClusterError) as error:
        settings(LedgerConfig(), {"GALERNE_LEDGER_URL": "mysql://x:hunter2@y/z"})
    assert "hunter2" not in str(error.value)


def test_a_password_in_the_configuration_shows_nowhere() -> None:
    config = GalerneConfig.model_validate(
        {
            "ledger": {"url": "postgresql://galerne:hunter2@db:5432/usage"},
            "models": [{"id": "m", "source": "fake:m"}],
            "tenants": [{"id": "t", "keys": [{"id": "k", "sha256": "0" * 64}]}],
        }
    )
    for text in (repr(config), str(config), repr(config.ledger), f"{config.ledger}"):
        assert "hunter2" not in text
    assert "hunter2" not in Masker().text(f"ledger: {{url: {config.ledger.url}}}")
    with pytest.raises(ValueError, match="must be sqlite"):
        LedgerConfig.model_validate({"url": "mysql://x"})


def test_the_migrations_make_the_table_that_the_code_knows(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    engine = store.connect(f"sqlite:///{tmp_path}/x.db")
    schema.upgrade(engine)
    schema.upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSIONS})
        differences = [d for d in compare_metadata(context, store.METADATA) if d[0] != "modify_type"]
    assert not differences
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD
    engine.dispose()
    assert os.listdir(tmp_path)


def test_a_table_of_before_is_brought_on_and_one_of_later_is_left_alone(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    url = f"sqlite:///{tmp_path}/x.db"
    engine = store.connect(url)
    later = {"lost_engine", "lost_prompt_tokens", "lost_completion_tokens", "lost_exact", "counted_completion_tokens"}
    before = {name: value for name, value in store._columns(row(1)).items() if name not in later}
    old = sa.table("usage", *(sa.column(name, store.USAGE.c[name].type) for name in before))
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(schema.MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(old.insert(), [before])
    schema.upgrade(engine)
    with engine.begin() as connection:
        # A gateway of before goes on writing, and a new one beside it.
        connection.execute(old.insert(), [before | {"id": "g-2"}])
        store.insert(connection, [row(3, lost_engine="r1", lost_prompt_tokens=None, lost_exact=False)])
        found = connection.execute(store.USAGE.select().order_by("id")).all()
        assert [(r.lost_engine, r.lost_prompt_tokens, r.lost_completion_tokens, r.lost_exact) for r in found] == [
            ("", 0, 0, True),
            ("", 0, 0, True),
            ("r1", None, 0, False),
        ]
        assert store.lost(connection) == {"r1": Lost(Tokens(), Tokens(), 1)}
        connection.execute(sa.text(f"UPDATE {schema.VERSIONS} SET version_num = '9999'"))  # noqa: S608 - a constant
    schema.upgrade(engine)
    engine.dispose()


def test_rows_of_before_are_read_and_rows_without_a_lost_attempt_are_as_long_as_before(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    batch = spill.write([row(1)], "a", NOW_S)
    assert b"lost_" not in batch.path.read_bytes()
    assert spill.read(batch) == [row(1)]
    lost = row(2, lost_engine="r1", lost_prompt_tokens=9, lost_completion_tokens=None, lost_exact=False)
    assert spill.read(spill.write([lost], "b", NOW_S)) == [lost]
