"""Speculative decoding: guess tokens cheaply, let the model read them all at once, keep those that were right.

The model chooses each token just as it would without: by its own scores and, where it draws, with the next number of
the sequence's own generator. A guess is accepted if it is the token that was chosen. So the text is the same with
guesses and without, token for token, drawn ones included. A draft model guesses by drawing with the numbers that the
model will draw with: the likelier both find a token, the likelier both draw it.

target   t5 │ d6 d7 d8      reads its last token and the guesses in one pass
chosen      │ d6 d7 x8      two accepted, one recovered; had all been right, a bonus token would come behind them

Source: Leviathan et al. 2023 (arXiv:2211.17192); the shared randomness in place of their rejection sampling is
"drafter-invariant speculative decoding", Daliri et al. 2024 (arXiv:2408.07978).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from bluejay.decoding.sampler import Choice, choose
from bluejay.engine.batch import Reading
from bluejay.engine.block_pool import BlockPool
from bluejay.engine.runner import Runner
from bluejay.engine.scheduler import Part, Schedule
from bluejay.engine.sequence import Sequence

MOST_DRAFTS = 8
MOST_SEQUENCES = 8  # beyond that the model has enough to read without guesses
FIRST_ACCEPTANCE = 0.7  # of a guess, before any was checked
FIRST_COST = 0.1  # of a guess, in steps of its own, before any was timed
WEIGHT = 0.1  # of the latest step in the averages
PROBE_EVERY = 32  # steps: what does not pay now may pay later in the text, and the other way round
TIMED_FIRST = 6  # steps without guesses, to know what these are measured by; the first two are not yet recorded
CATCH_UP_TOKENS = 256  # that the draft model reads in a step of what it has not yet seen: no stream waits for more


class Speculation(Protocol):
    """A way to guess."""

    def num_drafts(self, sequence: Sequence, num_decoding: int) -> int:
        """How many tokens to guess for a sequence that decodes, of so many that do."""
        ...

    def draft(self, schedule: Schedule) -> None:
        """Fill in the parts' guesses, at most as many as there is room for."""
        ...

    def learn(self, schedule: Schedule, seconds: float) -> None:
        """Note which guesses were right, and how long the step took, guessing included."""
        ...


class NoSpeculation:
    """Guesses nothing."""

    def num_drafts(self, sequence: Sequence, num_decoding: int) -> int:
        return 0

    def draft(self, schedule: Schedule) -> None:
        pass

    def learn(self, schedule: Schedule, seconds: float) -> None:
        pass


@dataclass
class _Record:
    """How well a sequence could be guessed."""

    acceptance: float = FIRST_ACCEPTANCE
    steps_without: int = 0
    patience: int = PROBE_EVERY  # steps until the next try; longer after each that was for nothing


