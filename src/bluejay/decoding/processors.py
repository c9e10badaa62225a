"""What options do to scores before a token is chosen: one small function for each, in transformers' order.

A function takes scores, histories and one value of its option for each row, and returns new scores: rows of requests
with different options are processed together. An option at its default adds no processor.

Shapes (B rows, V ids): scores [B, V] float32; histories: B lists of ids, prompt and answer so far.
Source: transformers 4.56.2, `_get_logits_processor`; OpenAI's API reference for the penalties that count the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from typing import Any

import torch
from torch import Tensor

from bluejay.decoding.params import SamplingParams
from bluejay.errors import InvalidRequest

Histories = Sequence[Sequence[int]]
Number = float | Tensor  # of all rows, or [B, 1]


@dataclass(frozen=True)
class Processor:
    """One option of one request: what it does, and its value."""

    apply: Callable[[Tensor, Histories, Sequence[Any]], Tensor]
    value: Any

    def __call__(self, scores: Tensor, histories: Histories) -> Tensor:
        """Process rows that all belong to this request."""
        return self.apply(scores, histories, [self.value] * len(histories))


def processors_for(
    params: SamplingParams,
    prompt: Sequence[int],
    *,
    eos_ids: tuple[int, ...],
    vocab_size: int,
    forbidden: Tensor | None = None,
) -> list[Processor]:
    """The processors that a request's options ask for, in the order in which they apply.

    The diversity penalty of beam groups is not among them: `diversity` comes before all of these, in the beam search.

    Args:
        forbidden: [V] bool, ids that have no token. Their logits must already be -inf; here they only need care where
            `remove_invalid_values` would make them finite again.
    Raises: InvalidRequest if `bad_words_ids` or `logit_bias` names an id outside the vocabulary.
    """
    chain: list[Processor] = []
    if params.logit_bias:
        chain.append(Processor(logit_bias, _checked_bias(params.logit_bias, vocab_size)))
    if params.repetition_penalty != 1:
        chain.append(Processor(repetition_penalty, params.repetition_penalty))
    if params.frequency_penalty != 0 or params.presence_penalty != 0:
        penalties = (params.frequency_penalty, params.presence_penalty, len(prompt))
        chain.append(Processor(answer_penalties, penalties))
    if params.no_repeat_ngram_size > 0:
        chain.append(Processor(no_repeat_ngram, params.no_repeat_ngram_size))
    if params.encoder_no_repeat_ngram_size > 0:
        size = params.encoder_no_repeat_ngram_size
        chain.append(Processor(_no_ngram_of_prompt, (size, ngram_endings(prompt, size))))
    if params.bad_words_ids is not None:
        chain.append(Processor(bad_words, _checked_words(params.bad_words_ids, eos_ids, vocab_size)))
    min_length = params.min_length
    if params.min_new_tokens is not None:
        min_length = len(prompt) + params.min_new_tokens
    if eos_ids and min_length > len(prompt):
        chain.append(Processor(no_end_before, (min_length, eos_ids)))
    if params.remove_invalid_values:
        chain.append(Processor(_finite, forbidden))
    if params.do_sample:
        chain += _warpers(params, eos_ids)
    return chain


def _warpers(params: SamplingParams, eos_ids: tuple[int, ...]) -> list[Processor]:
    """What narrows the distribution that tokens are drawn from."""
    # A beam needs one token besides every end-of-text to go on with.
    keep = max(2, len(eos_ids) + 1) if params.num_beams > 1 else 1
    chain: list[Processor] = []
    if params.temperature != 1:
        chain.append(Processor(_temperature, params.temperature))
    if params.top_k:
        chain.append(Processor(_top_k, max(params.top_k, keep)))
    if params.top_p is not None and params.top_p < 1:
        chain.append(Processor(_top_p, (params.top_p, keep)))
    if params.min_p:
        chain.append(Processor(_min_p, (params.min_p, keep)))
    if params.typical_p is not None and params.typical_p < 1:
        chain.append(Processor(_typical_p, (params.typical_p, keep)))
    return chain


def process(chain: Iterable[Processor], scores: Tensor, histories: Histories) -> Tensor:
    """Apply all processors of one request to its rows, one after the other."""
    for processor in chain:
        scores = processor(scores, histories)
    return scores


def process_rows(chains: Sequence[Sequence[Processor]], scores: Tensor, histories: Histories) -> Tensor:
    """Apply to each row the processors of its own request; an option is computed for all rows that have it at once."""
    values: dict[Callable[..., Tensor], dict[int, Any]] = {function: {} for function in _ORDER}
    for row, chain in enumerate(chains):
        for processor in chain:
            values[processor.apply][row] = processor.value
    for function, own in values.items():
        if len(own) == len(chains):
            scores = function(scores, histories, list(own.values()))
        elif own:
            rows = torch.tensor(list(own), device=scores.device)
            changed = function(scores[rows], [histories[row] for row in own], list(own.values()))
            scores = scores.index_copy(0, rows, changed)
    return scores


def _numbers(values: Sequence[float], scores: Tensor) -> Number:
    """One number for all rows where they agree, which computes as transformers does; else one for each, [B, 1]."""
    if min(values) == max(values):
        return values[0]
    return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]


def _temperature(scores: Tensor, histories: Histories, temperatures: Sequence[float]) -> Tensor:
    return scores / _numbers(temperatures, scores)


def _top_k(scores: Tensor, histories: Histories, ks: Sequence[int]) -> Tensor:
    return top_k(scores, ks)


def _top_p(scores: Tensor, histories: Histories, values: Sequence[tuple[float, int]]) -> Tensor:
    return top_p(scores, _numbers([1 - p for p, _ in values], scores), [keep for _, keep in values])


def _min_p(scores: Tensor, histories: Histories, values: Sequence[tuple[float, int]]) -> Tensor:
    return min_p(scores, _numbers([least for least, _ in values], scores), [keep for _, keep in values])


def _typical_p(scores: Tensor, histories: Histories, values: Sequence[tuple[float, int]]) -> Tensor:
    return typical_p(scores, _numbers([mass for mass, _ in values], scores), [keep for _, keep in values])


def _finite(scores: Tensor, histories: Histories, forbidden: Sequence[Tensor | None]) -> Tensor:
    return finite(scores, forbidden[0])  # one model, one set of ids without a token


def diversity(scores: Tensor, chosen: Sequence[int], penalty: float) -> Tensor:
    """Subtract `penalty` for each time that an earlier group chose a token in this step.

    Source: Vijayakumar et al. 2016 (arXiv:1610.02424), Hamming diversity.
    """
    if not chosen:
        return scores
    size = scores.shape[-1]
    counts = torch.bincount(torch.tensor(chosen, device=scores.device), minlength=size)
    return scores - penalty * counts[:size]  # an end-of-text outside the vocabulary costs nobody anything


def _checked_bias(bias: Mapping[int, float], vocab_size: int) -> Mapping[int, float]:
    if outside := sorted(token for token in bias if token >= vocab_size):
        raise InvalidRequest(f"logit_bias names {outside[:10]}, expected ids from 0 to {vocab_size - 1}", "logit_bias")
    return bias


def logit_bias(scores: Tensor, histories: Histories, biases: Sequence[Mapping[int, float]]) -> Tensor:
    """Add each row's biases to the scores of its tokens."""
    rows = [row for row, bias in enumerate(biases) for _ in bias]
    ids = list(joined.from_iterable(biases))
    values = scores.new_tensor([value for bias in biases for value in bias.values()])
    places = (torch.tensor(rows, device=scores.device), torch.tensor(ids, device=scores.device))
    return scores.index_put(places, values, accumulate=True)


