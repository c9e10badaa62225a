"""How much of a prompt a step may read without those who wait for their next token noticing."""

from __future__ import annotations

from bluejay.engine.scheduler import Schedule

FIRST_CHUNK = 32  # tokens, before anything has been measured
LEAST_CHUNK = 8  # tokens: whatever the watch says, a prompt gets on
WEIGHT = 0.2  # of the latest step in the averages: some ten steps are remembered


class Pacing:
    """Watches how long steps take, and cuts prompts so that no step is much longer than one that only decodes.

    Args:
        max_stall: how many times as long a step with a chunk of a prompt may take; 0 is no limit.
    """

    def __init__(self, max_stall: float) -> None:
        self._max_stall = max_stall
        self._decode_s: float | None = None
        self._token_s: float | None = None

    @property
    def max_prefill_tokens(self) -> int | None:
        """Tokens of prompts that a step may read while sequences decode; None if any number."""
        if self._max_stall == 0:
            return None
        if not self._decode_s or not self._token_s:  # a clock may stand still
            return FIRST_CHUNK
        return max(LEAST_CHUNK, int((self._max_stall - 1) * self._decode_s / self._token_s))

    def learn(self, schedule: Schedule, seconds: float) -> None:
        """Note how long a step took."""
        num_read = sum(part.num_tokens for part in schedule.parts if part.num_tokens > 1)
        num_decoding = sum(part.num_tokens == 1 for part in schedule.parts)
        if num_read == 0:
            self._decode_s = _average(self._decode_s, seconds)
        elif num_decoding == 0:
            # What any step costs is not the tokens' fault, but nothing is there yet to take it off.
            self._token_s = _average(self._token_s, seconds / num_read)
        elif self._decode_s is not None:
            self._token_s = _average(self._token_s, max(seconds - self._decode_s, 0.1 * seconds) / num_read)


def _average(before: float | None, now: float) -> float:
    return now if before is None else (1 - WEIGHT) * before + WEIGHT * now
