import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from bluejay.accounts import keys
from bluejay.accounts.records import UsageTotal
from bluejay.accounts.store import Store
from bluejay.errors import InvalidRequest, StoreError

from .rows import NOON, usage


@contextmanager
def refused(part: str) -> Iterator[None]:
    with pytest.raises(InvalidRequest) as caught:
        yield
    assert part in str(caught.value)


# Projects


def test_projects_are_made_found_and_listed(store: Store) -> None:
    beta, alpha = store.create_project("beta"), store.create_project("alpha", "premium")
    assert store.list_projects() == [alpha, beta]
    assert store.find_project("beta") == store.find_project(beta.id) == beta
    assert (beta.plan, alpha.plan, beta.disabled_at) == ("free", "premium", None)
    assert len(beta.id) == 24
    assert abs(datetime.now(UTC) - beta.created_at) < timedelta(minutes=1)
    for name in ("gamma", "", "\0", "\ud800", "x" * 10_000):
        assert store.find_project(name) is None


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "ä", "a" * 64, "0" * 24, "a\n"])
def test_names_of_projects_are_plain(sqlite_store: Store, name: str) -> None:
    with refused("expected 1 to 63 letters"):
        sqlite_store.create_project(name)


def test_a_name_is_taken_once(store: Store) -> None:
    store.create_project("default")
    with refused("there is a project default already"):
        store.create_project("default")


def test_projects_change(store: Store) -> None:
    made = store.create_project("default")
    assert store.set_plan("default", "developer").plan == "developer"
    disabled = store.disable_project(made.id)
    assert disabled.disabled_at is not None
    assert store.disable_project("default") == disabled
    assert store.enable_project("default").disabled_at is None
    for change in (store.disable_project, store.enable_project, lambda name: store.set_plan(name, "free")):
        with refused("there is no project 'other'"):
            change("other")


# Keys


def test_a_key_is_shown_once_and_found_by_its_digest(store: Store) -> None:
    project = store.create_project("default")
    assert not store.has_keys()
    created = store.create_key("default", "laptop", scopes=("admin", "user"))
    assert store.has_keys()
    record = created.record
    assert store.find_key(keys.digest_of(created.text)) == record
    assert (record.project, record.name, record.scopes) == (project, "laptop", ("user", "admin"))
    assert created.text not in repr(store.list_keys())
    assert created.text.startswith(record.prefix)
    for wrong in (created.text[:-1], created.text.swapcase(), "", "\0", "\ud800"):
        assert store.find_key(keys.digest_of(wrong)) is None


def test_keys_are_listed_by_project(store: Store) -> None:
    store.create_project("a")
    store.create_project("b")
    first, second = store.create_key("a", "one").record, store.create_key("b", "two").record
    assert store.list_keys() == [first, second]
    assert store.list_keys("b") == [second]
    with refused("there is no project 'c'"):
        store.list_keys("c")


def test_all_that_is_wrong_with_a_key_is_said_at_once(sqlite_store: Store) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sqlite_store.create_key("default", "a\nb", scopes=("root",), expires_at=NOON - timedelta(days=400))
    for part in ("name is 'a\\nb'", "scopes are root, expected some of user, admin", "which is over"):
        assert part in str(caught.value)
    with refused("there is no project 'default'"):
        sqlite_store.create_key("default", "name")


@pytest.mark.parametrize("named_by", ["id", "prefix", "text"])
def test_a_revoked_key_has_a_problem(store: Store, named_by: str) -> None:
    store.create_project("default")
    created = store.create_key("default", "laptop")
    other = store.create_key("default", "phone").record
    name = created.text if named_by == "text" else getattr(created.record, named_by)
    revoked = store.revoke_key(name)
    assert revoked.id == created.record.id
    assert "was revoked" in (revoked.problem(datetime.now(UTC)) or "")
    assert store.revoke_key(name) == revoked
    assert store.list_keys() == [revoked, other]
    assert store.has_keys()


