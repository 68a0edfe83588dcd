"""Brings the ledger's table to the version that this program knows, by Alembic; imported by the writer alone."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from serving.metering.store import MIGRATION_LOCK

MIGRATIONS = Path(__file__).with_name("migrations")
VERSIONS = "galerne_ledger_version"
# The newest of them; a test holds it against the modules.
HEAD = "0003"


def upgrade(engine: Engine) -> None:
    """Run what is missing, in one transaction; a gateway that comes at the same time waits.

    A table that a newer gateway has brought further is left as it is: what versions add has defaults.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:number)"), {"number": MIGRATION_LOCK})
        number = sa.column("version_num", sa.String)
        newest = sa.select(sa.func.max(number)).select_from(sa.table(VERSIONS, number))
        if sa.inspect(connection).has_table(VERSIONS) and (connection.scalar(newest) or "") >= HEAD:
            return
        # Half a second of a processor, for once in a ledger's life.
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
