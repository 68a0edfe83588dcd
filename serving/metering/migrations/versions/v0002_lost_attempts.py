"""What another attempt at a request cost: the replica that was lost, or was slower, and what it computed.

Rows of before say that there was none. Gateways of before go on writing while this one runs: what they leave out has
defaults.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("usage", sa.Column("lost_engine", sa.String(128), nullable=False, server_default=""))
    op.add_column("usage", sa.Column("lost_prompt_tokens", sa.BigInteger, server_default="0"))
    op.add_column("usage", sa.Column("lost_completion_tokens", sa.BigInteger, server_default="0"))
    op.add_column("usage", sa.Column("lost_exact", sa.Boolean, nullable=False, server_default=sa.true()))


def downgrade() -> None:
    """Drop them."""
    for name in ("lost_exact", "lost_completion_tokens", "lost_prompt_tokens", "lost_engine"):
        op.drop_column("usage", name)
