"""From an error to what a client is told: a status, a code, a sentence; each dialect has its own body around them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from bluejay import errors
from bluejay.errors import BluejayError, RequestError

MAX_REASON = 1000  # characters

_log = logging.getLogger("bluejay.server")


class TooLarge(RequestError):
    """A body that is larger than the server takes."""


class TooSlow(RequestError):
    """A body that did not come in time."""


class NotServed(RequestError):
    """A call of the original service that Bluejay has, by design, no answer to."""


class NoSuchThing(RequestError):
    """A task, key, file or record that does not exist, or not for this caller."""


class ClientGone(BluejayError):
    """Nobody is left to answer."""


# The first class that fits counts: special ones stand before what they derive from.
STATUS: dict[type[BluejayError], int] = {
    TooLarge: 413,
    TooSlow: 408,
    NotServed: 501,
    NoSuchThing: 404,
    ClientGone: 499,
    errors.ModelNotFound: 404,
    errors.RequestError: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.QuotaExceeded: 429,
    errors.AccessError: 403,
    errors.EngineError: 503,
    errors.StoreError: 503,
}


@dataclass(frozen=True)
class Failure:
    """What a dialect renders.

    Attributes:
        status: of HTTP.
        kind: the error's class, such as "InvalidRequest".
        message: for people; no path, no stack.
        param: the option at fault.
        retry_after_s: when to come again, where that is known.
    """

    status: int
    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What stands above the body: `Retry-After` in whole seconds, and how to show a key."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


class Rarely:
    """Lets one of each kind through in so many seconds, and counts those between.

    Args:
        every_s: seconds.
        clock: seconds, ever growing.
    """

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def num_held_back(self, kind: str) -> int | None:
        """How many were held back since the last of its kind; None: this one is to be, too."""
        now = self._clock()
        last_s, count = self._last.get(kind, (now - self._every_s, 0))
        if now - last_s < self._every_s:
            self._last[kind] = last_s, count + 1
            return None
        self._last[kind] = now, 0
        return count


_reasons = Rarely(1.0)  # a database that is away fails thousands of requests in the same way


def log_reason(error: BaseException) -> None:
    """Log why, where the client is not told: of each class of errors once in a second."""
    if _is_for_the_log(error) and (count := _reasons.num_held_back(type(error).__name__)) is not None:
        extra = {"held_back": count} if count else {}
        _log.warning("%s: %s", type(error).__name__, str(error)[:MAX_REASON], extra=extra)


def _is_for_the_log(error: BaseException) -> bool:
    """Whether what an error says is for the operator, not for the client."""
    return _status(error) == 503 and not isinstance(error, errors.Overloaded | errors.Stopped)


def _status(error: BaseException) -> int:
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def failure_of(error: BaseException) -> Failure:
    """What a client is told of an error; of one that is not Bluejay's nothing but that it happened."""
    if not isinstance(error, BluejayError):
        return Failure(500, "InternalError", "something went wrong on the server; its log names this request's id")
    status = _status(error)
    message = str(error)
    if _is_for_the_log(error):
        message = "the server could not finish this request; try again soon"
    if status == 500:
        return failure_of(Exception())
    return Failure(
        status,
        type(error).__name__,
        message,
        getattr(error, "param", None),
        getattr(error, "retry_after_s", None),
    )
