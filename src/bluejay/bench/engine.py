"""Time an engine in this process: prompts, steps, and the machine's memory in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bluejay.bench.machine import BandwidthMeter, peak_memory_bytes
from bluejay.bench.workload import Workload
from bluejay.errors import EngineError

# An engine's way to work: prompts and a number of new tokens -> once for the prompts, then once for every step, after
# that step's tokens were chosen. How many rows the step had is what it yields.
Run = Callable[[Sequence[Sequence[int]], int], Iterator[int]]

BETWEEN_READINGS_S = 1.0  # a reading takes some 50 ms: 5 % of the time, and memory's speed changes within seconds


@dataclass(frozen=True)
class Timings:
    """What was measured.

    Attributes:
        prefill_s: each timed run's prompts, up to the choice of their first tokens.
        step_s: each step of each timed run.
        bandwidth_gb_per_s: readings of the memory's speed, before, between and after those.
        peak_memory_bytes: of the process, until the buffer for these readings was made.
    """

    prefill_s: tuple[float, ...]
    step_s: tuple[float, ...]
    bandwidth_gb_per_s: tuple[float, ...]
    peak_memory_bytes: int


def measure(
    run: Run,
    prompts: Sequence[Sequence[int]],
    workload: Workload,
    *,
    make_meter: Callable[[], BandwidthMeter] = BandwidthMeter,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Timings:
    """Run the workload once to warm up, then `repeats` times with a watch.

    The speed of memory is read before, between and after the runs, and about every second between two steps: on a
    machine that others use too, it is another one after a minute. The first run, which is not timed, has no such
    readings; the peak of memory is taken behind it, so that it holds an engine's whole work and no foreign buffer.

    Args:
        on_progress: called with the steps done so far and the steps in all, a prompt counting as a step.
    Raises: EngineError if the engine ends early.
    """
    total = (workload.repeats + 1) * workload.max_new_tokens
    done = 0

    def timed() -> Iterator[float]:
        """The seconds of a run's prompts, then of each of its steps."""
        nonlocal done
        steps = run(prompts, workload.max_new_tokens)
        for _ in range(workload.max_new_tokens):
            began = time.perf_counter()
            num_rows = next(steps, 0)
            elapsed = time.perf_counter() - began
            if num_rows != len(prompts):
                raise EngineError(f"the engine went on with {num_rows} of {len(prompts)} rows before the run's end")
            done += 1
            on_progress(done, total)
            yield elapsed

    for _ in timed():
        pass
    peak = peak_memory_bytes()
    meter = make_meter()
    prefill_s, step_s, readings = [], [], [meter.read()]
    last_reading = time.perf_counter()
    for _ in range(workload.repeats):
        times = timed()
        prefill_s.append(next(times))
        for elapsed in times:
            step_s.append(elapsed)
            if time.perf_counter() - last_reading > BETWEEN_READINGS_S:
                readings.append(meter.read())
                last_reading = time.perf_counter()
        readings.append(meter.read())
        last_reading = time.perf_counter()
    return Timings(tuple(prefill_s), tuple(step_s), tuple(readings), peak)