def answer_penalties(scores: Tensor, histories: Histories, values: Sequence[tuple[float, float, int]]) -> Tensor:
    """Make tokens of the answer so far less likely: by how often they came, and for having come.

    Args: values: for each row its frequency penalty, its presence penalty, and the length of its prompt.
    Source: OpenAI's API reference, "Frequency and presence penalties": mu - count * frequency - (count > 0) * presence.
    """
    frequency, presence, starts = zip(*values, strict=True)
    answers = [history[start:] for history, start in zip(histories, starts, strict=True)]
    rows = [row for row, answer in enumerate(answers) for _ in answer]
    if not rows:
        return scores
    counts = torch.zeros_like(scores)
    places = (
        torch.tensor(rows, device=scores.device),
        torch.tensor(list(joined.from_iterable(answers)), device=scores.device),
    )
    counts.index_put_(places, counts.new_ones(()), accumulate=True)
    return scores - _numbers(frequency, scores) * counts - _numbers(presence, scores) * (counts > 0)


def repetition_penalty(scores: Tensor, histories: Histories, penalties: Sequence[float]) -> Tensor:
    """Divide positive scores of tokens in the history by the row's penalty, multiply negative ones.

    Source: Keskar et al. 2019 (arXiv:1909.05858), section 4.1.
    """
    ids = torch.tensor(list(joined.from_iterable(histories)), device=scores.device)
    lengths = torch.tensor([len(history) for history in histories], device=scores.device)
    rows = torch.arange(len(histories), device=scores.device).repeat_interleave(lengths)
    penalty = torch.tensor(penalties, dtype=scores.dtype, device=scores.device)[rows]
    seen = scores[rows, ids]
    # An id that comes twice gets the same number twice.
    return scores.index_put((rows, ids), torch.where(seen < 0, seen * penalty, seen / penalty))


