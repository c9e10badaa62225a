"""The table of contents of a zip archive whose entries are stored as they are, which is how torch.save writes.

    | local header, name, padding | data | local header … | … | central directory | zip64 record, locator | end record |

Source: PKWARE, APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bluejay.checkpoints.files import MAX_DESCRIPTION_BYTES, MappedFile, short
from bluejay.errors import CheckpointError

MAGIC = b"PK\x03\x04"

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_IN_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """Where an entry's data is.

    Attributes:
        start, num_bytes: its run of bytes in the file.
        crc: CRC-32 of the data; 0 where the writer left it out.
    """

    start: int
    num_bytes: int
    crc: int


@dataclass(frozen=True)
class _Listed:
    """An entry as the central directory has it."""

    name: bytes
    header_start: int
    num_bytes: int
    crc: int


def read_contents(file: MappedFile) -> dict[str, Entry]:
    """Every entry by its name.

    Raises: CheckpointError if an entry is compressed, encrypted, listed twice, overlaps another or leaves the file.
    """
    directory_start, directory_bytes = _find_directory(file)
    listed = _read_directory(file, directory_start, directory_bytes)
    entries: dict[str, Entry] = {}
    position = 0
    for item in sorted(listed, key=lambda item: item.header_start):
        name = item.name.decode("utf-8", "backslashreplace")
        if name in entries:
            raise CheckpointError(f"{file.path}: the entry {short(name)} is listed twice")
        if item.header_start < position:
            raise CheckpointError(f"{file.path}: the entry {short(name)} overlaps another")
        start = _data_start(file, item, name)
        position = start + item.num_bytes
        if position > directory_start:
            raise CheckpointError(f"{file.path}: the entry {short(name)} runs past the end of the data")
        entries[name] = Entry(start, item.num_bytes, item.crc)
    return entries


def _find_directory(file: MappedFile) -> tuple[int, int]:
    """First byte and length of the central directory."""
    end_start = file.num_bytes - _END.size
    if end_start < 0:
        raise CheckpointError(f"{file.path}: is cut short at byte {file.num_bytes}; fetch the file again")
    magic, *_, num_bytes, start, comment_bytes = _END.unpack(file.read(end_start, _END.size))
    if magic != b"PK\x05\x06" or comment_bytes:
        raise CheckpointError(f"{file.path}: does not end as a zip archive; it is cut short, fetch the file again")
    limit = end_start
    if end_start >= _LOCATOR.size:
        magic, _, end64_start, _ = _LOCATOR.unpack(file.read(end_start - _LOCATOR.size, _LOCATOR.size))
        if magic == b"PK\x06\x07":
            limit = end64_start
            magic, *_, num_bytes, start = _END64.unpack(file.read(end64_start, _END64.size))
            if magic != b"PK\x06\x06":
                raise CheckpointError(f"{file.path}: its zip64 record is not at byte {end64_start}")
    if start + num_bytes > limit or num_bytes > MAX_DESCRIPTION_BYTES:
        raise CheckpointError(f"{file.path}: claims a zip directory of {num_bytes} bytes at byte {start}")
    return start, num_bytes


def _read_directory(file: MappedFile, start: int, num_bytes: int) -> list[_Listed]:
    raw = file.read(start, num_bytes)
    found, position = [], 0
    while position < len(raw):
        where = f"{file.path}: the zip directory at byte {start + position}"
        if len(raw) - position < _CENTRAL.size or raw[position : position + 4] != b"PK\x01\x02":
            raise CheckpointError(f"{where} is damaged")
        (_, _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes, comment_bytes, _, _, _, header) = (
            _CENTRAL.unpack_from(raw, position)
        )
        position += _CENTRAL.size
        name = raw[position : position + name_bytes]
        extra = raw[position + name_bytes : position + name_bytes + extra_bytes]
        position += name_bytes + extra_bytes + comment_bytes
        if position > len(raw):
            raise CheckpointError(f"{where} is damaged")
        size, packed, header = _widen([size, packed, header], extra, where)
        if method != 0 or flags & 1 or packed != size:
            raise CheckpointError(
                f"{where}: {short(name.decode('utf-8', 'backslashreplace'))} is compressed or encrypted; "
                "torch.save and numpy.savez store numbers as they are, so this file was made by something else"
            )
        found.append(_Listed(name, header, size, crc))
    return found


def _widen(values: list[int], extra: bytes, where: str) -> list[int]:
    """Replace the values that need 64 bits by those of the zip64 extra field, which holds just these, in order."""
    if _IN_ZIP64 not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        field = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1 and len(field) == length >= 8 * values.count(_IN_ZIP64):
            wide = iter(struct.unpack_from(f"<{values.count(_IN_ZIP64)}Q", field))
            return [next(wide) if value == _IN_ZIP64 else value for value in values]
    raise CheckpointError(f"{where}: a size or an offset is missing")


def _data_start(file: MappedFile, item: _Listed, name: str) -> int:
    """The first byte after the entry's own header, which must agree with the directory."""
    header = file.read(item.header_start, _LOCAL.size)
    magic, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
    named_alike = name_bytes == len(item.name) and file.read(item.header_start + _LOCAL.size, name_bytes) == item.name
    if magic != MAGIC or flags & 1 or method != 0 or not named_alike:
        raise CheckpointError(f"{file.path}: the header of {short(name)} at byte {item.header_start} is damaged")
    return item.header_start + _LOCAL.size + len(item.name) + int(extra_bytes)
