r"""One .npz file of numpy.savez, read without trust and without numpy's loader: plain arrays only, one at a time.

    zip entry arr_N.npy: | \x93NUMPY, version, header length | header, a Python dict as text | data |

Source: numpy's documentation of the format, numpy.lib.format.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bluejay.checkpoints.files import MappedFile, check_shape, short
from bluejay.checkpoints.stored_zip import Entry, read_contents
from bluejay.errors import CheckpointError

# numpy does not know bfloat16 and writes it as two bytes without a meaning.
_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "V2": torch.bfloat16,
    "i8": torch.int64,
    "i4": torch.int32,
    "u4": torch.uint32,
}
_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # numpy's own limit
_MAX_DIGITS = 19  # of 2^62; of some thousands Python makes no number
_HEADER = re.compile(r"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n")


@dataclass(frozen=True)
class StoredArray:
    """Where an array is.

    Attributes:
        name: the zip's name for it, such as arr_3.npy.
        shape, dtype: as stored.
        start: the first byte of its data in the file.
        columns_first: whether it is laid out column by column.
        entry: the whole zip entry, header included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    columns_first: bool
    entry: Entry


class NpzFile:
    """The arrays that numpy.savez was given without names: arr_0, arr_1, …

    Attributes:
        path: the file.
        num_arrays: how many there are.
    Raises: CheckpointError that names the file and the array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        self._entries = read_contents(self._file)
        self.num_arrays = len(self._entries)
        for i in range(self.num_arrays):
            if f"arr_{i}.npy" not in self._entries:
                raise CheckpointError(f"{path}: holds {self.num_arrays} arrays, but arr_{i}.npy is not among them")

    def look(self, index: int) -> StoredArray:
        """Read the header of an array, not its data.

        Raises: CheckpointError for anything but plain little-endian numbers.
        """
        name = f"arr_{index}.npy"
        where = f"{self.path}: {name}"
        entry = self._entries[name]
        start, text = self._read_header(entry, where)
        header = _HEADER.fullmatch(text)
        if header is None:
            raise CheckpointError(f"{where}: its header is {short(text.strip())}, expected that of a plain array")
        kind, columns_first, dims = header.groups()
        if kind[1:] not in _DTYPES or kind[:1] not in ("<", "|"):
            reason = "holds pickled objects, which could run code" if "O" in kind else f"has dtype {short(kind)}"
            raise CheckpointError(f"{where}: {reason}; Bluejay reads {', '.join(_DTYPES)}, little-endian")
        numbers = [dim for dim in dims.replace(" ", "").split(",") if dim]
        if any(len(number) > _MAX_DIGITS for number in numbers):
            raise CheckpointError(f"{where}: its shape is {short(dims)}, which no tensor has")
        shape = check_shape([int(number) for number in numbers], where)
        dtype = _DTYPES[kind[1:]]
        if columns_first == "True" and len(shape) != 2:
            raise CheckpointError(f"{where}: is laid out column by column and has {len(shape)} dims, expected 2")
        if start + math.prod(shape) * dtype.itemsize != entry.start + entry.num_bytes:
            raise CheckpointError(f"{where}: {kind} {list(shape)} does not fill its {entry.num_bytes} bytes")
        return StoredArray(name, shape, dtype, start, columns_first == "True", entry)

    def read(self, array: StoredArray) -> Tensor:
        """The array's numbers, a view of the mapped file where it is aligned.

        Raises: CheckpointError if they do not match their checksum.
        """
        entry = array.entry
        stored = self._file.view(entry.start, entry.num_bytes, torch.uint8)
        if entry.crc and zlib.crc32(stored.numpy().data) != entry.crc:
            raise CheckpointError(
                f"{self.path}: {array.name} is damaged: bytes {entry.start} to {entry.start + entry.num_bytes} do not "
                "match their checksum; fetch the file again"
            )
        flat = self._file.view(array.start, math.prod(array.shape), array.dtype)
        return flat.view(array.shape[::-1]).mT if array.columns_first else flat.view(array.shape)

    def _read_header(self, entry: Entry, where: str) -> tuple[int, str]:
        """The first byte of the data, and the header's text."""
        if entry.num_bytes < 12:
            raise CheckpointError(f"{where}: is too short for an array")
        head = self._file.read(entry.start, 12)
        if head[:6] != _MAGIC or head[6] not in (1, 2, 3):
            raise CheckpointError(f"{where}: is not an array that numpy wrote")
        length_bytes = 2 if head[6] == 1 else 4
        length = int.from_bytes(head[8 : 8 + length_bytes], "little")
        start = entry.start + 8 + length_bytes
        if length > min(_MAX_HEADER_BYTES, entry.start + entry.num_bytes - start):
            raise CheckpointError(f"{where}: claims a header of {length} bytes")
        return start + length, self._file.read(start, length).decode("latin-1")