class Lengths:
    """How many tokens to guess: as many as bring the most text in the time, by what was accepted and what it cost."""

    def __init__(self) -> None:
        self._records: WeakKeyDictionary[Sequence, _Record] = WeakKeyDictionary()
        # Of the latest steps without guesses, by the number of sequences.
        self._step_s: dict[int, deque[float]] = {}
        self._draft_s: float | None = None  # more for each guess
        self._num_steps = 0

    def best(self, sequence: Sequence, num_decoding: int) -> int:
        """The number of guesses that pays best; 0 where none does, but for a try now and then."""
        timed = self._step_s.get(num_decoding, ())
        watching = len(timed) < TIMED_FIRST or self._num_steps % PROBE_EVERY == 0
        if sequence.continuation is None or num_decoding > MOST_SEQUENCES or watching:
            return 0
        record = self._records.setdefault(sequence, _Record())
        step_s = median(timed)
        cost = self._draft_s * num_decoding / step_s if self._draft_s is not None and step_s else FIRST_COST
        number = max(range(MOST_DRAFTS + 1), key=lambda count: _gain(record.acceptance, count) / (1 + cost * count))
        if number:
            record.steps_without, record.patience = 0, PROBE_EVERY
        else:
            record.steps_without += 1
            if record.steps_without >= record.patience:
                record.steps_without, record.patience, number = 0, 2 * record.patience, 1
        # The last token comes from the model alone.
        return min(number, sequence.continuation.max_new_tokens - sequence.continuation.num_new_tokens - 1)

    def learn(self, schedule: Schedule, seconds: float) -> None:
        """Note a step's guesses and its time."""
        self._num_steps += 1
        for part in schedule.parts:
            if part.drafts:
                record = self._records.setdefault(part.sequence, _Record())
                checked = min(part.num_accepted + 1, len(part.drafts))  # those behind a wrong one were not
                weight = 1 - (1 - WEIGHT) ** checked
                record.acceptance += weight * (part.num_accepted / checked - record.acceptance)
        if any(part.num_tokens > 1 or (part.num_drafts and not part.drafts) for part in schedule.parts):
            return  # a prompt's chunk says nothing of what a guess costs, nor a draft model that reads what it missed
        number, num_drafts = len(schedule.parts), sum(len(part.drafts) for part in schedule.parts)
        if num_drafts == 0:
            self._step_s.setdefault(number, deque(maxlen=TIMED_FIRST)).append(seconds)
        elif number in self._step_s:
            self._draft_s = _average(self._draft_s, max(0.0, seconds - median(self._step_s[number])) / num_drafts)


def _gain(acceptance: float, count: int) -> float:
    """The tokens that a step brings on average, with so many guesses of which each is right so often."""
    return sum(acceptance**k for k in range(count + 1))


def _average(before: float | None, now: float) -> float:
    return now if before is None else (1 - WEIGHT) * before + WEIGHT * now


@dataclass
class _Index:
    """Where n-grams of a sequence were last followed by something."""

    num_indexed: int = 0
    followers: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramSpeculation:
    """Guesses what followed the last time that the same tokens came, in the prompt or in the answer.

    Source: prompt look-up decoding (Saxena 2023), as in transformers' `prompt_lookup_num_tokens`.

    Args:
        sizes: tokens that must agree, tried in this order.
    """

    def __init__(self, sizes: tuple[int, ...] = (4, 3, 2)) -> None:
        self._sizes = sizes
        self._lengths = Lengths()
        self._indexes: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def num_drafts(self, sequence: Sequence, num_decoding: int) -> int:
        number = self._lengths.best(sequence, num_decoding)
        return number if number > 0 and self._follower(sequence) is not None else 0

    def draft(self, schedule: Schedule) -> None:
        for part in schedule.parts:
            if part.num_drafts and (place := self._follower(part.sequence)) is not None:
                text = list(part.sequence.token_ids)
                for offset in range(part.num_drafts):
                    text.append(text[place + offset])  # a text that repeats itself runs on into its own guesses
                part.drafts = text[len(part.sequence.token_ids) :]

    def learn(self, schedule: Schedule, seconds: float) -> None:
        self._lengths.learn(schedule, seconds)

    def _follower(self, sequence: Sequence) -> int | None:
        """The place behind an earlier occurrence of the last tokens."""
        index, ids = self._indexes.setdefault(sequence, _Index()), sequence.token_ids
        for end in range(index.num_indexed, len(ids) - 1):
            for size in self._sizes:
                if end + 1 >= size:
                    index.followers[tuple(ids[end + 1 - size : end + 1])] = end + 1
        index.num_indexed = max(index.num_indexed, len(ids) - 1)
        places = (index.followers.get(tuple(ids[-size:])) for size in self._sizes if len(ids) >= size)
        return next((place for place in places if place is not None), None)


