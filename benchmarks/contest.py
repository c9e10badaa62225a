"""Contestants as the driver sees them: processes that are stopped while another one runs.

Libraries keep their threads spinning for a while after a call, and spinning threads slow everybody else down. A
contestant that waits is therefore stopped by a signal: what it does between its questions costs nobody anything.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ContestError(Exception):
    """A contestant failed; the message is its own or says how it ended."""


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        name: how tables call it.
        python: of the environment that it runs in.
        module: below `benchmarks.contestants`.
        arguments: what its class takes.
    """

    name: str
    python: str
    module: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """An answer, and how the machine was used meanwhile.

    Attributes:
        seconds: what the contestant measured.
        cores: processors that it kept busy on average.
        others: processors that everybody else kept busy on average.
    """

    seconds: float
    cores: float
    others: float


@dataclass
class Contestant:
    """A running contestant; stopped except while it answers."""

    entry: Entry
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    self.entry.python,
                    "-m",
                    f"benchmarks.contestants.{self.entry.module}",
                    json.dumps(self.entry.arguments),
                ],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
            )

    def ask(self, call: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Wake it, ask, stop it.

        Raises: ContestError if it fails, ends, or takes too long.
        """
        assert self.process.stdin is not None
        os.kill(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        except BrokenPipeError:
            raise ContestError(self._ending()) from None
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP)
        if "error" in answer:
            raise ContestError(answer["error"])
        found: dict[str, Any] = answer["ok"]
        return found

    def measure(self, call: str, timeout_s: float, **arguments: Any) -> Reading:
        """Ask for seconds, and watch the processors."""
        start, own, all_busy = time.perf_counter(), self._cpu_s(), _busy_s()
        seconds = self.ask(call, timeout_s, **arguments)["seconds"]
        wall = time.perf_counter() - start
        own, all_busy = self._cpu_s() - own, _busy_s() - all_busy
        return Reading(seconds, own / wall, max(0.0, all_busy - own) / wall)

    def end(self) -> None:
        """End the process, by its own id."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _read_line(self, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        stdout, end, line = self.process.stdout.fileno(), time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise ContestError(f"no answer within {timeout_s:.0f} s")
            piece = os.read(stdout, 1 << 16)
            if not piece:
                raise ContestError(self._ending())
            line += piece
        return line

    def _ending(self) -> str:
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"it ended with status {self.process.wait()}" + (f": {last[0]}" if last else "")

    def _cpu_s(self) -> float:
        """Processor time of all its threads so far (man 5 proc: utime and stime)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS_PER_S


def _busy_s() -> float:
    """Processor time of everybody so far: other guests of the host included, neither idling nor waiting for a disk."""
    times = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(times) - times[3] - times[4]) / _CLOCK_TICKS_PER_S


@dataclass(frozen=True)
class Task:
    """A question for every contestant of a contest."""

    name: str
    call: str
    arguments: Mapping[str, Any]


QUIET = 0.1  # processors; above it a reading is taken again
_MOST_READINGS = 3


def run(
    entries: Sequence[Entry],
    tasks: Sequence[Task],
    rounds: int,
    log_folder: Path,
    on_round: Callable[[dict[str, Any]], None],
    timeout_s: float = 300,
) -> None:
    """Ask every contestant every task, alternating: A B C A B C …

    A reading during which other processes took more than QUIET processors is taken again, up to twice; the least
    disturbed one counts, whatever its figure.

    Args:
        log_folder: for what contestants print.
        on_round: called after each round with what JSON files hold: for each contestant what it said of itself, or its
            failure, and its readings by task.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    there: dict[str, Contestant] = {}
    found: dict[str, Any] = {}
    try:
        for entry in entries:
            print(f"preparing {entry.name} …", flush=True)
            there[entry.name] = Contestant(entry, log_folder / f"{entry.name.replace(' ', '-')}.log")
            found[entry.name] = {"arguments": dict(entry.arguments), "readings": {task.name: [] for task in tasks}}
            try:
                found[entry.name]["facts"] = there[entry.name].ask("prepare", timeout_s)
            except ContestError as error:
                _drop(there, found, entry.name, error)
        for number in range(rounds):
            for task in tasks:
                for name in _turned(list(there), number):
                    try:
                        reading = _quietest(there[name], task, timeout_s)
                    except ContestError as error:
                        _drop(there, found, name, error)
                        continue
                    found[name]["readings"][task.name].append(vars(reading))
                    told = f"{1e3 * reading.seconds:.1f} ms, {reading.cores:.2f} cores, others {reading.others:.2f}"
                    print(f"round {number + 1}: {task.name}: {name}: {told}", flush=True)
            on_round(found)
    finally:
        for contestant in there.values():
            contestant.end()


def _quietest(contestant: Contestant, task: Task, timeout_s: float) -> Reading:
    readings: list[Reading] = []
    while len(readings) < _MOST_READINGS and (not readings or readings[-1].others > QUIET):
        readings.append(contestant.measure(task.call, timeout_s, **task.arguments))
    return min(readings, key=lambda reading: reading.others)


def _turned(names: list[str], number: int) -> list[str]:
    """Each round begins with another one, so that none always runs behind the same."""
    first = number % len(names) if names else 0
    return names[first:] + names[:first]


def _drop(there: dict[str, Contestant], found: dict[str, Any], name: str, error: ContestError) -> None:
    print(f"{name} failed: {error}", flush=True)
    found[name]["failure"] = str(error)
    there.pop(name).end()
