"""What filters found, on its way into the database: off the answers' path, and patient while the database is away."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from bluejay.errors import Overloaded, StoreError
from bluejay.server.metrics import Metrics
from bluejay.server.threads import Threads, store_threads

MAX_WAITING = 1000  # generations, of some kilobytes each
FIRST_DELAY_S = 0.25  # before the second try; then twice as long
MAX_DELAY_S = 10.0
CLOSING_S = 10.0  # a server that ends waits so long for its database

_log = logging.getLogger("bluejay.server")


@dataclass(frozen=True)
class Flagged:
    """A generation for a person to look at; as `Store.add_flagged` takes it."""

    request_id: str
    project_id: str | None
    model: str
    rule: str
    action: str
    prompt: str
    text: str


class Keeping(Protocol):
    """What is asked of the store."""

    def add_flagged(
        self, *, request_id: str, project_id: str | None, model: str, rule: str, action: str, prompt: str, text: str
    ) -> Any: ...


class Review:
    """Keeps generations for review, in the order of their coming.

    Args:
        store: the database.
        max_waiting: beyond so many what comes is dropped, counted and logged.
        threads: that ask the store; None: its own.
    """

    def __init__(
        self, store: Keeping, metrics: Metrics, max_waiting: int = MAX_WAITING, threads: Threads | None = None
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._threads = threads or store_threads()
        self._waiting: deque[Flagged] = deque()
        self._writing: asyncio.Task[None] | None = None

    def add(self, flagged: Flagged) -> None:
        """Keep a generation soon; the caller does not wait."""
        if len(self._waiting) >= self._max_waiting:
            self._metrics.reviewed("dropped")
            _log.warning("a flagged generation is not kept: %d wait for the database already", len(self._waiting))
            return
        self._waiting.append(flagged)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        delay_s = FIRST_DELAY_S
        while self._waiting:
            try:
                await self._threads.run(partial(self._store.add_flagged, **vars(self._waiting[0])))
            except (StoreError, Overloaded) as error:
                self._metrics.reviewed("retried")
                _log.warning("flagged generations wait: %s", error, extra={"waiting": len(self._waiting)})
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_DELAY_S)
            except Exception as error:  # of this one alone: the others are not to wait behind it for ever
                self._waiting.popleft()
                self._metrics.reviewed("dropped")
                _log.error("a flagged generation could not be kept", exc_info=error)
            else:
                self._waiting.popleft()
                self._metrics.reviewed("kept")
                delay_s = FIRST_DELAY_S

    async def close(self, within_s: float = CLOSING_S) -> None:
        """Keep what waits; what the database does not take within that time is lost, and the log says how much."""
        if self._writing is None:
            return
        await asyncio.wait([self._writing], timeout=within_s)
        if not self._writing.done():
            self._writing.cancel()
            await asyncio.wait([self._writing])
        if self._waiting:
            self._metrics.reviewed("dropped", len(self._waiting))
            _log.error("%d flagged generations are lost: the database is away", len(self._waiting))
