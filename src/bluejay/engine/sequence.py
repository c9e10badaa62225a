"""A request while it runs, and its token streams."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from torch import Tensor

from bluejay.engine.block_pool import chain_hashes
from bluejay.engine.continuation import Continuation

if TYPE_CHECKING:
    from bluejay.decoding.beam import Answer, Search
    from bluejay.decoding.sampler import TokenLogprobs
    from bluejay.engine.request import GenerationRequest


class Status(StrEnum):
    """Where a request is; each equals its text."""

    WAITING = "waiting"  # for its first step, or for its next one after a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One token stream: a prompt, an answer, a beam on its way, an answer of beams that is read for its scores, or a
    text that is embedded.

    Attributes:
        token_ids: prompt and answer so far.
        num_computed_tokens: positions whose K and V are in the cache. The scheduler lets it chase `num_tokens`: chunks
            of a prompt, prefix hits, preemption and drafts are the same case.
        block_table: the blocks that hold them, in order.
        continuation: how tokens are chosen and become text; None for beams and for what is only read.
        logits: [1, V] behind the last token, while a beam waits for its siblings.
        score_from: the first position whose next token's log-probability is wanted; None if none is.
        logprobs: those found so far.
        answer: what is read for its scores.
        hidden_sum: [n_embd] float32, over the first `num_summed` tokens of a text that is embedded.
    """

    request: Request
    index: int
    token_ids: list[int]
    continuation: Continuation | None = None
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    score_from: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    answer: Answer | None = None
    hidden_sum: Tensor | None = None
    num_summed: int = 0
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that the model has not yet read."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def first_unscored(self) -> int | None:
        """The first position whose next token's log-probability is still wanted; None if none is."""
        if self.score_from is None:
            return None
        position = self.score_from + len(self.logprobs)
        return position if position < len(self.token_ids) - 1 else None

    def block_hashes(self, block_size: int) -> list[bytes]:
        """The hashes of the sequence's full blocks, each computed once."""
        known = len(self._hashes)
        if known < len(self.token_ids) // block_size:
            parent = self._hashes[-1] if known else self.request.salt
            self._hashes.extend(chain_hashes(self.token_ids[known * block_size :], block_size, parent))
        return self._hashes

    def fork(self, index: int, token_ids: list[int]) -> Sequence:
        """A sequence that begins with the same tokens; the blocks are the scheduler's affair."""
        known = list(self._hashes)
        return Sequence(self.request, index, token_ids, num_computed_tokens=self.num_computed_tokens, _hashes=known)


@dataclass(eq=False)
class Request:
    """What a caller asked, while it runs.

    Attributes:
        id: the engine's name for it; who came first has the smaller one.
        sequences: those that are not finished. At first one, with the prompt; it forks when the prompt is read.
        open_indexes: of the answers that are still owed.
        prompt_logprobs: of the prompt's tokens behind the first, once it has been read.
        has_told_prompt: whether an event has carried them.
        search: a beam search on its way.
        leader_tokens: how many tokens its sequences share, of which the first one reads them for all after a
            preemption; 0 if each reads its own.
        num_cached_tokens: of the prompt, found in the cache; None before it began.
        embeds: whether its prompt is a text of which the mean of the last hidden states is wanted, and no answer.
        arrived_s, started_s, first_token_s: by the engine's clock; None until then.
    """

    id: int
    asked: GenerationRequest
    prompt: Continuation
    arrived_s: float = 0.0
    status: Status = Status.WAITING
    sequences: list[Sequence] = field(default_factory=list)
    open_indexes: list[int] = field(init=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    has_told_prompt: bool = False
    search: Search | None = None
    leader_tokens: int = 0
    num_cached_tokens: int | None = None
    num_generated_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    embeds: bool = False
    started_s: float | None = None
    first_token_s: float | None = None
    salt: bytes = field(init=False)

    def __post_init__(self) -> None:
        # Two tenants never share a block, nor can one tell by its own waiting what another has asked.
        self.salt = hashlib.sha256(b"bluejay prefix " + self.asked.tenant.encode("utf-8", "surrogatepass")).digest()
        self.open_indexes = list(range(self.asked.params.num_return_sequences))

    @property
    def width(self) -> int:
        """The sequences that it will have."""
        params = self.asked.params
        return max(params.num_beams, params.num_return_sequences)

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is served sooner: the higher priority, then who came first."""
        return (-self.asked.priority, self.id)

    def most_blocks(self, block_size: int) -> int:
        """The blocks it needs if nothing is found in the cache and every answer is as long as it may be."""
        num_prompt_tokens = len(self.asked.prompt_token_ids)
        shared = (num_prompt_tokens - 1) // block_size  # the last one is read again for the scores of answers of beams
        longest = -(-(num_prompt_tokens + self.prompt.max_new_tokens) // block_size)
        return shared + self.width * (longest - shared)