def test_revoking_what_is_not_there_shows_no_key(store: Store) -> None:
    text = keys.new_key().text
    with pytest.raises(InvalidRequest) as caught:
        store.revoke_key(text)
    assert f"there is no key '{text[:11]}'" in str(caught.value)
    assert text not in str(caught.value)


def test_two_keys_that_begin_alike_are_told_apart_by_id(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sqlite_store.create_project("default")
    drawn = iter(f"bj-samesame{number}" for number in range(2))
    monkeypatch.setattr(keys.secrets, "token_urlsafe", lambda size: next(drawn)[3:])
    records = [sqlite_store.create_key("default", "twin").record for _ in range(2)]
    with refused(f"there are two keys 'bj-samesame'; name one by its id: {records[0].id}, {records[1].id}"):
        sqlite_store.revoke_key("bj-samesame")


def test_expiry_and_disabling_are_seen_at_once(store: Store) -> None:
    store.create_project("default")
    now = datetime.now(UTC)
    created = store.create_key("default", "laptop", expires_at=now + timedelta(hours=1))
    digest = created.record.digest
    assert created.record.problem(now) is None
    assert "expired" in (created.record.problem(now + timedelta(hours=1)) or "")
    store.disable_project("default")
    found = store.find_key(digest)
    assert found is not None
    assert "disabled" in (found.problem(now) or "")


def test_last_use_is_kept_to_the_minute(store: Store) -> None:
    store.create_project("default")
    key = store.create_key("default", "laptop").record

    def last_used() -> datetime | None:
        return store.list_keys()[0].last_used_at

    for seconds, expected in ((0, 0), (59, 0), (61, 61), (100, 61), (200, 200)):
        store.touch_key(key.id, NOON + timedelta(seconds=seconds))
        assert last_used() == NOON + timedelta(seconds=expected)


def test_unknown_and_wrong_keys_take_the_same_path(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sqlite_store.create_project("default")
    created = sqlite_store.create_key("default", "laptop")
    compared: list[tuple[str, str | None]] = []
    monkeypatch.setattr(keys, "is_same", lambda digest, kept: compared.append((digest, kept)))
    for text in ("", "nothing like a key", created.text[:-1] + "?", keys.new_key().text, created.text):
        sqlite_store.find_key(keys.digest_of(text))
    assert len(compared) == 5
    assert [kept for _, kept in compared] == [None] * 4 + [created.record.digest]


# Usage


def test_usage_is_taken_once(store: Store) -> None:
    store.record_usage([])
    rows = [usage(f"r{number}", generated_tokens=number) for number in range(1000)]
    store.record_usage(rows)
    store.record_usage([*rows[500:], usage("r0", generated_tokens=77), usage("new"), usage("new")])
    assert store.usage_totals() == [UsageTotal("", 1001, 3003, 1001, sum(range(1000)) + 5)]


def test_all_rows_are_kept_or_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = usage("b")
    object.__setattr__(broken, "prompt_tokens", None)
    with pytest.raises(StoreError, match="refused"):
        store.record_usage([usage("a"), broken])
    assert store.usage_totals()[0].num_requests == 0


def test_usage_by_project_key_model_and_day(store: Store) -> None:
    alpha, beta = store.create_project("alpha"), store.create_project("beta")
    key = store.create_key("alpha", "laptop").record
    store.record_usage(
        [
            usage("1", project_id=alpha.id, key_id=key.id, served_model="x"),
            usage("2", project_id=alpha.id, key_id="gone", served_model="y", started_at=NOON + timedelta(hours=13)),
            usage("3", project_id=beta.id, served_model="y", started_at=NOON + timedelta(hours=12)),
            usage("4", served_model="y", generated_tokens=0, cached_tokens=0),
        ]
    )

    def groups(*arguments: object, **options: object) -> dict[str | None, int]:
        return {total.group: total.num_tokens for total in store.usage_totals(*arguments, **options)}  # type: ignore[arg-type]

    assert groups("project") == {None: 3, "alpha": 16, "beta": 8}
    assert groups("key") == {None: 11, f"{key.prefix}… laptop": 8, "gone": 8}
    assert groups("model") == {"x": 8, "y": 19}
    assert groups("day") == {"2026-01-31": 11, "2026-02-01": 16}
    assert groups("day", project="alpha") == groups("day", project=alpha.id) == {"2026-01-31": 8, "2026-02-01": 8}
    assert groups("model", since=NOON + timedelta(hours=12)) == {"y": 16}
    assert groups("model", until=NOON + timedelta(hours=12)) == {"x": 8, "y": 3}
    assert groups("model", project="beta", until=NOON) == {}
    assert groups(project="beta", until=NOON) == {"": 0}
    assert store.usage_since(alpha.id, NOON) == UsageTotal("", 2, 6, 2, 10)
    assert store.usage_since(alpha.id, NOON + timedelta(hours=1)).num_tokens == 8
    assert store.usage_since("nobody", NOON).num_requests == 0
    with refused("there is no project 'gamma'"):
        store.usage_totals("day", project="gamma")


def test_days_are_those_of_utc_whatever_the_session_thinks(postgresql_url: str) -> None:
    store = Store.open(f"{postgresql_url}?options=-c%20timezone%3DPacific/Auckland")
    store.record_usage([usage("1", started_at=NOON + timedelta(hours=11, minutes=59))])
    assert [total.group for total in store.usage_totals("day")] == ["2026-01-31"]
    store.close()


# Flagged generations


def add(store: Store, **changes: str | None) -> int:
    row = {
        "request_id": "r",
        "project_id": None,
        "model": "m",
        "rule": "words",
        "action": "mask",
        "prompt": "p",
        "text": "t",
    }
    return store.add_flagged(**row | changes).id  # type: ignore[arg-type]


def test_flagged_generations_are_listed_reviewed_and_exported(store: Store) -> None:
    ids = [add(store, text=f"text {number}\0\ud800") for number in range(5)]
    assert [row.id for row in store.list_flagged(limit=2)] == ids[:2]
    assert [row.id for row in store.list_flagged("pending", after=ids[1], limit=2)] == ids[2:4]
    reviewed = store.review_flagged(ids[2], "rejected", reviewer="ann", note="not for children")
    assert (reviewed.status, reviewed.reviewer, reviewed.note) == ("rejected", "ann", "not for children")
    assert reviewed.text == "text 2\ufffd\ufffd"
    assert reviewed.reviewed_at is not None
    assert list(store.export_flagged("rejected")) == [reviewed]
    assert [row.id for row in store.export_flagged("pending")] == [*ids[:2], *ids[3:]]
    assert store.review_flagged(ids[2], "accepted", reviewer="bea").note is None
    assert [row.id for row in store.export_flagged()] == ids


def test_an_export_is_of_any_length(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [add(sqlite_store) for _ in range(7)]
    whole = sqlite_store.list_flagged
    monkeypatch.setattr(sqlite_store, "list_flagged", lambda status, after, limit: whole(status, after=after, limit=3))
    assert [row.id for row in sqlite_store.export_flagged()] == ids


def test_reviews_of_nothing_and_of_no_kind(sqlite_store: Store) -> None:
    with refused("there is no flagged generation 7"):
        sqlite_store.review_flagged(7, "accepted", reviewer="ann")
    with refused("verdict is 'maybe', expected accepted or rejected"):
        sqlite_store.review_flagged(7, "maybe", reviewer="ann")  # type: ignore[arg-type]
    with refused("status is 'maybe', expected one of pending, accepted, rejected"):
        sqlite_store.list_flagged("maybe")


# Threads


def test_threads_write_side_by_side(store: Store) -> None:
    project = store.create_project("default")
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            for number in range(20):
                store.record_usage([usage(f"{writer}-{number}", project_id=project.id)])
                store.usage_since(project.id, NOON)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.usage_since(project.id, NOON).num_requests == 120
