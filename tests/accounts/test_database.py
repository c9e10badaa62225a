import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bluejay.accounts.database import Database, data_folder
from bluejay.accounts.store import Store
from bluejay.accounts.tables import metadata
from bluejay.errors import ConfigError, StoreError


def test_migrations_make_the_tables_that_the_code_knows(url: str) -> None:
    database = Database(url)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_opening_again_changes_nothing(url: str) -> None:
    first = Store.open(url)
    made = first.create_project("default")
    second = Store.open(url)
    assert second.list_projects() == [made]
    first.close()
    second.close()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_servers_may_open_a_new_database_at_the_same_time(url: str, kind: str) -> None:
    if kind == "processes":
        code = "import sys; from bluejay.accounts.store import Store; Store.open(sys.argv[1]).close()"
        started = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(2)]
        assert [(done.communicate(timeout=60)[1], done.returncode) for done in started] == [(b"", 0)] * 2
        return
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            Store.open(url).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_default_is_a_private_file_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    old = os.umask(0o022)
    try:
        store = Store.open(None)
    finally:
        os.umask(old)
    store.create_project("default")
    assert store.location == str(tmp_path / "data" / "bluejay" / "bluejay.db")
    assert stat.S_IMODE(data_folder().stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in data_folder().iterdir()}
    assert files == {"bluejay.db": 0o600, "bluejay.db-wal": 0o600, "bluejay.db-shm": 0o600}
    store.close()


def test_sqlite_is_set_up_for_servers(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.db")
    with database.reading() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "foreign_keys")
        }
        found["busy_timeout"] = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
        found["synchronous"] = connection.exec_driver_sql("PRAGMA synchronous").scalar()
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 5000, "synchronous": 2}
    database.close()


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("accounts.db", "database is no URL; expected sqlite:///path/to/file.db or postgresql://"),
        ("mysql://u:secret@h/d", "database is of the kind mysql; expected sqlite"),
        ("sqlite://", "database names no file"),
        ("sqlite:///:memory:", "database names no file"),
        ("sqlite:///a.db?mode=ro", "database names no file"),
        ("postgresql://u:sec@ret@h/d", "write it as %40"),
        ("postgresql://u:secret@h:port/d", "database is no URL"),
    ],
)
def test_urls_that_are_none(url: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Store.open(url)
    assert part in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "ret@h" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_named_without_its_password() -> None:
    with pytest.raises(StoreError) as caught:
        Store.open("postgresql://me:secret-word@127.0.0.1:1/accounts?connect_timeout=2")
    assert "the database postgresql://127.0.0.1:1/accounts cannot be reached" in str(caught.value)
    assert "BLUEJAY_DATABASE names another" in str(caught.value)
    assert "secret-word" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be reached: .*No such file"):
        Store.open(f"sqlite:///{tmp_path}/none/a.db")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("Once upon a time there was a file that was no database. " * 30)
    with pytest.raises(StoreError, match="file is not a database"):
        Store.open(f"sqlite:///{tmp_path}/a.db")


def test_a_database_of_a_newer_version(tmp_path: Path) -> None:
    Store.open(f"sqlite:///{tmp_path}/a.db").close()
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="if a newer Bluejay made it, install that one"):
        Store.open(f"sqlite:///{tmp_path}/a.db")


def test_an_error_shows_no_values(sqlite_store: Store, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "accounts.db")
    connection.execute("DROP TABLE flagged_generations")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError) as caught:
        sqlite_store.add_flagged(
            request_id="r", project_id=None, model="m", rule="r", action="flag", prompt="my secret", text="x"
        )
    assert "no such table: flagged_generations" in str(caught.value)
    assert "my secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_room_does_without_torch() -> None:
    code = (
        "import sys; from bluejay.accounts import keys, plans, store, ledger; "
        "sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
