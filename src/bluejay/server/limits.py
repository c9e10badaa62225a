"""Who may come in: a bounded queue for each model, and what a plan admits in a minute and in a day."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bluejay.accounts.plans import Plan
from bluejay.errors import Overloaded, QuotaExceeded

REMEMBERED = 64  # sequences by whose pace the next ones are promised
FIRST_PACE_S = 1.0  # seconds a sequence, until some have ended
MAX_RETRY_AFTER_S = 120.0
DAY_S = 86_400.0
MINUTE_S = 60.0

Clock = Callable[[], float]


class Gate:
    """Admits as many sequences as a model works on, and some that wait; says when to come to all others.

    Each who is sent away is promised a later time than the one before, at the pace at which sequences end: who comes
    back when told finds a place.

    Args:
        max_running, max_queue: sequences.
        clock: seconds, ever growing.
    """

    def __init__(self, max_running: int, max_queue: int, clock: Clock = time.monotonic) -> None:
        self._capacity = max_running + max_queue
        self._max_running = max_running
        self._clock = clock
        self._paces_s: deque[float] = deque(maxlen=REMEMBERED)  # from one end to the next, while somebody was inside
        self._since_s = 0.0  # the latest end, or when somebody came into an empty place
        self._promised_s = 0.0
        self.num_inside = 0

    def enter(self, num_sequences: int) -> None:
        """Take places. Raises: Overloaded at once if there are not as many."""
        self.check(num_sequences)
        if not self.num_inside:
            self._since_s = self._clock()
        self.num_inside += num_sequences

    def check(self, num_sequences: int) -> None:
        """Whether there are as many places. Raises: Overloaded if not."""
        # A request that is larger than everything runs alone, as it does in the engine.
        if self.num_inside and self.num_inside + num_sequences > self._capacity:
            wait_s = self._promise(num_sequences)
            raise Overloaded(f"all {self._capacity} places are taken; try again in {math.ceil(wait_s)} s", wait_s)

    def leave(self, num_sequences: int) -> None:
        """Give places back."""
        self.num_inside -= num_sequences
        now = self._clock()
        self._paces_s.extend([(now - self._since_s) / num_sequences] * min(num_sequences, REMEMBERED))
        self._since_s = now

    def pace_s(self) -> float:
        """Seconds from the end of one sequence to that of the next one, of late."""
        if not self._paces_s:
            return FIRST_PACE_S / self._max_running
        return sum(self._paces_s) / len(self._paces_s)

    def _promise(self, num_sequences: int) -> float:
        """How long until so many places will be free, all that were promised before being taken."""
        now, pace_s = self._clock(), self.pace_s()
        missing = self.num_inside + num_sequences - self._capacity
        first_s = now + missing * pace_s
        self._promised_s = max(first_s, self._promised_s + num_sequences * pace_s)
        self._promised_s = min(self._promised_s, now + MAX_RETRY_AFTER_S)
        return self._promised_s - now


@dataclass
class _Window:
    """What was spent in a span of time: each whole span begins anew."""

    span_s: float
    began: int = -1
    spent: int = 0

    def at(self, now: float) -> _Window:
        """The window at a time of the wall clock."""
        if (number := math.floor(now / self.span_s)) != self.began:
            self.began, self.spent = number, 0
        return self

    def ends_in_s(self, now: float) -> float:
        return (math.floor(now / self.span_s) + 1) * self.span_s - now


@dataclass
class _Spending:
    """What one project has spent."""

    minute_requests: _Window = field(default_factory=lambda: _Window(MINUTE_S))
    minute_tokens: _Window = field(default_factory=lambda: _Window(MINUTE_S))
    day_requests: _Window = field(default_factory=lambda: _Window(DAY_S))
    day_tokens: _Window = field(default_factory=lambda: _Window(DAY_S))
    running: int = 0


class Limits:
    """What each project may still ask for; a project's keys share it.

    Requests count when they come. Tokens count when they are known: those of the prompt at the start, those of the
    answer at the end, so a last request may go beyond its limit, and the next one waits.

    Args:
        clock: seconds since 1970; days are UTC's.
    """

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        self._projects: defaultdict[str, _Spending] = defaultdict(_Spending)

    def knows(self, project: str) -> bool:
        """Whether anything was counted for a project today."""
        now = self._clock()
        spending = self._projects.get(project)
        return spending is not None and spending.day_requests.began == math.floor(now / DAY_S)

    def restore(self, project: str, day_requests: int, day_tokens: int) -> None:
        """Take over what was spent today before this server began."""
        now, spending = self._clock(), self._projects[project]
        spending.day_requests.at(now).spent += day_requests
        spending.day_tokens.at(now).spent += day_tokens

    @contextmanager
    def request(self, project: str, plan: Plan) -> Iterator[None]:
        """Hold a place among the project's concurrent requests. Raises: QuotaExceeded with when to come again."""
        now, spending = self._clock(), self._projects[project]
        self._check(now, spending, plan)
        spending.minute_requests.at(now).spent += 1
        spending.day_requests.at(now).spent += 1
        spending.running += 1
        try:
            yield
        finally:
            spending.running -= 1

    def spend(self, project: str, num_tokens: int) -> None:
        """Count tokens."""
        now, spending = self._clock(), self._projects[project]
        spending.minute_tokens.at(now).spent += num_tokens
        spending.day_tokens.at(now).spent += num_tokens

    def _check(self, now: float, spending: _Spending, plan: Plan) -> None:
        asked = (
            ("requests a minute", spending.minute_requests, plan.requests_per_minute),
            ("requests a day", spending.day_requests, plan.requests_per_day),
            ("tokens a minute", spending.minute_tokens, plan.tokens_per_minute),
            ("tokens a day", spending.day_tokens, plan.tokens_per_day),
        )
        for what, window, limit in asked:
            if limit is not None and window.at(now).spent >= limit:
                raise QuotaExceeded(
                    f"the plan {plan.name} has {limit:,} {what}, and they are used up", window.ends_in_s(now)
                )
        if plan.concurrent_requests is not None and spending.running >= plan.concurrent_requests:
            raise QuotaExceeded(
                f"the plan {plan.name} has {plan.concurrent_requests:,} requests at a time, and they are running", 1.0
            )
