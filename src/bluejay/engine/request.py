"""What goes into generation and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from bluejay.decoding.logprobs import TokenLogprobs
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.stopping import FinishReason
from bluejay.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EmbeddingEvent",
    "FinishReason",
    "GenerationEvent",
    "GenerationRequest",
    "RequestOutput",
    "Score",
    "SequenceOutput",
    "Usage",
]

# What is said of a FinishReason.ERROR whose event has no `error`.
NO_TOKEN = (
    "no token could be chosen: the model's scores are no numbers, or every token is banned; try dtype float32, "
    "remove_invalid_values, or fewer bans"
)


def check_ids_are_whole(token_ids: Sequence[int], param: str) -> None:
    """Raises: InvalidRequest for what no token id can be; which ids there are the model knows."""
    if kinds := {kind for kind in {*map(type, token_ids)} if issubclass(kind, bool) or not issubclass(kind, Integral)}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidRequest(f"{param} holds {names}, expected token ids, which are whole numbers", param)


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to go on from it.

    Attributes:
        priority: the higher is served first; equals in the order of their coming.
        tenant: only requests of one tenant share what the cache remembers of prompts.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""

    def __post_init__(self) -> None:
        check_ids_are_whole(self.prompt_token_ids, "prompt")
        if not isinstance(self.tenant, str):
            raise InvalidRequest(f"tenant is {self.tenant!r:.80}, expected a text")


@dataclass(frozen=True)
class Usage:
    """What a request took, told with its last event.

    Attributes:
        prompt_tokens: of which `cached_tokens` were found in the cache.
        generated_tokens: of all its answers; of beams those of the answers that came out.
        drafted_tokens, accepted_tokens: guessed by speculation, and right.
        queued_s, first_token_s: from its arrival to its first step and to its first token; None if it had none.
        per_token_s: from one token of an answer to the next, on average; None with fewer than two.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queued_s: float | None = None
    first_token_s: float | None = None
    per_token_s: float | None = None


@dataclass(frozen=True)
class GenerationEvent:
    """What one step brought for one sequence of one request.

    Greedy and sampled sequences bring one token each step. A beam search knows its answers only at its end: each comes
    in one event with all its tokens.

    Attributes:
        request: the request's place in the list that was asked for.
        index: the sequence's number within its request; the best beam is 0.
        token_ids: the new tokens; none where no token could be chosen.
        text: what may be shown now, whole characters only; "" where no tokenizer is at hand.
        logprobs: one for each token where asked for, else empty.
        finish_reason: why the sequence ends with this event, None while it goes on.
        beam_score: log-probability over length ** length_penalty, of a beam search.
        prompt_logprobs: with the request's first event, where asked for: one for each token of the prompt, None for
            the first.
        usage: with the request's last event, where an `Engine` generates.
        error: what went wrong, where `finish_reason` is "error" and it was not that no token could be chosen.
    """

    request: int
    index: int
    token_ids: list[int]
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    beam_score: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    usage: Usage | None = None
    error: str | None = None


@dataclass(frozen=True)
class EmbeddingEvent(GenerationEvent):
    """A text has been read to its end.

    Attributes:
        vector: [n_embd] float32 on the CPU, the mean over the text's tokens of the last hidden states.
    """

    vector: Tensor | None = None


@dataclass
class SequenceOutput:
    """One answer.

    Attributes:
        token_ids: the new tokens, an end-of-text that ended them included.
        text: the new text, without special tokens and up to a stop text.
        finish_reason: why it ended.
        logprobs: one for each token; None where not asked for.
        cumulative_logprob: the sum of the tokens' log-probabilities; None where `logprobs` is.
        beam_score: log-probability over length ** length_penalty; None without beams.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    beam_score: float | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        return None if self.logprobs is None else sum(token.logprob for token in self.logprobs)

    def add(self, event: GenerationEvent) -> None:
        """Append what an event brought."""
        self.token_ids += event.token_ids
        self.text += event.text
        if self.logprobs is not None:
            self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason
        self.beam_score = event.beam_score


@dataclass
class RequestOutput:
    """All answers to one prompt; `text`, `token_ids`, `finish_reason` and `logprobs` are those of the first.

    Attributes:
        prompt_token_ids, prompt: the prompt as ids and, where it came as text, as text.
        sequences: `num_return_sequences` answers; of beams the best comes first.
        prompt_logprobs: one for each token of the prompt, None for the first; None where not asked for.
        usage: what it took; None where a `PlainEngine` generated.
    """

    prompt_token_ids: list[int]
    sequences: list[SequenceOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt: str = ""
    usage: Usage | None = None

    @classmethod
    def blank(cls, request: GenerationRequest) -> RequestOutput:
        """An output that waits for its events."""
        params = request.params
        sequences = [
            SequenceOutput(logprobs=None if params.logprobs is None else []) for _ in range(params.num_return_sequences)
        ]
        return cls(list(request.prompt_token_ids), sequences)

    def add(self, event: GenerationEvent) -> None:
        """Take over what an event brought."""
        self.sequences[event.index].add(event)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.usage = event.usage or self.usage

    @property
    def text(self) -> str:
        return self.sequences[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.sequences[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.sequences[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.sequences[0].logprobs


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    Attributes:
        logprob: natural log-probability of the whole continuation.
        is_greedy: whether each of its tokens is the likeliest one.
    """

    logprob: float
    is_greedy: bool
