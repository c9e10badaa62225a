"""As `bluejay_model`, but by the engine that serves many requests: a paged cache, prompts in chunks, one batch."""

from __future__ import annotations

from benchmarks.contestants import bluejay_model
from benchmarks.contestants.protocol import arguments, serve

from bluejay.engine.engine import Engine
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions


class Contestant(bluejay_model.Contestant):
    """The engine as LLM makes it, with room for as many sequences as a batch has."""

    def _engine(self, batch: int) -> Engine:
        return Engine(Network(self.model), EngineOptions(max_num_sequences=batch))


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({name: getattr(contestant, name) for name in ("prepare", "decode", "prefill", "generate")})
