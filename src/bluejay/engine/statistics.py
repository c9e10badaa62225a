"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """What an engine is at, and what it has done since it was made.

    Attributes:
        running, waiting: requests.
        num_blocks, held_blocks, cached_blocks: of the cache; held by sequences, remembered for prompts to come.
        steps: forward passes.
        prompt_tokens, cached_tokens: of requests that began, and how many of them were found in the cache.
        generated_tokens, drafted_tokens, accepted_tokens: chosen; guessed by speculation; guessed rightly.
        preemptions: requests that had to give their blocks away and to begin again.
    """

    running: int
    waiting: int
    num_blocks: int
    held_blocks: int
    cached_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
