"""Texts that are embedded by an engine, between the steps of its other requests.

`Scorer.embed` reads whole texts in one pass, and whoever streams waits. Here a text is read as a prompt is: in chunks,
beside the sequences that decode, through the paged cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from bluejay.engine.engine import Engine
from bluejay.engine.request import EmbeddingEvent, GenerationEvent
from bluejay.errors import EngineError


class Embedding:
    """The embeddings of some texts, on their way while somebody calls `engine.step`.

    Args:
        texts: token ids.
    Raises: RequestError if one of them cannot be read, before anything runs.
    """

    def __init__(self, engine: Engine, texts: Sequence[Sequence[int]]) -> None:
        self._engine = engine
        self._inbox: deque[GenerationEvent] = deque()
        self._numbers = engine.add_texts(texts, self._inbox)
        self._vectors: dict[int, Tensor] = {}

    def result(self) -> Tensor | None:
        """The means over tokens of the last hidden states, [n, n_embd] float32 on the CPU; None until all are there.

        Raises: EngineError if a text could not be read to its end; the others are cancelled then.
        """
        while self._inbox:
            event = self._inbox.popleft()
            if not isinstance(event, EmbeddingEvent) or event.vector is None:
                self.cancel()
                raise EngineError(event.error or f"a text could not be embedded: {event.finish_reason}")
            self._vectors[event.request] = event.vector
        if len(self._vectors) < len(self._numbers):
            return None
        n_embd = self._engine.network.model.config.n_embd
        return (
            torch.stack([self._vectors[number] for number in self._numbers])
            if self._numbers
            else torch.empty(0, n_embd)
        )

    def cancel(self) -> None:
        """End what has not ended, at the next step."""
        for number in self._numbers:
            self._engine.cancel(number)
