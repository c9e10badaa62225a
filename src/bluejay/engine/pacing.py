"""How much of a prompt a step may read without those who wait for their next token noticing."""

from __future__ import annotations

from bluejay.engine.scheduler import Schedule

FIRST_CHUNK = 32  # tokens, before anything has been measured
LEAST_CHUNK = 4  # tokens: whatever the watch says, a prompt gets on
UNNOTICED_S = 0.02  # a step that short brings each stream 50 tokens a second: faster than anybody reads
WEIGHT = 0.3  # of the latest step in the averages: some six are remembered
LOOK_EVERY = 32  # steps: so often one without prompts is timed, where there would be none


class Pacing:
    """Watches how long steps take, and cuts prompts so that no step is much longer than one that only decodes.

    Args:
        max_stall: how many times as long a step with a chunk of a prompt may take; 0 is no limit.
    """

    def __init__(self, max_stall: float) -> None:
        self._max_stall = max_stall
        self._decode_s: float | None = None
        self._token_s: float | None = None
        self._num_unseen = LOOK_EVERY  # steps since one without prompts

    def max_prefill_tokens(self, num_reading: int, num_decoding: int) -> int | None:
        """Tokens of prompts that a step may read; None if any number.

        Who waits for the first token waits as much as who waits for the next one: where more requests wait for theirs
        than sequences decode, these get as many times less of the machine.

        Args:
            num_reading: requests whose prompts are not yet read.
            num_decoding: sequences that are decoding.
        """
        if self._max_stall == 0 or num_decoding == 0:
            return None
        if self._num_unseen >= LOOK_EVERY:
            return 0
        if not self._decode_s or not self._token_s:  # a clock may stand still
            return FIRST_CHUNK
        share = max(1.0, num_reading / num_decoding)
        longer_s = max(share * (self._max_stall - 1) * self._decode_s, UNNOTICED_S - self._decode_s)
        return max(LEAST_CHUNK, int(longer_s / self._token_s))

    def learn(self, schedule: Schedule, seconds: float) -> None:
        """Note how long a step took."""
        num_read = sum(part.num_tokens for part in schedule.parts if part.num_tokens > 1)
        num_decoding = sum(part.num_tokens == 1 for part in schedule.parts)
        self._num_unseen += num_decoding > 0
        if num_read == 0:
            self._num_unseen = 0
            self._decode_s = _average(self._decode_s, seconds)
        elif num_decoding == 0:
            # What any step costs is not the tokens' fault, but nothing is there yet to take it off.
            self._token_s = _average(self._token_s, seconds / num_read)
        elif self._decode_s is not None:
            self._token_s = _average(self._token_s, max(seconds - self._decode_s, 0.1 * seconds) / num_read)


def _average(before: float | None, now: float) -> float:
    return now if before is None else (1 - WEIGHT) * before + WEIGHT * now
