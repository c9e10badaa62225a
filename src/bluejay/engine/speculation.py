"""Speculative decoding: guess tokens cheaply, read them all at once, keep those that were right."""

from __future__ import annotations

from typing import Protocol

from bluejay.engine.scheduler import Schedule
from bluejay.engine.sequence import Sequence


class Speculation(Protocol):
    """A way to guess."""

    def num_drafts(self, sequence: Sequence, num_decoding: int) -> int:
        """How many tokens to guess for a sequence that decodes, of so many that do."""
        ...

    def draft(self, schedule: Schedule) -> None:
        """Fill in the parts' guesses, at most as many as there is room for."""
        ...

    def learn(self, schedule: Schedule) -> None:
        """Note which guesses were right."""
        ...


class NoSpeculation:
    """Guesses nothing."""

    def num_drafts(self, sequence: Sequence, num_decoding: int) -> int:
        return 0

    def draft(self, schedule: Schedule) -> None:
        pass

    def learn(self, schedule: Schedule) -> None:
        pass
