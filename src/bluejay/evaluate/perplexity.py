"""What a text costs under a model: bits per byte, which compares across tokenizers; perplexity per token and word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bluejay.errors import InvalidRequest
from bluejay.model import CausalAttention, LanguageModel
from bluejay.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """Sums over a text; `nats` is minus the log-probability of all its tokens."""

    nats: float
    num_tokens: int
    num_bytes: int
    num_words: int
    num_documents: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def token_perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Per word between spaces, as WikiText is measured."""
        return _exp(self.nats / self.num_words)


@torch.inference_mode()
def perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    stride: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score documents, each from an end-of-text token on, with a window that slides over the long ones.

    Args:
        stride: tokens that the window moves; each scored token has at least context - stride tokens before it.
            None: half of the context.
        on_progress: called with the number of bytes scored so far.
    Raises: InvalidRequest if stride does not fit the context, or there is nothing to score.
    Source: the sliding window of transformers' perplexity guide; bits per byte as in the Pile (arXiv:2101.00027), 3.1.
    """
    context = model.config.n_positions
    stride = context // 2 or 1 if stride is None else stride
    if not 1 <= stride <= context:
        raise InvalidRequest(f"stride is {stride}, expected 1 to the context of {context} tokens", "stride")
    total = Perplexity(0.0, 0, 0, 0, 0)
    for text in documents:
        ids = torch.tensor(tokenizer.encode(text), device=device)
        if not len(ids):
            continue
        first = ids.new_tensor([tokenizer.eos_token_id if tokenizer.eos_token_id is not None else int(ids[0])])
        nats = sum(
            _window_nats(model, window, scored) for window, scored in windows(torch.cat((first, ids)), context, stride)
        )
        total = Perplexity(
            nats=total.nats + nats,
            num_tokens=total.num_tokens + len(ids),
            num_bytes=total.num_bytes + len(text.encode()),
            num_words=total.num_words + max(1, len(text.split())),
            num_documents=total.num_documents + 1,
        )
        if on_progress is not None:
            on_progress(total.num_bytes)
    if not total.num_tokens:
        raise InvalidRequest("there is no text to score", "documents")
    return total


def windows(ids: Tensor, context: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Cut ids into windows of at most context inputs and one target more, with how many of the last targets to score.

    ids      |0.......|
    windows  [0 . . . ] scored: 4 targets
                 [. . .|. . ]   scored: only what the first has not
    """
    scored = 0
    num_targets = len(ids) - 1
    while scored < num_targets:
        end = min(context if scored == 0 else scored + stride, num_targets)
        start = max(0, end - context)
        yield ids[start : end + 1], end - scored
        scored = end


def _window_nats(model: LanguageModel, window: Tensor, scored: int) -> float:
    inputs, targets = window[:-1], window[1:]
    hidden = model(inputs[None], torch.arange(len(inputs), device=inputs.device)[None], CausalAttention())
    logprobs = model.logits(hidden[0, -scored:]).log_softmax(-1)
    return -float(logprobs.gather(1, targets[-scored:, None]).double().sum())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
