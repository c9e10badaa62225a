"""From what a dialect has read to the events that it renders: bound, count, admit, generate, meter.

Every dialect comes through here, and so does everybody else who generates on the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate

from bluejay.accounts.ledger import Ledger
from bluejay.accounts.records import Outcome
from bluejay.accounts.records import Usage as UsageRecord
from bluejay.accounts.store import Store
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.stopping import FinishReason
from bluejay.engine.request import GenerationEvent, GenerationRequest, RequestOutput, Usage
from bluejay.errors import ContextLengthExceeded, EngineError, Forbidden, InvalidRequest, Overloaded, StoreError
from bluejay.server.auth import Principal
from bluejay.server.filters import Filters
from bluejay.server.limits import Limits
from bluejay.server.metrics import Metrics
from bluejay.server.models import ServedModel
from bluejay.server.options import ServerOptions
from bluejay.server.review import Flagged, Review
from bluejay.server.threads import Threads, store_threads
from bluejay.server.tracing import NO_SPAN, Span
from bluejay.server.watch import Watch
from bluejay.tokenizer import Tokenizer

Prompt = str | Sequence[int]

RECALL_S = 2.0  # a database that thinks for longer about a project's usage of today counts as away
MAX_TOKENISING_CHARS = 8 * 2**20  # that wait for the tokenizer: some seconds of its work
SHORT_CHARS = 256  # encoded in a tenth of a ms; to wake a thread and be woken by it takes longer

_log = logging.getLogger("bluejay.server")


@dataclass(frozen=True)
class Item:
    """One prompt and how to go on from it.

    Attributes:
        reads_only: the prompt is read for its log-probabilities; what the engine chooses behind it neither counts nor
            comes out.
        cut: where the model's context ends before the answer may, it ends the answer; else that is refused.
    """

    prompt: Prompt
    params: SamplingParams
    reads_only: bool = False
    cut: bool = True

    @property
    def num_sequences(self) -> int:
        """Rows of the engine's batch that it takes."""
        return max(self.params.num_beams, self.params.num_return_sequences)

    def length(self, num_prompt_tokens: int) -> int | None:
        """Tokens of the prompt and of an answer, at most; None where only the model's context bounds them."""
        params = self.params
        return params.max_length if params.max_new_tokens is None else num_prompt_tokens + params.max_new_tokens

    def num_told_logprobs(self, num_prompt_tokens: int, n_positions: int) -> int:
        """Log-probabilities that are told of it, at most; those of the prompt stand in each answer."""
        params, length = self.params, min(self.length(num_prompt_tokens) or n_positions, n_positions)
        parts = ((params.prompt_logprobs, num_prompt_tokens), (params.logprobs, max(0, length - num_prompt_tokens)))
        told = sum((1 + likeliest) * num_tokens for likeliest, num_tokens in parts if likeliest is not None)
        return params.num_return_sequences * told


def items_of(prompts: Sequence[Prompt], params: SamplingParams, options: ServerOptions, **how: bool) -> list[Item]:
    """Prompts to go on from in one way; `how` is for `Item`. Raises: as `bound_prompts`, before an item is made."""
    bound_prompts(len(prompts), options)
    return [Item(prompt, params, **how) for prompt in prompts]


def bound_prompts(num_prompts: int, options: ServerOptions, what: str = "prompts") -> None:
    """Raises: InvalidRequest for more prompts than one request may have; `what` they are called there."""
    if num_prompts > options.max_prompts:
        raise InvalidRequest(
            f"there are {num_prompts:,} {what}, expected at most {options.max_prompts:,} in one request", "prompt"
        )


