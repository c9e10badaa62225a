"""What follows from logits: tokens are chosen, sequences fork, searches go on, answers end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bluejay.decoding.beam import Answer
from bluejay.decoding.sampler import TokenLogprobs, choose, token_logprobs
from bluejay.decoding.stopping import FinishReason
from bluejay.engine.request import EmbeddingEvent, GenerationEvent, Usage
from bluejay.engine.runner import Runner
from bluejay.engine.scheduler import Part, Schedule, Scheduler
from bluejay.engine.scorer import LOGITS_CHUNK
from bluejay.engine.sequence import Request, Sequence, Status


@dataclass
class _Choosing:
    """A sequence that chooses its next token, and as many more as it had guessed rightly.

    Attributes:
        row: of the logits, behind its last own token; those behind its guesses follow.
        part: where these are; None for a fork, which has none.
    """

    sequence: Sequence
    row: int
    part: Part | None = None
    num_accepted: int = 0

    @property
    def drafts(self) -> Seq[int]:
        return () if self.part is None else self.part.drafts


class Answers:
    """Decides what a step's logits mean for each request, and tells its caller in events.

    Attributes:
        num_generated_tokens, num_drafted_tokens, num_accepted_tokens: since the engine was made.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    def decide(self, schedule: Schedule, hidden: Tensor, events: list[GenerationEvent]) -> None:
        """Go on from a step's hidden states, [T, n_embd], those of the parts one behind the other.

        Args:
            events: where events are added, one by one: what has been decided counts, whatever happens then.
        """
        rows: list[int] = []  # of hidden, whose logits are needed
        ready: list[tuple[Part, int]] = []  # parts whose sequence has been read to its end, and their first logits
        row = 0
        for part in schedule.parts:
            self._score(part, hidden[row : row + part.num_tokens])
            self._scheduler.computed(part.sequence, part.num_tokens)
            if part.sequence.request.embeds:
                self._embed(part, hidden[row : row + part.num_tokens], events)
            elif part.end == part.sequence.num_tokens:
                ready.append((part, len(rows)))
                last = row + part.num_tokens - 1
                rows.extend(range(last, last + 1 + len(part.drafts)))
            row += part.num_tokens + len(part.drafts)
        if ready:
            self._go_on(ready, self._runner.logits(hidden, rows), events)

    def decide_all(self, schedule: Schedule, logits: Tensor, events: list[GenerationEvent]) -> None:
        """Go on from a step that only decodes: a row of logits [parts, V] for each part."""
        for part in schedule.parts:
            self._scheduler.computed(part.sequence, 1)
        self._go_on([(part, row) for row, part in enumerate(schedule.parts)], logits, events)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> list[GenerationEvent]:
        """End all answers of a request that have not ended by themselves."""
        if request.status != Status.FINISHED:
            self._scheduler.finish(request)
        indexes, request.open_indexes = request.open_indexes or [0], []
        events = [GenerationEvent(request.id, index, [], finish_reason=reason, error=error) for index in indexes]
        return [*events[:-1], replace(events[-1], usage=self._usage(request))]

    def _go_on(self, ready: list[tuple[Part, int]], logits: Tensor, events: list[GenerationEvent]) -> None:
        choosing: list[_Choosing] = []
        searching: dict[int, Request] = {}
        for part, row in ready:
            sequence, request = part.sequence, part.sequence.request
            if sequence.answer is not None:
                events.append(self._end_answer(sequence))
                continue
            if sequence.continuation is None and request.search is None:
                choosing += [_Choosing(fork, row) for fork in self._begin_answers(request)]
            elif sequence.continuation is not None:
                choosing.append(_Choosing(sequence, row, part))
            if request.search is not None:
                sequence.logits = logits[row : row + 1]
                searching[request.id] = request
        self._choose(choosing, logits, events)
        for request in searching.values():
            events += self._search(request)

    def _begin_answers(self, request: Request) -> list[Sequence]:
        """The prompt has been read: fork, or begin a search; returns the sequences that choose tokens."""
        [root] = request.sequences
        params, device = request.asked.params, self._runner.network.device
        if root.score_from is not None:
            request.prompt_logprobs = root.logprobs
            root.score_from, root.logprobs = None, []
        if params.num_beams > 1:
            request.search = request.prompt.begin_search(device)
            return []
        for continuation in request.prompt.forks(range(params.num_return_sequences), device):
            if continuation.index == 0:
                root.continuation, root.token_ids = continuation, continuation.history
                continue
            child = root.fork(continuation.index, continuation.history)
            child.continuation = continuation
            self._scheduler.fork(root, child)
            request.sequences.append(child)
        return request.sequences

    def _choose(self, choosing: list[_Choosing], logits: Tensor, events: list[GenerationEvent]) -> None:
        """Choose a token for each; who guessed it goes on with the next, in step with all others that did."""
        for one in choosing:
            one.sequence.request.num_drafted_tokens += len(one.drafts)
            self.num_drafted_tokens += len(one.drafts)
        going_on = choosing
        while going_on:
            continuations = [one.sequence.continuation for one in going_on]
            rows = [one.row + one.num_accepted for one in going_on]
            own = logits if rows == list(range(len(logits))) else logits[torch.tensor(rows, device=logits.device)]
            token_ids = choose(own, [c.choice for c in continuations if c], [c.history for c in continuations if c])
            now = self._clock()
            right = []
            for place, (one, token_id) in enumerate(zip(going_on, token_ids, strict=True)):
                event = self._accept(one.sequence, token_id, own[place : place + 1], now)
                guessed = one.num_accepted < len(one.drafts) and token_id == one.drafts[one.num_accepted]
                if guessed:
                    self._accept_draft(one)
                if event.finish_reason is not None:
                    event = self._leave(one.sequence, event)
                elif guessed:
                    right.append(one)
                events.append(event)
            going_on = right

    def _accept_draft(self, one: _Choosing) -> None:
        """The token was guessed rightly: its K and V are in the cache already."""
        assert one.part is not None
        one.num_accepted += 1
        one.part.num_accepted += 1
        one.sequence.request.num_accepted_tokens += 1
        self.num_accepted_tokens += 1
        self._scheduler.computed(one.sequence, 1)

    def _accept(self, sequence: Sequence, token_id: int | None, logits: Tensor, now: float) -> GenerationEvent:
        """Give a sequence its token."""
        request = sequence.request
        assert sequence.continuation is not None and request.started_s is not None
        event = sequence.continuation.accept(token_id, logits, now - request.started_s)
        if token_id is not None:
            request.num_generated_tokens += 1
            self.num_generated_tokens += 1
            request.first_token_s = now if request.first_token_s is None else request.first_token_s
        return self._first(request, event)

    def _first(self, request: Request, event: GenerationEvent) -> GenerationEvent:
        """A request's first event tells of its prompt."""
        if request.has_told_prompt or request.asked.params.prompt_logprobs is None:
            return event
        request.has_told_prompt = True
        return replace(event, prompt_logprobs=[None, *request.prompt_logprobs])

    def _leave(self, sequence: Sequence, event: GenerationEvent) -> GenerationEvent:
        """Take a sequence that has ended out of its request; with the last one the request ends."""
        request = sequence.request
        self._scheduler.release(sequence)
        request.sequences.remove(sequence)
        return self._ended(request, event)

    def _ended(self, request: Request, event: GenerationEvent) -> GenerationEvent:
        """An answer has ended; the last one tells what the request took."""
        request.open_indexes.remove(event.index)
        if request.open_indexes:
            return event
        self._scheduler.finish(request)
        return replace(event, usage=self._usage(request))

    def _search(self, request: Request) -> list[GenerationEvent]:
        """Let a search take its step, once all its beams have been read."""
        beams, search, params = request.sequences, request.search, request.asked.params
        logits = [beam.logits for beam in beams if beam.logits is not None]
        if len(logits) < len(beams):
            return []
        assert search is not None and request.started_s is not None
        elapsed = self._clock() - request.started_s
        request.first_token_s = self._clock() if request.first_token_s is None else request.first_token_s
        step = search.step(torch.cat(logits), out_of_time=params.max_time is not None and elapsed > params.max_time)
        children: list[Sequence] = []
        if not search.done:
            for parent, token_id in zip(step.parents, step.token_ids, strict=True):
                child = beams[parent].fork(len(children), [*beams[parent].token_ids, token_id])
                self._scheduler.fork(beams[parent], child)
                children.append(child)
        else:
            answers = search.finish()
            self.num_generated_tokens += sum(len(answer.token_ids) for answer in answers)
            request.num_generated_tokens = sum(len(answer.token_ids) for answer in answers)
            if params.logprobs is not None:
                children = [self._to_score(beams[0], place, answer) for place, answer in enumerate(answers)]
        for beam in beams:
            self._scheduler.release(beam)
        request.sequences = children
        if children:
            return []
        return [self._end_beam(request, place, answer, []) for place, answer in enumerate(answers)]

    def _to_score(self, beam: Sequence, index: int, answer: Answer) -> Sequence:
        """A sequence that reads an answer once more, for its log-probabilities; what stood before it is shared."""
        request, size = beam.request, self._scheduler.pool.block_size
        first = len(request.prompt.history) - 1  # the position that predicts the answer's first token
        sequence = Sequence(request, index, [*request.prompt.history, *answer.token_ids])
        sequence.num_computed_tokens = first // size * size
        sequence.block_table = beam.block_table[: first // size]
        self._scheduler.pool.share(sequence.block_table)
        sequence.score_from, sequence.answer = first, answer
        return sequence

    def _end_answer(self, sequence: Sequence) -> GenerationEvent:
        """An answer of beams has been read for its scores."""
        request = sequence.request
        assert sequence.answer is not None
        self._scheduler.release(sequence)
        request.sequences.remove(sequence)
        return self._end_beam(request, sequence.index, sequence.answer, sequence.logprobs)

    def _end_beam(self, request: Request, index: int, answer: Answer, logprobs: list[TokenLogprobs]) -> GenerationEvent:
        event = request.prompt.end_beam(index, answer, logprobs)
        return self._ended(request, self._first(request, event))

    def _score(self, part: Part, hidden: Tensor) -> None:
        """Find the log-probabilities of a part's tokens, where they are wanted; hidden [num_tokens, n_embd]."""
        sequence = part.sequence
        if (first := sequence.first_unscored) is None:
            return
        asked = sequence.request.asked.params
        num_top = (asked.prompt_logprobs if sequence.answer is None else asked.logprobs) or 0
        end = min(part.end, sequence.num_tokens - 1)
        for begin in range(max(first, part.start), end, LOGITS_CHUNK):
            until = min(begin + LOGITS_CHUNK, end)
            logits = self._runner.network.logits(hidden[begin - part.start : until - part.start])
            sequence.logprobs += token_logprobs(logits, sequence.token_ids[begin + 1 : until + 1], num_top)

    def _embed(self, part: Part, hidden: Tensor, events: list[GenerationEvent]) -> None:
        """Add up the hidden states of a part of a text, [num_tokens, n_embd]; behind its last one the text ends."""
        sequence, request = part.sequence, part.sequence.request
        new = hidden[max(0, sequence.num_summed - part.start) :]  # a text that was preempted is read again
        if len(new):
            own = new.float().sum(0)
            sequence.hidden_sum = own if sequence.hidden_sum is None else sequence.hidden_sum + own
            sequence.num_summed += len(new)
        if part.end == sequence.num_tokens:
            assert sequence.hidden_sum is not None
            vector = (sequence.hidden_sum / sequence.num_tokens).cpu()
            [ended] = self.end(request, FinishReason.STOP)
            events.append(
                EmbeddingEvent(request.id, 0, [], finish_reason=ended.finish_reason, usage=ended.usage, vector=vector)
            )

    def _usage(self, request: Request) -> Usage:
        first, last = request.first_token_s, self._clock()
        steps = request.num_generated_tokens / request.asked.params.num_return_sequences - 1
        return Usage(
            prompt_tokens=len(request.asked.prompt_token_ids),
            cached_tokens=request.num_cached_tokens or 0,
            generated_tokens=request.num_generated_tokens,
            drafted_tokens=request.num_drafted_tokens,
            accepted_tokens=request.num_accepted_tokens,
            queued_s=None if request.started_s is None else request.started_s - request.arrived_s,
            first_token_s=None if first is None else first - request.arrived_s,
            per_token_s=None if first is None or steps <= 0 else (last - first) / steps,
        )
