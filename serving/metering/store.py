"""The ledger's database: one table, on SQLite or PostgreSQL alike. Imported by writer, reader and `galerne usage` only.

Promises: a row that is inserted twice is there once; what `insert` returned from is on the database's disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from serving.metering.reconcile import Lost, Tokens
from serving.metering.row import Row

# Of all databases that speak PostgreSQL's protocol this is one number for Galerne's migrations.
MIGRATION_LOCK: Final = 4_721_190_332
SQLITE_WAIT_S: Final = 30
CONNECT_S: Final = 5
IDS_AT_ONCE: Final = 500
ROWS_AT_ONCE: Final = 5000
STATEMENT_MS: Final = 60_000
# Steps of SQLite's machine between two looks at the clock: a millisecond.
PROGRESS_STEPS: Final = 20_000
QUERY_CANCELED: Final = "57014"
# 1970 in SQLite's days.
JULIAN_1970: Final = 2440587.5
DAY_S: Final = 86400.0


class Utc(sa.types.TypeDecorator[datetime]):
    """A moment; SQLite keeps no zone, so it is UTC there by agreement."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To the database."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """From the database."""
        return value.replace(tzinfo=UTC) if value is not None and dialect.name == "sqlite" else value


METADATA: Final = sa.MetaData()
USAGE: Final = sa.Table(
    "usage",
    METADATA,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("route", sa.String(64), nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("counted_prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("exact", sa.Boolean, nullable=False),
    sa.Column("status", sa.SmallInteger, nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("started_at", Utc, nullable=False),
    sa.Column("ttft_s", sa.Double),
    sa.Column("duration_s", sa.Double, nullable=False),
    sa.Column("gateway_id", sa.String(128), nullable=False),
    sa.Column("engine", sa.String(128), nullable=False),
    sa.Column("lost_engine", sa.String(128), nullable=False),
    sa.Column("lost_prompt_tokens", sa.BigInteger),
    sa.Column("lost_completion_tokens", sa.BigInteger),
    sa.Column("lost_exact", sa.Boolean, nullable=False),
    sa.Column("counted_completion_tokens", sa.BigInteger),
    sa.Index("usage_tenant_started_at", "tenant", "started_at"),
    sa.Index("usage_started_at", "started_at"),
)


def connect(url: str) -> Engine:
    """An engine for a ledger's URL; nothing is connected yet. Raises sqlalchemy.exc.ArgumentError."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        options = f"-c timezone=UTC -c statement_timeout={STATEMENT_MS}"
        return sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_size=1,
            max_overflow=0,
            connect_args={"connect_timeout": CONNECT_S, "options": options},
        )
    engine = sa.create_engine(parsed, connect_args={"timeout": SQLITE_WAIT_S})
    sa.event.listen(engine, "connect", _durable)
    return engine


def missing_file(url: str) -> str | None:
    """The file of a SQLite ledger that is not there; to connect makes it, empty."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None or Path(parsed.database).exists():
        return None
    return parsed.database


def is_begun(connection: Connection) -> bool:
    """Whether a writer has ever made the table here."""
    return sa.inspect(connection).has_table(USAGE.name)


def bound(connection: Connection, seconds: float) -> None:
    """End statements of this connection's transaction that take longer, counted from now; `took_too_long` tells."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"SET LOCAL statement_timeout = {max(1, int(seconds * 1000))}"))
        return
    deadline_s = time.monotonic() + seconds
    raw: Any = connection.connection.driver_connection
    raw.set_progress_handler(lambda: time.monotonic() > deadline_s, PROGRESS_STEPS)


def took_too_long(error: Exception) -> bool:
    """Whether a statement was ended by `bound`."""
    original = getattr(error, "orig", None)
    return getattr(original, "sqlstate", None) == QUERY_CANCELED or str(original) == "interrupted"


def reason(error: Exception) -> str:
    """The driver's own first line; SQLAlchemy's text repeats the statement and its rows."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else ""


def insert(connection: Connection, rows: Sequence[Row]) -> None:
    """Add rows within the caller's transaction; those that are there already stay as they are."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(USAGE).on_conflict_do_nothing(index_elements=[USAGE.c.id])
    connection.execute(statement, [_columns(row) for row in rows])


def totals(
    connection: Connection,
    by: Sequence[str],
    *,
    tenant: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    models: Sequence[str] = (),
    ended_before_s: float | None = None,
    limit: int | None = None,
) -> list[Mapping[str, Any]]:
    """Sums over rows that began in [since, until), grouped and ordered by columns, or `day` (UTC).

    `models`: of these alone, where any are named; `ended_before_s` (since 1970): of those that had ended by then;
    `limit`: so many groups at most.
    """
    names: dict[str, sa.ColumnElement[Any]] = {
        name: (sa.func.date(USAGE.c.started_at) if name == "day" else USAGE.c[name]).label(name) for name in by
    }
    c = USAGE.c
    query = sa.select(
        *names.values(),
        sa.func.count().label("requests"),
        *(_sum(column).label(name) for name, column in _TOKENS.items()),
        _sum(sa.case((c.exact, 0), else_=1)).label("estimated"),
    )
    for condition in (
        None if tenant is None else c.tenant == tenant,
        None if since is None else c.started_at >= since,
        None if until is None else c.started_at < until,
        c.model.in_(models) if models else None,
        None if ended_before_s is None else _began_s(connection) + c.duration_s < ended_before_s,
    ):
        if condition is not None:
            query = query.where(condition)
    query = query.group_by(*names.values()).order_by(*names.values()).limit(limit)
    return [dict(row) for row in connection.execute(query).mappings()]


def _began_s(connection: Connection) -> sa.ColumnElement[float]:
    """When a row's request began, seconds since 1970 with their fractions."""
    if connection.dialect.name == "sqlite":
        return (sa.func.julianday(USAGE.c.started_at, type_=sa.Double) - JULIAN_1970) * DAY_S
    return sa.cast(sa.extract("epoch", USAGE.c.started_at), sa.Double)


def ran(connection: Connection, since_s: float, until_s: float) -> Iterator[Mapping[str, Any]]:
    """Rows of requests that ran on an engine at any time in [since_s, until_s], seconds since 1970, one by one."""
    c = USAGE.c
    # SQLite's seconds are whole ones.
    ended_s = sa.extract("epoch", c.started_at) + c.duration_s
    lost = (c.lost_engine, c.lost_prompt_tokens, c.lost_completion_tokens, c.lost_exact)
    query = sa.select(
        c.engine,
        c.started_at,
        c.duration_s,
        c.counted_prompt_tokens,
        _COMPUTED.label("completion_tokens"),
        c.exact,
        *lost,
    ).where(c.engine != "", c.started_at <= datetime.fromtimestamp(until_s, UTC), ended_s >= since_s - 1)
    found = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query)
    for row in found.mappings():
        yield dict(row)


def computed(connection: Connection) -> dict[str, Tokens]:
    """What each engine computed for the requests that have it in their rows, billed or not."""
    c = USAGE.c
    query = sa.select(c.engine, _sum(c.counted_prompt_tokens), _sum(_COMPUTED)).group_by(c.engine)
    return {engine: Tokens(prompt, completion) for engine, prompt, completion in connection.execute(query)}


def lost(connection: Connection) -> dict[str, Lost]:
    """What attempts of which clients got nothing cost each engine."""
    c = USAGE.c
    tokens = (c.lost_prompt_tokens, c.lost_completion_tokens)
    unknown = sa.or_(*(column.is_(None) for column in tokens))
    query = sa.select(
        c.lost_engine,
        *(_sum(sa.case((c.lost_exact, column), else_=0)) for column in tokens),
        *(_sum(column) for column in tokens),
        _sum(sa.case((unknown, 1), else_=0)),
    )
    rows = connection.execute(query.where(c.lost_engine != "").group_by(c.lost_engine))
    return {
        engine: Lost(Tokens(prompt, completion), Tokens(most_prompt, most_completion), unbounded)
        for engine, prompt, completion, most_prompt, most_completion, unbounded in rows
    }


def known(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Which of these rows are there."""
    found: set[str] = set()
    for start in range(0, len(ids), IDS_AT_ONCE):
        part = ids[start : start + IDS_AT_ONCE]
        found.update(connection.execute(sa.select(USAGE.c.id).where(USAGE.c.id.in_(part))).scalars())
    return found


_COMPUTED: Final = sa.func.coalesce(USAGE.c.counted_completion_tokens, USAGE.c.completion_tokens)
_TOKENS: Final[dict[str, sa.ColumnElement[Any]]] = {
    "prompt_tokens": USAGE.c.prompt_tokens,
    "cached_tokens": USAGE.c.cached_tokens,
    "completion_tokens": USAGE.c.completion_tokens,
    "counted_prompt_tokens": USAGE.c.counted_prompt_tokens,
}


def _sum(column: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    # PostgreSQL sums BIGINT to NUMERIC.
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0), sa.BigInteger)


def _columns(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(row, name) for name in row.__struct_fields__}
    found["started_at"] = datetime.fromtimestamp(row.started_at, UTC)
    return found


def _durable(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # A spill's file goes once its rows are committed: a commit must outlive the machine.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
