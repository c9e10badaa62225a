"""How much of a prompt a step may read without those who wait for their next token noticing."""

from __future__ import annotations

from collections import deque
from statistics import median

from bluejay.engine.scheduler import Schedule

FIRST_CHUNK = 32  # tokens, before anything has been measured
LEAST_CHUNK = 4  # tokens: whatever the watch says, a prompt gets on
UNNOTICED_S = 0.02  # a step that short brings each stream 50 tokens a second: faster than anybody reads
REMEMBERED = 8  # steps with prompts: the next ones cost what these did, a little more as contexts grow
REMEMBERED_DECODES = 5  # steps without, of which there are few while prompts are read
LOOK_EVERY = 32  # steps: so often one without prompts is timed, where there would be none


class Pacing:
    """Watches how long steps take, and cuts prompts so that no step is much longer than one that only decodes.

    Steps of one kind differ, by what else the machine does. So what a step without prompts takes is a median, which one
    slow step does not raise. And where sequences would stall, a token of a prompt is taken to cost what it did in one
    of the slower of the last steps: by their average, half of them would last longer than they may. The slowest is
    left out, as it may have been held up by others. Where nobody notices, or more wait to be read, the usual cost will
    do.

    Args:
        max_stall: how many times as long a step with a chunk of a prompt may take; 0 is no limit.
    """

    def __init__(self, max_stall: float) -> None:
        self._max_stall = max_stall
        self._decode_s: deque[float] = deque(maxlen=REMEMBERED_DECODES)
        self._token_s: deque[float] = deque(maxlen=REMEMBERED)
        self._alone_s = 0.0  # a token's cost where nobody decoded
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
        decode_s, usual_s, slow_s = median(self._decode_s), self._token_s_at(1 / 2), self._token_s_at(3 / 4)
        if not decode_s or not usual_s:  # a clock may stand still
            return FIRST_CHUNK
        share = max(1.0, num_reading / num_decoding)
        unstalled = share * (self._max_stall - 1) * decode_s / (slow_s if share == 1 else usual_s)
        unnoticed = (UNNOTICED_S - decode_s) / usual_s
        return max(LEAST_CHUNK, int(max(unstalled, unnoticed)))

    def learn(self, schedule: Schedule, seconds: float) -> None:
        """Note how long a step took."""
        num_read = sum(part.num_tokens for part in schedule.parts if part.num_tokens > 1)
        num_decoding = sum(part.num_tokens == 1 for part in schedule.parts)
        self._num_unseen += num_decoding > 0
        if num_read == 0:
            self._num_unseen = 0
            self._decode_s.append(seconds)
        elif num_decoding == 0:
            # What any step costs is not the tokens' fault, but nothing is there yet to take it off.
            self._alone_s = seconds / num_read
        elif self._decode_s:
            self._token_s.append(max(seconds - median(self._decode_s), 0.1 * seconds) / num_read)

    def _token_s_at(self, place: float) -> float:
        """What a token costs in the step at a place between the quickest, 0, and the slowest, 1, of the last ones."""
        costs = sorted(self._token_s)
        return costs[int(len(costs) * place)] if costs else self._alone_s
