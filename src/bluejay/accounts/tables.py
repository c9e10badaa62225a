"""The tables. A change here needs a migration beside it: a test compares the two.

    projects ──< api_keys           a key belongs to a project
    usage                           one row for each request; ids of project and key, but no foreign keys
    flagged_generations             what a filter flagged, for review

Usage refers loosely on purpose: a journal may be replayed into another database than the one whose keys it was written
under, and a row that tells what happened is not to be refused for that.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)


class Utc(TypeDecorator[datetime]):
    """A moment, in UTC with its zone on this side; SQLite, which knows no zones, keeps it without."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Raises: ValueError if the time has no zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Names for constraints, so that a later migration can speak of them in either database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(24), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("plan", String(63), nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("disabled_at", Utc),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(24), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("prefix", String(16), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("scopes", String(63), nullable=False),  # with spaces between
    Column("created_at", Utc, nullable=False),
    Column("expires_at", Utc),
    Column("revoked_at", Utc),
    Column("last_used_at", Utc),
)

usage = Table(
    "usage",
    metadata,
    Column("request_id", String(200), primary_key=True),
    Column("project_id", String(200)),
    Column("key_id", String(200)),
    Column("dialect", String(200), nullable=False),
    Column("model", String(200), nullable=False),
    Column("served_model", String(200), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("started_at", Utc, nullable=False),
    Column("ended_at", Utc, nullable=False),
    Column("first_token_s", Float),
    Column("outcome", String(16), nullable=False),
    Index(None, "started_at"),
    Index(None, "project_id", "started_at"),
)

flagged_generations = Table(
    "flagged_generations",
    metadata,
    # SQLite counts up by itself for INTEGER alone; AUTOINCREMENT keeps an id from ever meaning another row.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("request_id", String(200), nullable=False),
    Column("project_id", String(200)),
    Column("model", String(200), nullable=False),
    Column("rule", String(200), nullable=False),
    Column("action", String(16), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("reviewed_at", Utc),
    Column("reviewer", String(200)),
    Column("note", Text),
    Index(None, "status", "id"),
    sqlite_autoincrement=True,
)