class ModelSpeculation:
    """Lets a small model guess, whose keys and values lie in blocks of the same numbers.

    Args:
        runner: the draft model with a cache of its own, of as many blocks as the pool has.
        pool: the target's.
        vocab_size: the target's.
    """

    def __init__(self, runner: Runner, pool: BlockPool, vocab_size: int) -> None:
        self._runner = runner
        self._pool = pool
        self._vocab_size = vocab_size
        self._lengths = Lengths()
        # For each block how many of its tokens the draft model has read, and when it was handed out.
        self._read = [(0, 0)] * pool.num_blocks

    def num_drafts(self, sequence: Sequence, num_decoding: int) -> int:
        return self._lengths.best(sequence, num_decoding)

    def draft(self, schedule: Schedule) -> None:
        guessing = self._catch_up([part for part in schedule.parts if part.num_drafts])
        if not guessing:
            return
        choices = {part.sequence: _foresight(part.sequence) for part, _ in guessing}
        parts, logits = [part for part, _ in guessing], torch.cat([row for _, row in guessing])
        while True:
            own = [choices[part.sequence] for part in parts]
            histories = [[*part.sequence.token_ids, *part.drafts] for part in parts]
            rows = []
            for row, (part, token_id) in enumerate(zip(parts, choose(logits, own, histories), strict=True)):
                if token_id is not None:
                    part.drafts.append(token_id)
                    if len(part.drafts) < part.num_drafts:
                        rows.append(row)
            if not rows:
                return
            parts = [parts[row] for row in rows]
            logits = self._logits(
                [
                    Reading(part.drafts[-1:], part.end + len(part.drafts) - 1, part.sequence.block_table)
                    for part in parts
                ]
            )

    def learn(self, schedule: Schedule, seconds: float) -> None:
        self._lengths.learn(schedule, seconds)
        for part in schedule.parts:
            if part.drafts:  # the last guess was not read
                self._note(part.sequence, part.end, part.end + min(part.num_accepted, len(part.drafts) - 1))

    def _catch_up(self, parts: list[Part]) -> list[tuple[Part, Tensor]]:
        """Read what the draft model has not yet seen; the parts for which that was all, with logits [1, V]."""
        readings, complete, budget = [], [], CATCH_UP_TOKENS
        for part in parts:
            ids, start = part.sequence.token_ids, self._num_read(part.sequence)
            end = min(len(ids), start + budget)
            if end > start and max(ids[start:end]) < self._runner.network.model.config.vocab_size:
                budget -= end - start
                readings.append((part, Reading(ids[start:end], start, part.sequence.block_table)))
                complete.append(end == len(ids))
        if not readings:
            return []
        logits = self._logits([reading for _, reading in readings])
        for part, reading in readings:
            self._note(part.sequence, reading.start, reading.start + len(reading.token_ids))
        rows = zip(readings, complete, logits[:, None], strict=True)
        return [(part, row) for (part, _), caught_up, row in rows if caught_up]

    def _logits(self, readings: list[Reading]) -> Tensor:
        """Behind each reading's last token, [readings, V] with the target's V."""
        hidden = self._runner.forward(readings)
        ends = torch.tensor([len(reading.token_ids) for reading in readings]).cumsum(0) - 1
        logits = self._runner.logits(hidden, ends.tolist())
        missing = self._vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[:, : self._vocab_size]

    def _num_read(self, sequence: Sequence) -> int:
        """How many of a sequence's tokens lie in the draft model's cache; its last one is always read anew."""
        number = 0
        for block in sequence.block_table:
            count, stamp = self._read[block]
            if stamp != self._pool.stamps[block]:
                break
            number += count
            if count < self._pool.block_size:
                break
        return min(number, sequence.num_tokens - 1)

    def _note(self, sequence: Sequence, start: int, end: int) -> None:
        """Remember that positions up to `end` have been read, those from `start` on just now."""
        size = self._pool.block_size
        for place in range(start // size, -(-end // size)):
            if place < len(sequence.block_table):  # else it has ended meanwhile
                block = sequence.block_table[place]
                self._read[block] = (min(size, end - place * size), self._pool.stamps[block])


def _foresight(sequence: Sequence) -> Choice:
    """The sequence's way to choose, with the random numbers that are still to come."""
    assert sequence.continuation is not None
    choice = sequence.continuation.choice
    if choice.generator is None:
        return choice
    ahead = torch.Generator(choice.generator.device)
    ahead.set_state(choice.generator.get_state())
    return replace(choice, generator=ahead)
