"""Alembic's entry: it runs on the connection that `serving.metering.schema` opened, in its transaction."""

from __future__ import annotations

from alembic import context

from serving.metering.schema import VERSIONS
from serving.metering.store import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # The database may hold other programs' tables, with versions of their own.
    version_table=VERSIONS,
    transactional_ddl=False,
)
context.run_migrations()
