"""The engine in another process: real ones, with the default model, that are killed and stopped."""

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bluejay import LLM, SamplingParams
from bluejay.engine import client as client_module
from bluejay.engine import messages, worker_process
from bluejay.engine.client import EngineClient, Phase
from bluejay.engine.embedding import Embedding
from bluejay.engine.request import GenerationEvent, GenerationRequest, RequestOutput
from bluejay.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Stopped,
)

PATIENCE_S = 60.0  # for what must happen at all, on a machine that is busy with something else
PROMPT = [5, 6, 7]
LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[asyncio.Runner, EngineClient]]:
    with asyncio.Runner() as runner:
        client = EngineClient()
        runner.run(client.start())
        yield runner, client
        runner.run(client.close())


@pytest.fixture
def run(running: tuple[asyncio.Runner, EngineClient]) -> Run:
    return running[0].run


@pytest.fixture
def client(running: tuple[asyncio.Runner, EngineClient]) -> EngineClient:
    """One for all tests of this file: a start takes seconds. It heals, should a test have killed it."""
    runner, client = running
    runner.run(_until(lambda: client.ready))
    return client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@asynccontextmanager
async def _started(**options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(**options)
    try:
        await client.start()
        yield client
    finally:
        await client.close()


async def _until(condition: Callable[[], object]) -> float:
    """Wait for it; returns how long that took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def _output(client: EngineClient, request: GenerationRequest) -> RequestOutput:
    output = RequestOutput.blank(request)
    async for event in client.generate(request):
        assert event.request == 0
        output.add(event)
    return output


async def _events(client: EngineClient, params: SamplingParams = LONG) -> list[GenerationEvent]:
    return [event async for event in client.generate(GenerationRequest(PROMPT, params))]


async def _idle(client: EngineClient) -> None:
    """Wait until the engine holds nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := await client.statistics()).running or found.waiting or found.held_blocks:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether there is such a process, and not as a zombie that a container's first process does not care for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_a_server_holds_does_without_torch() -> None:
    code = "import sys; import bluejay.engine.client; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_it_is_ready_and_knows_what_was_opened(client: EngineClient, llm: LLM) -> None:
    assert client.ready
    assert client.state.phase == "ready"
    assert client.facts is not None
    assert (client.facts.model, client.facts.n_positions) == ("default", llm.config.n_positions)
    assert client.facts.vocab_size == llm.config.vocab_size
    assert client.facts.num_cache_tokens > 0
    assert _lives(client.facts.pid)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=30, logprobs=2, prompt_logprobs=1),
        SamplingParams(max_new_tokens=30, do_sample=True, seed=2**64 - 1, num_return_sequences=3),
        SamplingParams(max_new_tokens=12, num_beams=4, num_return_sequences=2, stop=["."]),
    ],
    ids=lambda params: params.mode,
)
def test_answers_are_those_of_the_engine_in_process(
    run: Run, client: EngineClient, llm: LLM, params: SamplingParams
) -> None:
    requests = [GenerationRequest(llm.encode(text), params) for text in ("Once upon a time", "The little 🐦 was")]

    async def ask() -> list[RequestOutput]:
        return await asyncio.gather(*(_output(client, request) for request in requests))

    for output, expected in zip(run(ask()), llm.engine.generate(requests), strict=True):
        assert [(one.token_ids, one.text, one.finish_reason) for one in output.sequences] == [
            (one.token_ids, one.text, one.finish_reason) for one in expected.sequences
        ]
        for one, other in zip(output.sequences, expected.sequences, strict=True):
            assert (one.beam_score or 0.0) == pytest.approx(other.beam_score or 0.0, rel=1e-4)
            assert (one.cumulative_logprob or 0.0) == pytest.approx(other.cumulative_logprob or 0.0, rel=1e-4)
            assert (one.logprobs is None) == (params.logprobs is None)
        assert [one and one.token_id for one in output.prompt_logprobs or []] == [
            one and one.token_id for one in expected.prompt_logprobs or []
        ]
        assert output.usage is not None and expected.usage is not None
        assert output.usage.generated_tokens == expected.usage.generated_tokens