@dataclass(frozen=True)
class Asked:
    """What a dialect has read from a request.

    Attributes:
        model: who is to answer.
        items: prompts, at least one.
        dialect: the dialect's name.
        asked_model: the model's name as the caller said it.
    """

    model: ServedModel
    items: Sequence[Item]
    dialect: str
    asked_model: str

    @property
    def num_sequences(self) -> int:
        """Rows of the engine's batch that all of it takes."""
        return sum(item.num_sequences for item in self.items)


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        request_id: names the request in answers, logs and the ledger.
        received_s: when it came, by time.monotonic().
        span: what is told of it in traces.
    """

    principal: Principal
    request_id: str
    received_s: float = field(default_factory=time.monotonic)
    span: Span = NO_SPAN


class Service:
    """Generates for callers.

    Args:
        options: bounds.
        store: where today's usage is looked up, once for each project.
        limits: what plans admit.
        ledger: where usage is written.
        filters: what looks at answers before they leave.
        metrics: what counts.
        review: where what filters found is kept; None: it is not.
        threads: that ask the store; None: its own.
    """

    def __init__(
        self,
        options: ServerOptions,
        store: Store,
        *,
        limits: Limits,
        ledger: Ledger,
        filters: Filters,
        metrics: Metrics,
        review: Review | None = None,
        threads: Threads | None = None,
    ) -> None:
        self.options = options
        self.limits = limits
        self.ledger = ledger
        self.filters = filters
        self.metrics = metrics
        self.review = review
        self.running: set[Run] = set()
        self._store = store
        self._store_threads = threads or store_threads()
        self._recalling: dict[str, asyncio.Task[None]] = {}
        # One is enough: the library itself encodes several texts on several threads.
        self._tokenising = Threads("the tokenizer", 1, MAX_TOKENISING_CHARS)

    async def begin(self, caller: Caller, asked: Asked) -> Run:
        """Admit a request; the caller iterates over the run's events and closes it.

        Raises: RequestError for what cannot be served as asked, Forbidden, QuotaExceeded, Overloaded.
        """
        plan = caller.principal.plan
        if plan.models is not None and asked.model.name not in plan.models:
            raise Forbidden(f"the plan {plan.name} does not have the model {asked.model.name}")
        tokenizer, facts = asked.model.opened()
        self._bound(asked.items)
        # Who finds no place is told so before any work is done for it; the place itself is taken by the run.
        asked.model.gate.check(asked.num_sequences)
        self._check_tokenising([item.prompt for item in asked.items if isinstance(item.prompt, str)])
        with ExitStack() as places:
            places.enter_context(await self.place(caller))
            prompts = await self.encode(tokenizer, [item.prompt for item in asked.items], facts.n_positions)
            self._bound_tokens(asked.items, prompts, facts.n_positions)
            asked.model.opened()  # it may have gone meanwhile, and a run holds places
            return Run(self, caller, asked, prompts, tokenizer, facts.n_positions, places)

    async def place(self, caller: Caller) -> AbstractContextManager[None]:
        """A place among the requests of the caller's project; to enter it counts as one, and may raise QuotaExceeded.

        Work begins behind it: what is refused later has taken some too.
        """
        principal = caller.principal
        await self._recall(principal.project_id)
        return self.limits.request(principal.project_id or "", principal.plan)

    async def _recall(self, project_id: str | None) -> None:
        """Count what a project spent today before this server began; once, whoever asks first."""
        if project_id is None or self.limits.knows(project_id):
            return
        task = self._recalling.get(project_id)
        if task is None:
            task = self._recalling[project_id] = asyncio.create_task(self._look_up_today(project_id))
            task.add_done_callback(lambda _: self._recalling.pop(project_id, None))
        await asyncio.shield(task)

    async def _look_up_today(self, project_id: str) -> None:
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        try:
            total = await self._store_threads.run(self._store.usage_since, project_id, today, within_s=RECALL_S)
        except (StoreError, Overloaded, TimeoutError) as error:  # the limits of the day then begin with this server
            _log.warning("the usage of today is not known: %s", str(error) or f"no answer within {RECALL_S:g} s")
            self.limits.restore(project_id, 0, 0)
        else:
            self.limits.restore(project_id, total.num_requests, total.num_tokens)

    async def encode(self, tokenizer: Tokenizer, prompts: Sequence[Prompt], n_positions: int) -> list[list[int]]:
        """Token ids of each prompt, <|endoftext|> for an empty text; the loop goes on meanwhile.

        Raises: InvalidRequest, ContextLengthExceeded, Overloaded.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        # No token has more bytes than the longest one: what is longer than that need not be counted.
        most = n_positions * tokenizer.longest_token_bytes
        if too_long := [text for text in texts if len(text) > most]:
            raise ContextLengthExceeded(
                f"the prompt has {len(too_long[0]):,} characters, more than {n_positions:,} tokens can say", "prompt"
            )
        encoded = iter(await self.tokenise(tokenizer, texts))
        start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [(next(encoded) if isinstance(prompt, str) else list(prompt)) or start for prompt in prompts]

    async def tokenise(self, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, none for an empty one; the loop goes on meanwhile.

        Raises: InvalidRequest, Overloaded.
        """
        if (num_chars := sum(map(len, texts))) <= SHORT_CHARS:
            return tokenizer.encode_batch(texts)
        return await self._tokenising.run(tokenizer.encode_batch, texts, size=num_chars)

    def _check_tokenising(self, texts: Sequence[str]) -> None:
        """Raises: Overloaded if too much waits for the tokenizer already."""
        if (num_chars := sum(map(len, texts))) > SHORT_CHARS:
            self._tokenising.check(num_chars)

    def _bound(self, items: Sequence[Item]) -> None:
        """Raises: InvalidRequest for more than one request may ask, before anything is made for it."""
        options = self.options
        if not items:
            raise InvalidRequest("there is no prompt; give at least one", "prompt")
        bound_prompts(len(items), options)
        if (num_sequences := sum(item.num_sequences for item in items)) > options.max_sequences:
            raise InvalidRequest(
                f"the request asks for {num_sequences:,} answers or beams, expected at most {options.max_sequences:,}",
                "n",
            )
        for item in items:
            for name in ("logprobs", "prompt_logprobs"):
                if (getattr(item.params, name) or 0) > options.max_logprobs:
                    raise InvalidRequest(
                        f"{name} is {getattr(item.params, name):,}, expected at most {options.max_logprobs}", "logprobs"
                    )

    def _bound_tokens(self, items: Sequence[Item], prompts: Sequence[Sequence[int]], n_positions: int) -> None:
        total = told = 0
        for item, prompt in zip(items, prompts, strict=True):
            params, length = item.params, item.length(len(prompt))
            if not item.cut and (length or 0) > n_positions:
                raise ContextLengthExceeded(
                    f"max_tokens is {params.max_new_tokens:,}, the prompt has {len(prompt):,} tokens, and the model's "
                    f"context holds {n_positions:,} in all; ask for fewer",
                    "max_tokens",
                )
            total += len(prompt) + item.num_sequences * max(0, min(length or n_positions, n_positions) - len(prompt))
            told += item.num_told_logprobs(len(prompt), n_positions)
        if total > self.options.max_tokens:
            raise InvalidRequest(
                f"the request could take {total:,} tokens, expected at most {self.options.max_tokens:,}: ask for fewer "
                "prompts, fewer answers or shorter ones",
                "max_tokens",
            )
        if told > self.options.max_told_logprobs:
            raise InvalidRequest(
                f"the request could be told {told:,} log-probabilities, expected at most "
                f"{self.options.max_told_logprobs:,}: ask for fewer beside each token, fewer prompts or fewer answers",
                "logprobs",
            )


class Run:
    """A request that was admitted, to be iterated over once; `close` it, however that ended.

    Attributes:
        caller, asked: who asked, and what.
        prompts: token ids of each prompt.
        num_generated, num_delivered: tokens of answers that came, and that went on to the caller.
        usages: of prompts that have ended, by their place.
    """

    def __init__(
        self,
        service: Service,
        caller: Caller,
        asked: Asked,
        prompts: list[list[int]],
        tokenizer: Tokenizer,
        n_positions: int,
        places: ExitStack,
    ) -> None:
        self._tokenizer = tokenizer
        self._n_positions = n_positions
        self.caller = caller
        self.asked = asked
        self.prompts = prompts
        self.num_generated = 0
        self.num_delivered = 0
        self.usages: dict[int, Usage] = {}
        self._service = service
        self._failed = False
        self._first_token_s: float | None = None
        self._began_at = datetime.now(UTC)
        self._enter(places)

    def _enter(self, places: ExitStack) -> None:
        """Take a place in the model's queue, open the account, and keep what is to be given back."""
        service, principal, asked = self._service, self.caller.principal, self.asked
        asked.model.gate.enter(asked.num_sequences)
        places.callback(asked.model.gate.leave, asked.num_sequences)
        self._open_account()
        service.running.add(self)
        places.callback(service.running.discard, self)
        self._places = places.pop_all()
        service.limits.spend(principal.project_id or "", self.num_prompt_tokens)
        service.metrics.begun(self)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_told_logprobs(self) -> int:
        """Log-probabilities that its answers tell, at most."""
        pairs = zip(self.asked.items, self.prompts, strict=True)
        return sum(item.num_told_logprobs(len(prompt), self._n_positions) for item, prompt in pairs)

    @property
    def usage(self) -> Usage:
        """Of all prompts together, as far as it is known."""
        usages = self.usages.values()
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            generated_tokens=self.num_generated,
        )

    async def events(self) -> AsyncGenerator[GenerationEvent, None]:
        """What comes, as it comes; an event's `request` is its prompt's place. To be closed by who iterates."""
        source = self._merged() if len(self.prompts) > 1 else self._of(0)
        async with aclosing(source) as events:
            async for event in events:
                self._note(event)
                yield event

    async def outputs(self) -> list[RequestOutput]:
        """Everything at the end: one output for each prompt. Raises: EngineError if one could not be finished."""
        requests = [self._request(place) for place in range(len(self.prompts))]
        outputs = [RequestOutput.blank(request) for request in requests]
        async with aclosing(self.events()) as events:
            async for event in events:
                if event.error is not None:
                    raise EngineError(event.error)
                outputs[event.request].add(event)
        return outputs

    async def vectors(self) -> list[list[float]]:
        """One vector for each prompt, instead of answers. Raises: RequestError, EngineError."""
        engine, most = self.asked.model.engine, self.asked.model.opened()[1].n_positions
        vectors: list[list[float]] = []
        while len(vectors) < len(self.prompts):
            first = len(vectors)
            vectors += await engine.embed(_as_many(self.prompts[first:], most))
            for place in range(first, len(vectors)):
                self.usages[place] = Usage(prompt_tokens=len(self.prompts[place]))
        return vectors

    def deliver(self) -> None:
        """Note that what came so far goes to the caller now; to be called before it is sent."""
        if self.num_generated > self.num_delivered:
            self.num_delivered = self.num_generated
            self._service.ledger.progress(self.caller.request_id, self.num_delivered)

    def count_untold(self, num_tokens: int) -> None:
        """Count tokens that were generated for the caller, whose ids a filter does not tell."""
        self.num_generated += num_tokens

    def prompt_text(self, place: int) -> str:
        """A prompt as text; decoded where it came as token ids."""
        prompt = self.asked.items[place].prompt
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def note_filtered(self, place: int, rule: str, action: str, text: str) -> None:
        """Count and log what a filter found, without the text; keep it for review where that is wanted."""
        service, model, caller = self._service, self.asked.model.name, self.caller
        service.metrics.filtered(model, rule, action)
        _log.info("filtered", extra={"request_id": caller.request_id, "model": model, "rule": rule, "action": action})
        if service.review is not None:
            prompt = self.prompt_text(place)
            service.review.add(
                Flagged(caller.request_id, caller.principal.project_id, model, rule, action, prompt, text)
            )

    def close(self) -> None:
        """Close the account and give the places back. May be called again."""
        service = self._service
        if self not in service.running:
            return
        ended = len(self.usages) == len(self.prompts)
        outcome: Outcome = "error" if self._failed else "completed" if ended else "cancelled"
        with self._places:
            record = self._record(outcome)
            service.ledger.end(record)
            self.caller.span.served(record)
            service.limits.spend(self.caller.principal.project_id or "", self.num_delivered)
            service.metrics.ended(self, outcome)

    def _open_account(self) -> None:
        principal = self.caller.principal
        self._service.ledger.begin(
            request_id=self.caller.request_id,
            project_id=principal.project_id,
            key_id=principal.key_id,
            dialect=self.asked.dialect,
            model=self.asked.asked_model,
            served_model=self.asked.model.name,
            prompt_tokens=self.num_prompt_tokens,
            started_at=self._began_at,
        )

    def _record(self, outcome: Outcome) -> UsageRecord:
        principal = self.caller.principal
        return UsageRecord(
            request_id=self.caller.request_id,
            project_id=principal.project_id,
            key_id=principal.key_id,
            dialect=self.asked.dialect,
            model=self.asked.asked_model,
            served_model=self.asked.model.name,
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.usage.cached_tokens,
            generated_tokens=self.num_delivered,
            started_at=self._began_at,
            ended_at=datetime.now(UTC),
            first_token_s=self._first_token_s,
            outcome=outcome,
        )

    def _request(self, place: int) -> GenerationRequest:
        principal = self.caller.principal
        return GenerationRequest(
            self.prompts[place],
            self.asked.items[place].params,
            priority=principal.plan.priority,
            tenant=principal.project_id or "",
        )

    def _of(self, place: int) -> AsyncGenerator[GenerationEvent, None]:
        """What comes for one prompt, as the model's filters let it out; the events name the first prompt."""
        events: AsyncGenerator[GenerationEvent, None] = self.asked.model.engine.generate(self._request(place))
        if self.asked.items[place].reads_only:
            return _without_answers(events)
        rules = self._service.filters.of(self.asked.model.name)
        return events if rules is None else Watch(rules, self, place).events(events)

    async def _merged(self) -> AsyncGenerator[GenerationEvent, None]:
        """The events of all prompts, in the order of their coming."""
        queue: asyncio.Queue[GenerationEvent | None] = asyncio.Queue()

        async def pump(place: int) -> None:
            try:
                async with aclosing(self._of(place)) as events:
                    async for event in events:
                        queue.put_nowait(replace(event, request=place))
            finally:
                queue.put_nowait(None)

        pumps = [asyncio.create_task(pump(place)) for place in range(len(self.prompts))]
        try:
            left = len(pumps)
            while left:
                event = await queue.get()
                if event is not None:
                    yield event
                    continue
                left -= 1
                for task in pumps:
                    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                        raise error
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _note(self, event: GenerationEvent) -> None:
        self.num_generated += len(event.token_ids)
        if self._first_token_s is None and event.token_ids:
            self._first_token_s = time.monotonic() - self.caller.received_s
            self._service.metrics.first_token(self, self._first_token_s)
        if event.finish_reason is FinishReason.ERROR:
            self._failed = True
        if event.usage is not None:
            self.usages[event.request] = event.usage


async def _without_answers(events: AsyncGenerator[GenerationEvent, None]) -> AsyncGenerator[GenerationEvent, None]:
    """The events without the tokens that were chosen: each answer ends with none."""
    async with aclosing(events):
        async for event in events:
            reason = FinishReason.ERROR if event.error is not None else FinishReason.LENGTH
            yield replace(event, token_ids=[], text="", logprobs=[], finish_reason=reason)


def _as_many(prompts: Sequence[list[int]], most: int) -> list[list[int]]:
    """The first prompts that together have at most so many tokens; one at least.

    Others get their tokens between two such parts.
    """
    totals = accumulate(map(len, prompts))
    return list(prompts[: max(1, sum(1 for total in totals if total <= most))])
