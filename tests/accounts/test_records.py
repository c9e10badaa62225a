from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluejay.accounts.records import KeyRecord, ProjectRecord, Usage, storable

from .rows import NOON, usage

PROJECT = ProjectRecord("0" * 24, "default", "free", NOON, None)
KEY = KeyRecord("1" * 24, PROJECT, "laptop", "bj-abcdefgh", "d" * 64, ("user",), NOON, None, None, None)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (KEY, None),
        (replace(KEY, expires_at=NOON + timedelta(seconds=1)), None),
        (replace(KEY, expires_at=NOON), "the key bj-abcdefgh… expired on 2026-01-31"),
        (replace(KEY, revoked_at=NOON), "the key bj-abcdefgh… was revoked on 2026-01-31"),
        (replace(KEY, project=replace(PROJECT, disabled_at=NOON)), "the project default was disabled on 2026-01-31"),
    ],
)
def test_why_a_key_does_not_open_the_door(key: KeyRecord, problem: str | None) -> None:
    assert key.problem(NOON) == problem


@given(st.text(st.characters(codec=None, exclude_categories=())), st.integers(0, 10))
def test_storable_texts_are_of_whole_characters_without_nul(text: str, max_chars: int) -> None:
    found = storable(text, max_chars)
    assert "\0" not in found
    assert len(found) <= max_chars
    assert storable(found, max_chars) == found
    found.encode()


def test_storable_leaves_good_texts_alone() -> None:
    assert storable("Zaß 😀") == "Zaß 😀"
    assert storable("a\0b") == "a\ufffdb"


def test_times_of_usage_are_utc() -> None:
    there = timezone(timedelta(hours=2))
    assert usage("a", started_at=datetime(2026, 1, 31, 14, tzinfo=there)).started_at.tzinfo is UTC
    with pytest.raises(ValueError, match=r"ended_at is .* which has no time zone"):
        usage("a", ended_at=datetime(2026, 1, 31))


@pytest.mark.parametrize("changes", [{"outcome": "done"}, {"prompt_tokens": -1}, {"generated_tokens": 2**63}])
def test_usage_that_no_database_would_take_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        usage("a", **changes)


def test_long_names_in_usage_are_cut() -> None:
    found: Usage = usage("a", model="m" * 1000, dialect="x\0")
    assert (found.model, found.dialect) == ("m" * 200, "x\ufffd")
