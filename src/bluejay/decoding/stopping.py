"""When an answer ends: end-of-text, lengths, time, and stop texts; nothing here reads a clock."""

from __future__ import annotations

from enum import StrEnum

from bluejay.decoding.params import DEFAULT_NEW_TOKENS, SamplingParams
from bluejay.errors import ContextLengthExceeded, InvalidRequest


class FinishReason(StrEnum):
    """Why an answer ended; each equals its text."""

    STOP = "stop"  # end-of-text or a stop text
    LENGTH = "length"  # max_new_tokens, max_length, max_time or the model's context
    CANCELLED = "cancelled"
    ERROR = "error"  # no token could be chosen
    FILTERED = "content_filter"  # a server's filter refused it; OpenAI's word


def new_token_limit(params: SamplingParams, num_prompt_tokens: int, n_positions: int) -> int:
    """How many tokens an answer may have; the model's context cuts what was asked for.

    Raises:
        ContextLengthExceeded: if not one token fits behind the prompt.
        InvalidRequest: if the prompt has no token, or as many as `max_length` admits in all.
    """
    if num_prompt_tokens == 0:
        raise InvalidRequest("the prompt has no token; begin it with at least one", param="prompt")
    room = n_positions - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens, and the model's context of {n_positions} must also hold at "
            f"least one new token; shorten the prompt to {n_positions - 1}",
            param="prompt",
        )
    if params.max_new_tokens is not None:
        return min(params.max_new_tokens, room)
    if params.max_length is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if params.max_length <= num_prompt_tokens:
        raise InvalidRequest(
            f"max_length is {params.max_length} and counts the prompt, which has {num_prompt_tokens} tokens; "
            f"expected {num_prompt_tokens + 1} or more, or use max_new_tokens",
            param="max_length",
        )
    return min(params.max_length - num_prompt_tokens, room)


class StopText:
    """Lets text through as it comes, until one of the stop texts is complete.

    Text that may be the beginning of a stop text is held back until it is clear whether it is one.

    Args:
        stops: texts that end the answer and are not part of it.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take new text; return what may be shown of it and of what was held back."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """End the answer: what is still held back was no stop text, and is returned."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def finish_reason(
    token_id: int,
    num_new_tokens: int,
    *,
    eos_ids: tuple[int, ...],
    max_new_tokens: int,
    stopped: bool = False,
    out_of_time: bool = False,
) -> FinishReason | None:
    """Whether an answer ends with the token that it has just been given.

    Args:
        token_id: the new token.
        num_new_tokens: tokens of the answer, the new one included.
        stopped: a stop text is complete.
        out_of_time: more than `max_time` has passed.
    """
    if token_id in eos_ids or stopped:
        return FinishReason.STOP
    if num_new_tokens >= max_new_tokens or out_of_time:
        return FinishReason.LENGTH
    return None
