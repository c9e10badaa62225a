"""What options do to scores before a token is chosen: one small function for each, in transformers' order.

A processor takes scores and histories and returns new scores. The scores of rows that share one request's options are
processed together; an option at its default adds no processor.

Shapes (B rows of one request, V ids): scores [B, V] float32; histories: B lists of ids, prompt and answer so far.
Source: transformers 4.56.2, `_get_logits_processor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from bluejay.decoding.params import SamplingParams
from bluejay.errors import InvalidRequest

Histories = Sequence[Sequence[int]]
Processor = Callable[[Tensor, Histories], Tensor]


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
    Raises: InvalidRequest if `bad_words_ids` names an id outside the vocabulary.
    """
    chain: list[Processor] = []
    if params.repetition_penalty != 1:
        chain.append(lambda scores, rows: repetition_penalty(scores, rows, params.repetition_penalty))
    if params.no_repeat_ngram_size > 0:
        chain.append(lambda scores, rows: no_repeat_ngram(scores, rows, params.no_repeat_ngram_size))
    if params.encoder_no_repeat_ngram_size > 0:
        endings = ngram_endings(prompt, params.encoder_no_repeat_ngram_size)
        size = params.encoder_no_repeat_ngram_size
        chain.append(lambda scores, rows: _ban(scores, (endings.get(_tail(row, size), ()) for row in rows)))
    if params.bad_words_ids is not None:
        words = _checked_words(params.bad_words_ids, eos_ids, vocab_size)
        chain.append(lambda scores, rows: bad_words(scores, rows, words))
    min_length = params.min_length
    if params.min_new_tokens is not None:
        min_length = len(prompt) + params.min_new_tokens
    if eos_ids and min_length > len(prompt):
        chain.append(lambda scores, rows: no_end_before(scores, rows, min_length, eos_ids))
    if params.remove_invalid_values:
        chain.append(lambda scores, rows: finite(scores, forbidden))
    if params.do_sample:
        chain += _warpers(params, eos_ids)
    return chain


def _warpers(params: SamplingParams, eos_ids: tuple[int, ...]) -> list[Processor]:
    """What narrows the distribution that tokens are drawn from."""
    # A beam needs one token besides every end-of-text to go on with.
    keep = max(2, len(eos_ids) + 1) if params.num_beams > 1 else 1
    temperature, k, p, least, mass = params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p
    chain: list[Processor] = []
    if temperature != 1:
        chain.append(lambda scores, rows: scores / temperature)
    if k:
        chain.append(lambda scores, rows: top_k(scores, max(k, keep)))
    if p is not None and p < 1:
        chain.append(lambda scores, rows: top_p(scores, p, keep))
    if least:
        chain.append(lambda scores, rows: min_p(scores, least, keep))
    if mass is not None and mass < 1:
        chain.append(lambda scores, rows: typical_p(scores, mass, keep))
    return chain


def process(chain: Iterable[Processor], scores: Tensor, histories: Histories) -> Tensor:
    """Apply all processors, one after the other."""
    for processor in chain:
        scores = processor(scores, histories)
    return scores


def diversity(scores: Tensor, chosen: Sequence[int], penalty: float) -> Tensor:
    """Subtract `penalty` for each time that an earlier group chose a token in this step.

    Source: Vijayakumar et al. 2016 (arXiv:1610.02424), Hamming diversity.
    """
    if not chosen:
        return scores
    size = scores.shape[-1]
    counts = torch.bincount(torch.tensor(chosen, device=scores.device), minlength=size)
    return scores - penalty * counts[:size]  # an end-of-text outside the vocabulary costs nobody anything


