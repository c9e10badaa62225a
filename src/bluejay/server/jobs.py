"""Requests that are answered later: they wait, run as all others do, and their results are kept to be fetched.

They live in the memory of the server, and end with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import structlog

from bluejay.engine.request import RequestOutput
from bluejay.errors import BluejayError, EngineError, Overloaded, QuotaExceeded
from bluejay.server.auth import Principal
from bluejay.server.errors import Failure, NoSuchThing, failure_of, log_reason
from bluejay.server.generation import Asked, Caller, Run, Service
from bluejay.server.shelf import Shelf

SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0  # until a job that found no place asks again
RETRY_AFTER_S = 5.0  # for whoever finds no room for a further job

_log = logging.getLogger("bluejay.server")


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"  # it waited too long
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class Retries:
    """How often a prediction that the engine could not finish is tried, and the waits between."""

    max_attempts: int = 1
    first_delay_s: float = 1.0
    max_delay_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        """Seconds behind the first, second … attempt; each is twice the one before."""
        return min(self.first_delay_s * 2.0 ** min(attempt - 1, 30), self.max_delay_s)


@dataclass(frozen=True)
class Work:
    """What a job is to do.

    Attributes:
        asked: as for a request that is answered at once.
        render: from the outputs to what is told of them, in JSON.
        num_bytes: of the request; bounds what waits.
        priority: the lower is served first, among the jobs of one project.
        max_queued_s: it expires if it has not begun by then.
    """

    asked: Asked
    render: Callable[[list[RequestOutput]], Any]
    num_bytes: int
    priority: int = 0
    max_queued_s: float = 600.0
    retries: Retries = field(default_factory=Retries)


@dataclass
class Job:
    """One request, as who asked may see it.

    Attributes:
        owner: the project's id, "" on an open server.
        model: the name of the model.
        place: what the caller called the model.
        changed_at: when it came into its state.
        result: JSON, of a job that is done.
        failure: why it has failed, expired or was cancelled.
        run: while it runs.
    """

    id: str
    owner: str
    dialect: str
    model: str
    place: str
    created_at: datetime
    changed_at: datetime
    state: JobState = JobState.QUEUED
    result: bytes | None = None
    failure: Failure | None = None
    run: Run | None = None

    @property
    def progress(self) -> float:
        """From 0 to 1; 1 only when it has ended. The tokens of beams are known at their end alone."""
        if self.state.ended:
            return 1.0
        return 0.0 if self.run is None else min(0.99, self.run.num_generated / _expected_tokens(self.run))

    @property
    def answer(self) -> Any:
        """What `render` made, of a job that is done."""
        return None if self.result is None else json.loads(self.result)


@dataclass
class _Open:
    """A job that has not ended."""

    job: Job
    principal: Principal
    work: Work
    number: int
    until_s: float
    held: bool = False  # it found no place, and asks again soon
    num_begun: int = 0
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        return self.task is None and not self.held


class Jobs:
    """All jobs of a server.

    Projects take turns: whose jobs run least comes first, then whose began longest ago. Of one project's jobs that of
    the lower `priority` comes first, then the earlier. What runs goes through `Service`, with its limits, its ledger
    and its counters; what it generates counts as delivered when the result is there.

    Args:
        max_running: jobs that run together.
        max_open: jobs that wait or run; one project may have half of them.
        max_bytes: of requests that wait or run, and of results.
        keep_s: so long a result is kept.
    """

    def __init__(self, service: Service, *, max_running: int, max_open: int, max_bytes: int, keep_s: float) -> None:
        self._service = service
        self._max_running = max_running
        self._max_open = max_open
        self._max_bytes = max_bytes
        self._open: dict[str, _Open] = {}
        self._ended: Shelf[Job] = Shelf(max_open, max_bytes, keep_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_submitted = 0
        self._num_begun = 0
        self._last_begun: dict[str, int] = {}  # by owner
        self._draining = False

    def submit(self, principal: Principal, work: Work) -> Job:
        """Take a job. Raises: QuotaExceeded, Overloaded if there are too many that have not ended."""
        owner = principal.project_id or ""
        self._check_room(owner, work)
        now, asked = datetime.now(UTC), work.asked
        job = Job(uuid.uuid4().hex, owner, asked.dialect, asked.model.name, asked.asked_model, now, now)
        self._num_submitted += 1
        entry = _Open(job, principal, work, self._num_submitted, time.monotonic() + work.max_queued_s)
        entry.timer = asyncio.get_running_loop().call_later(work.max_queued_s, self._expire, entry)
        self._open[job.id] = entry
        self._start()
        return job

    def find(self, owner: str, dialect: str, job_id: str) -> Job:
        """A job. Raises: NoSuchThing if there is none of this id, or it is somebody else's, or it was long ago."""
        entry = self._open.get(job_id)
        job = self._ended.get(owner, job_id) if entry is None else entry.job
        if job is None or job.owner != owner or job.dialect != dialect:
            raise NoSuchThing(
                f"there is no request {job_id[:100]!r} here; what has ended is forgotten some time later, or when the "
                "server is started anew"
            )
        return job

    def cancel(self, job: Job) -> bool:
        """End a job; False if it had ended by itself."""
        entry = self._open.get(job.id)
        if entry is None:
            return False
        self._end(entry, JobState.CANCELLED, Failure(499, "Cancelled", "it was cancelled"))
        return True

    def count(self, owner: str, model: str) -> tuple[int, int]:
        """An owner's jobs of a model that wait, and that run."""
        jobs = [entry.job for entry in self._open.values() if (entry.job.owner, entry.job.model) == (owner, model)]
        num_running = sum(job.state is JobState.RUNNING for job in jobs)
        return len(jobs) - num_running, num_running

    def drain(self) -> None:
        """Take no further jobs, and give up those that wait: what runs goes on."""
        self._draining = True
        for entry in list(self._open.values()):
            if entry.job.state is JobState.QUEUED:
                self._give_up(entry)

    async def close(self) -> None:
        """End everything."""
        self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_room(self, owner: str, work: Work) -> None:
        if self._draining:
            raise Overloaded("the server is about to end and takes no further asynchronous requests", RETRY_AFTER_S)
        most = max(1, self._max_open // 2)
        if sum(entry.job.owner == owner for entry in self._open.values()) >= most:
            raise QuotaExceeded(f"{most:,} asynchronous requests of this project wait or run", RETRY_AFTER_S)
        num_bytes = work.num_bytes + sum(entry.work.num_bytes for entry in self._open.values())
        if len(self._open) >= self._max_open or num_bytes > self._max_bytes:
            raise Overloaded("there is no room for a further asynchronous request", RETRY_AFTER_S)

    def _start(self) -> None:
        """Begin as many as may run."""
        while len(self._tasks) < self._max_running and (entry := self._next()) is not None:
            self._num_begun += 1
            self._last_begun[entry.job.owner] = self._num_begun
            task = entry.task = asyncio.create_task(self._work(entry))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._start()

    def _next(self) -> _Open | None:
        running = Counter(entry.job.owner for entry in self._open.values() if entry.task is not None)

        def turn(entry: _Open) -> tuple[int, int, int, int]:
            owner = entry.job.owner
            return running[owner], self._last_begun.get(owner, 0), entry.work.priority, entry.number

        return min((entry for entry in self._open.values() if entry.waits), key=turn, default=None)

    async def _work(self, entry: _Open) -> None:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=entry.job.id, dialect=entry.job.dialect)
        try:
            result = await self._tried(entry)
        except (Overloaded, QuotaExceeded) as error:
            self._hold(entry, error.retry_after_s)
        except asyncio.CancelledError:
            self._end(entry, JobState.CANCELLED, Failure(503, "Stopped", "the server ended before it was done"))
        except TimeoutError:
            limit_s = self._service.options.request_timeout_s
            self._end(entry, JobState.FAILED, Failure(504, "TimedOut", f"it was not done within {limit_s:g} s"))
        except Exception as error:
            log_reason(error)
            _log.log(
                logging.INFO if isinstance(error, BluejayError) else logging.ERROR,
                "job failed: %s",
                type(error).__name__,
                exc_info=None if isinstance(error, BluejayError) else error,
            )
            self._end(entry, JobState.FAILED, failure_of(error))
        else:
            self._keep(entry, result)

    async def _tried(self, entry: _Open) -> bytes:
        retries = entry.work.retries
        for attempt in range(1, retries.max_attempts):
            try:
                return await self._once(entry)
            except Overloaded:
                raise
            except EngineError as error:
                log_reason(error)
                _log.info("attempt %d of %d failed: %s", attempt, retries.max_attempts, type(error).__name__)
                await asyncio.sleep(retries.delay_s(attempt))
        return await self._once(entry)

    async def _once(self, entry: _Open) -> bytes:
        # A ledger knows a request once: further attempts have names of their own.
        request_id = f"{entry.job.id}-{entry.num_begun}" if entry.num_begun else entry.job.id
        run = await self._service.begin(Caller(entry.principal, request_id), entry.work.asked)
        entry.num_begun += 1
        job = entry.job
        job.run = run
        self._enter(job, JobState.RUNNING)
        try:
            async with asyncio.timeout(self._service.options.request_timeout_s):
                outputs = await run.outputs()
            result = json.dumps(entry.work.render(outputs), separators=(",", ":")).encode()
            run.deliver()
            return result
        finally:
            job.run = None
            run.close()

    def _hold(self, entry: _Open, retry_after_s: float) -> None:
        """Let a job that found no place ask again."""
        if entry.job.id not in self._open:
            return
        entry.task = None
        self._enter(entry.job, JobState.QUEUED)
        if self._draining:
            self._give_up(entry)
        elif time.monotonic() >= entry.until_s:
            self._expire(entry)
        entry.held = True
        wait_s = min(max(retry_after_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)
        asyncio.get_running_loop().call_later(wait_s, self._release, entry)

    def _release(self, entry: _Open) -> None:
        entry.held = False
        self._start()

    def _expire(self, entry: _Open) -> None:
        if entry.job.state is JobState.QUEUED:
            waited = f"it found no place within {entry.work.max_queued_s:g} s"
            self._end(entry, JobState.EXPIRED, Failure(504, "Expired", waited))

    def _give_up(self, entry: _Open) -> None:
        self._end(entry, JobState.CANCELLED, Failure(503, "Stopped", "the server ended before it began; send it again"))

    def _keep(self, entry: _Open, result: bytes) -> None:
        entry.job.result = result
        self._end(entry, JobState.DONE, None)

    def _end(self, entry: _Open, state: JobState, failure: Failure | None) -> None:
        """Move a job to those that have ended, and end what works on it; nothing if it is there."""
        job = entry.job
        if self._open.pop(job.id, None) is None:
            return
        if entry.timer is not None:
            entry.timer.cancel()
        if entry.task is not None and entry.task is not asyncio.current_task():
            entry.task.cancel()
        job.failure = failure
        self._enter(job, state)
        try:
            self._ended.put(job.owner, job.id, job, len(job.result or b""))
        except BluejayError as error:  # more than may be kept
            job.result, job.failure = None, failure_of(error)
            self._enter(job, JobState.FAILED)
            self._ended.put(job.owner, job.id, job, 0)

    def _enter(self, job: Job, state: JobState) -> None:
        if job.state is not state:
            job.state, job.changed_at = state, datetime.now(UTC)


def _expected_tokens(run: Run) -> int:
    """Tokens that a run may generate, at most; at least 1."""
    total = 0
    for item, prompt in zip(run.asked.items, run.prompts, strict=True):
        length = item.params.max_new_tokens or (item.params.max_length or len(prompt) + 20) - len(prompt)
        total += max(0, length) * item.params.num_return_sequences
    return max(1, total)
