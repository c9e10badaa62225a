"""Who computes what in the next step: one counter for everything.

A sequence has `num_tokens` tokens, and `num_computed_tokens` of them have been read. A step lets sequences read some of
the rest: one token of those that are decoding, with drafts more; chunks of prompts; what a prefix hit left over; what a
preempted request must read again. Decoding comes first, prompts get what the budget leaves.

Source: the one-counter scheduling is vLLM's (v1/core/sched/scheduler.py, its opening comment).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from bluejay.engine.block_pool import BlockPool
from bluejay.engine.sequence import Request, Sequence, Status

MOST_LOOKED_AT = 256  # waiting requests that a step considers, where those before them wait for a shared prefix


@dataclass
class Part:
    """What a step computes of one sequence: `num_tokens` of its own from `start` on, then guesses.

    Attributes:
        num_drafts: tokens behind them that may be guessed; there is room for their K and V.
        drafts: the guesses.
        num_accepted: how many of them were right.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_drafts: int = 0
    drafts: list[int] = field(default_factory=list)
    num_accepted: int = 0

    @property
    def token_ids(self) -> list[int]:
        """What is read: the sequence's own tokens, then the guesses."""
        return [*self.sequence.token_ids[self.start : self.end], *self.drafts]

    @property
    def end(self) -> int:
        """Where its own tokens end."""
        return self.start + self.num_tokens


@dataclass
class Schedule:
    """One step: its parts, and the blocks whose content must be copied before it, from -> to, all at once."""

    parts: list[Part]
    copies: list[tuple[int, int]]

    @property
    def only_decodes(self) -> bool:
        """Whether each sequence reads its last token, and nothing else is wanted than what comes next."""
        return all(
            part.end == part.sequence.num_tokens
            and part.num_tokens == 1
            and not part.drafts
            and part.sequence.first_unscored is None
            and not part.sequence.request.embeds
            for part in self.parts
        )