def no_repeat_ngram(scores: Tensor, histories: Histories, sizes: Sequence[int]) -> Tensor:
    """Ban tokens that would complete an n-gram which the row's history already has."""
    return _ban(scores, map(_completions, histories, sizes))


def _no_ngram_of_prompt(
    scores: Tensor, histories: Histories, values: Sequence[tuple[int, dict[tuple[int, ...], set[int]]]]
) -> Tensor:
    """Ban tokens that would complete an n-gram of the row's prompt."""
    pairs = zip(histories, values, strict=True)
    return _ban(scores, (endings.get(_tail(row, size), ()) for row, (size, endings) in pairs))


def _completions(history: Sequence[int], size: int) -> set[int]:
    tail = _tail(history, size)
    starts = range(len(history) - size + 1)
    return {history[i + size - 1] for i in starts if tuple(history[i : i + size - 1]) == tail}


def ngram_endings(tokens: Sequence[int], size: int) -> dict[tuple[int, ...], set[int]]:
    """First tokens of each n-gram of `tokens` -> the tokens that ended it."""
    endings: dict[tuple[int, ...], set[int]] = {}
    for i in range(len(tokens) - size + 1):
        endings.setdefault(tuple(tokens[i : i + size - 1]), set()).add(tokens[i + size - 1])
    return endings


def _tail(history: Sequence[int], size: int) -> tuple[int, ...]:
    """The last size - 1 tokens, or all there are."""
    return tuple(history[max(0, len(history) - size + 1) :])


def _ban(scores: Tensor, banned: Iterable[Collection[int]]) -> Tensor:
    places = [(row, token) for row, ids in enumerate(banned) for token in ids]
    if not places:
        return scores
    rows, ids = torch.tensor(places, device=scores.device).unbind(1)
    return scores.index_put((rows, ids), scores.new_tensor(-math.inf))


def _checked_words(words: Sequence[Sequence[int]], eos_ids: tuple[int, ...], vocab_size: int) -> list[list[int]]:
    """The words without those that are an end-of-text alone: an answer must be able to end."""
    outside = sorted({token for word in words for token in word if token >= vocab_size})
    if outside:
        raise InvalidRequest(f"bad_words_ids names {outside}, expected ids from 0 to {vocab_size - 1}", "bad_words_ids")
    return [list(word) for word in words if len(word) > 1 or word[0] not in eos_ids]


