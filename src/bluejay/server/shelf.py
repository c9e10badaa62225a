"""What is kept in memory for callers who come back: bounded in number, bytes and time; each sees their own alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from bluejay.server.errors import TooLarge

Value = TypeVar("Value")

SHARE = 0.5  # of all bytes and places, what one owner may take


@dataclass(frozen=True)
class _Entry(Generic[Value]):
    value: Value
    num_bytes: int
    until_s: float


class Shelf(Generic[Value]):
    """Values by owner and key. Where there is no room, the oldest goes of whoever holds most.

    Args:
        max_entries, max_bytes: in all; one owner may hold half of each.
        ttl_s: a value is kept so long, at most.
        clock: seconds, ever growing.
    """

    def __init__(
        self, max_entries: int, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry[Value]] = {}  # the oldest first

    def put(self, owner: str, key: str, value: Value, num_bytes: int) -> None:
        """Keep a value; one of the same key goes. Raises: TooLarge if it is more than one owner may hold."""
        if num_bytes > (most := int(self._max_bytes * SHARE)):
            raise TooLarge(f"{num_bytes:,} bytes are to be kept, expected at most {most:,}; send less at a time")
        self.drop(owner, key)
        self._forget_old()
        self._entries[owner, key] = _Entry(value, num_bytes, self._clock() + self._ttl_s)
        self._make_room(owner)

    def get(self, owner: str, key: str) -> Value | None:
        """The value, if it is still there."""
        self._forget_old()
        entry = self._entries.get((owner, key))
        return None if entry is None else entry.value

    def values(self, owner: str) -> list[Value]:
        """Everything of one owner, the oldest first."""
        self._forget_old()
        return [entry.value for (who, _), entry in self._entries.items() if who == owner]

    def drop(self, owner: str, key: str) -> None:
        """Forget a value, if it is there."""
        self._entries.pop((owner, key), None)

    def _forget_old(self) -> None:
        now = self._clock()
        while self._entries and self._entries[first := next(iter(self._entries))].until_s <= now:
            del self._entries[first]

    def _make_room(self, owner: str) -> None:
        count: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for (who, _), entry in self._entries.items():
            count[who] += 1
            held[who] += entry.num_bytes
        most_entries, most_bytes = max(1, int(self._max_entries * SHARE)), int(self._max_bytes * SHARE)
        while True:
            if count[owner] > most_entries or held[owner] > most_bytes:
                who = owner
            elif count.total() > self._max_entries:
                who = max(count, key=count.__getitem__)
            elif held.total() > self._max_bytes:
                who = max(held, key=held.__getitem__)
            else:
                return
            oldest = next(place for place in self._entries if place[0] == who)
            count[who] -= 1
            held[who] -= self._entries.pop(oldest).num_bytes
