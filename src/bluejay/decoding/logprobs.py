"""What is told of a token's probability; knows no torch, as whoever only reads answers needs none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of one token, before any option changed it.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability.
        top: ids and log-probabilities of the likeliest tokens, likeliest first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
