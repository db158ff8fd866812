"""what users said of hits; standing queries and their events"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("collection_id", sa.String(), nullable=False),
        sa.Column("video_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("statement", sa.String(), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("start", sa.Float()),
        sa.Column("end", sa.Float()),
        sa.Column("relevant", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.Column("updated_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_feedback_tenant_id")),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name=op.f("fk_feedback_collection_id")),
        sa.ForeignKeyConstraint(["video_id"], ["videos.id"], name=op.f("fk_feedback_video_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feedback")),
        sa.UniqueConstraint("collection_id", "statement", name=op.f("uq_feedback_collection_id_statement")),
    )
    op.create_index(op.f("ix_feedback_video_id"), "feedback", ["video_id"])
    op.create_index("ix_feedback_collection_id_id", "feedback", ["collection_id", "id"])
    op.create_table(
        "alerts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("collection_id", sa.String(), nullable=False),
        sa.Column("name", sa.String()),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("min_score", sa.Float()),
        sa.Column("webhook", sa.String()),
        sa.Column("events", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("encoder", sa.String()),
        sa.Column("vector", sa.LargeBinary()),
        sa.Column("failing_event", sa.String()),
        sa.Column("failing_until", sa.String()),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_alerts_tenant_id")),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name=op.f("fk_alerts_collection_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alerts")),
    )
    op.create_index(op.f("ix_alerts_tenant_id"), "alerts", ["tenant_id"])
    op.create_index("ix_alerts_collection_id_id", "alerts", ["collection_id", "id"])
    op.create_table(
        "alert_events",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("alert_id", sa.String(), nullable=False),
        sa.Column("video_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("start", sa.Float(), nullable=False),
        sa.Column("end", sa.Float(), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("generation_id", sa.String(), nullable=False),
        sa.Column("delivery", sa.String()),
        sa.Column("error", sa.JSON()),
        sa.Column("task_id", sa.String()),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.Column("delivered_at", sa.String()),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_alert_events_tenant_id")),
        sa.ForeignKeyConstraint(["alert_id"], ["alerts.id"], name=op.f("fk_alert_events_alert_id")),
        sa.ForeignKeyConstraint(["video_id"], ["videos.id"], name=op.f("fk_alert_events_video_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alert_events")),
        sa.UniqueConstraint("alert_id", "video_id", name=op.f("uq_alert_events_alert_id_video_id")),
        sa.UniqueConstraint("alert_id", "number", name=op.f("uq_alert_events_alert_id_number")),
    )
    op.create_index(op.f("ix_alert_events_video_id"), "alert_events", ["video_id"])
    op.create_index(op.f("ix_alert_events_created_at"), "alert_events", ["created_at"])


def downgrade() -> None:
    for table in ("alert_events", "alerts", "feedback"):
        op.drop_table(table)