def test_embeddings_are_those_of_the_engine_in_process(run: Run, client: EngineClient, llm: LLM) -> None:
    texts = ["a blue jay", "the owl heard them"]
    vectors = run(client.embed(texts))
    embedding = Embedding(llm.engine, llm.encode_texts(texts))
    while (in_process := embedding.result()) is None:
        llm.engine.step()
    for vector, expected, one_pass in zip(vectors, in_process.tolist(), llm.embed(texts).tolist(), strict=True):
        assert vector == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert vector == pytest.approx(one_pass, abs=1e-3)  # without a cache of 16 bits
    assert run(client.embed([])) == []
    with pytest.raises(InvalidRequest, match="no token") as refused:
        run(client.embed(["a", ""]))
    assert refused.value.param == "text"


def test_who_stops_listening_frees_its_blocks(run: Run, client: EngineClient) -> None:
    async def leave() -> None:
        stream = client.generate(GenerationRequest(PROMPT, LONG))
        async for _ in stream:
            break
        await stream.aclose()
        listening = asyncio.create_task(_events(client))
        while not (await client.statistics()).running:
            await asyncio.sleep(0.01)
        listening.cancel()
        await _idle(client)
        assert client._asked == {}

    before = run(client.statistics()).generated_tokens
    run(leave())
    assert run(client.statistics()).generated_tokens - before < 2 * 900


def test_streams_go_on_beside_an_embedding_and_who_leaves_that_frees_its_blocks(run: Run, client: EngineClient) -> None:
    async def ask() -> None:
        stream = client.generate(GenerationRequest(PROMPT, LONG))
        await anext(stream)
        embedding = asyncio.create_task(client.embed([[number] * 1000 for number in range(64)]))
        for _ in range(200):  # read in one pass, all would be there before the second
            await anext(stream)
        assert not embedding.done()
        embedding.cancel()
        await stream.aclose()
        await _idle(client)
        assert client._asked == {}

    run(ask())


def test_a_bad_request_is_refused_and_the_others_go_on(run: Run, client: EngineClient) -> None:
    async def ask() -> None:
        others = [asyncio.create_task(_events(client, SHORT)) for _ in range(3)]
        with pytest.raises(InvalidRequest, match="token ids") as refused:
            await _output(client, GenerationRequest([10**6], SHORT))
        assert refused.value.param == "prompt"
        with pytest.raises(ContextLengthExceeded):
            await _output(client, GenerationRequest([5] * 5000, SHORT))
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await _output(client, GenerationRequest(PROMPT, SHORT, priority=2**70))
        with pytest.raises(InvalidRequest, match="bytes"):
            await client.embed(["a" * messages.MAX_FRAME_BYTES])
        with pytest.raises(InvalidRequest, match="text holds float"):
            await client.embed([[1.5]])  # type: ignore[list-item]
        with pytest.raises(InvalidRequest, match=r"eos_token_id names \[9000\]"):
            groups = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}
            await _output(client, GenerationRequest(PROMPT, SamplingParams(eos_token_id=[9000, 5], **groups)))
        strange = await _output(client, GenerationRequest(PROMPT, SHORT, tenant="\ud800"))
        assert len(strange.sequences[0].token_ids) == 8
        for events in await asyncio.gather(*others):
            assert [event.finish_reason for event in events] == [None] * 7 + ["length"]

    pid = client.facts and client.facts.pid
    run(ask())
    assert client.ready and client.facts is not None and client.facts.pid == pid


def test_an_answer_too_large_to_be_sent_is_refused(run: Run, client: EngineClient) -> None:
    async def ask() -> None:
        other = asyncio.create_task(_events(client, SHORT))
        params = SamplingParams(max_new_tokens=5, ignore_eos=True, prompt_logprobs=8192)
        with pytest.raises(InvalidRequest, match="fewer log-probabilities"):
            await _output(client, GenerationRequest([5] * 200, params))
        assert len(await other) == 8
        await _idle(client)

    run(ask())
    assert client.ready