def bad_words(scores: Tensor, histories: Histories, words: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Ban the last token of each of a row's words where its history ends in the tokens before it.

    A word must fit into the history as a whole, its last token included: transformers looks no earlier.
    """
    pairs = zip(histories, words, strict=True)
    return _ban(scores, ([word[-1] for word in own if _completes(history, word)] for history, own in pairs))


def _completes(history: Sequence[int], word: Sequence[int]) -> bool:
    before = len(word) - 1
    if before == 0:
        return True
    return len(word) <= len(history) and list(history[-before:]) == list(word[:-1])


def no_end_before(scores: Tensor, histories: Histories, values: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
    """Ban every end-of-text while prompt and answer together are shorter than the row's smallest length.

    Args: values: for each row its smallest length, and the ids that end its answer.
    """
    V = scores.shape[-1]
    pairs = zip(histories, values, strict=True)
    return _ban(scores, ([i for i in ids if i < V] if len(history) < least else () for history, (least, ids) in pairs))


def finite(scores: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """NaN becomes 0, an infinity the largest finite number of its sign; `forbidden` ids stay at -inf."""
    scores = torch.nan_to_num(scores)
    return scores if forbidden is None else scores.masked_fill(forbidden, -math.inf)


def top_k(scores: Tensor, ks: Sequence[int]) -> Tensor:
    """Keep each row's k highest scores, and those equal to the lowest of them."""
    ks = [min(k, scores.shape[-1]) for k in ks]
    last = torch.tensor(ks, device=scores.device)[:, None] - 1
    least = scores.topk(max(ks)).values.gather(1, last)
    return scores.masked_fill(scores < least, -math.inf)


def top_p(scores: Tensor, rest: Number, keep: Sequence[int]) -> Tensor:
    """Keep the likeliest tokens that leave at most a probability of `rest` to all others, and at least `keep` of them.

    Source: Holtzman et al. 2019 (arXiv:1904.09751), nucleus sampling; its p is 1 - rest.
    """
    ascending, ids = scores.sort(descending=False)
    drop = ascending.softmax(-1).cumsum(-1) <= rest
    drop &= ~_first(keep, scores).flip(-1)
    return scores.masked_fill(_unsorted(drop, ids), -math.inf)


def min_p(scores: Tensor, least: Number, keep: Sequence[int]) -> Tensor:
    """Keep tokens with at least `least` of the likeliest one's probability, and at least `keep` of them.

    Source: Nguyen et al. 2024 (arXiv:2407.01082).
    """
    probs = scores.softmax(-1)
    drop = probs < least * probs.amax(-1, keepdim=True)
    drop &= ~_unsorted(_first(keep, scores), scores.argsort(descending=True))
    return scores.masked_fill(drop, -math.inf)


def typical_p(scores: Tensor, mass: Number, keep: Sequence[int]) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, together of probability `mass`; at least `keep`.

    Source: Meister et al. 2022 (arXiv:2202.00666), locally typical sampling.
    """
    log_probs = scores.log_softmax(-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
    distance, ids = (-log_probs - entropy).abs().sort(descending=False)
    reached = scores.gather(-1, ids).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(-1, last)
    drop &= ~_first(keep, scores)
    return scores.masked_fill(_unsorted(drop, ids), -math.inf)


def _first(counts: Sequence[int], scores: Tensor) -> Tensor:
    """[B, V] bool: True in each row's first `count` places."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    return places < torch.tensor(counts, device=scores.device)[:, None]


def _unsorted(flags: Tensor, ids: Tensor) -> Tensor:
    """Put each flag back at the id that it belongs to."""
    return torch.empty_like(flags).scatter_(-1, ids, flags)


# In which they apply, whatever the request.
_ORDER: tuple[Callable[..., Tensor], ...] = (
    logit_bias,
    repetition_penalty,
    answer_penalties,
    no_repeat_ngram,
    _no_ngram_of_prompt,
    bad_words,
    no_end_before,
    _finite,
    _temperature,
    _top_k,
    _top_p,
    _min_p,
    _typical_p,
)
