"""Journals of usage on disk: append-only segments of framed records, in a folder that one process holds.

    FOLDER/lock                              held for moments: while a journal is made, claimed or removed
    FOLDER/20260131T120000-4711-9f3c2a/      a journal; 0700
        lock                                 held by its process for as long as it lives
        000001.log  000002.log               segments; 0600

    frame   length of the body, 4 bytes | CRC-32 of the body, 4 bytes | body
    body    msgpack: [BEGIN, …] [PROGRESS, request_id, generated_tokens] [END, …]; times in microseconds

A record is one write(2), which is in the kernel's hands when it returns: a process that is killed loses none. Nothing
is synchronised with the disk, so a power cut may lose what the kernel had not written yet, usually the last 30 seconds.
A record that was cut off is dropped; one that is damaged is passed over.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack

from bluejay.accounts.records import MAX_NAME_CHARS, Usage, in_utc, storable

BEGIN, PROGRESS, END = 1, 2, 3
MAX_BODY_BYTES = 64 * 1024  # some ten times the longest record: a longer one is none
READ_BYTES = 1024 * 1024

_HEADER = struct.Struct("<II")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TIMES = tuple(index for index, field in enumerate(fields(Usage)) if field.name in ("started_at", "ended_at"))


@dataclass(frozen=True)
class Begin:
    """A request that was taken on. Attributes as in `Usage`."""

    request_id: str
    project_id: str | None
    key_id: str | None
    dialect: str
    model: str
    served_model: str
    prompt_tokens: int
    started_at: datetime

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                object.__setattr__(self, field.name, storable(value, MAX_NAME_CHARS))
        object.__setattr__(self, "started_at", in_utc(self.started_at, "started_at"))

    def lost(self, generated_tokens: int, ended_at: datetime) -> Usage:
        """What is known of the request where its server was killed: not the cached tokens, nor the first one's time."""
        ended_at = max(self.started_at, ended_at)
        return Usage(
            **vars(self),
            cached_tokens=0,
            generated_tokens=generated_tokens,
            ended_at=ended_at,
            first_token_s=None,
            outcome="lost",
        )


@dataclass(frozen=True)
class Progress:
    """The tokens that were delivered so far."""

    request_id: str
    generated_tokens: int


Record = Begin | Progress | Usage


def pack(record: Record) -> bytes:
    """The record's frame."""
    values: list[Any]
    if isinstance(record, Progress):
        return pack_progress(record.request_id, record.generated_tokens)
    if isinstance(record, Begin):
        values = [BEGIN, *vars(record).values()]
        values[-1] = _microseconds(record.started_at)
    else:
        values = [END, *vars(record).values()]
        for index in _TIMES:
            values[index + 1] = _microseconds(values[index + 1])
    return _frame(msgpack.packb(values))


def pack_progress(request_id: str, generated_tokens: int) -> bytes:
    """A Progress' frame, without the object: this is done for each piece of each stream."""
    return _frame(msgpack.packb((PROGRESS, request_id, generated_tokens)))


def _frame(body: bytes) -> bytes:
    return _HEADER.pack(len(body), zlib.crc32(body)) + body


def _unpack(body: bytes) -> Record | str:
    """The record; what is wrong with it where it is none, such as one of a newer version."""
    try:
        kind, *values = msgpack.unpackb(body)
        if kind == PROGRESS:
            return Progress(*values)
        if kind == BEGIN:
            values[-1] = _EPOCH + values[-1] * _MICROSECOND
            return Begin(*values)
        if kind == END:
            for index in _TIMES:
                values[index] = _EPOCH + values[index] * _MICROSECOND
            return Usage(*values)
    except (ValueError, TypeError, IndexError, OverflowError, msgpack.UnpackException) as error:
        return str(error)
    return f"unknown kind {kind!r}"


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def read(
    file: int, position: int, end: int, *, on_damage: Callable[[int], None], ends_only: bool = False
) -> Iterator[tuple[Record | None, int]]:
    """Each record between two positions of a file, and the position behind it.

    What is no whole frame is passed over up to the next one. No text in a record can pass for a frame: the length of a
    frame has a byte of zero, and `storable` text has none.

    Args:
        on_damage: is told the position of a record that was passed over while others follow; one that was cut off at
            the end is no damage.
        ends_only: do not unpack the others; they come as None.
    """
    data, start = b"", position  # data[0] is the file's byte at `start`
    damaged_at: int | None = None
    while position < end:
        if position - start + _HEADER.size + MAX_BODY_BYTES > len(data) < end - start:
            data, start = os.pread(file, min(READ_BYTES, end - position), position), position
        body = _body(data, position - start)
        if body is None:
            damaged_at = position if damaged_at is None else damaged_at
            position += 1
            continue
        if damaged_at is not None:
            on_damage(damaged_at)
            damaged_at = None
        # The body is a short array, so its second byte is the kind.
        record = None if ends_only and body[1] != END else _unpack(body)
        if isinstance(record, str):
            on_damage(position)
            record = None
        position += _HEADER.size + len(body)
        yield record, position