def test_a_large_answer_keeps_the_loop_free(run: Run, client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a worker whose words are still being understood counts as no silent one."""
    understood = messages.unpack

    def slowly(body: bytes) -> messages.Message:
        if len(body) > worker_process.LARGE_BYTES:
            time.sleep(2.0)  # longer than the worker may be silent
        return understood(body)

    monkeypatch.setattr(messages, "unpack", slowly)

    async def ask() -> float:
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=100)
        asked = asyncio.create_task(_output(client, GenerationRequest([5] * 200, params)))
        longest_s = 0.0
        while not asked.done():
            began_s = time.monotonic()
            await asyncio.sleep(0.01)
            longest_s = max(longest_s, time.monotonic() - began_s)
            assert client.ready
        assert len(asked.result().prompt_logprobs or []) == 200
        return longest_s

    assert run(ask()) < 1.0


def test_who_reads_slowly_holds_nobody_up(run: Run, client: EngineClient) -> None:
    async def ask() -> None:
        slow = client.generate(GenerationRequest(PROMPT, SamplingParams(max_new_tokens=300, ignore_eos=True)))
        await anext(slow)
        assert len(await _events(client, SHORT)) == 8
        await _idle(client)  # the slow one has ended there, too
        assert len([event async for event in slow]) == 299

    run(ask())


def test_a_server_that_is_held_up_does_not_blame_the_worker(run: Run, client: EngineClient) -> None:
    async def ask() -> None:
        listening = asyncio.create_task(_events(client, SHORT))
        await asyncio.sleep(0.01)
        time.sleep(2.5)  # longer than the worker may be silent
        assert len(await listening) == 8

    pid = client.facts and client.facts.pid
    run(ask())
    assert client.facts is not None and client.facts.pid == pid


async def _fault(client: EngineClient, number: int, num_streams: int) -> tuple[float, float, list[Any]]:
    """Send a signal under load: seconds until all have ended, until it is ready again, and what each got."""
    assert client.facts is not None
    pid = client.facts.pid
    streams = [asyncio.create_task(_events(client)) for _ in range(num_streams)]
    while (await client.statistics()).running < num_streams:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    began = time.monotonic()
    os.kill(pid, number)
    ended = await asyncio.gather(*streams)
    ended_s = time.monotonic() - began
    with pytest.raises(Overloaded, match="starting again") as refused:
        await _events(client)
    assert 1 <= refused.value.retry_after_s < PATIENCE_S
    await _until(lambda: client.ready)
    ready_s = time.monotonic() - began
    assert not Path(f"/proc/{pid}").exists()  # nor is it left as a zombie
    assert client.facts.pid != pid
    return ended_s, ready_s, ended


@pytest.mark.parametrize(
    ("number", "limit_s", "reason"),
    [
        (signal.SIGKILL, 2, r"killed by signal 9 \(Killed\)"),
        (signal.SIGTERM, 2, r"killed by signal 15 \(Terminated\)"),
        (signal.SIGSTOP, 2, "no sign of life for 0"),
        (None, 3, "no sign of life for [12]"),  # 1.6 s, on a machine that is not busy
    ],
    ids=["SIGKILL", "SIGTERM", "SIGSTOP", "hang"],
)
def test_requests_of_a_dead_worker_end_and_a_new_one_comes(
    run: Run,
    client: EngineClient,
    llm: LLM,
    number: int | None,
    limit_s: float,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if number is None:  # stopped all the same, but the system does not say so
        monkeypatch.setattr(worker_process, "_is_stopped", lambda process: False)
    ended_s, ready_s, ended = run(_fault(client, number or signal.SIGSTOP, 4))
    assert ended_s < limit_s
    assert ready_s < 30  # 3 to 4 s on a machine that is not busy
    longest = replace(LONG, max_new_tokens=max(map(len, ended)))
    [expected] = llm.engine.generate([GenerationRequest(PROMPT, longest)])
    for events in ended:
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason == "error"
        assert re.search(reason, str(events[-1].error))
        got = [token for event in events for token in event.token_ids]
        assert got == expected.token_ids[: len(got)]
    assert len(run(_events(client, SHORT))) == 8


def test_each_open_answer_of_a_dead_worker_ends(run: Run, client: EngineClient) -> None:
    async def ask() -> None:
        params = SamplingParams(max_new_tokens=900, ignore_eos=True, do_sample=True, num_return_sequences=3)
        asked = asyncio.create_task(_events(client, params))
        counted = asyncio.create_task(_idle(client))
        await asyncio.sleep(0.3)
        assert client.facts is not None
        os.kill(client.facts.pid, signal.SIGKILL)
        ends = [event for event in await asked if event.finish_reason is not None]
        assert [(event.index, event.finish_reason) for event in ends] == [(i, "error") for i in range(3)]
        with pytest.raises(EngineError, match=r"killed by signal 9|starting again"):
            await counted

    run(ask())


def test_a_step_that_never_ends_counts_as_dead(run: Run, client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_step_timeout_s", 0.05)
    with pytest.raises(EngineError, match="in one step"):
        run(client.embed(["the fox and the owl " * 190] * 100))


def test_ctrl_c_is_not_the_workers(run: Run, client: EngineClient) -> None:
    assert client.facts is not None
    os.kill(client.facts.pid, signal.SIGINT)
    assert len(run(_events(client, SHORT))) == 8


def test_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads, files = threading.active_count(), len(list(Path("/dev/fd").iterdir()))

    async def look() -> None:
        await _until(lambda: list(tmp_path.glob("bluejay-*/socket")))
        [door] = tmp_path.glob("bluejay-*/socket")
        assert door.is_socket()
        assert (door.stat().st_mode & 0o777, door.parent.stat().st_mode & 0o777) == (0o600, 0o700)

    async def live() -> None:
        told: list[tuple[int, int]] = []
        client = EngineClient(on_progress=lambda *progress: told.append(progress))
        phases = [client.state.phase]
        with pytest.raises(Stopped, match="not started"):
            await _events(client)
        looking, starting = asyncio.create_task(look()), asyncio.create_task(client.start())
        while not starting.done():
            await asyncio.sleep(0.01)
            if client.state.phase != phases[-1]:
                phases.append(client.state.phase)
                if client.state.phase is Phase.LOADING:
                    with pytest.raises(Overloaded, match="is starting; try again"):
                        await client.statistics()
        await asyncio.gather(looking, starting)
        assert phases == ["stopped", "starting", "loading", "ready"]
        assert told[-1][0] == told[-1][1] > 0
        with pytest.raises(EngineError, match="before"):
            await client.start()
        running = asyncio.create_task(_events(client))
        await _until(lambda: client._asked)
        await asyncio.gather(client.close(), client.close())
        last = (await running)[-1]
        assert (last.finish_reason, last.error) == ("error", "the engine was closed")
        await client.close()
        assert client.facts is not None and not Path(f"/proc/{client.facts.pid}").exists()
        assert not client.ready and client.state.phase == "stopped"
        with pytest.raises(Stopped, match="closed"):
            await _events(client)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(live())
    assert list(tmp_path.iterdir()) == []
    assert (threading.active_count(), len(list(Path("/dev/fd").iterdir()))) == (threads, files)


@pytest.mark.parametrize("wait_s", [0.0, 0.02, 0.6])
def test_who_gives_up_waiting_for_the_start_leaves_nothing(
    wait_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pids: list[int] = []
    _note_pids(monkeypatch, pids.append)

    async def give_up() -> None:
        client = EngineClient()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(wait_s):
                await client.start()
        assert client.state.phase == "stopped"

    asyncio.run(give_up())
    assert not any(map(_lives, pids))
    assert list(tmp_path.iterdir()) == []


def _note_pids(monkeypatch: pytest.MonkeyPatch, note: Callable[[int], None]) -> None:
    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            note(self.pid)

    monkeypatch.setattr(worker_process.subprocess, "Popen", Noted)


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"model": "no/such-model"}, ModelNotFound, "no/such-model"),
        ({"dtype": "float99"}, ConfigError, "float99"),
    ],
)
def test_a_model_that_cannot_be_opened_is_told_at_the_start(
    options: dict[str, Any], kind: type[Exception], complaint: str
) -> None:
    async def live() -> None:
        client = EngineClient(**options)
        with pytest.raises(kind, match=complaint):
            await client.start()
        assert client.state.phase == "failed" and complaint in client.state.reason
        with pytest.raises(Stopped, match=complaint):
            await _events(client)
        await client.close()
        assert client.state.phase == "failed"

    asyncio.run(live())


def test_another_version_of_the_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PROTOCOL_VERSION", 99)
    with pytest.raises(EngineError, match=r"speaks protocol \d+, this one 99"):
        asyncio.run(EngineClient().start())


def test_a_worker_that_dies_before_it_connects_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process.sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match=r"ended with exit code 1 before it connected"):
        asyncio.run(EngineClient().start())
    monkeypatch.setattr(worker_process.sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match=r"cannot be started: .*/nowhere/python"):
        asyncio.run(EngineClient().start())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who is at the other end")
def test_another_process_than_the_started_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[-1]); input()"
    intruders: list[subprocess.Popen[bytes]] = []

    class Elsewhere(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__(["sleep", "60"], **options)
            intruders.append(subprocess.Popen([sys.executable, "-c", code, command[-1]], stdin=subprocess.PIPE))

    with monkeypatch.context() as patch:
        patch.setattr(worker_process, "subprocess", _Namespace(subprocess, Popen=Elsewhere))
        with pytest.raises(EngineError, match="connected instead of the engine's worker"):
            asyncio.run(EngineClient().start())
    intruders[0].communicate(b"\n")


class _Namespace:
    """A module with something of it replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def test_a_folder_with_a_long_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with worker_process._door() as (_, path):
        assert len(path.encode()) <= 103
        assert Path(path).is_socket()
    assert not Path(path).parent.exists()
    assert list(long.iterdir()) == []


def test_a_process_is_waited_for_by_who_is_cancelled_meanwhile() -> None:
    async def live() -> None:
        process = subprocess.Popen(["sleep", "60"])
        ending = asyncio.create_task(worker_process._unbroken(worker_process._end(process)))
        for _ in range(2):
            await asyncio.sleep(0)
            ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert process.returncode == -signal.SIGKILL

    asyncio.run(live())


def test_workers_that_die_before_they_are_ready_are_started_ever_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = iter(["dead"] * 8 + ["ready", "steady"])
    delays: list[float] = []

    async def run_worker(ready: Any) -> None:
        if (life := next(lives, None)) is None:
            raise asyncio.CancelledError
        if life != "dead":
            client._ready_s = time.monotonic()
        if life == "steady":
            monkeypatch.setattr(client_module, "STEADY_S", -1.0)
        raise EngineError("it ended")

    async def sleep(delay_s: float) -> None:
        delays.append(delay_s)

    async def live() -> None:
        ready = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        with pytest.raises(asyncio.CancelledError):
            await client._supervise(ready)

    client = EngineClient()
    monkeypatch.setattr(client, "_run_worker", run_worker)
    monkeypatch.setattr(client_module, "asyncio", _Namespace(asyncio, sleep=sleep))
    asyncio.run(live())
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 0]


