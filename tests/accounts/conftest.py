"""Both databases: SQLite in a file, and a real PostgreSQL where Debian's package is there."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bluejay.accounts.store import Store


class PostgreSQL:
    """A server on a free port of loopback; as root it runs as another user, since it refuses to run as root."""

    def __init__(self, bin_folder: Path, folder: Path) -> None:
        self._bin = bin_folder
        self._data = folder / "data"
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "bluejay", "-E", "UTF8", "--locale=C", "-N")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = [f"-p{self.port}", "-clisten_addresses=127.0.0.1", "-cunix_socket_directories=", "-cfsync=off"]
        command = [str(self._bin / "postgres"), "-D", str(self._data), *options]
        with (self._data / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._as_user())
        self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-t", "30", until_done=True)

    def stop(self) -> None:
        """At once, as a machine that goes away: clients lose their connections."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT, PostgreSQL's immediate shutdown
            self._process.wait(30)
            self._process = None

    def url(self) -> str:
        return f"postgresql://bluejay:secret-word@127.0.0.1:{self.port}/postgres"

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _as_user(self) -> dict[str, object]:
        user = self._user
        return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": "/"}

    def _run(self, name: str, *arguments: str, until_done: bool = False) -> None:
        for _ in range(300 if until_done else 1):
            command = [str(self._bin / name), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, **self._as_user())
            if done.returncode == 0:
                return
            time.sleep(0.05 if until_done else 0)
        raise AssertionError(f"{name}: {done.stdout}{done.stderr}")


def _unprivileged_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A running PostgreSQL; who stops it starts it again."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        pytest.skip("Debian's package postgresql is not installed")
    # Not in pytest's own folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="bluejay-postgresql-"))
    try:
        server = PostgreSQL(found[-1].parent, folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgresql_url(postgresql: PostgreSQL) -> str:
    """An empty database: always the same, since to make and remove them takes PostgreSQL longer than the tests."""
    others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
    postgresql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    postgresql.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return postgresql.url()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/accounts.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """A store in each kind of database."""
    opened = Store.open(url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/accounts.db")
    yield opened
    opened.close()
