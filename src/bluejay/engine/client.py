"""What a server holds of an engine that runs in a process of its own.

An error of the model's, of a kernel or of the machine may take the worker's process with it, never the server's: each
running request then ends with an event that says so, and a new worker is started.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from bluejay.decoding.stopping import FinishReason
from bluejay.engine.messages import (
    Beat,
    Cancel,
    Count,
    Counted,
    Embed,
    Embedded,
    Events,
    Facts,
    Failed,
    Generate,
    Message,
    Open,
    Progress,
    ProtocolError,
    Ready,
    Refused,
    Said,
)
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import GenerationEvent, GenerationRequest, check_ids_are_whole
from bluejay.engine.statistics import Statistics
from bluejay.engine.worker_process import WorkerProcess
from bluejay.errors import BluejayError, EngineError, InvalidRequest, Overloaded, Stopped

LOADING_SILENCE_S = 60.0  # importing torch from a cold disk holds Python's lock for seconds, and the beats with it
FIRST_DELAY_S = 0.5  # before the second start that follows a worker's death before it was ready; then twice as long
MAX_DELAY_S = 30.0
STEADY_S = 10.0  # a worker that was ready for so long has proved that its like can be started
USUAL_START_S = 5.0  # until one start has been measured

_log = logging.getLogger(__name__)


class Phase(StrEnum):
    """Where an engine is; each equals its text."""

    STARTING = "starting"  # a process is being started
    LOADING = "loading"  # it reads the weights
    READY = "ready"
    FAILED = "failed"  # the worker has ended, and another one will be started soon, if one was ever ready
    STOPPED = "stopped"  # not started yet, or closed


@dataclass(frozen=True)
class State:
    """Where an engine is, and why.

    Attributes:
        reason: why it failed or stopped; of an engine that starts again, why the last one ended.
        done_bytes, total_bytes: of the weights, while they are loaded.
    """

    phase: Phase
    reason: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


class EngineClient:
    """An engine in a process of its own. Belongs to the asyncio loop in which it is started; `close` ends it.

    A second process stands by, with torch imported and no model, to take the first one's place within a second.
    Where the system can (Linux), the process also ends with the thread that runs this loop.

    Args:
        model, dtype, device, options, draft: as `LLM` takes them.
        threads: CPU threads; 0 is as many as are good.
        heartbeat_timeout_s: a worker that is silent for so long counts as dead; it speaks each 0.25 s.
        step_timeout_s: so does one whose step lasts longer.
        on_progress: called with bytes read and bytes in all while weights load.

    Attributes:
        state: where it is.
        facts: what the last worker that was ready has opened; None until then.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        options: EngineOptions | None = None,
        draft: str | Path | None = None,
        heartbeat_timeout_s: float = 1.5,
        step_timeout_s: float = 120.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        name = None if model is None else str(model)
        guess = None if draft is None else str(draft)
        self._open = Open(name, dtype, device, threads, options or EngineOptions(), guess)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._step_timeout_s = step_timeout_s
        self._on_progress = on_progress
        self.state = State(Phase.STOPPED, "the engine was not started")
        self.facts: Facts | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._worker: WorkerProcess | None = None  # only while it is ready
        self._standby: asyncio.Task[WorkerProcess] | None = None
        self._asked: dict[int, _Stream | _Question] = {}
        self._num_asked = 0
        self._ready_s = 0.0  # when the last worker was ready, by time.monotonic(), as all times here
        self._start_took_s = USUAL_START_S
        self._expected_s = 0.0  # when one will be ready, if all goes as the last time

    @property
    def ready(self) -> bool:
        """Whether requests are welcome: a worker has loaded the model, and lives."""
        return self._worker is not None and self._worker.silent_s <= self._heartbeat_timeout_s

    async def start(self) -> None:
        """Start a worker and wait until it is ready. May be called once.

        Raises: what `LLM` raises; EngineError if the process cannot be started or ends, Stopped if it was closed.
        """
        if self._supervisor is not None:
            raise EngineError("the engine was started before; make another client")
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(ready))
        try:
            await ready
        except asyncio.CancelledError:
            await self.close()
            raise

    async def close(self) -> None:
        """End the worker and what it was doing; returns when its process is gone. May be called again."""
        if self._supervisor is None or not self._supervisor.done():  # else it failed, and its state says why
            self.state = State(Phase.STOPPED, "the engine was closed")
        if self._supervisor is not None:
            if not self._supervisor.cancelling():
                self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield what each step brings for a request; the events' `request` is 0. Who stops listening cancels it.

        If the worker ends, each answer that has not ended does, with an event whose `finish_reason` is "error".
        Raises: before the first event RequestError, Overloaded while no worker is ready, Stopped behind `close`.
        """
        stream = _Stream(request.params.num_return_sequences)
        try:
            number = self._ask(stream, lambda number: Generate(number, request))
        except ProtocolError as error:
            raise InvalidRequest(str(error)) from None
        try:
            while (event := await stream.next()) is not None:
                yield event
        finally:
            if self._asked.pop(number, None) is not None and self._worker is not None:
                self._worker.send(Cancel(number))

    async def statistics(self) -> Statistics:
        """What the worker's engine counts. Raises: EngineError as `generate`, or if the worker ends meanwhile."""
        answer: Counted = await self._question(Count)
        return answer.statistics

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """One vector for each text, as `LLM.embed`. Raises: RequestError, EngineError."""
        plain = [text if isinstance(text, str) else list(text) for text in texts]
        for ids in plain:
            if not isinstance(ids, str):
                check_ids_are_whole(ids, "text")
        try:
            answer: Embedded = await self._question(lambda number: Embed(number, plain))
        except ProtocolError as error:
            raise InvalidRequest(str(error), "text") from None
        flat = array("f", answer.vectors).tolist()
        return [flat[first : first + answer.n_embd] for first in range(0, len(flat), answer.n_embd)]

    async def _question(self, message: Callable[[int], Message]) -> Any:
        question = _Question()
        number = self._ask(question, message)
        try:
            return await question.answer
        finally:
            if self._asked.pop(number, None) is not None and self._worker is not None:
                self._worker.send(Cancel(number))

    def _ask(self, asked: _Stream | _Question, message: Callable[[int], Message]) -> int:
        """Send a message to the worker, if there is one, under a number of its own. Raises: ProtocolError."""
        if self._worker is None:
            raise self._unready()
        self._num_asked += 1
        self._worker.send(message(self._num_asked))
        self._asked[self._num_asked] = asked
        return self._num_asked

    def _unready(self) -> EngineError:
        if self._supervisor is None or self._supervisor.done() or self._supervisor.cancelling():
            return Stopped(f"the engine is {self.state.phase}: {self.state.reason}")
        wait_s = max(1.0, self._expected_s - time.monotonic())
        reason = f" again: {self.state.reason}" if self.state.reason else ""
        return Overloaded(f"the engine is starting{reason}; try again in {wait_s:.0f} s", round(wait_s, 1))

    async def _supervise(self, ready: asyncio.Future[None]) -> None:
        """Run one worker after the other, until cancelled, or the first one fails before it is ready."""
        delay_s = 0.0
        try:
            while True:
                began_s = time.monotonic()
                try:
                    await self._run_worker(ready)
                except Exception as error:
                    if not ready.done():
                        ready.set_exception(error)
                        return
                    delay_s = self._delay_after(delay_s, began_s)
                    _log.error("%s; starting another worker in %g s", error, delay_s)
                self._expected_s = time.monotonic() + delay_s + self._start_took_s
                await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            if not ready.done():
                ready.set_exception(Stopped("the engine was closed while it started"))
            raise
        finally:
            await self._end_standby()

    def _delay_after(self, delay_s: float, began_s: float) -> float:
        """How long to wait behind a worker's end, where it was `delay_s` before that worker."""
        if self._ready_s < began_s:  # it never was ready
            return min(max(2 * delay_s, FIRST_DELAY_S), MAX_DELAY_S)
        return 0.0 if time.monotonic() - self._ready_s > STEADY_S else delay_s

    async def _run_worker(self, ready: asyncio.Future[None]) -> None:
        """Start a worker and listen to it until it ends. Raises: an error that says why it did; never returns."""
        began_s = time.monotonic()
        self._expected_s = began_s + self._start_took_s
        self.state = replace(self.state, phase=Phase.STARTING, reason=self.state.reason if ready.done() else "")
        worker = None
        try:
            worker = await self._next_worker()
            worker.listen(LOADING_SILENCE_S)
            worker.send(self._open)
            self.state = replace(self.state, phase=Phase.LOADING)
            while True:
                message = await worker.receive()
                self._take(worker, message)
                if isinstance(message, Ready):
                    self._start_took_s = self._ready_s - began_s
                    self._standby = asyncio.create_task(WorkerProcess.start(max_silence_s=math.inf))
                    with suppress(asyncio.InvalidStateError):  # of a restart, or nobody waits for it any more
                        ready.set_result(None)
        except asyncio.CancelledError:
            self._lose("the engine was closed")
            raise
        except Exception as error:
            self.state = State(Phase.FAILED, str(error))
            self._lose(str(error))  # before the process is waited for: who waits for an answer has waited enough
            raise
        finally:
            if worker is not None:
                await worker.end()

    async def _next_worker(self) -> WorkerProcess:
        """The process that stands by, with torch imported; a new one if there is none, or it has ended."""
        standby, self._standby = self._standby, None
        if standby is not None:
            with suppress(EngineError):
                worker = await standby
                if worker.lives:
                    return worker
                await worker.end()
        return await WorkerProcess.start(max_silence_s=LOADING_SILENCE_S)

    async def _end_standby(self) -> None:
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.cancel()
            with suppress(EngineError, asyncio.CancelledError):
                await (await standby).end()

    def _take(self, worker: WorkerProcess, message: Message) -> None:
        match message:
            case Events(events):
                for event in events:
                    self._deliver(event)
            case Beat(step_age_s):
                if step_age_s > self._step_timeout_s:
                    worker.kill(f"was in one step for {step_age_s:.0f} s and was killed")
            case Counted(number) | Embedded(number):
                if isinstance(question := self._asked.pop(number, None), _Question):
                    question.take(message)
            case Refused(number, fault):
                if (asked := self._asked.pop(number, None)) is not None:
                    asked.refuse(fault.error())
            case Progress(done_bytes, total_bytes):
                self.state = State(Phase.LOADING, self.state.reason, done_bytes, total_bytes)
                if self._on_progress is not None:
                    self._on_progress(done_bytes, total_bytes)
            case Ready(facts):
                worker.max_silence_s = self._heartbeat_timeout_s
                self._worker, self.facts, self.state = worker, facts, State(Phase.READY)
                self._ready_s = time.monotonic()
            case Failed(fault):
                raise fault.error()
            case _:
                raise ProtocolError(f"the worker sent {type(message).__name__}, expected what workers send")

    def _deliver(self, event: Said | GenerationEvent) -> None:
        number = event[0] if isinstance(event, tuple) else event.request
        if not isinstance(stream := self._asked.get(number), _Stream):
            return
        if isinstance(event, tuple):
            stream.take(GenerationEvent(0, *event[1:]))
            return
        stream.take(replace(event, request=0))
        if event.usage is not None:
            del self._asked[number]

    def _lose(self, reason: str) -> None:
        """The worker is no more: end everything that waits for it."""
        self._worker = None
        asked, self._asked = self._asked, {}
        for one in asked.values():
            one.lose(reason)


