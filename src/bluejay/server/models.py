"""The models that a server offers: their names, their engines, where each is on its way to being ready."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from bluejay.engine.client import Phase, State
from bluejay.engine.messages import Facts
from bluejay.engine.request import GenerationRequest
from bluejay.engine.statistics import Statistics
from bluejay.errors import BluejayError, ConfigError, ModelNotFound, Overloaded, Stopped
from bluejay.server.limits import Gate
from bluejay.server.options import ModelOptions
from bluejay.tokenizer import Tokenizer, load_tokenizer

# Under these names GPT-J and GPT-Neo were offered; programs of that time still ask for them.
HOSTED_NAMES = (
    "eleutherai-gpt-j-6b",
    "EleutherAI/gpt-j-6B",
    "EleutherAI/gpt-j-6b",
    "gpt-j-6b",
    "gpt-j",
    "60ca2a1e54f6ecb69867c72c",  # Neuro's GPT-J-6B
    "60a40f81b635d67d627bf6b2",  # Neuro's GPT-Neo-125M
    "60b6578da4585d36792e32f9",  # Neuro's GPT-Neo-2.7B
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]{0,199}")

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a server asks of an engine; `EngineClient` is one."""

    state: State
    facts: Facts | None

    @property
    def ready(self) -> bool: ...
    async def start(self) -> None: ...
    async def close(self) -> None: ...
    def generate(self, request: GenerationRequest) -> Any: ...
    async def statistics(self) -> Statistics: ...
    async def embed(self, texts: Sequence[str | Sequence[int]]) -> list[list[float]]: ...


class ServedModel:
    """One model with its engine.

    Args:
        options: its names and defaults.
        make_engine: makes an engine that was not started; called again for each load.
        gate: who may come in, and when those who may not are to come again.

    Attributes:
        engine: what works now; another one after `unload` and `load`.
        created_at: seconds since 1970.
        facts, tokenizer: of what was opened; None until it is ready for the first time.
    """

    def __init__(self, options: ModelOptions, make_engine: Any, gate: Gate) -> None:
        if not NAME.fullmatch(options.name):
            raise ConfigError(
                f"a model's name is {options.name!r}, expected up to 200 letters, digits and . _ @ : / -; give "
                "another: "
                "NAME=PATH"
            )
        self.options = options
        self.gate = gate
        self._make_engine = make_engine
        self.engine: Engine = make_engine()
        self.facts: Facts | None = None
        self.tokenizer: Tokenizer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._wanted = True
        self.created_at = int(time.time())

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def wanted(self) -> bool:
        """Whether it is to be there: nobody has unloaded it."""
        return self._wanted

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._wanted and self.tokenizer is not None and self.engine.ready

    @property
    def state(self) -> State:
        """Where it is."""
        return self.engine.state

    def begin(self) -> asyncio.Task[None]:
        """Begin to load; the task fails as `EngineClient.start` does."""
        self._starting = asyncio.create_task(self._start())
        return self._starting

    async def load(self) -> None:
        """Load it if it is not loaded; returns when it is ready. Raises: what is wrong with it, Stopped if unloaded."""
        starting = self._starting
        if starting is None or (starting.done() and (starting.cancelled() or starting.exception() is not None)):
            self._wanted = True
            self.engine = self._make_engine()
            starting = self.begin()
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            if not starting.cancelled():
                raise
            raise Stopped(f"{self.name} was unloaded while it was loading") from None

    async def unload(self) -> None:
        """End its engine; whoever was served gets an error."""
        self._wanted = False
        starting, self._starting = self._starting, None  # before anything is waited for: who loads now begins anew
        await _end(self.engine, starting)

    async def close(self) -> None:
        """End its engine."""
        await _end(self.engine, self._starting)

    async def _start(self) -> None:
        try:
            engine = self.engine
            await engine.start()
            facts = engine.facts
            assert facts is not None
            self.tokenizer = await asyncio.to_thread(load_tokenizer, Path(facts.path))
            self.facts = facts
        except BluejayError as error:
            _log.error("%s cannot be served: %s", self.name, error)
            raise
        _log.info(
            "%s is ready: %s, %d positions, keys and values of %d tokens",
            self.name,
            self.options.source,
            facts.n_positions,
            facts.num_cache_tokens,
        )

    def opened(self) -> tuple[Tokenizer, Facts]:
        """What it has opened. Raises: Overloaded while it is not ready, Stopped if it will not be by itself."""
        if self.ready and self.tokenizer is not None and self.facts is not None:
            return self.tokenizer, self.facts
        if not self._wanted:
            raise Stopped(f"{self.name} was unloaded; an administrator can load it again")
        starting = self._starting
        failed = starting is not None and starting.done() and (starting.cancelled() or starting.exception() is not None)
        if failed or (self.state.phase is Phase.STOPPED and self.tokenizer is not None):
            raise Stopped(f"{self.name} could not be loaded; the server's log says why")
        raise Overloaded(f"{self.name} is not ready; try again soon", 2.0)


async def _end(engine: Engine, starting: asyncio.Task[None] | None) -> None:
    if starting is not None and not starting.done():
        starting.cancel()
    await engine.close()
    if starting is not None:
        await asyncio.wait([starting])


class Models:
    """All models of a server, by name.

    Args:
        models: each with names of its own.
        strict_names: a single model then answers to its own names alone.
    Raises: ConfigError if two have the same name, or there is none.
    """

    def __init__(self, models: Iterable[ServedModel], *, strict_names: bool = False) -> None:
        self._models = list(models)
        self._strict_names = strict_names
        if not self._models:
            raise ConfigError("there is no model to serve; name one, or none for the default model")
        self._by_name: dict[str, ServedModel] = {}
        for model in self._models:
            for name in (model.name, *model.options.aliases):
                if self._by_name.setdefault(name, model) is not model:
                    raise ConfigError(f"two models are called {name!r}; give one another name: NAME=PATH")

    def __iter__(self) -> Any:
        return iter(self._models)

    @property
    def ready(self) -> bool:
        """Whether every model that is wanted is ready."""
        return all(model.ready or not model.wanted for model in self._models) and any(m.ready for m in self._models)

    def find(self, name: str | None, *, any_id: bool = False) -> ServedModel:
        """The model of a name; None is the only one.

        Args:
            any_id: the names are ids that a hosted service once gave; a single model answers to any of them.
        Raises: ModelNotFound.
        """
        if name is not None and (model := self._by_name.get(name)) is not None:
            return model
        only = self._models[0] if len(self._models) == 1 else None
        if only is not None and (name is None or (not self._strict_names and (any_id or name in HOSTED_NAMES))):
            return only
        names = ", ".join(model.name for model in self._models[:20])
        if name is None:
            raise ModelNotFound(f"no model was named, and there are several: {names}", "model")
        raise ModelNotFound(f"there is no model {name[:200]!r}; there is: {names}", "model")
