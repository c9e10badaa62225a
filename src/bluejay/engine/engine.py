"""The engine: many requests, one model, one step at a time.

schedule   which sequences, how many tokens, which blocks
draft      guess tokens, where that pays
forward    read them all in one pass
decide     choose tokens, fork and end sequences
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Literal, TypeVar

import torch

from bluejay.decoding.stopping import FinishReason
from bluejay.engine.answers import Answers
from bluejay.engine.batch import Reading
from bluejay.engine.block_pool import BlockPool
from bluejay.engine.kv_cache import KVCache, bytes_per_token
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.pacing import Pacing
from bluejay.engine.request import GenerationEvent, GenerationRequest, RequestOutput
from bluejay.engine.runner import Runner
from bluejay.engine.scheduler import Schedule, Scheduler
from bluejay.engine.sequence import Request, Sequence
from bluejay.engine.speculation import ModelSpeculation, NgramSpeculation, NoSpeculation, Speculation
from bluejay.engine.statistics import Statistics
from bluejay.errors import ConfigError, EngineError, InvalidRequest

Asked = TypeVar("Asked")


class Engine:
    """Generates for many requests at once; they join and leave at any step.

    Several threads, and several streams of one thread, may use it at once.

    Args:
        network: the model, its tokenizer and its device.
        options: memory, limits.
        draft: how tokens are guessed ahead: "ngram", by what came before in the same text, or a smaller network with
            the same tokens; None: not at all.
        clock: seconds, for `max_time` and for what `Usage` tells.

    Attributes:
        num_cache_tokens: how many tokens the cache holds.
    """

    def __init__(
        self,
        network: Network,
        options: EngineOptions | None = None,
        *,
        draft: Network | Literal["ngram"] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = options or EngineOptions()
        config, size = network.model.config, options.block_size
        dtype = options.torch_cache_dtype(network.dtype)
        guessing_bytes = 0 if draft is None or draft == "ngram" else self._token_bytes(draft, options)
        num_blocks = options.num_blocks(config, dtype, network.device, beside_bytes=guessing_bytes)
        self.num_cache_tokens = num_blocks * size
        self.network = network
        self._runner = Runner(network, KVCache(config, num_blocks, size, dtype, network.device))
        self._pool = BlockPool(num_blocks, size)
        self._scheduler = Scheduler(
            self._pool,
            max_batch_tokens=options.max_batch_tokens,
            max_num_sequences=options.max_num_sequences,
            prefix_cache=options.prefix_cache,
        )
        self._answers = Answers(self._runner, self._scheduler, clock)
        self._speculation = self._speculate(draft, options)
        self._pacing = Pacing(options.max_stall)
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._cancelled: list[int] = []
        self._num_requests = 0
        self._num_steps = 0
        self._lock = threading.RLock()
        self._inboxes: dict[int, deque[GenerationEvent]] = {}  # of streams, by request

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._requests)

    def add(self, asked: GenerationRequest, inbox: deque[GenerationEvent] | None = None) -> int:
        """Take a request; returns the number by which its events name it.

        Args:
            inbox: where its events go, whoever calls `step`; None: `step` returns them.
        Raises: RequestError if it cannot be served; InvalidRequest with the numbers if it can never fit into the cache.
        """
        prepared = self._prepare_all([asked], self._prepare)
        self._begin(prepared, inbox)
        return prepared[0].id

    def add_texts(self, texts: Seq[Seq[int]], inbox: deque[GenerationEvent]) -> list[int]:
        """Take texts of which embeddings are wanted; returns the numbers by which their events name them.

        They are read in chunks, as prompts are. Each brings one event: an `EmbeddingEvent`, or how else it ended.

        Args:
            inbox: where the events go.
        Raises: RequestError if one of them cannot be read, before anything runs.
        """
        prepared = self._prepare_all(texts, self._prepare_text)
        self._begin(prepared, inbox)
        return [request.id for request in prepared]

    def cancel(self, number: int) -> None:
        """End a request at the next step, which frees its blocks; nothing happens if it has ended."""
        with self._lock:  # else one that is noted while a step takes the others along would be lost
            self._cancelled.append(number)

    def step(self) -> list[GenerationEvent]:
        """Read and choose the next tokens; returns what that brought, each request's events in their order.

        Events of requests that have an inbox are put there instead.
        """
        with self._lock, torch.inference_mode():
            events = self._end_cancelled()
            began = self._clock()
            schedule = self._scheduler.schedule(
                max_prefill_tokens=self._pacing.max_prefill_tokens, num_drafts=self._speculation.num_drafts
            )
            if schedule.parts:
                self._num_steps += 1
                try:
                    self._compute(schedule, began, events)
                except Exception as error:  # whatever it is, it ends these requests and not the engine
                    self._fail(schedule, error, events)
            return [event for event in events if not self._deliver(event)]

    def advance(self, inbox: deque[GenerationEvent]) -> None:
        """Take a step, unless another thread's step has brought something for this inbox meanwhile."""
        with self._lock:
            if not inbox:
                self.step()

    def stream(self, requests: Seq[GenerationRequest]) -> Iterator[GenerationEvent]:
        """Yield what each step brings, until every answer has ended; events name requests by their place here.

        Who stops listening cancels what still runs. Raises: RequestError for the first request that cannot be served,
        before anything runs.
        """
        return self._events(self._prepare_all(requests, self._prepare))

    def generate(self, requests: Seq[GenerationRequest]) -> list[RequestOutput]:
        """Run all requests to their end; the outputs are in the order of the requests.

        Raises: RequestError before anything runs; EngineError if the engine failed.
        """
        outputs = [RequestOutput.blank(request) for request in requests]
        for event in self.stream(requests):
            if event.error is not None:
                raise EngineError(event.error)
            outputs[event.request].add(event)
        return outputs

    def statistics(self) -> Statistics:
        """Count what there is."""
        scheduler, pool, answers = self._scheduler, self._pool, self._answers
        return Statistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            num_blocks=pool.num_blocks,
            held_blocks=pool.num_held,
            cached_blocks=pool.num_published,
            steps=self._num_steps,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generated_tokens=answers.num_generated_tokens,
            drafted_tokens=answers.num_drafted_tokens,
            accepted_tokens=answers.num_accepted_tokens,
            preemptions=scheduler.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Check the books of blocks. Raises: AssertionError."""
        self._scheduler.check_integrity()

    def _token_bytes(self, draft: Network, options: EngineOptions) -> int:
        """What the draft model keeps of each token."""
        return bytes_per_token(draft.model.config, options.torch_cache_dtype(draft.dtype))

    def _speculate(self, draft: Network | Literal["ngram"] | None, options: EngineOptions) -> Speculation:
        if draft is None:
            return NoSpeculation()
        if draft == "ngram":
            return NgramSpeculation()
        config, pool, dtype = draft.model.config, self._pool, options.torch_cache_dtype(draft.dtype)
        if config.n_positions < self.network.model.config.n_positions:
            raise ConfigError(
                f"the draft model's context has {config.n_positions} tokens, the model's "
                f"{self.network.model.config.n_positions}; take one that can follow"
            )
        cache = KVCache(config, pool.num_blocks, pool.block_size, dtype, draft.device)
        return ModelSpeculation(Runner(draft, cache), pool, self.network.model.config.vocab_size)

    def _events(self, requests: list[Request]) -> Iterator[GenerationEvent]:
        """Begin when somebody listens, and stop when nobody does."""
        places = {request.id: place for place, request in enumerate(requests)}
        inbox: deque[GenerationEvent] = deque()
        self._begin(requests, inbox)
        open_requests = set(places)
        try:
            while open_requests:
                self.advance(inbox)
                while inbox:
                    event = inbox.popleft()
                    if event.usage is not None:
                        open_requests.discard(event.request)
                    yield replace(event, request=places[event.request])
        finally:
            for number in open_requests:
                self.cancel(number)

    def _deliver(self, event: GenerationEvent) -> bool:
        """Put an event into its request's inbox, if it has one; behind the last event both are forgotten."""
        inbox = self._inboxes.get(event.request)
        if inbox is not None:
            inbox.append(event)
        if event.usage is not None:
            del self._requests[event.request]
            self._inboxes.pop(event.request, None)
        return inbox is not None

    def _prepare_all(self, requests: Iterable[Asked], prepare: Callable[[int, Asked], Request]) -> list[Request]:
        with self._lock:
            prepared = [prepare(self._num_requests + place, asked) for place, asked in enumerate(requests)]
            self._num_requests += len(prepared)
        return prepared

    def _begin(self, requests: list[Request], inbox: deque[GenerationEvent] | None) -> None:
        with self._lock:
            for request in requests:
                if inbox is not None:
                    self._inboxes[request.id] = inbox
                request.arrived_s = self._clock()
                self._requests[request.id] = request
                self._scheduler.add(request)

    def _prepare(self, number: int, asked: GenerationRequest) -> Request:
        prompt = self.network.prepare(number, asked)
        request = Request(number, asked, prompt)
        needed = request.most_blocks(self._pool.block_size)
        if needed > self._pool.num_blocks:
            size = self._pool.block_size
            raise InvalidRequest(
                f"{request.width} sequences of {len(prompt.history)} tokens of prompt and up to "
                f"{prompt.max_new_tokens} new ones need room for {needed * size} tokens, and the cache holds "
                f"{self.num_cache_tokens}; ask for "
                "fewer tokens or sequences, or give the cache more memory",
                "max_new_tokens",
            )
        root = Sequence(request, 0, prompt.history)
        if asked.params.prompt_logprobs is not None:
            root.score_from = 0
        request.sequences = [root]
        return request

    def _prepare_text(self, number: int, text: Seq[int]) -> Request:
        prompt = self.network.prepare_text(number, text)
        if len(text) > self.num_cache_tokens:
            raise InvalidRequest(
                f"the text has {len(text)} tokens to read, and the cache holds {self.num_cache_tokens}; shorten it, or "
                "give the cache more memory",
                "text",
            )
        request = Request(number, GenerationRequest(prompt.history, prompt.params), prompt, embeds=True)
        request.sequences = [Sequence(request, 0, prompt.history)]
        return request

    def _compute(self, schedule: Schedule, began: float, events: list[GenerationEvent]) -> None:
        """Draft, read, decide; adds what that brings to `events`."""
        for part in schedule.parts:
            if part.sequence.request.started_s is None:
                part.sequence.request.started_s = began
        self._runner.cache.copy(schedule.copies)
        self._speculation.draft(schedule)
        readings = [Reading(part.token_ids, part.start, part.sequence.block_table) for part in schedule.parts]
        if schedule.only_decodes:
            self._answers.decide_all(schedule, self._runner.decode(readings), events)
        else:
            self._answers.decide(schedule, self._runner.forward(readings), events)
        seconds = self._clock() - began
        self._speculation.learn(schedule, seconds)
        self._pacing.learn(schedule, seconds)

    def _end_cancelled(self) -> list[GenerationEvent]:
        numbers, self._cancelled = self._cancelled, []
        there = [self._requests[number] for number in dict.fromkeys(numbers) if number in self._requests]
        return [event for request in there for event in self._answers.end(request, FinishReason.CANCELLED)]

    def _fail(self, schedule: Schedule, error: Exception, events: list[GenerationEvent]) -> None:
        """End what a step that failed has not ended: what it has brought already counts."""
        message = f"{type(error).__name__}: {error}"
        ended = {event.request for event in events if event.usage is not None}
        for request in {part.sequence.request.id: part.sequence.request for part in schedule.parts}.values():
            if request.id not in ended:
                events += self._answers.end(request, FinishReason.ERROR, message)
