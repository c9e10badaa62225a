from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from bluejay.bench import engine
from bluejay.bench.engine import measure
from bluejay.bench.workload import Workload
from bluejay.errors import EngineError


class Clock:
    """Time that only an engine and a meter spend."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class ScriptedEngine:
    """Takes 10 s for prompts and then as long as the script says for each step."""

    def __init__(self, clock: Clock, step_s: Sequence[float]) -> None:
        self.clock, self.step_s = clock, step_s
        self.runs: list[tuple[list[list[int]], int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[int]:
        self.runs.append(([list(prompt) for prompt in prompts], max_new_tokens))
        for seconds in [10.0, *self.step_s]:
            self.clock.now += seconds
            yield len(prompts)


class ScriptedMeter:
    def __init__(self, clock: Clock, log: list[float]) -> None:
        self.clock, self.log = clock, log

    def read(self) -> float:
        self.log.append(self.clock.now)
        self.clock.now += 0.25
        return 20.0 + len(self.log)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    return clock


def test_prompts_and_steps_are_timed_without_the_warm_up_and_the_readings(clock: Clock) -> None:
    scripted = ScriptedEngine(clock, [0.5, 0.125, 2.0])
    workload = Workload(batch_size=2, prompt_tokens=3, max_new_tokens=4, repeats=2)
    readings: list[float] = []
    seen: list[tuple[int, int]] = []
    found = measure(
        scripted,
        [[1, 2, 3], [4, 5, 6]],
        workload,
        make_meter=lambda: ScriptedMeter(clock, readings),  # type: ignore[arg-type,return-value]
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert found.prefill_s == (10.0, 10.0)
    assert found.step_s == (0.5, 0.125, 2.0) * 2
    assert scripted.runs == [([[1, 2, 3], [4, 5, 6]], 4)] * 3
    assert seen == [(done, 12) for done in range(1, 13)]
    # Before the first timed run; behind the step after the long prompt; behind the step of 2 s; behind the run.
    run = 12.625
    assert readings[:4] == [run, run + 0.25 + 10.5, run + 0.5 + 12.625, run + 0.75 + 12.625]
    assert found.bandwidth_gb_per_s == tuple(21.0 + n for n in range(7))
    assert found.peak_memory_bytes > 2**20


def test_the_peak_of_memory_is_taken_before_the_meters_buffer_is_there(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(engine, "peak_memory_bytes", lambda: order.append("peak") or 7)

    def make_meter() -> ScriptedMeter:
        order.append("meter")
        return ScriptedMeter(clock, [])

    found = measure(ScriptedEngine(clock, [1.0]), [[1]], Workload(max_new_tokens=2), make_meter=make_meter)  # type: ignore[arg-type]
    assert order == ["peak", "meter"]
    assert found.peak_memory_bytes == 7


def test_an_engine_that_ends_early_is_an_error(clock: Clock) -> None:
    with pytest.raises(EngineError, match="went on with 0 of 1 rows"):
        measure(ScriptedEngine(clock, [1.0, 1.0]), [[1]], Workload(max_new_tokens=4))
