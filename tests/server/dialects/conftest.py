"""What tests of several dialects stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest

from bluejay.accounts.store import Store


@dataclass(frozen=True)
class Keyed:
    """A server that asks for keys, and a key of a user, of an administrator, and of a plan of one request a minute."""

    serving: Any
    user: str
    admin: str
    once: str


@pytest.fixture(scope="session")
def keyed(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Keyed]:
    database = f"sqlite:///{tmp_path_factory.mktemp('keyed')}/accounts.db"
    store = Store.open(database)
    store.create_project("birds")
    store.create_project("few", "once")
    user = store.create_key("birds", "user").text
    admin = store.create_key("birds", "admin", scopes=["user", "admin"]).text
    once = store.create_key("few", "once").text
    store.close()
    settings = "[plans.once]\nrequests_per_minute = 1\nrequests_per_day = 1\n"
    with start_server("--database", database, settings=settings) as serving:
        yield Keyed(serving, user, admin, once)
