"""One answer on its way: its tokens, its text, and when it ends; what every engine does with a token it has chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bluejay.decoding.beam import Answer, BeamRules, Search, beam_search
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.sampler import Choice, TokenLogprobs, generator_for, token_logprobs
from bluejay.decoding.stopping import FinishReason, StopText, finish_reason
from bluejay.engine.request import GenerationEvent
from bluejay.tokenizer import TextStream, Tokenizer


@dataclass
class Continuation:
    """One answer on its way.

    Attributes:
        request, index: whose answer it is, and which one.
        history: the tokens of prompt and answer.
        max_new_tokens: of the answer, by what was asked for and the model's context.
    """

    request: int
    index: int
    history: list[int]
    params: SamplingParams
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    choice: Choice
    tokenizer: Tokenizer | None
    num_new_tokens: int = 0
    text: TextStream | None = field(init=False)
    stop: StopText = field(init=False)

    def __post_init__(self) -> None:
        self.text = None if self.tokenizer is None else TextStream(self.tokenizer, skip_special_tokens=True)
        self.stop = StopText(self.params.stop_texts)

    def forks(self, indexes: Iterable[int], device: torch.device) -> Iterator[Continuation]:
        """Those of the request's answers that have these numbers, each with its own randomness."""
        for index in indexes:
            generator = generator_for(self.params, index, device) if self.params.do_sample else None
            choice = Choice(self.choice.processors, generator)
            yield replace(self, index=index, history=list(self.history), choice=choice)

    def accept(self, token_id: int | None, logits: Tensor, elapsed_s: float) -> GenerationEvent:
        """Append the chosen token; logits [1, V] are those that it was chosen from."""
        if token_id is None:
            return GenerationEvent(self.request, self.index, [], self._rest(), finish_reason=FinishReason.ERROR)
        self.history.append(token_id)
        self.num_new_tokens += 1
        text = "" if self.text is None else self.stop.push(self.text.push(token_id))
        params = self.params
        reason = finish_reason(
            token_id,
            self.num_new_tokens,
            eos_ids=self.eos_ids,
            max_new_tokens=self.max_new_tokens,
            stopped=self.stop.stopped,
            out_of_time=params.max_time is not None and elapsed_s > params.max_time,
        )
        if reason is not None:
            text += self._rest()
        logprobs = [] if params.logprobs is None else token_logprobs(logits, [token_id], params.logprobs)
        return GenerationEvent(self.request, self.index, [token_id], text, logprobs, reason)

    def begin_search(self, device: torch.device) -> Search:
        """The beam search that the request's options ask for."""
        params = self.params
        return beam_search(
            BeamRules(
                params=params,
                prompt=self.history,
                processors=self.choice.processors,
                eos_ids=self.eos_ids,
                max_new_tokens=self.max_new_tokens,
                generator=generator_for(params, 0, device) if params.do_sample else None,
                is_stopped=self.holds_stop_text if params.stop_texts else None,
            )
        )

    def end_beam(self, index: int, answer: Answer, logprobs: list[TokenLogprobs]) -> GenerationEvent:
        """The event of a finished beam: an answer comes as a whole."""
        reason = FinishReason.STOP if answer.complete else FinishReason.LENGTH
        reason = reason if answer.token_ids else FinishReason.ERROR
        text = self.text_of(answer.token_ids)
        return GenerationEvent(self.request, index, answer.token_ids, text, logprobs, reason, answer.score)

    def text_of(self, token_ids: Iterable[int]) -> str:
        """The text of a whole answer, up to a stop text."""
        if self.tokenizer is None:
            return ""
        stop = StopText(self.params.stop_texts)
        return stop.push(self.tokenizer.decode(token_ids, skip_special_tokens=True)) + stop.finish()

    def holds_stop_text(self, token_ids: list[int]) -> bool:
        """Whether a stop text is complete in an answer."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return any(stop in text for stop in self.params.stop_texts)

    def _rest(self) -> str:
        """What was held back when the answer ends."""
        return "" if self.text is None else self.stop.push(self.text.finish()) + self.stop.finish()
