"""Projects, keys, usage and flagged generations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# The types are written out, not taken from tables.py: that file goes on to change, a version does not.
_TIME = sa.DateTime(timezone=True)
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """From nothing."""
    _projects_and_keys()
    _usage()
    _flagged_generations()


def _projects_and_keys() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(24), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("plan", sa.String(63), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("disabled_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("name", name="uq_projects_name"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(24), nullable=False),
        sa.Column("project_id", sa.String(24), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(63), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("revoked_at", _TIME),
        sa.Column("last_used_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_api_keys_project_id"),
    )
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])


def _usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("project_id", sa.String(200)),
        sa.Column("key_id", sa.String(200)),
        sa.Column("dialect", sa.String(200), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("served_model", sa.String(200), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("generated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME, nullable=False),
        sa.Column("first_token_s", sa.Float()),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
    )
    op.create_index("ix_usage_started_at", "usage", ["started_at"])
    op.create_index("ix_usage_project_id_started_at", "usage", ["project_id", "started_at"])


def _flagged_generations() -> None:
    op.create_table(
        "flagged_generations",
        sa.Column("id", _ID, nullable=False, autoincrement=True),
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("project_id", sa.String(200)),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("rule", sa.String(200), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("reviewed_at", _TIME),
        sa.Column("reviewer", sa.String(200)),
        sa.Column("note", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_flagged_generations"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_flagged_generations_status_id", "flagged_generations", ["status", "id"])
