import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bluejay.accounts import journal as journals
from bluejay.accounts.journal import Begin, Progress, Record
from bluejay.accounts.records import OUTCOMES, Usage, storable

from .rows import NOON, begun, usage

RECORDS: list[Record] = [Begin(**begun("a")), Progress("a", 3), usage("a"), Begin(**begun("b")), Progress("b", 70_000)]

names = st.text(max_size=220).map(lambda text: storable(text, 200))
moments = st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC))
counts = st.integers(0, 2**63 - 1)
begins = st.builds(Begin, names, st.none() | names, st.none() | names, names, names, names, counts, moments)
usages = st.builds(
    Usage,
    *(names, st.none() | names, st.none() | names, names, names, names, counts, counts, counts, moments, moments),
    st.none() | st.floats(0, 1e6),
    st.sampled_from(OUTCOMES),
)
records = st.lists(begins | usages | st.builds(Progress, names, counts), min_size=1, max_size=8)


@contextmanager
def opened(path: Path, data: bytes) -> Iterator[tuple[int, int]]:
    """A file with that content, and its length."""
    path.write_bytes(data)
    file = os.open(path, os.O_RDONLY)
    try:
        yield file, len(data)
    finally:
        os.close(file)


def read_all(path: Path, data: bytes) -> tuple[list[Record | None], list[int]]:
    """The records of a file, and where there is damage."""
    damage: list[int] = []
    with opened(path, data) as (file, end):
        return [record for record, _ in journals.read(file, 0, end, on_damage=damage.append)], damage


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "segment.log"


@given(records)
def test_what_was_written_is_read(path: Path, written: list[Record]) -> None:
    assert read_all(path, b"".join(map(journals.pack, written))) == (written, [])


@given(records, st.data())
def test_a_file_that_is_cut_off_anywhere_loses_the_torn_record_alone(
    path: Path, written: list[Record], data: st.DataObject
) -> None:
    frames = [journals.pack(record) for record in written]
    cut = data.draw(st.integers(0, sum(map(len, frames))))
    num_whole = sum(sum(map(len, frames[: number + 1])) <= cut for number in range(len(frames)))
    assert read_all(path, b"".join(frames)[:cut]) == (written[:num_whole], [])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(records, st.data())
def test_a_damaged_record_is_passed_over_and_told(path: Path, written: list[Record], data: st.DataObject) -> None:
    frames = [journals.pack(record) for record in written]
    number = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[number]) - 1))
    start = sum(map(len, frames[:number]))
    spoilt = bytearray(b"".join(frames))
    spoilt[start + at] ^= data.draw(st.integers(1, 255))
    found, damage = read_all(path, bytes(spoilt))
    assert found == written[:number] + written[number + 1 :]
    assert damage == ([start] if number + 1 < len(frames) else [])


@pytest.mark.parametrize("num_zeros", [1, 8, 4096])
def test_zeros_that_a_power_cut_left_are_no_records(path: Path, num_zeros: int) -> None:
    data = b"".join(map(journals.pack, RECORDS))
    assert read_all(path, data + bytes(num_zeros)) == (RECORDS, [])
    assert read_all(path, data + bytes(num_zeros) + data) == (RECORDS * 2, [len(data)])


def test_records_of_a_newer_version_are_passed_over(path: Path) -> None:
    newer = journals._frame(b"\x92\x04\x01")
    first = journals.pack(RECORDS[0])
    found, damage = read_all(path, first + newer + first)
    assert (found, damage) == ([RECORDS[0], None, RECORDS[0]], [len(first)])


def test_a_long_file_is_read_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "READ_BYTES", 1000)
    monkeypatch.setattr(journals, "MAX_BODY_BYTES", 500)
    assert read_all(path, b"".join(map(journals.pack, RECORDS * 50))) == (RECORDS * 50, [])


def test_reading_goes_on_where_it_ended_and_may_leave_out_what_runs(path: Path) -> None:
    with opened(path, b"".join(map(journals.pack, RECORDS))) as (file, end):
        damage: list[int] = []
        first = list(journals.read(file, 0, end, on_damage=damage.append, ends_only=True))
        assert [record for record, _ in first] == [None, None, RECORDS[2], None, None]
        rest = journals.read(file, first[2][1], end, on_damage=damage.append)
        assert [record for record, _ in rest] == RECORDS[3:]
        assert damage == []


def test_a_text_cannot_pass_for_a_frame(path: Path) -> None:
    inner = journals.pack(usage("forged"))
    forged = Begin(**begun("a", model=inner.decode("latin-1")))
    frame = journals.pack(forged)
    assert read_all(path, frame[:-1]) == ([], [])
    assert read_all(path, frame) == ([forged], [])


def test_what_a_lost_request_took_is_what_was_delivered() -> None:
    begin = Begin(**begun("a"))
    later = NOON + timedelta(minutes=1)
    assert begin.lost(7, later) == usage(
        "a", generated_tokens=7, cached_tokens=0, ended_at=later, first_token_s=None, outcome="lost"
    )
    assert begin.lost(0, NOON - timedelta(days=1)).ended_at == NOON


def test_journals_are_private(tmp_path: Path) -> None:
    journal = journals.create(tmp_path / "ledger")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in journal.path.iterdir()}
    assert modes == {"lock": 0o600, "000001.log": 0o600}
    assert stat.S_IMODE(journal.path.stat().st_mode) == stat.S_IMODE(journal.path.parent.stat().st_mode) == 0o700
    journal.remove()
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["lock"]


def test_a_journal_has_one_process(tmp_path: Path) -> None:
    mine = journals.create(tmp_path)
    other = journals.create(tmp_path)
    assert journals.claim_dead(tmp_path) == []
    mine.append(b"x")
    mine.close()
    (claimed,) = journals.claim_dead(tmp_path)
    assert claimed.path == mine.path
    assert [path.read_bytes() for path in claimed.segments()] == [b"x"]
    assert journals.claim_dead(tmp_path) == []
    claimed.remove()
    other.remove()


def test_folders_that_were_never_finished_are_cleared_away(tmp_path: Path) -> None:
    journals.create(tmp_path).remove()
    (tmp_path / "20260131T120000-1-abcdef").mkdir()
    assert journals.claim_dead(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_full_disk_leaves_no_half_record(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 1,000 bytes."""
    code = f"""if True:
        import resource
        from pathlib import Path
        from bluejay.accounts import journal as journals
        journal = journals.create(Path({str(tmp_path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        failures = 0
        for number in range(100):
            try:
                journal.append(journals.pack_progress("request", number))
            except OSError:
                failures += 1
        assert 0 < failures < 100, failures
        try:
            journal.start_segment(bytes(2000))
        except OSError:
            assert len(journal.segments()) == journal.number == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.append(journals.pack_progress("request", 1000))
        assert journal.end == journal.segments()[0].stat().st_size
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    (journal,) = journals.claim_dead(tmp_path)
    found, damage = read_all(tmp_path / "copy", journal.segments()[0].read_bytes())
    numbers = [record.generated_tokens for record in found if isinstance(record, Progress)]
    assert numbers == [*range(len(numbers) - 1), 1000]
    assert damage == []
    journal.remove()
