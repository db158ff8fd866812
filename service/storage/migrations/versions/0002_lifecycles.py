"""deleted tenants and adapters, retired generations, attempts and revisions of tasks"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("deleted_at", sa.String()))
    op.add_column("adapters", sa.Column("deleted_at", sa.String()))
    op.add_column("generations", sa.Column("retired_at", sa.String()))
    op.add_column("tasks", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("revision", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("tasks", "revision")
    op.drop_column("tasks", "attempts")
    op.drop_column("generations", "retired_at")
    op.drop_column("adapters", "deleted_at")
    op.drop_column("tenants", "deleted_at")
