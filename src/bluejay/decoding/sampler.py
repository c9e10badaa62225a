"""From logits to one token a row: the likeliest or a draw, and the log-probabilities that are reported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bluejay.decoding.logprobs import TokenLogprobs as TokenLogprobs
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.processors import Processor, process_rows


@dataclass(frozen=True)
class Choice:
    """How one sequence chooses its tokens: its processors, and a generator where it draws."""

    processors: Sequence[Processor] = field(default_factory=list)
    generator: torch.Generator | None = None

    @property
    def plain(self) -> bool:
        """Whether the choice is nothing but the highest logit."""
        return not self.processors and self.generator is None


def generator_for(params: SamplingParams, index: int, device: torch.device) -> torch.Generator:
    """The source of randomness of a request's sequence `index`; each sequence has one of its own.

    Sequence 0 uses the seed itself, the others a hash of seed and index: neighbouring seeds share no sequence, and
    nothing else in the batch matters. Without a seed it starts anywhere.
    """
    generator = torch.Generator(device)
    if params.seed is None:
        generator.seed()
    elif index == 0:
        generator.manual_seed(params.seed)
    else:
        digest = hashlib.blake2b(f"{params.seed}:{index}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest))
    return generator


def choose(logits: Tensor, choices: Sequence[Choice], histories: Sequence[Sequence[int]]) -> list[int | None]:
    """One token for each row, computed for all rows together.

    Shapes: logits [B, V] float32.
    Returns: a token id for each row, None where no token can be chosen because none has a probability: all are banned,
        or the logits are no numbers.
    """
    if all(choice.plain for choice in choices):
        return _likeliest(logits)
    scores = process_rows([choice.processors for choice in choices], logits, histories)
    token_ids = _likeliest(scores)
    rows = [row for row, choice in enumerate(choices) if choice.generator is not None]
    if rows:
        own = scores if len(rows) == len(choices) else scores[rows]
        drawn = _draw_rows(own, [choices[row].generator for row in rows])
        for row, token_id in zip(rows, drawn, strict=True):
            token_ids[row] = token_id
    return token_ids


def _likeliest(scores: Tensor) -> list[int | None]:
    token_ids = scores.argmax(-1)
    best = scores.gather(-1, token_ids[:, None])[:, 0]
    return [
        token_id if score > -math.inf else None  # nor is a NaN, which argmax takes first
        for score, token_id in zip(best.tolist(), token_ids.tolist(), strict=True)
    ]


def _draw_rows(scores: Tensor, generators: Sequence[torch.Generator | None]) -> list[int | None]:
    """Draw one id for each row with the row's own generator, as `draw` does for one.

    The likeliest after dividing by exponential noise is a draw by probability, and what `torch.multinomial` does.
    """
    possible = torch.isfinite(scores.amax(-1)).tolist()
    noise = torch.ones_like(scores)
    for row, generator in enumerate(generators):
        if possible[row]:
            noise[row].exponential_(1, generator=generator)
    drawn = (scores.softmax(-1) / noise).argmax(-1).tolist()
    return [token_id if there else None for token_id, there in zip(drawn, possible, strict=True)]


def draw(scores: Tensor, num_draws: int, generator: torch.Generator) -> Tensor | None:
    """Draw ids without putting them back, each by the softmax of its score.

    Shapes: scores [1, N] -> [1, num_draws] int64; None where the scores give no distribution.
    """
    # Checked beforehand: on a GPU a wrong distribution would take the whole process down.
    if not torch.isfinite(scores.amax()):
        return None
    return torch.multinomial(scores.softmax(-1), num_draws, generator=generator)


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens and of the likeliest ones.

    Shapes (T positions): logits [T, V] float32, token_ids T ids.
    """
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    best, ids = log_probs.topk(min(num_top, log_probs.shape[-1]))
    return [
        TokenLogprobs(token, logprob, tuple(zip(top_ids, top_values, strict=True)))
        for token, logprob, top_ids, top_values in zip(token_ids, chosen, ids.tolist(), best.tolist(), strict=True)
    ]
