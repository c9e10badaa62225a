"""How many threads this machine, or the container's share of it, is good for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Processors:
    """What a process may use.

    Attributes:
        there: the machine's processors.
        allowed: those that the process may run on (taskset, cpusets).
        quota: processors' worth of time that the container may take; None where it is not limited.
    """

    there: int
    allowed: int
    quota: float | None

    @property
    def threads(self) -> int:
        """As many threads as are never stopped by the quota: rounded down, as a stopped one holds up all others."""
        return max(1, min(self.allowed, self.allowed if self.quota is None else int(self.quota)))

    @property
    def reason(self) -> str:
        """Why `threads` is what it is, in a few words."""
        if self.quota is not None and self.quota < self.allowed:
            return f"the container's CPU quota, {self.quota:g} of {self.allowed} processors"
        if self.allowed < self.there:
            return f"the processors that this process may use, of {self.there}"
        return "one for each processor"


def processors(root: Path = Path("/")) -> Processors:
    """Ask the operating system; `root` is where /proc and /sys are."""
    there = os.cpu_count() or 1
    # Only Linux can be asked which processors are allowed.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return Processors(there, allowed, min(_quotas(root), default=None))


def _quotas(root: Path) -> Iterator[float]:
    """The limits of the process's control group and of all above it, of version 1 or 2 (man 7 cgroups)."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, controllers_and_group = line.partition(":")
        controllers, _, group = controllers_and_group.partition(":")
        if controllers == "":
            for folder in _upwards(mounts, group):
                yield from _share(_text(folder / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for folder in (*_upwards(mounts / controllers, group), *_upwards(mounts / "cpu", group)):
                yield from _share([_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")])


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """The group's folder and all above it. A container may see the host's path: what is missing says nothing."""
    path = PurePosixPath(group.lstrip("/"))
    yield from (mount / part for part in (path, *path.parents) if ".." not in part.parts)


def _share(quota_and_period: list[str]) -> Iterator[float]:
    """Microseconds of processor time in a period of microseconds; "max" and -1 are no limit."""
    if len(quota_and_period) == 2 and all(number.isdigit() and int(number) for number in quota_and_period):
        yield int(quota_and_period[0]) / int(quota_and_period[1])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