class _Stream:
    """The events of one request, from the worker to whoever listens; as many as its answers have tokens, at most."""

    def __init__(self, num_answers: int) -> None:
        # What asyncio.Queue is, for the one reader that there is: each token of each answer comes through here.
        self._events: deque[GenerationEvent | BluejayError | None] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._open_indexes = set(range(num_answers))
        self._begun = False

    async def next(self) -> GenerationEvent | None:
        """The next event; None behind the last. Raises: what the request was refused for."""
        while not self._events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        event = self._events.popleft()
        if isinstance(event, BluejayError):
            raise event
        return event

    def _put(self, event: GenerationEvent | BluejayError | None) -> None:
        self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def take(self, event: GenerationEvent) -> None:
        self._begun = True
        if event.finish_reason is not None:
            self._open_indexes.discard(event.index)
        self._put(event)
        if event.usage is not None:
            self._put(None)

    def refuse(self, error: BluejayError) -> None:
        """End with an error that concerns this request alone."""
        if self._begun:  # an exception would hide what came before from who gathers it
            self.lose(str(error))
        else:
            self._put(error)

    def lose(self, reason: str) -> None:
        """End each answer that has not ended."""
        for index in sorted(self._open_indexes):
            self._put(GenerationEvent(0, index, [], finish_reason=FinishReason.ERROR, error=reason))
        self._put(None)


class _Question:
    """What is answered with one message."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def take(self, message: Message) -> None:
        if not self.answer.done():
            self.answer.set_result(message)

    def refuse(self, error: BluejayError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def lose(self, reason: str) -> None:
        self.refuse(EngineError(reason))
