"""What the verbs for accounts share: the database, the plans, and times as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from bluejay.errors import InvalidRequest

if TYPE_CHECKING:
    from bluejay.accounts.store import Store

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="sqlite:///path or postgresql://…; BLUEJAY_DATABASE keeps a password out of lists of processes.",
        show_default="a file of Bluejay's own",
    ),
]

_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@contextmanager
def open_store(database: str | None) -> Iterator[Store]:
    """The store that flags, environment or settings file name."""
    from bluejay.accounts.store import Store
    from bluejay.settings import load_settings

    store = Store.open(load_settings({"database": database}).database)
    try:
        yield store
    finally:
        store.close()


def require_plan(name: str) -> None:
    """Raises: InvalidRequest if neither the package nor the settings file has such a plan."""
    from bluejay.accounts.plans import read_plans
    from bluejay.settings import load_table

    plans = read_plans(load_table("plans"))
    if name not in plans:
        raise InvalidRequest(
            f"there is no plan {name!r}, only {', '.join(plans)}; [plans.NAME] in the settings file adds one", "plan"
        )


def parse_moment(text: str, option: str, *, direction: int) -> datetime:
    """A moment: "2026-01-31", "2026-01-31T12:00" (UTC unless it names a zone), or "30m", "12h", "7d", "4w" from now.

    Args:
        direction: 1 for a span into the future, -1 into the past.
    Raises: InvalidRequest.
    """
    try:
        if span := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
            return datetime.now(UTC) + direction * int(span[1]) * _UNITS[span[2]]
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"--{option} is {text!r}, expected a date as 2026-01-31, a time as 2026-01-31T12:00, or a span as 12h, 30d",
            option,
        ) from None


def day(moment: datetime | None) -> str:
    """The moment's day for a table, "" for none."""
    return "" if moment is None else f"{moment:%Y-%m-%d}"
