from pathlib import Path

import pytest

from bluejay.ops.threads import Processors, processors


def quota(root: Path, files: dict[str, str]) -> float | None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return processors(root).quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert processors(tmp_path).quota is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        # The tightest of the group and those above it.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/cpu.max": "max 100000",
            },
            3.0,
        ),
        # A container that sees its path as the host names it.
        ({"proc/self/cgroup": "0::/../host/path", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        # Version 1, and one that is mounted beside an empty version 2.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/1",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({"proc/self/cgroup": "2:cpuset:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "7"}, None),
        ({"proc/self/cgroup": "nonsense", "sys/fs/cgroup/cpu.max": "1"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1 0"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "garbage of three words"}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    assert quota(tmp_path, files) == expected


@pytest.mark.parametrize(
    ("there", "allowed", "quota", "threads", "reason"),
    [
        (8, 8, None, 8, "one for each processor"),
        (8, 3, None, 3, "the processors that this process may use, of 8"),
        (8, 8, 2.9, 2, "the container's CPU quota, 2.9 of 8 processors"),
        (8, 8, 0.5, 1, "the container's CPU quota, 0.5 of 8 processors"),
        (8, 2, 4.0, 2, "the processors that this process may use, of 8"),
    ],
)
def test_threads_are_no_more_than_run_at_once(
    there: int, allowed: int, quota: float | None, threads: int, reason: str
) -> None:
    found = Processors(there, allowed, quota)
    assert (found.threads, found.reason) == (threads, reason)
