"""The usage ledger: what requests took, written down so that neither a killed server nor an absent database loses it.

    begin, progress, end  ->  journal (a write each)  ->  a thread, each second  ->  store

The journal is the truth until a row is in the store. The thread reads ended requests back from it, so that memory stays
as it is however long the database is away; rows may reach the store twice, which takes them once. A segment is removed
when all that ended in it is stored: requests that still run are carried over into the next one when that begins.

A server that starts claims the journals of servers that died. Their ended requests are stored; those without an end
become rows with outcome "lost", and the tokens that were delivered last.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Protocol

from bluejay.accounts import journal as journals
from bluejay.accounts.database import data_folder
from bluejay.accounts.journal import Begin, Journal
from bluejay.accounts.records import MAX_NAME_CHARS, Usage
from bluejay.errors import StoreError

INTERVAL_S = 1.0
MAX_DELAY_S = 30.0  # between tries, while the database is away
BATCH = 500  # rows a transaction: some 20 ms of SQLite's only writer
SEGMENT_BYTES = 4 * 1024 * 1024  # read again in well under a second
EMPTY_BYTES = 64 * 1024  # an idle server's segment is emptied beyond this
MAX_KEPT = 100_000  # rows in memory while the disk is full as well, some 100 MB

_log = logging.getLogger(__name__)


class UsageStore(Protocol):
    """What the ledger needs of a `Store`."""

    def record_usage(self, rows: Sequence[Usage]) -> None:
        """Keep rows, all or none; one whose request is there already changes nothing. Raises: StoreError."""


@dataclass
class _Open:
    """A request that runs."""

    begin: bytes
    generated_tokens: int = 0
    is_written: bool = False


def default_folder() -> Path:
    """Where journals lie unless told otherwise: beside the default database."""
    return data_folder() / "ledger"


class Ledger:
    """Writes usage down, and moves it into the store. Any thread may use it.

    Args:
        folder: where journals lie; several servers may share it, each has a journal of its own there.
        store: where ended requests go. It may be away.
        interval_s: between two moves.
    Raises: StoreError if the folder cannot be used.
    """

    def __init__(self, folder: Path, store: UsageStore, *, interval_s: float = INTERVAL_S) -> None:
        self._folder = folder
        self._store = store
        self._interval_s = interval_s
        try:
            self._journal = journals.create(folder)
            self._adopted = journals.claim_dead(folder)
        except OSError as error:
            raise StoreError(f"the usage journal {folder} cannot be made: {error}; name a folder of yours") from None
        self._lock = threading.Lock()  # of all below, and of the journal's appends
        self._open: dict[str, _Open] = {}
        self._num_pending = 0
        self._kept: deque[Usage] = deque()
        self._num_dropped = 0
        self._place = (1, 0)  # segment and position up to which the store has everything
        self._disk_problem: str | None = None
        self._store_problem: str | None = None
        self._num_moves = 0
        self._is_closing = self._is_closed = self._is_released = False
        self._wake = threading.Event()
        self._moved = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._move, name="usage-ledger", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """What keeps usage from being written down or stored at this time, None where all is well."""
        return "; ".join(filter(None, (self._disk_problem, self._store_problem))) or None

    def begin(
        self,
        *,
        request_id: str,
        project_id: str | None,
        key_id: str | None,
        dialect: str,
        model: str,
        served_model: str,
        prompt_tokens: int,
        started_at: datetime,
    ) -> None:
        """Write down that a request was taken on. Args: as `Usage`.

        Raises: ValueError if the request's id is not of ASCII, is too long, or runs already.
        """
        if not request_id.isascii() or not 0 < len(request_id) <= MAX_NAME_CHARS:
            raise ValueError(f"request_id is {request_id!r}, expected 1 to {MAX_NAME_CHARS} characters of ASCII")
        begun = Begin(request_id, project_id, key_id, dialect, model, served_model, prompt_tokens, started_at)
        frame = journals.pack(begun)
        with self._lock:
            if request_id in self._open:
                raise ValueError(f"the request {request_id} runs already")
            self._open[request_id] = _Open(frame, is_written=self._append(frame))

    def progress(self, request_id: str, generated_tokens: int) -> None:
        """Write down how many tokens are delivered with the piece that is sent next.

        Raises: ValueError if the request was not begun, or has ended.
        """
        frame = journals.pack_progress(request_id, generated_tokens)
        with self._lock:
            request = self._open.get(request_id)
            if request is None:
                raise ValueError(f"the request {request_id} was not begun, or has ended")
            request.generated_tokens = generated_tokens
            if not request.is_written:  # the disk was full
                frame = request.begin + frame
            request.is_written = self._append(frame) or request.is_written

    def end(self, usage: Usage) -> None:
        """Write down what a request took; the store gets it with the next move. It need not have begun here."""
        frame = journals.pack(usage)
        with self._lock:
            is_written = self._append(frame)
            self._open.pop(usage.request_id, None)
            self._num_pending += 1
            if not is_written:
                self._keep(usage)

    def pending(self) -> int:
        """Requests that ended and are not in the store yet. A dead server's journal counts as one until it is."""
        with self._lock:
            return self._num_pending + len(self._adopted)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Move what has ended into the store now, with one try.

        Returns: whether that was done, within the time.
        """
        deadline = time.monotonic() + timeout_s
        with self._moved:
            last = self._num_moves + 2  # one that had begun may have passed by what ended since
            while self._num_pending + len(self._adopted) and self._num_moves < last:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._thread.is_alive():
                    return False
                self._wake.set()
                self._moved.wait(min(left_s, 0.2))
            return not self._num_pending + len(self._adopted) or self._store_problem is None

    def close(self, timeout_s: float = 10.0) -> bool:
        """Flush and stop. What is not stored by then, or runs still, is in the journal for the next server that starts.

        Returns: whether all that ended is stored.
        """
        deadline = time.monotonic() + timeout_s
        self.flush(timeout_s)
        self._is_closing = True
        self._wake.set()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        with self._lock:
            self._is_closed = True
            if self._thread.is_alive():  # the database does not answer: the journal is let go when the process ends
                return False
            if not self._is_released:
                self._release()
            return not self._num_pending and not self._adopted

    def _release(self) -> None:
        self._is_released = True
        for adopted in self._adopted:
            adopted.close()
        if self._num_pending or self._open:
            self._journal.close()
        else:
            self._journal.remove()

    # Writing: the lock is held.

    def _append(self, frame: bytes) -> bool:
        if self._is_closed:
            raise ValueError("the ledger is closed")
        try:
            self._journal.append(frame)
        except OSError as error:
            self._note_disk(error)
            return False
        if self._disk_problem is not None:
            self._disk_problem = None
            _log.warning("the usage journal %s is written again", self._journal.path)
        return True

    def _note_disk(self, error: OSError) -> None:
        if self._disk_problem is None:
            _log.warning("the usage journal %s cannot be written: %s", self._journal.path, error)
        self._disk_problem = (
            f"the usage journal {self._folder} cannot be written: {error.strerror}; see that it has room"
        )

    def _keep(self, usage: Usage) -> None:
        self._kept.append(usage)
        if len(self._kept) > MAX_KEPT:
            self._kept.popleft()
            self._num_pending -= 1
            self._num_dropped += 1
            if self._num_dropped % 1000 == 1:
                _log.error("disk full and database away: usage of %d requests is lost", self._num_dropped)

    # Moving: all of it in the ledger's thread.

    def _move(self) -> None:
        delay = self._interval_s
        while True:
            is_last = self._is_closing  # asked before: what ended until then is moved
            try:
                self._move_once()
                if self._store_problem is not None:
                    _log.warning("usage is stored again")
                self._store_problem = None
                delay = self._interval_s
            except Exception as error:  # whatever it is, the rows are in the journal, and the next try may do
                if self._store_problem is None:
                    _log.warning("usage waits in the journal: %s", error, exc_info=not isinstance(error, StoreError))
                self._store_problem = f"usage waits in the journal: {error}"
                delay = min(MAX_DELAY_S, 2 * delay)
            with self._moved:
                self._num_moves += 1
                self._moved.notify_all()
            if is_last:
                return
            self._wake.wait(delay)
            self._wake.clear()

    def _move_once(self) -> None:
        self._move_kept()
        while self._move_batch():
            pass
        self._tidy()
        for adopted in list(self._adopted):
            self._move_adopted(adopted)

    def _move_kept(self) -> None:
        """Into the journal what it had no room for; where it still has none, straight into the store."""
        while self._kept:
            with self._lock:
                while self._kept and self._append(journals.pack(self._kept[0])):
                    self._kept.popleft()
                batch = [self._kept.popleft() for _ in range(min(BATCH, len(self._kept)))]
            try:
                self._store.record_usage(batch)
            except Exception:
                with self._lock:
                    self._kept.extendleft(reversed(batch))
                raise
            with self._lock:
                self._num_pending -= len(batch)

    def _move_batch(self) -> bool:
        """Store the next ended requests of the own journal; whether there may be more."""
        with self._lock:
            last, end = self._journal.number, self._journal.end
        number, position = self._place
        path = self._journal.segment(number)
        if number < last:
            end = path.stat().st_size
        rows, position = _ended(path, position, end)
        if rows:
            self._store.record_usage(rows)
        with self._lock:
            self._num_pending -= len(rows)
        self._place = number, position
        if len(rows) == BATCH:
            return True
        if number < last:
            self._place = number + 1, 0
            path.unlink()
            return True
        return False

    def _tidy(self) -> None:
        """Begin a new segment where this one is long; empty it where nothing in it is needed."""
        with self._lock:
            number, end = self._journal.number, self._journal.end
            if end > EMPTY_BYTES and not self._open and self._place == (number, end):
                self._journal.cut(0)
                self._place = number, 0
            elif end > SEGMENT_BYTES:
                try:
                    self._journal.start_segment(b"".join(self._carried_over()))
                except OSError as error:  # the old one goes on meanwhile
                    self._note_disk(error)
                    return
                for request in self._open.values():
                    request.is_written = True

    def _carried_over(self) -> Iterator[bytes]:
        for request_id, request in self._open.items():
            yield request.begin
            if request.generated_tokens:
                yield journals.pack_progress(request_id, request.generated_tokens)

    def _move_adopted(self, adopted: Journal) -> None:
        rows = replay(adopted)
        while batch := list(islice(rows, BATCH)):
            self._store.record_usage(batch)
        adopted.remove()
        with self._lock:
            self._adopted.remove(adopted)
        _log.info("the usage of a server that died is stored: %s", adopted.path.name)


def replay(journal: Journal) -> Iterator[Usage]:
    """What a dead process wrote down: the requests that ended, then those that ran when it died."""
    running: dict[str, tuple[Begin, int]] = {}
    ended_at = datetime.fromtimestamp(0, UTC)
    for path in journal.segments():
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            ended_at = datetime.fromtimestamp(status.st_mtime, UTC)
            for record, _ in journals.read(file.fileno(), 0, status.st_size, on_damage=_damage_in(path)):
                if isinstance(record, Usage):
                    running.pop(record.request_id, None)
                    yield record
                elif isinstance(record, Begin):  # it may have been carried over without its progress
                    running[record.request_id] = record, running.get(record.request_id, (record, 0))[1]
                elif record is not None and record.request_id in running:
                    running[record.request_id] = running[record.request_id][0], record.generated_tokens
    for begin, generated_tokens in running.values():
        yield begin.lost(generated_tokens, ended_at)


def _ended(path: Path, position: int, end: int) -> tuple[list[Usage], int]:
    """At most `BATCH` requests that ended between two positions of a segment, and the position behind them."""
    rows: list[Usage] = []
    with path.open("rb") as file:
        records = journals.read(file.fileno(), position, end, on_damage=_damage_in(path), ends_only=True)
        for record, behind in records:
            position = behind
            if isinstance(record, Usage):
                rows.append(record)
                if len(rows) == BATCH:
                    break
    return rows, position


def _damage_in(path: Path) -> Callable[[int], None]:
    return lambda position: _log.error("%s: a record at byte %d is damaged and passed over", path, position)