def repetition_penalty(scores: Tensor, histories: Histories, penalty: float) -> Tensor:
    """Divide positive scores of tokens in the history by `penalty`, multiply negative ones.

    Source: Keskar et al. 2019 (arXiv:1909.05858), section 4.1.
    """
    scores = scores.clone()
    for row, history in zip(scores, histories, strict=True):
        ids = torch.tensor(list(set(history)), device=scores.device)
        seen = row[ids]
        row[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores


def no_repeat_ngram(scores: Tensor, histories: Histories, size: int) -> Tensor:
    """Ban tokens that would complete an n-gram which the row's history already has."""
    return _ban(scores, (_completions(history, size) for history in histories))


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
    scores = scores.clone()
    for row, ids in zip(scores, banned, strict=True):
        if ids:
            row[list(ids)] = -math.inf
    return scores


def _checked_words(words: Sequence[Sequence[int]], eos_ids: tuple[int, ...], vocab_size: int) -> list[list[int]]:
    """The words without those that are an end-of-text alone: an answer must be able to end."""
    outside = sorted({token for word in words for token in word if token >= vocab_size})
    if outside:
        raise InvalidRequest(f"bad_words_ids names {outside}, expected ids from 0 to {vocab_size - 1}", "bad_words_ids")
    return [list(word) for word in words if len(word) > 1 or word[0] not in eos_ids]


def bad_words(scores: Tensor, histories: Histories, words: Sequence[Sequence[int]]) -> Tensor:
    """Ban each word's last token where the history ends in the tokens before it.

    A word must fit into the history as a whole, its last token included: transformers looks no earlier.
    """
    return _ban(scores, ([word[-1] for word in words if _completes(history, word)] for history in histories))


def _completes(history: Sequence[int], word: Sequence[int]) -> bool:
    before = len(word) - 1
    if before == 0:
        return True
    return len(word) <= len(history) and list(history[-before:]) == list(word[:-1])


def no_end_before(scores: Tensor, histories: Histories, min_length: int, eos_ids: tuple[int, ...]) -> Tensor:
    """Ban every end-of-text while prompt and answer together are shorter than `min_length`."""
    known = [i for i in eos_ids if i < scores.shape[-1]]
    return _ban(scores, (known if len(history) < min_length else () for history in histories))


def finite(scores: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """NaN becomes 0, an infinity the largest finite number of its sign; `forbidden` ids stay at -inf."""
    scores = torch.nan_to_num(scores)
    return scores if forbidden is None else scores.masked_fill(forbidden, -math.inf)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, and those equal to the lowest of them."""
    least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, -math.inf)


def top_p(scores: Tensor, p: float, keep: int) -> Tensor:
    """Keep the likeliest tokens that together have probability p, and at least `keep` of them.

    Source: Holtzman et al. 2019 (arXiv:1904.09751), nucleus sampling.
    """
    ascending, ids = scores.sort(descending=False)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -keep:] = False
    return scores.masked_fill(_unsorted(drop, ids), -math.inf)


def min_p(scores: Tensor, least: float, keep: int) -> Tensor:
    """Keep tokens with at least `least` of the likeliest one's probability, and at least `keep` of them.

    Source: Nguyen et al. 2024 (arXiv:2407.01082).
    """
    probs = scores.softmax(-1)
    drop = probs < least * probs.amax(-1, keepdim=True)
    drop.scatter_(-1, scores.argsort(descending=True)[:, :keep], False)
    return scores.masked_fill(drop, -math.inf)


def typical_p(scores: Tensor, mass: float, keep: int) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, together of probability `mass`; at least `keep`.

    Source: Meister et al. 2022 (arXiv:2202.00666), locally typical sampling.
    """
    log_probs = scores.log_softmax(-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
    distance, ids = (-log_probs - entropy).abs().sort(descending=False)
    reached = scores.gather(-1, ids).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(-1, last)
    drop[:, :keep] = False
    return scores.masked_fill(_unsorted(drop, ids), -math.inf)


def _unsorted(flags: Tensor, ids: Tensor) -> Tensor:
    """Put each flag back at the id that it belongs to."""
    return torch.empty_like(flags).scatter_(-1, ids, flags)
