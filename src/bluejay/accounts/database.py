"""Connections to the database: SQLite in a private file, or PostgreSQL; its migrations; its errors, less its password.

SQLite: WAL, so that readers and the one writer do not wait for each other; a transaction that will write says so when
it begins (BEGIN IMMEDIATE), since one that reads first and then writes is refused where another writer was quicker.
`synchronous` stays FULL: what was committed survives a power cut.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from bluejay.errors import ConfigError, StoreError

FORMS = "sqlite:///path/to/file.db or postgresql://user:password@host:5432/name"
MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_S = 5.0  # a commit takes milliseconds; who waits longer is told
CONNECT_S = 5
UNACKNOWLEDGED_MS = 10_000  # after so long without an answer from its machine, PostgreSQL counts as gone
MIGRATION_LOCK = 0x626C75656A6179  # "bluejay"; PostgreSQL's advisory locks are numbers


def data_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where accounts and usage lie on this machine: bluejay in $XDG_DATA_HOME (~/.local/share)."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bluejay"


def default_path(environ: Mapping[str, str] | None = None) -> Path:
    """The database that is used where no URL names another."""
    return data_folder(environ) / "bluejay.db"


class Database:
    """One database, migrated to this version's tables. Any thread may use it.

    Args:
        url: `FORMS`; None or "" for `default_path()`.
    Raises: ConfigError if the URL is none; StoreError if the database cannot be reached or is of a newer version.
    """

    def __init__(self, url: str | None = None) -> None:
        parsed = _parsed(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.location = _location(parsed)
        self._password = parsed.password
        with self.faults():
            self._engine = _sqlite_engine(parsed) if self.is_sqlite else _postgresql_engine(parsed)
            self._migrate()

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads. Raises: StoreError, whatever goes wrong with the database in it."""
        with self.faults(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes, committed at the end. Raises: as `reading`."""
        with self.faults(), self._engine.execution_options(bluejay_writes=True).begin() as connection:
            yield connection

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn the driver's errors into StoreErrors that name the database and the remedy, and hold no password."""
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            raise self._store_error(error) from None

    def _store_error(self, error: Exception) -> StoreError:
        reason = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        if self._password:
            reason = reason.replace(str(self._password), "***")
        reason = " ".join(reason.split())
        if isinstance(error, OperationalError | InterfaceError | PoolTimeout | OSError):
            remedy = "see that it runs, has room, and may be used; --database or BLUEJAY_DATABASE names another"
            return StoreError(f"the database {self.location} cannot be reached: {reason}; {remedy}")
        return StoreError(f"the database {self.location} refused: {reason}; see that it is one of Bluejay's")

    def _migrate(self) -> None:
        """Bring the tables to this version; of servers that start together one does it, the others wait."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise StoreError(
                    f"the database {self.location} cannot be brought to this version: {error}; if a newer Bluejay made "
                    "it, install that one"
                ) from None


def _parsed(url: str | None) -> URL:
    if not url:
        return URL.create("sqlite", database=str(default_path()))
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        raise ConfigError(f"database is no URL; expected {FORMS}") from None  # it may hold a password: not shown
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        # A password with an @ that is not written %40 would end in the host's name, and in messages.
        if "@" in (parsed.host or ""):
            raise ConfigError("database has an @ in its user or password; write it as %40")
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise ConfigError(f"database is of the kind {parsed.drivername}; expected {FORMS}")
    if not parsed.database or parsed.database.startswith((":memory:", "file:")) or parsed.query:
        raise ConfigError("database names no file; expected sqlite:///path/to/file.db, with four slashes if absolute")
    return parsed


def _location(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{url.host or ''}{port}/{url.database or ''}"


def _sqlite_engine(url: URL) -> Engine:
    path = Path(str(url.database))
    if path.parent == data_folder():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made here, since SQLite would make it readable for all; its -wal and -shm files follow its mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _use_wal(path)
    engine = create_engine(url, connect_args={"timeout": BUSY_S}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN leaves out tables' changes
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("bluejay_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(path: Path) -> None:
    """The file remembers it. SQLite does not wait for others here, however long its time-out: so this does."""
    deadline = time.monotonic() + BUSY_S
    while True:
        connection = sqlite3.connect(path, timeout=BUSY_S)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise OSError(str(error)) from None
        except sqlite3.DatabaseError as error:
            raise OSError(str(error)) from None
        finally:
            connection.close()
        time.sleep(0.01)


def _postgresql_engine(url: URL) -> Engine:
    limits = {"connect_timeout": CONNECT_S, "tcp_user_timeout": UNACKNOWLEDGED_MS}
    return create_engine(
        url,
        connect_args={name: value for name, value in limits.items() if name not in url.query},
        hide_parameters=True,
        pool_pre_ping=True,  # a database that was restarted is found again without an error
        pool_size=8,
        max_overflow=8,
        pool_timeout=BUSY_S,
    )
