"""What waits for the tokenizer: it is counted, bounded, and ends with its client and its time."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from bluejay.accounts.plans import Plan
from bluejay.decoding.params import SamplingParams
from bluejay.errors import ContextLengthExceeded, Overloaded, QuotaExceeded
from bluejay.server import generation
from bluejay.server.auth import Principal
from bluejay.server.call import Call
from bluejay.server.dialects import openai
from bluejay.server.errors import ClientGone
from bluejay.server.filters import Filters
from bluejay.server.generation import Caller, Item, Service
from bluejay.server.limits import Gate, Limits
from bluejay.server.metrics import Metrics
from bluejay.server.options import ServerOptions

LONG = "word " * 200


class Slow:
    """A tokenizer that waits to be let on, once it is told to."""

    eos_token_id = 0
    longest_token_bytes = 128

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.begun.set()
        assert self.go.wait(30)
        return [[1] * len(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


class House:
    """As much of a server as a request needs until it is in the engine's hands."""

    def __init__(self, plan: Plan, **options: Any) -> None:
        self.options = ServerOptions(**options)
        self.tokenizer = Slow()
        facts = SimpleNamespace(n_positions=1024, vocab_size=100)
        self.model = SimpleNamespace(name="jay", gate=Gate(8, 8), opened=lambda: (self.tokenizer, facts))
        self.models = SimpleNamespace(find=lambda name, any_id: self.model)
        none: Any = SimpleNamespace(begin=lambda **_: None, end=lambda record: None)
        usage: Any = SimpleNamespace(usage_since=lambda *_: SimpleNamespace(num_requests=0, num_tokens=0))
        self.service = Service(self.options, usage, limits=Limits(), ledger=none, filters=Filters(), metrics=Metrics())
        self.principal = Principal("project", "key", "bj-x", plan, is_admin=False)
        self.gone = asyncio.Event()

    def call(self, **body: Any) -> Call:
        async def stream() -> AsyncIterator[bytes]:
            yield json.dumps(body).encode()

        async def receive() -> dict[str, str]:
            await self.gone.wait()
            return {"type": "http.disconnect"}

        request: Any = SimpleNamespace(headers={}, stream=stream, receive=receive)
        house: Any = self
        return Call(request, house, openai.DIALECT, Caller(self.principal, "id"))

    async def begin(self, text: str) -> generation.Run:
        model: Any = self.model
        return await self.call().begin(model, [Item(text, SamplingParams(max_new_tokens=4), cut=False)])

    @property
    def num_held(self) -> int:
        return self.service.limits._projects["project"].running


def played(play: Callable[[House], Coroutine[Any, Any, None]], requests_per_minute: int | None, **options: Any) -> None:
    async def all_of_it() -> None:
        async with asyncio.timeout(20):
            house = House(Plan("some", requests_per_minute, None, None, None, None), **options)
            await play(house)
            assert house.num_held == house.model.gate.num_inside == 0

    asyncio.run(all_of_it())


def test_what_is_refused_behind_the_tokenizer_counts() -> None:
    async def play(house: House) -> None:
        for error in (ContextLengthExceeded, QuotaExceeded):
            with pytest.raises(error):
                await house.begin("a" * 1025)
        assert not house.service.running

    played(play, 1)


def test_a_run_holds_one_place_until_it_is_closed() -> None:
    async def play(house: House) -> None:
        run = await house.begin("a")
        assert (house.num_held, house.model.gate.num_inside) == (1, 1)
        run.close()
        house.model.gate.enter(16)
        with pytest.raises(Overloaded):
            await house.begin("a")
        house.model.gate.leave(16)
        (await house.begin("a")).close()  # who found no place has not counted

    played(play, 2)


@pytest.mark.parametrize(
    ("handler", "body"), [(openai.tokenize, {"prompt": "a"}), (openai.detokenize, {"tokens": [1, 2]})]
)
def test_tokens_of_a_text_and_back_are_requests(handler: Any, body: dict[str, Any]) -> None:
    async def play(house: House) -> None:
        assert (await handler(house.call(**body))).status_code == 200
        with pytest.raises(QuotaExceeded):
            await handler(house.call(**body))

    played(play, 1)


def test_who_goes_and_whose_time_is_over_waits_no_longer() -> None:
    async def play(house: House) -> None:
        house.tokenizer.go.clear()
        with pytest.raises(Overloaded, match=r"within 0\.1 s"):
            await house.begin(LONG)
        with pytest.raises(Overloaded, match=r"within 0\.1 s"):
            await openai.tokenize(house.call(prompt=LONG))
        waiting = asyncio.create_task(house.begin(LONG))
        await asyncio.sleep(0)
        house.gone.set()
        with pytest.raises(ClientGone):
            await waiting
        house.tokenizer.go.set()

    played(play, None, request_timeout_s=0.1)


def test_beyond_what_may_wait_for_the_tokenizer_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_TOKENISING_CHARS", 1500)

    async def play(house: House) -> None:
        house.tokenizer.go.clear()
        first = asyncio.create_task(house.begin(LONG))
        await asyncio.to_thread(house.tokenizer.begun.wait, 20)
        with pytest.raises(Overloaded, match="too much waits for the tokenizer"):
            await house.begin(LONG)
        assert house.num_held == 1
        house.tokenizer.go.set()
        (await house.begin("short")).close()  # is not to wait
        (await first).close()

    played(play, 2)