ORPHAN = """
import asyncio, sys
from bluejay.engine.client import EngineClient
from bluejay.engine.worker_process import WorkerProcess

async def main():
    if sys.argv[1] == "loading":
        own = WorkerProcess.start
        async def start(**options):
            worker = await own(**options)
            print(worker.pid, flush=True)
            return worker
        WorkerProcess.start = start
    client = EngineClient()
    await client.start()
    print(client.facts.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["loading", "ready", "stopped"])
def test_a_killed_server_leaves_no_worker(when: str) -> None:
    if when == "stopped" and sys.platform != "linux":
        pytest.skip("only Linux ends a stopped process with its parent")
    with subprocess.Popen([sys.executable, "-c", ORPHAN, when], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert _lives(pid)
        if when == "stopped":
            os.kill(pid, signal.SIGSTOP)
        server.kill()
    asyncio.run(_until(lambda: not _lives(pid)))


@pytest.mark.slow
def test_fifty_faults_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    _note_pids(monkeypatch, pids.append)

    async def live() -> list[tuple[float, float]]:
        times = []
        async with _started() as client:
            for number in itertools.islice(itertools.cycle([signal.SIGKILL, signal.SIGSTOP]), 50):
                ended_s, ready_s, ended = await _fault(client, number, 8)
                assert all(events[-1].finish_reason == "error" for events in ended)
                times.append((ended_s, ready_s))
                print(f"{number.name}: ended after {ended_s:.2f} s, ready after {ready_s:.2f} s", flush=True)
            assert len(await _events(client, SHORT)) == 8
        return times

    times = asyncio.run(live())
    assert not any(map(_lives, pids))
    for kind, own in (("SIGKILL", times[::2]), ("SIGSTOP", times[1::2])):
        print(f"{kind}: ended after at most {max(own)[0]:.2f} s, ready after at most {max(t for _, t in own):.2f} s")
    assert max(ended_s for ended_s, _ in times) < 2
    assert max(ready_s for _, ready_s in times) < 5
