"""Threads of one kind of work each: what hangs, or takes long, holds up its own kind alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from bluejay.errors import Overloaded

Result = TypeVar("Result")

STORE_THREADS = 4
MAX_ASKING = 256  # calls of the store that wait or run
RETRY_AFTER_S = 1.0  # for whoever finds too much waiting


class Threads:
    """A few threads, and a bounded queue before them.

    Args:
        name: of the work, as who is sent away is told.
        num_threads: that work.
        max_open: what may wait and run together, in the unit of the sizes; one alone may be larger.
    """

    def __init__(self, name: str, num_threads: int, max_open: int) -> None:
        self._name = name
        self._max_open = max_open
        self._open = 0
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    def check(self, size: int = 1) -> None:
        """Whether there is room for so much more. Raises: Overloaded if not."""
        if self._open and self._open + size > self._max_open:
            raise Overloaded(
                f"too much waits for {self._name}; try again in {RETRY_AFTER_S:g} s or later", RETRY_AFTER_S
            )

    async def run(
        self, work: Callable[..., Result], *values: object, size: int = 1, within_s: float | None = None
    ) -> Result:
        """What the work returns; the loop goes on meanwhile.

        Nobody can end a thread: work that takes longer than `within_s` goes on, unless it has not begun, and counts
        as long as it does.

        Raises: Overloaded, TimeoutError, and what the work raises.
        """
        self.check(size)
        with self._lock:
            self._open += size

        def leave(_: Future[Result]) -> None:
            with self._lock:
                self._open -= size

        future = self._executor.submit(copy_context().run, work, *values)
        future.add_done_callback(leave)
        async with asyncio.timeout(within_s):
            return await asyncio.wrap_future(future)


def store_threads() -> Threads:
    """Those that ask the store for everything but keys; a database that hangs holds these, and nobody else's."""
    return Threads("the database", STORE_THREADS, MAX_ASKING)
