"""What looks at answers before they leave."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Protocol

from bluejay.engine.request import GenerationEvent

if TYPE_CHECKING:
    from bluejay.server.generation import Run


class Rules(Protocol):
    """What a model's answers are held against."""

    def watch(
        self, run: Run, events: AsyncGenerator[GenerationEvent, None]
    ) -> AsyncGenerator[GenerationEvent, None]: ...


class Filters:
    """The rules of each model, by its name."""

    def __init__(self, rules: Mapping[str, Rules] | None = None) -> None:
        self._rules = dict(rules or {})

    def of(self, model: str) -> Rules | None:
        """The rules of a model; None where there are none."""
        return self._rules.get(model)
