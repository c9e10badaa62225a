"""The plain engine: prompts in, tokens out, a batch at a time, with a contiguous cache.

It is the slow twin of every faster engine: what they compute must equal what this one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bluejay.decoding.beam import Answer, BeamRules, beam_search
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.processors import processors_for
from bluejay.decoding.sampler import Choice, TokenLogprobs, choose, generator_for, token_logprobs
from bluejay.decoding.stopping import FinishReason, StopText, finish_reason, new_token_limit
from bluejay.engine.contiguous_cache import ContiguousCache
from bluejay.engine.kernel_cache import CACHE_DTYPE, KernelAttention, KernelCache
from bluejay.engine.recorded_step import decode
from bluejay.engine.request import GenerationEvent, GenerationRequest, RequestOutput, Score, SequenceOutput
from bluejay.errors import ContextLengthExceeded, InvalidRequest, UnsupportedOption
from bluejay.model import CausalAttention, LanguageModel
from bluejay.model.quantized import Quantization
from bluejay.tokenizer import TextStream, Tokenizer

LOGITS_CHUNK = 256  # positions whose logits are held at once: 50 MB at GPT-J's vocabulary


class PlainEngine:
    """Generates, scores and embeds with one model.

    Args:
        model: the network, in evaluation mode.
        tokenizer: turns tokens into text, and says which ids have a token at all: others are never chosen. Without
            it, events and outputs carry no text, and `stop` is refused.
        device: where the model is.
        max_rows: rows that run together, be they of one request or of several; further ones wait. Beams of one search
            always run together.
        cache_dtype: of the keys and values that are kept: float32, float16 or bfloat16. None: float16 for a quantised
            model, else as the model computes them. With a dtype of their own, `bluejay.ops` attends to them.
        clock: seconds, for `max_time`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str = "cpu",
        max_rows: int = 32,
        cache_dtype: torch.dtype | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self._max_rows = max_rows
        self._quantized = Quantization.of(model.config) is not None
        self._cache_dtype = CACHE_DTYPE if cache_dtype is None and self._quantized else cache_dtype
        self._clock = clock
        self._forbidden = None if tokenizer is None else self._ids_without_token(tokenizer)

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[GenerationEvent]:
        """Yield what each step brings, until every sequence has ended.

        Raises: RequestError for the first request that cannot be served, before anything runs.
        """
        return self._events([self._prepare(place, request) for place, request in enumerate(requests)])

    def generate(self, requests: Sequence[GenerationRequest]) -> list[RequestOutput]:
        """Run all requests to their end; the outputs are in the order of the requests.

        Raises: as `stream`.
        """
        events = self.stream(requests)
        outputs = []
        for request in requests:
            params = request.params
            blank = [
                SequenceOutput(logprobs=None if params.logprobs is None else [])
                for _ in range(params.num_return_sequences)
            ]
            outputs.append(RequestOutput(list(request.prompt_token_ids), blank))
        for event in events:
            outputs[event.request].sequences[event.index].add(event)
        for output, request in zip(outputs, requests, strict=True):
            if request.params.prompt_logprobs is not None:
                prompt = output.prompt_token_ids
                rest = self._logprobs(prompt[:1], prompt[1:], request.params.prompt_logprobs)
                output.prompt_logprobs = [None, *rest]
        return outputs

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """How likely each continuation is behind its context, both as token ids.

        Raises:
            InvalidRequest: if a context has no token.
            ContextLengthExceeded: if context and continuation together are longer than the model's context and one.
        """
        for context, continuation in pairs:
            self._check_ids([*context, *continuation])
            if not context:
                raise InvalidRequest("the context has no token; begin it with the end-of-text token", "context")
            self._check_length(len(context) + len(continuation) - 1)
        # The last token is only predicted, never read.
        texts = [[*context, *continuation[:-1]] for context, continuation in pairs]
        scores: dict[int, Score] = {}
        for place, hidden in self._hidden_states(texts):
            context, continuation = pairs[place]
            logprob, is_greedy = 0.0, True
            for logits, ids in self._chunks(hidden[len(context) - 1 :], continuation):
                logprob += sum(token.logprob for token in token_logprobs(logits, ids, 0))
                is_greedy = is_greedy and logits.argmax(-1).tolist() == list(ids)
            scores[place] = Score(logprob, is_greedy)
        return [scores[place] for place in range(len(pairs))]

    @torch.inference_mode()
    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The mean over tokens of the last hidden states, [n, n_embd] float32 on the CPU.

        Raises: InvalidRequest if a text has no token, ContextLengthExceeded if it has too many.
        """
        for text in texts:
            self._check_ids(text)
            if not text:
                raise InvalidRequest("a text has no token; nothing can be embedded", "text")
            self._check_length(len(text))
        means = torch.empty(len(texts), self._model.config.n_embd)
        for place, hidden in self._hidden_states(texts):
            means[place] = hidden.float().mean(0)
        return means

    @torch.inference_mode()
    def _events(self, sequences: list[_Sequence]) -> Iterator[GenerationEvent]:
        batch: list[tuple[_Sequence, range]] = []
        num_rows = 0
        for sequence in sequences:
            if sequence.params.num_beams > 1:
                yield from self._run_beams(sequence)
                continue
            count = sequence.params.num_return_sequences
            for first in range(0, count, self._max_rows):
                indexes = range(first, min(first + self._max_rows, count))
                if num_rows + len(indexes) > self._max_rows:
                    yield from self._run(batch)
                    batch, num_rows = [], 0
                batch.append((sequence, indexes))
                num_rows += len(indexes)
        if batch:
            yield from self._run(batch)

    def _run(self, prompts: list[tuple[_Sequence, range]]) -> Iterator[GenerationEvent]:
        """Greedy and sampled sequences together: one forward pass a token, rows leave as they end.

        Args:
            prompts: each with the numbers of those of its answers that are to run now.
        """
        cache = self._new_cache()
        began = self._clock()
        logits = self._prefill(cache, [prompt.history for prompt, _ in prompts])
        owners = [row for row, (_, indexes) in enumerate(prompts) for _ in indexes]
        sequences = [fork for prompt, indexes in prompts for fork in prompt.forks(indexes, self._device)]
        if len(owners) > len(prompts):
            cache.select(owners)
            logits = logits[owners]
        while True:
            token_ids = choose(logits, [s.choice for s in sequences], [s.history for s in sequences])
            elapsed = self._clock() - began
            going_on = []
            for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
                event = sequence.accept(token_id, logits[row : row + 1], elapsed)
                yield event
                if event.finish_reason is None:
                    going_on.append(row)
            if not going_on:
                return
            if len(going_on) < len(sequences):
                sequences = [sequences[row] for row in going_on]
                cache.select(going_on)
            logits = self._decode(cache, [s.history for s in sequences])

    def _run_beams(self, sequence: _Sequence) -> Iterator[GenerationEvent]:
        """One beam search: a row for each running beam."""
        cache = self._new_cache()
        params, began = sequence.params, self._clock()
        search = beam_search(
            BeamRules(
                params=params,
                prompt=sequence.history,
                processors=sequence.choice.processors,
                eos_ids=sequence.eos_ids,
                max_new_tokens=sequence.max_new_tokens,
                generator=generator_for(params, 0, self._device) if params.do_sample else None,
                is_stopped=sequence.holds_stop_text if params.stop_texts else None,
            )
        )
        logits = self._prefill(cache, [sequence.history])
        beams = [sequence.history]
        while True:
            out_of_time = params.max_time is not None and self._clock() - began > params.max_time
            step = search.step(logits, out_of_time=out_of_time)
            if search.done:
                break
            beams = [[*beams[row], token] for row, token in zip(step.parents, step.token_ids, strict=True)]
            cache.select(step.parents)
            logits = self._decode(cache, beams)
        for index, answer in enumerate(search.finish()):
            yield self._beam_event(sequence, index, answer)

    def _beam_event(self, sequence: _Sequence, index: int, answer: Answer) -> GenerationEvent:
        reason = FinishReason.STOP if answer.complete else FinishReason.LENGTH
        logprobs: list[TokenLogprobs] = []
        if sequence.params.logprobs is not None:
            logprobs = self._logprobs(sequence.history, answer.token_ids, sequence.params.logprobs)
        return GenerationEvent(
            sequence.request,
            index,
            answer.token_ids,
            sequence.text_of(answer.token_ids),
            logprobs,
            reason if answer.token_ids else FinishReason.ERROR,
            answer.score,
        )

    def _prepare(self, place: int, request: GenerationRequest) -> _Sequence:
        """Check a request against this model."""
        params, prompt = request.params, list(request.prompt_token_ids)
        config = self._model.config
        self._check_ids(prompt)
        limit = new_token_limit(params, len(prompt), config.n_positions)
        if params.stop_texts and self._tokenizer is None:
            raise UnsupportedOption("stop needs a tokenizer, and this model was opened without one", "stop")
        eos_ids = params.eos_ids(config.eos_token_id)
        processors = processors_for(
            params, prompt, eos_ids=eos_ids, vocab_size=config.vocab_size, forbidden=self._forbidden
        )
        return _Sequence(place, 0, prompt, params, eos_ids, limit, Choice(processors), self._tokenizer)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        size = self._model.config.vocab_size
        if wrong := sorted({token for token in token_ids if not 0 <= token < size}):
            raise InvalidRequest(f"the prompt holds token ids {wrong[:10]}, expected 0 to {size - 1}", "prompt")

    def _check_length(self, num_tokens: int) -> None:
        longest = self._model.config.n_positions
        if num_tokens > longest:
            raise ContextLengthExceeded(
                f"the text has {num_tokens} tokens to read, and the model's context holds {longest}; shorten it", "text"
            )

    def _ids_without_token(self, tokenizer: Tokenizer) -> Tensor | None:
        """[V] bool, True for ids that must never be chosen; None if there are none."""
        size = self._model.config.vocab_size
        mask = torch.ones(size, dtype=torch.bool)
        mask[[i for i in tokenizer.known_ids if i < size]] = False
        return mask.to(self._device) if mask.any() else None

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self._allowed(self._model.logits(hidden_states))

    def _allowed(self, logits: Tensor) -> Tensor:
        """Without the ids that must never be chosen."""
        return logits if self._forbidden is None else logits.masked_fill_(self._forbidden, -torch.inf)

    def _new_cache(self) -> ContiguousCache:
        if self._cache_dtype is None:
            return ContiguousCache(self._model.config.n_positions)
        return KernelCache(self._model.config.n_positions, dtype=self._cache_dtype)

    def _prefill(self, cache: ContiguousCache, prompts: list[list[int]]) -> Tensor:
        """Read all prompts, padded on the right; logits behind each one, [B, V]."""
        input_ids, positions = self._padded(prompts)
        cache.begin([0] * len(prompts), input_ids.shape[1])
        hidden = self._model(input_ids, positions, cache)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        return self._logits(hidden[torch.arange(len(prompts), device=self._device), last])

    def _decode(self, cache: ContiguousCache, histories: list[list[int]]) -> Tensor:
        """Read the last token of each row; logits behind it, [B, V]."""
        starts = [len(history) - 1 for history in histories]
        cache.begin(starts, 1)
        input_ids = torch.tensor([[history[-1]] for history in histories], device=self._device)
        positions = torch.tensor([[start] for start in starts], device=self._device)
        if self._quantized and isinstance(cache, KernelCache):
            return self._allowed(decode(self._model, input_ids, positions, cache))
        return self._logits(self._model(input_ids, positions, cache)[:, 0])

    def _padded(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids padded on the right with 0, and positions; both [B, T]."""
        width = max(map(len, texts))
        input_ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=self._device)
        return input_ids, torch.arange(width, device=self._device).expand(len(texts), -1)

    def _hidden_states(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """Each text's place and last hidden states, [its tokens, n_embd]; texts of like length run together."""
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        attend = KernelAttention() if self._quantized else CausalAttention()
        for first in range(0, len(texts), self._max_rows):
            places = by_length[first : first + self._max_rows]
            hidden = self._model(*self._padded([texts[place] for place in places]), attend)
            for row, place in enumerate(places):
                yield place, hidden[row, : len(texts[place])]

    def _chunks(self, hidden: Tensor, token_ids: Sequence[int]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Logits [T, V] and the tokens that they predict, a part at a time."""
        for first in range(0, len(token_ids), LOGITS_CHUNK):
            ids = token_ids[first : first + LOGITS_CHUNK]
            yield self._logits(hidden[first : first + len(ids)]), ids

    @torch.inference_mode()
    def _logprobs(self, context: Sequence[int], token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """The log-probabilities of tokens behind a context, by reading both at once."""
        if not token_ids:
            return []
        [(_, hidden)] = self._hidden_states([[*context, *token_ids[:-1]]])
        chunks = self._chunks(hidden[len(context) - 1 :], token_ids)
        return [token for logits, ids in chunks for token in token_logprobs(logits, ids, num_top)]


@dataclass
class _Sequence:
    """One answer on its way."""

    request: int
    index: int
    history: list[int]  # prompt and answer
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

    def forks(self, indexes: Iterable[int], device: torch.device) -> Iterator[_Sequence]:
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
