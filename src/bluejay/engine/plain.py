"""The plain engine: prompts in, tokens out, a batch at a time, with a contiguous cache.

It is the slow twin of every faster engine: what they compute must equal what this one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bluejay.decoding.sampler import TokenLogprobs, choose
from bluejay.engine.contiguous_cache import ContiguousCache
from bluejay.engine.continuation import Continuation
from bluejay.engine.kernel_cache import CACHE_DTYPE, KernelCache
from bluejay.engine.network import Network
from bluejay.engine.recorded_step import decode
from bluejay.engine.request import GenerationEvent, GenerationRequest, RequestOutput
from bluejay.engine.scorer import Scorer, padded
from bluejay.model import LanguageModel
from bluejay.tokenizer import Tokenizer


class PlainEngine:
    """Generates with one model.

    Args:
        model, tokenizer, device: as `Network` takes them.
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
        self._network = Network(model, tokenizer, device=device)
        self._scorer = Scorer(self._network, max_rows=max_rows)
        self._max_rows = max_rows
        self._cache_dtype = CACHE_DTYPE if cache_dtype is None and self._network.quantized else cache_dtype
        self._clock = clock

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[GenerationEvent]:
        """Yield what each step brings, until every sequence has ended.

        Raises: RequestError for the first request that cannot be served, before anything runs.
        """
        return self._events([self._network.prepare(place, request) for place, request in enumerate(requests)])

    def generate(self, requests: Sequence[GenerationRequest]) -> list[RequestOutput]:
        """Run all requests to their end; the outputs are in the order of the requests.

        Raises: as `stream`.
        """
        events = self.stream(requests)
        outputs = [RequestOutput.blank(request) for request in requests]
        for event in events:
            outputs[event.request].add(event)
        for output, request in zip(outputs, requests, strict=True):
            if request.params.prompt_logprobs is not None:
                prompt = output.prompt_token_ids
                rest = self._scorer.logprobs(prompt[:1], prompt[1:], request.params.prompt_logprobs)
                output.prompt_logprobs = [None, *rest]
        return outputs

    @torch.inference_mode()
    def _events(self, sequences: list[Continuation]) -> Iterator[GenerationEvent]:
        batch: list[tuple[Continuation, range]] = []
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

    def _run(self, prompts: list[tuple[Continuation, range]]) -> Iterator[GenerationEvent]:
        """Greedy and sampled sequences together: one forward pass a token, rows leave as they end.

        Args:
            prompts: each with the numbers of those of its answers that are to run now.
        """
        cache = self._new_cache()
        began = self._clock()
        logits = self._prefill(cache, [prompt.history for prompt, _ in prompts])
        owners = [row for row, (_, indexes) in enumerate(prompts) for _ in indexes]
        sequences = [fork for prompt, indexes in prompts for fork in prompt.forks(indexes, self._network.device)]
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

    def _run_beams(self, sequence: Continuation) -> Iterator[GenerationEvent]:
        """One beam search: a row for each running beam."""
        cache = self._new_cache()
        params, began = sequence.params, self._clock()
        search = sequence.begin_search(self._network.device)
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
            logprobs: list[TokenLogprobs] = []
            if params.logprobs is not None:
                logprobs = self._scorer.logprobs(sequence.history, answer.token_ids, params.logprobs)
            yield sequence.end_beam(index, answer, logprobs)

    def _new_cache(self) -> ContiguousCache:
        if self._cache_dtype is None:
            return ContiguousCache(self._network.model.config.n_positions)
        return KernelCache(self._network.model.config.n_positions, dtype=self._cache_dtype)

    def _prefill(self, cache: ContiguousCache, prompts: list[list[int]]) -> Tensor:
        """Read all prompts, padded on the right; logits behind each one, [B, V]."""
        input_ids, positions = padded(prompts, self._network.device)
        cache.begin([0] * len(prompts), input_ids.shape[1])
        hidden = self._network.model(input_ids, positions, cache)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._network.device)
        return self._network.logits(hidden[torch.arange(len(prompts), device=self._network.device), last])

    def _decode(self, cache: ContiguousCache, histories: list[list[int]]) -> Tensor:
        """Read the last token of each row; logits behind it, [B, V]."""
        starts = [len(history) - 1 for history in histories]
        cache.begin(starts, 1)
        input_ids = torch.tensor([[history[-1]] for history in histories], device=self._network.device)
        positions = torch.tensor([[start] for start in starts], device=self._network.device)
        if self._network.quantized and isinstance(cache, KernelCache):
            return self._network.allowed(decode(self._network.model, input_ids, positions, cache))
        return self._network.logits(self._network.model(input_ids, positions, cache)[:, 0])