class Scheduler:
    """Decides, and keeps the books of blocks.

    Args:
        max_batch_tokens: tokens of a step. Sequences that decode always get theirs.
        max_num_sequences: sequences that run; a wider request runs alone.
        prefix_cache: find beginnings of prompts in the cache.
    """

    def __init__(
        self, pool: BlockPool, *, max_batch_tokens: int, max_num_sequences: int, prefix_cache: bool = True
    ) -> None:
        self.pool = pool
        self.running: list[Request] = []  # by rank
        self.waiting: list[Request] = []  # by rank
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._max_batch_tokens = max_batch_tokens
        self._max_num_sequences = max_num_sequences
        self._prefix_cache = prefix_cache
        self._parts: dict[Sequence, Part] = {}
        self._copies: list[tuple[int, int]] = []

    def add(self, request: Request) -> None:
        """Let a request wait for its turn; its first sequence holds the prompt."""
        insort(self.waiting, request, key=lambda other: other.rank)

    def schedule(
        self,
        *,
        max_prefill_tokens: Callable[[int, int], int | None] = lambda num_reading, num_decoding: None,
        num_drafts: Callable[[Sequence, int], int] = lambda sequence, num_decoding: 0,
    ) -> Schedule:
        """Choose the next step's tokens and find blocks for them.

        Args:
            max_prefill_tokens: told how many requests have prompts to read and how many sequences decode, the tokens of
                prompts that these may wait for; None is no limit.
            num_drafts: told a sequence that decodes and how many do, how many tokens to guess.
        """
        self._parts, self._copies = {}, []
        for request in list(self.running):
            for sequence in self._readers(request):
                if sequence.num_pending == 1:
                    self._take(sequence, 1)
        decoding = list(self._parts.values())
        for part in decoding:
            if part.sequence.first_unscored is None and part.sequence in self._parts:
                self._take_drafts(part, num_drafts(part.sequence, len(decoding)))
        budget = self._max_batch_tokens - sum(part.num_tokens + part.num_drafts for part in self._parts.values())
        # Texts to embed wait for no first token: however many come at once, streams go on as with one.
        num_reading = sum(not request.embeds for request in self.waiting)
        num_reading += sum(any(s.num_pending > 1 for s in r.sequences) and not r.embeds for r in self.running)
        if (most := max_prefill_tokens(num_reading, len(decoding))) is not None:
            budget = min(budget, most)
        for request in list(self.running):
            for sequence in self._readers(request):
                if budget > 0 and sequence.num_pending > 1 and sequence not in self._parts:
                    budget -= self._take(sequence, min(sequence.num_pending, budget))
        if budget > 0 and self.waiting:
            self._admit(budget)
        return Schedule(list(self._parts.values()), self._copies)

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that the K and V of a sequence's next tokens are in the cache."""
        before = sequence.num_computed_tokens // self.pool.block_size
        sequence.num_computed_tokens += num_tokens
        after = sequence.num_computed_tokens // self.pool.block_size
        if self._finds(sequence.request) and after > before:
            hashes = sequence.block_hashes(self.pool.block_size)
            for place in range(before, after):
                self.pool.publish(sequence.block_table[place], hashes[place])
        request = sequence.request
        if 0 < request.leader_tokens <= sequence.num_computed_tokens:
            self._follow_leader(request)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child hold its parent's blocks; who writes first into one that is shared gets a copy."""
        child.block_table = list(parent.block_table)
        self.pool.share(child.block_table)

    def release(self, sequence: Sequence) -> None:
        """Let go of a sequence's blocks."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        for sequence in request.sequences:
            self.release(sequence)
        request.sequences = []
        (self.waiting if request.status == Status.WAITING else self.running).remove(request)
        request.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Check the books. Raises: AssertionError."""
        requests = [*self.running, *self.waiting]
        self.pool.check_integrity([sequence.block_table for request in requests for sequence in request.sequences])
        for request in requests:
            for sequence in request.sequences:
                room = len(sequence.block_table) * self.pool.block_size
                assert 0 <= sequence.num_computed_tokens <= min(sequence.num_tokens, room), "tokens without a block"
                assert request.status == Status.RUNNING or not sequence.block_table, "a waiting request holds blocks"
        for queue in (self.running, self.waiting):
            ranks = [request.rank for request in queue]
            assert ranks == sorted(ranks), "a queue is out of order"

    def _readers(self, request: Request) -> list[Sequence]:
        """The sequences that may read on: only the first one while it leads the others."""
        if request.status != Status.RUNNING:  # preempted within this step
            return []
        return request.sequences[:1] if request.leader_tokens else list(request.sequences)

    def _take(self, sequence: Sequence, num_tokens: int) -> int:
        """Plan to read so many tokens; returns how many, 0 if the request had to be preempted for want of blocks."""
        if sequence.request.status != Status.RUNNING or not self._make_room(sequence, num_tokens):
            return 0
        self._parts[sequence] = Part(sequence, sequence.num_computed_tokens, num_tokens)
        return num_tokens

    def _take_drafts(self, part: Part, num_drafts: int) -> None:
        """Make room behind a part for guesses, as far as blocks are free: nobody is preempted for a guess."""
        table, size = part.sequence.block_table, self.pool.block_size
        while part.num_drafts < num_drafts:
            if part.end + part.num_drafts == len(table) * size:
                if self.pool.num_free == 0:
                    return
                table.append(self.pool.allocate())
            part.num_drafts += 1

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """See to it that the sequence may write its next tokens' K and V; preempt others, the youngest first."""
        size = self.pool.block_size
        start = sequence.num_computed_tokens
        table = sequence.block_table
        last = -(-(start + num_tokens) // size)
        shared = [place for place in range(start // size, len(table)) if not self.pool.may_write(table[place])]
        while self.pool.num_free < max(0, last - len(table)) + len(shared):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence.request:
                return False
            # A holder that is gone may leave a block to this one alone.
            shared = [place for place in shared if not self.pool.may_write(table[place])]
        for place in shared:
            block = self.pool.allocate()
            if start > place * size:  # else nothing in it is of use
                self._copies.append((table[place], block))
            self.pool.release([table[place]])
            table[place] = block
        table.extend(self.pool.allocate() for _ in range(last - len(table)))
        return True

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; it will read all its tokens again."""
        self.num_preemptions += 1
        held = {block for sequence in request.sequences for block in sequence.block_table}
        self._copies = [(source, to) for source, to in self._copies if to not in held]
        for sequence in request.sequences:
            self._parts.pop(sequence, None)
            self.release(sequence)
            sequence.num_computed_tokens = 0
            sequence.logits = None
        request.leader_tokens = _shared_tokens(request.sequences) if len(request.sequences) > 1 else 0
        self.running.remove(request)
        request.status = Status.WAITING
        self.add(request)

    def _follow_leader(self, request: Request) -> None:
        """Share with the other sequences what the first one has read for them."""
        leader, count = request.sequences[0], request.leader_tokens
        request.leader_tokens = 0
        blocks = leader.block_table[: -(-count // self.pool.block_size)]
        for follower in request.sequences[1:]:
            follower.block_table = list(blocks)
            self.pool.share(blocks)
            follower.num_computed_tokens = count

    def _admit(self, budget: int) -> None:
        """Let waiting requests begin, in order, while there is room."""
        coming = self._coming_hashes()
        num_sequences = sum(request.width for request in self.running)
        for request in self.waiting[:MOST_LOOKED_AT]:
            if budget <= 0 or (self.running and num_sequences + request.width > self._max_num_sequences):
                return
            sequence = request.sequences[0]
            found = self._find(sequence)
            hashes = sequence.block_hashes(self.pool.block_size) if self._finds(request) else []
            if len(found) < self._most_hits(sequence) and hashes[len(found)] in coming:
                continue  # somebody is reading just that: what waits a step costs nothing then
            if not self._has_room(sequence, found):
                return
            self._begin(request, found)
            num_sequences += request.width
            budget -= self._take(sequence, min(sequence.num_pending, budget))
            coming.update(hashes[sequence.num_computed_tokens // self.pool.block_size :])

    def _coming_hashes(self) -> set[bytes]:
        """The hashes of the blocks that prompts are about to fill."""
        size = self.pool.block_size
        finding = (request for request in self.running if self._finds(request))
        reading = (s for request in finding for s in request.sequences[:1] if s.num_pending > 1)
        return {h for s in reading for h in s.block_hashes(size)[s.num_computed_tokens // size :]}

    def _most_hits(self, sequence: Sequence) -> int:
        """Blocks that may be taken from the cache: the last token must be read, and those before a score."""
        if not self._finds(sequence.request):
            return 0
        last = sequence.num_tokens - 1 if sequence.first_unscored is None else sequence.first_unscored
        return last // self.pool.block_size

    def _finds(self, request: Request) -> bool:
        """Whether a request shares blocks with others: of a text to embed each token must be read, and none is kept."""
        return self._prefix_cache and not request.embeds

    def _find(self, sequence: Sequence) -> list[int]:
        return self.pool.find(sequence.block_hashes(self.pool.block_size)[: self._most_hits(sequence)])

    def _has_room(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether its tokens fit beside one more block for each that runs, so that nobody is preempted soon."""
        needed = -(-sequence.num_tokens // self.pool.block_size) - len(found)
        spare = sum(len(request.sequences) for request in self.running)
        return needed + spare <= self.pool.num_free - self.pool.num_cached(found)

    def _begin(self, request: Request, found: list[int]) -> None:
        self.waiting.remove(request)
        request.status = Status.RUNNING
        insort(self.running, request, key=lambda other: other.rank)
        sequence = request.sequences[0]
        self.pool.share(found)
        sequence.block_table = found
        sequence.num_computed_tokens = len(found) * self.pool.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = sequence.num_computed_tokens
            self.num_prompt_tokens += sequence.num_tokens
            self.num_cached_tokens += sequence.num_computed_tokens
        if 0 < request.leader_tokens <= sequence.num_computed_tokens:
            self._follow_leader(request)


def _shared_tokens(sequences: Iterable[Sequence]) -> int:
    """How many first tokens all have in common and one may read for all: not each one's last, nor what it scores."""
    columns = zip(*(sequence.token_ids[: _end_of_shared(sequence)] for sequence in sequences), strict=False)
    return sum(1 for _ in takewhile(lambda column: min(column) == max(column), columns))


def _end_of_shared(sequence: Sequence) -> int:
    last = sequence.num_tokens - 1
    return last if sequence.first_unscored is None else min(last, sequence.first_unscored)
