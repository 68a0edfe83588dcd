"""What an engine wrote of an answer that never began, and that nobody is billed for.

Empty: as billed, also in rows of before and of gateways of before.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column("usage", sa.Column("counted_completion_tokens", sa.BigInteger))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("usage", "counted_completion_tokens")
