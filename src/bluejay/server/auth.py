"""From a request's headers to who asks: keys, scopes, plans, and a server that is open on the loopback."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol
from urllib.parse import urlsplit

from bluejay.accounts.keys import digest_of, is_same
from bluejay.accounts.plans import Plan
from bluejay.accounts.records import KeyRecord
from bluejay.errors import Forbidden, StoreError, Unauthenticated
from bluejay.server.options import is_loopback
from bluejay.server.threads import Threads

REMEMBERED_S = 5.0  # a revoked key works so long, at most; a database that is away does not stop the others at once
MAX_REMEMBERED = 4096
MAX_AWAY_S = 600.0  # a key that was right is taken for so long while the database cannot be asked
PATIENCE_S = 0.25  # a database that thinks for longer counts as away, for keys that were right
NUM_THREADS = 4  # that look keys up; a database that hangs holds these, and nobody else's
MAX_LOOKUPS = 256  # that wait or run; strangers with keys that nobody knows could send any number
LOOKUP_S = 5.0  # a database that thinks for longer counts as away
OPEN_PLAN = Plan("open", None, None, None, None, None)


class Access(StrEnum):
    """What a route asks of who calls it."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        project_id, key_id: None on a server without keys.
        name: for logs: how the key begins.
        is_admin: whether routes of the administrator are open.
        key_name: what the key is called; "" without one.
    """

    project_id: str | None
    key_id: str | None
    name: str
    plan: Plan
    is_admin: bool
    key_name: str = ""

    @property
    def reviewer(self) -> str:
        """Under whose name something is noted."""
        return self.key_name or self.name


class Keys(Protocol):
    """What is asked of the store."""

    def find_key(self, digest: str) -> KeyRecord | None: ...
    def touch_key(self, key_id: str, now: datetime) -> None: ...


NOBODY = Principal(None, None, "nobody", OPEN_PLAN, is_admin=False)


class Door:
    """Lets in who may come in.

    Args:
        keys: where keys are looked up; None on an open server, which asks for none.
        plans: by name.
        open_to_admin: whether an open server lets everybody administrate: only where the loopback alone reaches it.
    """

    def __init__(self, keys: Keys | None, plans: Mapping[str, Plan], *, open_to_admin: bool = False) -> None:
        self._keys = keys
        self.plans = plans
        self._open_to_admin = open_to_admin
        self._known: OrderedDict[str, tuple[float, KeyRecord | None]] = OrderedDict()
        self._num_forgotten = 0
        self._lookups: dict[str, _Lookup] = {}
        self._threads = Threads("the database", NUM_THREADS, MAX_LOOKUPS)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._keys is None

    async def admit(self, access: Access, headers: Mapping[str, str]) -> Principal:
        """Who asks, if they may. Raises: Unauthenticated, Forbidden, StoreError, Overloaded."""
        if access is Access.PUBLIC:
            return NOBODY
        if self._keys is None:
            if self._open_to_admin:
                _check_page(headers)
            principal = Principal(None, None, "open", OPEN_PLAN, self._open_to_admin)
        else:
            principal = await self._who(headers)
        if access is Access.ADMIN and not principal.is_admin:
            raise Forbidden("this needs a key of an administrator: bluejay keys create NAME --admin")
        return principal

    async def _who(self, headers: Mapping[str, str]) -> Principal:
        text = key_in(headers)
        if not text:
            raise Unauthenticated(
                "no key was sent; send one as 'Authorization: Bearer KEY', 'Authorization: Api-Key KEY' or "
                "'X-API-Key: KEY'"
            )
        digest = digest_of(text)
        record = await self._find(digest)
        # An unknown key walks the same way as a wrong one.
        same = is_same(digest, record.digest if record is not None else None)
        if not same or record is None:
            raise Unauthenticated("the key is not known here")
        if (problem := record.problem(datetime.now(UTC))) is not None:
            raise Unauthenticated(problem)
        plan = self.plans.get(record.project.plan)
        if plan is None:
            raise Forbidden(
                f"the project's plan {record.project.plan} is not one of this server's; its operator can set it"
            )
        return Principal(record.project.id, record.id, record.prefix, plan, "admin" in record.scopes, record.name)

    def forget(self, digest: str | None = None) -> None:
        """Ask the store again for a key that was revoked; for all keys, where a project was changed."""
        self._num_forgotten += 1
        if digest is None:
            self._known.clear()
        else:
            self._known.pop(digest, None)

    async def _find(self, digest: str) -> KeyRecord | None:
        now = time.monotonic()
        known_s, record = self._known.get(digest, (-MAX_AWAY_S, None))
        if now - known_s <= REMEMBERED_S:
            return record
        num_forgotten = self._num_forgotten
        if (lookup := self._lookups.get(digest)) is None:  # whoever comes with the same key waits for the same answer
            lookup = self._lookups[digest] = _Lookup(asyncio.create_task(self._look_up(digest)), now)
            lookup.task.add_done_callback(lambda _: lookup.succeeded)  # asked here, if all who waited have gone
        was_right = record is not None and now - known_s <= MAX_AWAY_S
        await asyncio.wait([lookup.task], timeout=max(0.0, lookup.began_s + PATIENCE_S - now) if was_right else None)
        if was_right and num_forgotten == self._num_forgotten and not lookup.succeeded:
            return record
        return await asyncio.shield(lookup.task)

    async def _look_up(self, digest: str) -> KeyRecord | None:
        """Ask the store, and remember what it says. Raises: StoreError, Overloaded."""
        try:
            num_forgotten = -1
            while num_forgotten != self._num_forgotten:  # what is found meanwhile may be from before
                num_forgotten = self._num_forgotten
                now = time.monotonic()
                found = await self._threads.run(self._ask_store, digest, within_s=LOOKUP_S)
            self._known[digest] = (now, found)
            self._known.move_to_end(digest)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
            return found
        except TimeoutError:
            raise StoreError(f"the database did not say within {LOOKUP_S:g} s who has a key") from None
        finally:
            del self._lookups[digest]

    def _ask_store(self, digest: str) -> KeyRecord | None:
        assert self._keys is not None
        record = self._keys.find_key(digest)
        if record is not None:
            with suppress(StoreError):  # a database that only reads opens the door all the same
                self._keys.touch_key(record.id, datetime.now(UTC))
        return record


@dataclass(frozen=True)
class _Lookup:
    """A question to the store, for everybody who shows the same key meanwhile."""

    task: asyncio.Task[KeyRecord | None]
    began_s: float

    @property
    def succeeded(self) -> bool:
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None


def key_in(headers: Mapping[str, str]) -> str:
    """The key that a request shows, "" where it shows none."""
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "api-key") and rest.strip():
        return rest.strip()
    return headers.get("x-api-key", "").strip()


def _check_page(headers: Mapping[str, str]) -> None:
    """An open server is for programs of this machine, not for pages of strangers in its browser.

    Raises: Forbidden for a request that a page sent, or that names another host.
    """
    host = _host_of(f"//{headers.get('host', 'localhost')}")
    origin = headers.get("origin")
    if not is_loopback(host):
        raise Forbidden(
            f"a server without keys answers to localhost alone, not to {host[:100]!r}; make a key for others"
        )
    if origin is not None and not is_loopback(_host_of(origin)):
        raise Forbidden("a server without keys does not answer to pages of other hosts; make a key for them")


def _host_of(url: str) -> str:
    """The host in a URL; "" where there is none, or the URL is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
