"""Usage, money, and how far both are counted: the first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """To this release."""
    kinds = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
    op.create_table(
        "usage",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=256), nullable=False),
        *(sa.Column(kind, sa.BigInteger(), nullable=False) for kind in kinds),
        sa.PrimaryKeyConstraint("day", "key", "model"),
    )
    op.create_table(
        "costs",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("usd", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("day"),
    )
    marks = op.create_table(
        "marks",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.bulk_insert(marks, [{"name": "turn", "value": ""}])
