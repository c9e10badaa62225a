"""What OpenAI's clients get: choices, log-probabilities, chunks, usage."""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from bluejay.decoding.logprobs import TokenLogprobs
from bluejay.engine.request import GenerationEvent, RequestOutput, SequenceOutput, Usage
from bluejay.errors import EngineError
from bluejay.server import sse
from bluejay.server.call import FEW_VALUES
from bluejay.server.dialects.openai_bodies import CompletionBody
from bluejay.server.generation import Run
from bluejay.server.threads import Threads
from bluejay.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own bottom


@dataclass(frozen=True)
class Completion:
    """One request to complete, and how its answers look.

    Attributes:
        run: what generates.
        tokenizer: of its model.
        writing: where large chunks are rendered and written.
    """

    body: CompletionBody
    run: Run
    tokenizer: Tokenizer
    writing: Threads
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self) -> dict[str, Any]:
        """What a whole answer and each chunk begin with; the model is the one that really speaks."""
        return {
            "id": f"cmpl-{self.run.caller.request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.run.asked.model.name,
            "system_fingerprint": None,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer without a stream."""
        choices = []
        for place, output in enumerate(outputs):
            for index, sequence in enumerate(best(output.sequences, self.body.num_answers)):
                writer = self.writer(place)
                text, logprobs = writer.begin(output.prompt_logprobs)
                logprobs += writer.tokens(sequence.token_ids, sequence.logprobs or [])
                choices.append(
                    {
                        "index": place * self.body.num_answers + index,
                        "text": text + sequence.text,
                        "logprobs": None if self.body.logprobs is None else columns(logprobs),
                        "finish_reason": sequence.finish_reason,
                    }
                )
        return {**self.head(), "choices": choices, "usage": usage(self.run.usage)}

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as a stream; the choices come as they are made."""
        plain = self.body.logprobs is None and not self.body.echo
        return self._plain_chunks() if plain else self._full_chunks()

    def _end(self) -> bytes:
        """What a stream ends with."""
        if not self._tells_usage:
            return sse.DONE
        return sse.event({**self.head(), "choices": [], "usage": usage(self.run.usage)}) + sse.DONE

    async def _plain_chunks(self) -> AsyncGenerator[bytes, None]:
        """Of texts alone: what is the same in all chunks of a choice is written once."""
        written: dict[tuple[int, int], sse.TextEvents] = {}
        async with aclosing(self.run.events()) as events:
            async for event in events:
                if event.finish_reason is not None:
                    raise_error(event)
                    yield sse.event(self._chunk(event, event.text, None))
                elif event.text:
                    key = (event.request, event.index)
                    if (texts := written.get(key)) is None:
                        texts = written[key] = sse.TextEvents(self._chunk(event, sse.TextEvents.MARK, None))
                    yield texts.event(event.text)
        yield self._end()

    async def _full_chunks(self) -> AsyncGenerator[bytes, None]:
        """With the prompt or log-probabilities."""
        writers: dict[tuple[int, int], Writer] = {}
        prompts: dict[int, list[TokenLogprobs | None] | None] = {}
        async with aclosing(self.run.events()) as events:
            async for event in events:
                raise_error(event)
                if event.prompt_logprobs is not None:
                    prompts[event.request] = event.prompt_logprobs
                begins = (key := (event.request, event.index)) not in writers
                if begins:
                    writers[key] = self.writer(event.request)
                prompt = prompts.get(event.request) if begins else None
                num_tokens = len(event.token_ids) + len(prompt or ())
                if num_tokens * (1 + (self.body.logprobs or 0)) <= FEW_VALUES:
                    chunk = self._full_chunk(event, writers[key], begins, prompt, sse.event)
                else:
                    many = self._full_chunk, event, writers[key], begins, prompt, sse.large_event
                    chunk = await self.writing.run(*many)
                if chunk:
                    yield chunk
        yield self._end()

    def _full_chunk(
        self,
        event: GenerationEvent,
        writer: Writer,
        begins: bool,
        prompt: Sequence[TokenLogprobs | None] | None,
        written: Callable[[Any], bytes],
    ) -> bytes:
        """What an event says of an answer, behind its prompt where it begins; b"" if that is nothing."""
        text, logprobs = writer.begin(prompt) if begins else ("", list[Token]())
        text += event.text
        logprobs += writer.tokens(event.token_ids, event.logprobs)
        if not text and not logprobs and event.finish_reason is None:
            return b""
        return written(self._chunk(event, text, logprobs))

    def _chunk(self, event: GenerationEvent, text: str, logprobs: list[Token] | None) -> dict[str, Any]:
        asks = self.body.logprobs is not None
        choice = {
            "index": event.request * self.body.num_answers + event.index,
            "text": text,
            "logprobs": columns(logprobs or []) if asks else None,
            "finish_reason": event.finish_reason,
        }
        return {**self.head(), "choices": [choice], **({"usage": None} if self._tells_usage else {})}

    @property
    def _tells_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def writer(self, place: int) -> Writer:
        """What writes one answer to the prompt of this place."""
        return Writer(self.tokenizer, self.run.asked.items[place].prompt, self.run.prompts[place], bool(self.body.echo))


def raise_error(event: GenerationEvent) -> None:
    """Raises: EngineError if the event says that the engine could not go on."""
    if event.error is not None:
        raise EngineError(event.error)


def best(sequences: Sequence[SequenceOutput], count: int) -> list[SequenceOutput]:
    """The `count` answers with the highest log-probability per token, likeliest first; all as they are if no more."""
    if len(sequences) <= count:
        return list(sequences)
    return sorted(sequences, key=_mean_logprob, reverse=True)[:count]


def _mean_logprob(sequence: SequenceOutput) -> float:
    if not sequence.logprobs:
        return LEAST_LOGPROB
    return sum(token.logprob for token in sequence.logprobs) / len(sequence.logprobs)


def usage(found: Usage) -> dict[str, Any]:
    """What a request took."""
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.generated_tokens,
        "total_tokens": found.prompt_tokens + found.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
    }


