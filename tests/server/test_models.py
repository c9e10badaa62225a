"""Loading and unloading models while a server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from bluejay.checkpoints.hub_cache import DEFAULT_MODEL_DIR
from bluejay.engine.client import Phase, State
from bluejay.errors import CheckpointError, Stopped
from bluejay.server.limits import Gate
from bluejay.server.models import ServedModel
from bluejay.server.options import ModelOptions


class FakeFacts:
    path = str(DEFAULT_MODEL_DIR)
    n_positions = 1024
    num_cache_tokens = 4096


class FakeEngine:
    """Starts when it is let."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.may_start = asyncio.Event()
        self.ready = False
        self.facts: Any = None
        self.state = State(Phase.STOPPED)

    async def start(self) -> None:
        await self.may_start.wait()
        if self.error is not None:
            raise self.error
        self.facts, self.ready = FakeFacts(), True

    async def close(self) -> None:
        self.ready = False


def served(*engines: FakeEngine) -> ServedModel:
    make: Callable[[], FakeEngine] = iter(engines).__next__
    return ServedModel(ModelOptions("jay", "default"), make, Gate(1, 1))


def test_the_log_says_what_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.may_start.set()
        await served(engine).begin()

    with caplog.at_level("INFO", "bluejay"):
        asyncio.run(scenario())
    assert "jay is ready: default, 1024 positions, keys and values of 4096 tokens" in caplog.messages


def test_one_that_could_not_be_loaded_is_tried_again() -> None:
    async def scenario() -> None:
        bad, good = FakeEngine(CheckpointError("it is not there")), FakeEngine()
        model = served(FakeEngine(), bad, good)
        await model.unload()
        bad.may_start.set()
        with pytest.raises(CheckpointError, match="not there"):
            await model.load()
        good.may_start.set()
        await model.load()
        assert model.ready

    asyncio.run(scenario())


def test_unloading_ends_a_loading() -> None:
    async def scenario() -> None:
        first, second = FakeEngine(), FakeEngine()
        model = served(first, second)
        model.begin()
        loading = asyncio.create_task(model.load())
        await asyncio.sleep(0)
        await model.unload()
        with pytest.raises(Stopped, match="unloaded while it was loading"):
            await loading
        second.may_start.set()
        await model.load()
        assert model.ready

    asyncio.run(scenario())


def test_who_loads_while_it_is_unloaded_begins_anew() -> None:
    async def scenario() -> None:
        first, second = FakeEngine(), FakeEngine()
        model = served(first, second)
        first.may_start.set()
        await model.begin()
        second.may_start.set()
        await asyncio.gather(model.unload(), model.load())
        assert model.ready
        assert model.engine is second

    asyncio.run(scenario())


def test_one_whose_files_are_gone_is_not_promised_again() -> None:
    async def scenario() -> None:
        model = served(first := FakeEngine(), second := FakeEngine(CheckpointError("gone")))
        first.may_start.set()
        await model.begin()
        await model.unload()
        second.may_start.set()
        with pytest.raises(CheckpointError):
            await model.load()
        with pytest.raises(Stopped, match="could not be loaded"):
            model.opened()

    asyncio.run(scenario())
