"""What is kept for callers, and what has to go."""

from __future__ import annotations

import pytest

from bluejay.server.errors import TooLarge
from bluejay.server.shelf import Shelf


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_each_sees_their_own_until_its_time_is_over() -> None:
    clock = Clock()
    shelf: Shelf[str] = Shelf(10, 1000, ttl_s=60, clock=clock)
    shelf.put("one", "a", "first", 10)
    clock.now_s = 30
    shelf.put("two", "a", "second", 10)
    assert (shelf.get("one", "a"), shelf.get("two", "a"), shelf.get("three", "a")) == ("first", "second", None)
    clock.now_s = 60
    assert (shelf.get("one", "a"), shelf.get("two", "a"), shelf.values("two")) == (None, "second", ["second"])
    shelf.drop("two", "a")
    shelf.drop("two", "a")
    assert shelf.values("two") == []


def test_one_owner_holds_half_at_most_and_the_oldest_goes() -> None:
    shelf: Shelf[int] = Shelf(8, 1000, ttl_s=60)
    for number in range(6):
        shelf.put("one", str(number), number, 1)
    assert shelf.values("one") == [2, 3, 4, 5]
    shelf.put("one", "large", 9, 499)
    assert shelf.values("one") == [5, 9]
    with pytest.raises(TooLarge, match="501 bytes"):
        shelf.put("one", "larger", 10, 501)


def test_a_value_of_the_same_key_takes_the_place_of_the_other() -> None:
    shelf: Shelf[int] = Shelf(8, 1000, ttl_s=60)
    for number in range(50):
        shelf.put("one", "a", number, 400)
    assert shelf.values("one") == [49]


def test_room_is_made_at_the_cost_of_whoever_holds_most() -> None:
    shelf: Shelf[int] = Shelf(100, 1000, ttl_s=60)
    shelf.put("small", "a", 0, 100)
    for number in range(5):
        shelf.put("large", str(number), number, 100)
    for number in range(5):
        shelf.put("other", str(number), number, 90)
    assert shelf.values("small") == [0]
    assert shelf.values("large") == [1, 2, 3, 4]
    assert shelf.values("other") == [0, 1, 2, 3, 4]