@dataclass(frozen=True)
class Token:
    """A token as it is told: its text, its log-probability, the likeliest texts, and where in the text it begins."""

    text: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


def columns(tokens: Sequence[Token]) -> dict[str, Any]:
    """OpenAI's form: a list of each kind."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


class Writer:
    """Writes the tokens of one answer, behind its prompt where that is echoed, with the places where they begin.

    Args:
        prompt: as it was sent.
        prompt_ids: its tokens.
        echo: whether the answer begins with the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str | Sequence[int], prompt_ids: list[int], echo: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._text = "" if not echo else prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids)
        self._offset = len(self._text)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def begin(self, logprobs: Sequence[TokenLogprobs | None] | None) -> tuple[str, list[Token]]:
        """The prompt's text and tokens; nothing where it is not echoed, no tokens where they were not asked for."""
        if not logprobs:
            return self._text, []
        tokens, decoder, offset = [], codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
        for token_id, found in zip(self._prompt_ids, logprobs, strict=True):
            tokens.append(self._token(token_id, found, min(offset, len(self._text))))
            offset += len(decoder.decode(self._tokenizer.token_bytes(token_id)))
        return self._text, tokens

    def tokens(self, token_ids: Iterable[int], logprobs: Sequence[TokenLogprobs]) -> list[Token]:
        """The next tokens of the answer; none where log-probabilities were not asked for."""
        written = []
        for token_id, found in zip(token_ids, logprobs, strict=False):
            written.append(self._token(token_id, found, self._offset))
            if not self._tokenizer.is_special(token_id):
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return written

    def _token(self, token_id: int, found: TokenLogprobs | None, offset: int) -> Token:
        text = shown(self._tokenizer, token_id)
        if found is None:
            return Token(text, None, None, offset)
        logprob = max(LEAST_LOGPROB, found.logprob)
        top: dict[str, float] = {}
        for other, value in (*found.top, (token_id, logprob)):
            top.setdefault(shown(self._tokenizer, other), max(LEAST_LOGPROB, value))
        return Token(text, logprob, top, offset)


def shown(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text, or, where it is a part of a character, as OpenAI shows its bytes: `bytes:\xe2\x80`."""
    own = tokenizer.token_bytes(token_id)
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)