def _body(data: bytes, at: int) -> bytes | None:
    """The body of the frame that begins there, None if none does."""
    if len(data) - at <= _HEADER.size:
        return None
    length, checksum = _HEADER.unpack_from(data, at)
    if not 2 <= length <= min(MAX_BODY_BYTES, len(data) - at - _HEADER.size):
        return None
    body = data[at + _HEADER.size : at + _HEADER.size + length]
    return body if zlib.crc32(body) == checksum else None


class Journal:
    """A journal that this process holds, its own or one of a dead process. Its methods are not to run side by side.

    Attributes:
        path: its folder.
        number: of the segment that is written, 0 before the first.
        end: that segment's length in bytes.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.number = 0
        self.end = 0
        self._lock = lock
        self._file: int | None = None

    def segments(self) -> list[Path]:
        """Its segments, the oldest first."""
        return sorted(self.path.glob("*.log"))

    def segment(self, number: int) -> Path:
        """The path of a segment."""
        return self.path / f"{number:06d}.log"

    def start_segment(self, frames: bytes) -> None:
        """Write into a new segment from now on, which begins with these frames.

        Raises: OSError, and nothing has changed.
        """
        path = self.segment(self.number + 1)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            _write(file, frames)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        if self._file is not None:
            os.close(self._file)
        self._file, self.number, self.end = file, self.number + 1, len(frames)

    def append(self, frames: bytes) -> None:
        """Write frames at the end. Raises: OSError; half of a frame is then not left behind."""
        if self._file is None:
            raise OSError(errno.EBADF, "the journal is closed")
        try:
            _write(self._file, frames)
        except OSError:
            with suppress(OSError):  # then `read` passes over it
                os.ftruncate(self._file, self.end)
            self.end = os.fstat(self._file).st_size
            raise
        self.end += len(frames)

    def cut(self, end: int) -> None:
        """Make the segment that short. Raises: OSError."""
        if self._file is not None:
            os.ftruncate(self._file, end)
            self.end = end

    def close(self) -> None:
        """Let go of it; whoever comes next may claim it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        os.close(self._lock)

    def remove(self) -> None:
        """Remove it and let go of it."""
        with _held(self.path.parent):
            for path in (*self.segments(), self.path / "lock"):
                path.unlink(missing_ok=True)
            self.path.rmdir()
        self.close()


def _write(file: int, frames: bytes) -> None:
    done = os.write(file, frames)
    if done != len(frames):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def create(folder: Path) -> Journal:
    """A new journal, with an empty segment. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _held(folder):
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{secrets.token_hex(3)}"
        path.mkdir(mode=0o700)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    journal = Journal(path, lock)
    try:
        journal.start_segment(b"")
    except OSError:
        journal.remove()
        raise
    return journal


def claim_dead(folder: Path) -> list[Journal]:
    """The journals whose processes are gone, the oldest first; they are this process's now. Raises: OSError."""
    found = []
    with _held(folder):
        for path in sorted(folder.glob("*-*-*/")):
            try:
                lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # its process died while it made or removed the journal
                with suppress(OSError):
                    path.rmdir()
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            found.append(Journal(path, lock))
    return found


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
