"""Who may come in, and when those who may not are to come again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluejay.accounts.plans import Plan
from bluejay.errors import Overloaded, QuotaExceeded
from bluejay.server.limits import MAX_RETRY_AFTER_S, Gate, Limits

DAY = 86_400.0


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def plan(**limits: int) -> Plan:
    nothing = dict.fromkeys(
        ("requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrent_requests")
    )
    return Plan("small", **{**nothing, **limits})


def test_a_gate_is_full_beyond_running_and_queue() -> None:
    gate = Gate(2, 1, Clock())
    for _ in range(3):
        gate.enter(1)
    with pytest.raises(Overloaded, match="all 3 places"):
        gate.enter(1)
    gate.leave(1)
    gate.enter(1)
    assert gate.num_inside == 3


def test_a_request_larger_than_the_gate_may_come_alone() -> None:
    gate = Gate(2, 1, Clock())
    gate.enter(50)
    with pytest.raises(Overloaded):
        gate.enter(1)
    gate.leave(50)
    assert gate.num_inside == 0


def test_who_is_sent_away_is_promised_a_time_of_their_own() -> None:
    clock = Clock()
    gate = Gate(1, 1, clock)
    for _ in range(2):
        gate.enter(1)
    for _ in range(10):  # one each half second
        clock.now += 0.5
        gate.leave(1)
        gate.enter(1)
    assert gate.pace_s() == pytest.approx(0.5)
    waits = []
    for _ in range(5):
        with pytest.raises(Overloaded) as refused:
            gate.enter(1)
        waits.append(refused.value.retry_after_s)
    assert waits == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5])


def test_who_comes_back_when_told_finds_a_place() -> None:
    clock = Clock()
    gate = Gate(1, 1, clock)
    for _ in range(2):
        gate.enter(1)
    for _ in range(4):
        clock.now += 1
        gate.leave(1)
        gate.enter(1)
    promised = []
    for _ in range(20):
        with pytest.raises(Overloaded) as refused:
            gate.enter(1)
        promised.append(clock.now + refused.value.retry_after_s)
    for time in promised:  # one ends each second, just before the next one comes
        clock.now = time
        gate.leave(1)
        gate.enter(1)


def test_an_idle_time_does_not_count_as_a_slow_one() -> None:
    clock = Clock()
    gate = Gate(1, 0, clock)
    for _ in range(5):
        gate.enter(1)
        clock.now += 0.1
        gate.leave(1)
        clock.now += 3600
    assert gate.pace_s() == pytest.approx(0.1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=200))
def test_no_wait_is_without_bounds_and_no_place_is_lost(sizes: list[int]) -> None:
    gate = Gate(2, 2, Clock())
    inside = []
    for size in sizes:
        try:
            gate.enter(size)
            inside.append(size)
        except Overloaded as error:
            assert 0 < error.retry_after_s <= MAX_RETRY_AFTER_S
    assert gate.num_inside == sum(inside)
    for size in inside:
        gate.leave(size)
    assert gate.num_inside == 0


@pytest.mark.parametrize(
    "name, span_s", [("requests_per_minute", 60.0), ("requests_per_day", DAY)], ids=["minute", "day"]
)
def test_requests_are_counted_in_their_span(name: str, span_s: float) -> None:
    clock = Clock(10 * DAY + 20)
    limits = Limits(clock)
    small = plan(**{name: 2})
    for _ in range(2):
        with limits.request("a", small):
            pass
    with pytest.raises(QuotaExceeded, match="2 requests") as refused, limits.request("a", small):
        pass
    assert refused.value.retry_after_s == pytest.approx(span_s - 20)
    with limits.request("b", small):
        pass
    clock.now += refused.value.retry_after_s
    with limits.request("a", small):
        pass


def test_tokens_are_counted_when_they_are_known() -> None:
    clock = Clock(10 * DAY)
    limits = Limits(clock)
    small = plan(tokens_per_minute=100, tokens_per_day=150)
    with limits.request("a", small):
        limits.spend("a", 120)
    with pytest.raises(QuotaExceeded, match="100 tokens a minute"), limits.request("a", small):
        pass
    clock.now += 60
    with limits.request("a", small):
        limits.spend("a", 40)
    clock.now += 60
    with pytest.raises(QuotaExceeded, match="150 tokens a day"), limits.request("a", small):
        pass


def test_places_are_given_back_whatever_happens() -> None:
    limits = Limits(Clock())
    small = plan(concurrent_requests=1)
    with pytest.raises(ZeroDivisionError), limits.request("a", small):
        with pytest.raises(QuotaExceeded, match="1 requests at a time"), limits.request("a", small):
            pass
        raise ZeroDivisionError
    with limits.request("a", small):
        pass


def test_what_was_spent_before_the_server_began_counts_for_the_day_alone() -> None:
    clock = Clock(10 * DAY + 5)
    limits = Limits(clock)
    small = plan(requests_per_day=10, tokens_per_day=1000, requests_per_minute=3)
    assert not limits.knows("a")
    limits.restore("a", 9, 10)
    assert limits.knows("a")
    with limits.request("a", small):
        pass
    with pytest.raises(QuotaExceeded, match="10 requests a day"), limits.request("a", small):
        pass
    clock.now += DAY
    assert not limits.knows("a")
