"""Projects, keys, usage and flagged generations in the database: every query that Bluejay makes is here.

Functions are plain and may wait for the database: a server calls them in threads. What they hand out are `records`.
Every one of them raises StoreError while the database cannot be reached.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from bluejay.accounts import keys
from bluejay.accounts.database import Database
from bluejay.accounts.plans import DEFAULT_PLAN
from bluejay.accounts.records import (
    MAX_NAME_CHARS,
    SCOPES,
    CreatedKey,
    FlaggedRecord,
    KeyRecord,
    ProjectRecord,
    Usage,
    UsageTotal,
    in_utc,
    storable,
)
from bluejay.accounts.tables import api_keys, flagged_generations, projects, usage
from bluejay.errors import InvalidRequest

Group = Literal["project", "key", "model", "day"]
GROUPS: tuple[Group, ...] = ("project", "key", "model", "day")
STATUSES = ("pending", "accepted", "rejected")

TOUCH_S = 60.0  # how exactly "last used" is kept: a write for each request would cost more than the request's own
_PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ID = re.compile(r"[0-9a-f]{24}")


class Store:
    """The database of accounts and usage. Any thread may use it.

    Attributes:
        location: the file, or the URL without user and password.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.location = database.location
        self._touched: dict[str, datetime] = {}
        self._touch_lock = threading.Lock()

    @classmethod
    def open(cls, url: str | None = None) -> Store:
        """Open the database, and bring its tables to this version.

        Args:
            url: sqlite:///path or postgresql://…; None or "" for bluejay/bluejay.db in $XDG_DATA_HOME (~/.local/share).
        Raises: ConfigError if the URL is none; StoreError if the database cannot be reached or is of a newer version.
        """
        return cls(Database(url))

    def close(self) -> None:
        """Close its connections."""
        self._database.close()

    # Projects

    def create_project(self, name: str, plan: str = DEFAULT_PLAN) -> ProjectRecord:
        """Open a project. Whether there is such a plan is for the caller to know.

        Raises: InvalidRequest if the name is none or taken.
        """
        if not _PROJECT_NAME.fullmatch(name) or _ID.fullmatch(name):
            raise InvalidRequest(
                f"project is {name!r}, expected 1 to 63 letters, digits, dots, dashes and underscores, "
                "the first a letter or digit, and not the form of an id",
                "project",
            )
        record = ProjectRecord(_new_id(), name, plan, _now(), None)
        with self._database.writing() as connection:
            adding = self._insert(projects).values(vars(record)).on_conflict_do_nothing().returning(projects.c.id)
            is_new = connection.execute(adding).first() is not None
        if not is_new:
            raise InvalidRequest(f"there is a project {name} already; choose another name", "project")
        return record

    def list_projects(self) -> list[ProjectRecord]:
        """All projects by name, the disabled ones too."""
        with self._database.reading() as connection:
            return [_project(row) for row in connection.execute(select(projects).order_by(projects.c.name))]

    def find_project(self, name_or_id: str) -> ProjectRecord | None:
        """The project of that name or id, None where there is none."""
        with self._database.reading() as connection:
            return _find_project(connection, name_or_id)

    def set_plan(self, name_or_id: str, plan: str) -> ProjectRecord:
        """Raises: InvalidRequest if there is no such project."""
        return self._change_project(name_or_id, {"plan": plan})

    def disable_project(self, name_or_id: str) -> ProjectRecord:
        """Refuse its keys from now on. Raises: InvalidRequest if there is no such project."""
        return self._change_project(name_or_id, {"disabled_at": func.coalesce(projects.c.disabled_at, _now())})

    def enable_project(self, name_or_id: str) -> ProjectRecord:
        """Take its keys again. Raises: InvalidRequest if there is no such project."""
        return self._change_project(name_or_id, {"disabled_at": None})

    def _change_project(self, name_or_id: str, changes: Mapping[str, Any]) -> ProjectRecord:
        with self._database.writing() as connection:
            found = _require_project(connection, name_or_id)
            connection.execute(update(projects).where(projects.c.id == found.id).values(changes))
            return _require_project(connection, found.id)

    # Keys

    def create_key(
        self, project: str, name: str, *, scopes: Sequence[str] = ("user",), expires_at: datetime | None = None
    ) -> CreatedKey:
        """Draw a key for a project, named by its name or id. The key's text is in the answer and nowhere else.

        Raises: InvalidRequest with all that is wrong with the options; or if there is no such project.
        """
        now = _now()
        wrong = []
        if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
            wrong.append(
                f"name is {name[:MAX_NAME_CHARS]!r}, expected 1 to {MAX_NAME_CHARS} characters that can be shown"
            )
        if not scopes or not set(scopes) <= set(SCOPES):
            wrong.append(f"scopes are {', '.join(scopes) or 'none'}, expected some of {', '.join(SCOPES)}")
        if expires_at is not None and in_utc(expires_at, "expires_at") <= now:
            wrong.append(f"expires_at is {expires_at:%Y-%m-%d %H:%M}, which is over")
        if wrong:
            raise InvalidRequest("; ".join(wrong))
        key = keys.new_key()
        with self._database.writing() as connection:
            found = _require_project(connection, project)
            row = {
                "id": _new_id(),
                "project_id": found.id,
                "name": name,
                "prefix": key.prefix,
                "digest": key.digest,
                "scopes": " ".join(scope for scope in SCOPES if scope in scopes),
                "created_at": now,
                "expires_at": expires_at,
            }
            connection.execute(api_keys.insert().values(row))
            (record,) = _keys(connection, api_keys.c.id == row["id"])
        return CreatedKey(key.text, record)

    def list_keys(self, project: str | None = None) -> list[KeyRecord]:
        """All keys, or those of one project, the oldest first; revoked and expired ones too.

        Raises: InvalidRequest if there is no such project.
        """
        with self._database.reading() as connection:
            if project is None:
                return _keys(connection)
            return _keys(connection, api_keys.c.project_id == _require_project(connection, project).id)

    def revoke_key(self, prefix_or_id: str) -> KeyRecord:
        """Refuse a key from now on. It is named by its id, by its first characters as lists show them, or by its text.

        Raises: InvalidRequest if there is none, or if two keys begin so.
        """
        named = storable(prefix_or_id)
        with self._database.writing() as connection:
            is_named = or_(
                api_keys.c.id == named, api_keys.c.prefix == named, api_keys.c.digest == keys.digest_of(named)
            )
            found = _keys(connection, is_named)
            if len(found) != 1:
                # No more than the prefix of what was typed: it may be a key's whole text.
                shown = named[: keys.NUM_PREFIX_CHARS] if named.startswith(keys.START) else named
                there = f"; name one by its id: {', '.join(key.id for key in found)}" if found else ""
                raise InvalidRequest(f"there {'are two keys' if found else 'is no key'} {shown!r}{there}", "key")
            is_it = api_keys.c.id == found[0].id
            revoked_at = func.coalesce(api_keys.c.revoked_at, _now())
            connection.execute(update(api_keys).where(is_it).values(revoked_at=revoked_at))
            return _keys(connection, is_it)[0]

    def find_key(self, digest: str) -> KeyRecord | None:
        """The key with that digest (`keys.digest_of`), None where there is none.

        Whether it is still valid says `KeyRecord.problem`. An unknown and a wrong key are the same case here, and take
        the same path: one look-up, one comparison in constant time.
        """
        with self._database.reading() as connection:
            found = _keys(connection, api_keys.c.digest == digest)
        return found[0] if keys.is_same(digest, found[0].digest if found else None) else None

    def has_keys(self) -> bool:
        """Whether a key was ever made. Revoked and expired ones count: a server is not to open when its last key ends.

        Raises: StoreError.
        """
        with self._database.reading() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None

    def touch_key(self, key_id: str, now: datetime) -> None:
        """Note that the key was used; written once a minute for each key."""
        with self._touch_lock:
            last = self._touched.get(key_id)
            if last is not None and abs((now - last).total_seconds()) < TOUCH_S:
                return
            self._touched[key_id] = now
        older = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at <= now - timedelta(seconds=TOUCH_S))
        with self._database.writing() as connection:
            connection.execute(update(api_keys).where(api_keys.c.id == key_id, older).values(last_used_at=now))

    # Usage

    def record_usage(self, rows: Sequence[Usage]) -> None:
        """Keep rows, all or none of them. A request that is there already stays as it is: rows may come twice."""
        if not rows:
            return
        with self._database.writing() as connection:
            connection.execute(self._insert(usage).on_conflict_do_nothing(), [vars(row) for row in rows])

    def usage_totals(
        self,
        by: Group | None = None,
        *,
        project: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[UsageTotal]:
        """Add up the usage of requests that started in [since, until), by group; in one row if by None.

        Args:
            project: its name or id, None for all.
        Raises: InvalidRequest if there is no such project.
        """
        with self._database.reading() as connection:
            wanted = [] if project is None else [usage.c.project_id == _require_project(connection, project).id]
            if since is not None:
                wanted.append(usage.c.started_at >= since)
            if until is not None:
                wanted.append(usage.c.started_at < until)
            totals = [_total(row) for row in connection.execute(self._totals(by).where(*wanted))]
        return sorted(totals, key=lambda total: total.group or "")  # the databases sort differently

    def usage_since(self, project_id: str, since: datetime) -> UsageTotal:
        """What a project has taken from that time on, as far as the ledger has brought it here."""
        with self._database.reading() as connection:
            of_it = (usage.c.project_id == project_id, usage.c.started_at >= since)
            return _total(connection.execute(self._totals(None).where(*of_it)).one())

    def _totals(self, by: Group | None) -> Any:
        sums = [func.count(usage.c.request_id).label("num_requests")]
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens"):
            sums.append(func.coalesce(func.sum(usage.c[name]), 0).label(name))
        label: ColumnElement[Any]
        if by is None:
            return select(*sums)
        if by == "project":
            label = func.coalesce(projects.c.name, usage.c.project_id)
            source = usage.outerjoin(projects, projects.c.id == usage.c.project_id)
            groups = [label, usage.c.project_id]
        elif by == "key":
            label = func.coalesce(api_keys.c.prefix + "… " + api_keys.c.name, usage.c.key_id)
            source = usage.outerjoin(api_keys, api_keys.c.id == usage.c.key_id)
            groups = [label, usage.c.key_id]
        else:
            label = usage.c.served_model if by == "model" else self._day()
            return select(label.label("group"), *sums).group_by(label)
        return select(label.label("group"), *sums).select_from(source).group_by(*groups)

    def _day(self) -> ColumnElement[str]:
        """2026-01-31, in UTC; the zone of PostgreSQL's session is not to matter."""
        if self._database.is_sqlite:
            return func.date(usage.c.started_at)
        return func.to_char(func.timezone("UTC", usage.c.started_at), "YYYY-MM-DD")

    # Flagged generations

    def add_flagged(
        self, *, request_id: str, project_id: str | None, model: str, rule: str, action: str, prompt: str, text: str
    ) -> FlaggedRecord:
        """Keep a generation for review."""
        row = {
            "request_id": storable(request_id, MAX_NAME_CHARS),
            "project_id": project_id,
            "model": storable(model, MAX_NAME_CHARS),
            "rule": storable(rule, MAX_NAME_CHARS),
            "action": action,
            "prompt": storable(prompt),
            "text": storable(text),
            "status": "pending",
            "created_at": _now(),
        }
        with self._database.writing() as connection:
            added = flagged_generations.insert().values(row).returning(*flagged_generations.c)
            return FlaggedRecord(**connection.execute(added).one()._mapping)

    def list_flagged(self, status: str | None = None, *, after: int = 0, limit: int = 100) -> list[FlaggedRecord]:
        """The first `limit` generations of that status (any, if None) whose ids come after `after`."""
        if status is not None and status not in STATUSES:
            raise InvalidRequest(f"status is {status!r}, expected one of {', '.join(STATUSES)}", "status")
        wanted = select(flagged_generations).where(flagged_generations.c.id > after)
        if status is not None:
            wanted = wanted.where(flagged_generations.c.status == status)
        with self._database.reading() as connection:
            rows = connection.execute(wanted.order_by(flagged_generations.c.id).limit(limit))
            return [FlaggedRecord(**row._mapping) for row in rows]

    def review_flagged(
        self, flagged_id: int, verdict: Literal["accepted", "rejected"], *, reviewer: str, note: str | None = None
    ) -> FlaggedRecord:
        """Accept or reject a generation; a second verdict takes the first one's place.

        Raises: InvalidRequest if there is none of that id, or no such verdict.
        """
        if verdict not in STATUSES[1:]:
            raise InvalidRequest(f"verdict is {verdict!r}, expected accepted or rejected", "verdict")
        changes = {
            "status": verdict,
            "reviewed_at": _now(),
            "reviewer": storable(reviewer, MAX_NAME_CHARS),
            "note": None if note is None else storable(note),
        }
        changed = update(flagged_generations).where(flagged_generations.c.id == flagged_id).values(changes)
        with self._database.writing() as connection:
            row = connection.execute(changed.returning(*flagged_generations.c)).first()
        if row is None:
            raise InvalidRequest(f"there is no flagged generation {flagged_id}", "id")
        return FlaggedRecord(**row._mapping)

    def export_flagged(self, status: str | None = None) -> Iterator[FlaggedRecord]:
        """All generations of that status by id, read page by page."""
        for page in self.flagged_pages(status):
            yield from page

    def flagged_pages(self, status: str | None = None) -> Iterator[list[FlaggedRecord]]:
        """The same as pages, none of them empty, each read when it is asked for."""
        after = 0
        while page := self.list_flagged(status, after=after, limit=500):
            yield page
            after = page[-1].id

    def _insert(self, table: Any) -> Any:
        """An INSERT that knows ON CONFLICT: each of the two databases has its own."""
        return sqlite.insert(table) if self._database.is_sqlite else postgresql.insert(table)


def _now() -> datetime:
    return datetime.now(UTC)


def _new_id() -> str:
    return secrets.token_hex(12)


def _project(row: Row[Any]) -> ProjectRecord:
    return ProjectRecord(**row._mapping)


def _find_project(connection: Connection, name_or_id: str) -> ProjectRecord | None:
    named = storable(name_or_id)
    row = connection.execute(select(projects).where(or_(projects.c.id == named, projects.c.name == named))).first()
    return None if row is None else _project(row)


def _require_project(connection: Connection, name_or_id: str) -> ProjectRecord:
    found = _find_project(connection, name_or_id)
    if found is None:
        raise InvalidRequest(
            f"there is no project {name_or_id[:MAX_NAME_CHARS]!r}; bluejay projects list shows them", "project"
        )
    return found


def _keys(connection: Connection, *wanted: ColumnElement[bool]) -> list[KeyRecord]:
    """Keys with their projects, the oldest first."""
    of_project = [column.label(f"of_{column.name}") for column in projects.c]
    joined = select(*api_keys.c, *of_project).join_from(api_keys, projects).where(*wanted)
    found = []
    for row in connection.execute(joined.order_by(api_keys.c.created_at, api_keys.c.id)):
        values = dict(row._mapping)
        project = ProjectRecord(**{column.name: values.pop(f"of_{column.name}") for column in projects.c})
        del values["project_id"]
        found.append(KeyRecord(**values | {"project": project, "scopes": tuple(values["scopes"].split())}))
    return found


def _total(row: Row[Any]) -> UsageTotal:
    counts = [
        int(row._mapping[name]) for name in ("num_requests", "prompt_tokens", "cached_tokens", "generated_tokens")
    ]
    return UsageTotal(row._mapping.get("group", ""), *counts)
