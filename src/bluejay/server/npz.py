"""Texts out of NumPy archives that strangers send: never a pickle, never more memory than was agreed on."""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bluejay.errors import InvalidRequest

ENTRY = b"PK\x01\x02"  # begins each line of an archive's list of contents
NPY = b"\x93NUMPY"
# As NumPy writes it; nothing is evaluated.
HEADER = re.compile(
    rb"\{\s*'descr':\s*'([^']{1,40})',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([0-9, ]{0,200})\),?\s*\}\s*"
)
TEXT = re.compile(r"[<>]U[1-9][0-9]{0,7}")
# What zipfile, zlib and NumPy say to bytes that are none of theirs.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


def is_npz(data: bytes) -> bool:
    """Whether the bytes begin as an archive does."""
    return data.startswith(b"PK")


def read_texts(data: bytes, *, max_texts: int, max_bytes: int) -> list[str]:
    """All texts of all arrays, in the order of the arrays' numbers, as `numpy.savez` names the items of a list.

    Args:
        max_bytes: of the arrays together, unpacked.
    Raises: InvalidRequest for what is no archive, holds anything but texts, or is larger than that.
    Source: NumPy's NEP 1, format 1.0 and 2.0.
    """
    texts: list[str] = []
    try:
        for name, array in _arrays(data, max_texts, max_bytes):
            texts += _texts(name, array, max_texts - len(texts))
    except BROKEN as error:
        raise InvalidRequest(f"the data is no valid .npz file: {str(error)[:200]}", "data") from None
    return texts


def digest_of_chunks(chunks: Sequence[bytes], *, max_arrays: int, max_bytes: int) -> str:
    """What Neuro's client names the data of a loader by, of the archives that hold them.

    It is the MD5 of the MD5s of the first arrays, of the second ones and so on, each over all chunks, in hexadecimal.

    Args:
        max_arrays: of a chunk.
        max_bytes: of all arrays together, unpacked.
    Raises: InvalidRequest for what is no archive of arrays, or is larger than that.
    """
    columns: list[Any] = []
    for chunk in chunks:
        try:
            for place, (name, array) in enumerate(_arrays(chunk, max_arrays, max_bytes)):
                max_bytes -= len(array)
                if place == len(columns):
                    columns.append(hashlib.md5(usedforsecurity=False))
                columns[place].update(_header(name, array)[3])
        except BROKEN as error:
            raise InvalidRequest(f"the data is no valid .npz file: {str(error)[:200]}", "data") from None
    return hashlib.md5(b"".join(column.digest() for column in columns), usedforsecurity=False).hexdigest()


def _arrays(data: bytes, max_arrays: int, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the files in an archive, whose list says how large they are before any is unpacked."""
    if data.count(ENTRY) > max_arrays:
        raise InvalidRequest(f"the data has more than {max_arrays:,} arrays; send fewer at a time", "data")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = archive.infolist()
        if (total := sum(file.file_size for file in files)) > max_bytes:
            raise InvalidRequest(
                f"the data unpacks to {total:,} bytes, expected at most {max_bytes:,}; send less at a time", "data"
            )
        if odd := [file for file in files if file.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]:
            raise InvalidRequest(
                f"the data is packed by method {odd[0].compress_type}, expected none or deflate", "data"
            )
        for file in sorted(files, key=_place):
            yield file.filename[:100], _unpack(archive, file)


def _unpack(archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> bytes:
    """A file's bytes, as many as the list says: it is the sender's, and more would come if one asked for all."""
    with archive.open(file) as packed:
        data = packed.read(file.file_size)
        if len(data) < file.file_size or packed.read(1):
            raise ValueError(f"{file.filename[:100]!r} is not of the length that the archive's list tells")
    return data


def _place(file: zipfile.ZipInfo) -> tuple[int, int]:
    """Numbered arrays by their numbers; others stay where they are, behind them."""
    stem = file.filename.removesuffix(".npy")
    return (0, int(stem)) if stem.isascii() and stem.isdecimal() and len(stem) < 10 else (1, 0)


def _texts(name: str, array: bytes, max_texts: int) -> list[str]:
    kind, is_fortran, shape, values = _header(name, array)
    if "O" in kind:
        raise InvalidRequest(f"the array {name!r} holds pickled objects, which are never opened; send texts", "data")
    if not TEXT.fullmatch(kind):
        raise InvalidRequest(f"the array {name!r} holds values of type {kind!r}, expected texts", "data")
    num_texts = math.prod(shape)
    if num_texts > max_texts:
        raise InvalidRequest("the data has more texts than one request may have; send fewer at a time", "data")
    if len(values) != num_texts * 4 * int(kind[2:]):
        raise InvalidRequest(f"the array {name!r} has {len(values):,} bytes, which its shape does not fit", "data")
    # NumPy takes characters beyond Unicode for a mistake of its own.
    if num_texts and np.frombuffer(values, f"{kind[0]}u4").max() > sys.maxunicode:
        raise InvalidRequest(f"the array {name!r} has characters that are none of Unicode", "data")
    found = np.frombuffer(values, kind).reshape(shape, order="F" if is_fortran else "C")
    return [str(text) for text in found.ravel(order="C")]


def _header(name: str, array: bytes) -> tuple[str, bool, tuple[int, ...], memoryview]:
    """Type, whether columns come first, shape and values of a .npy file."""
    width = {b"\x01\x00": 2, b"\x02\x00": 4}.get(array[6:8])
    if not array.startswith(NPY) or width is None:
        raise InvalidRequest(f"the file {name!r} in the data is no array of NumPy's format 1 or 2", "data")
    end = 8 + width + int.from_bytes(array[8 : 8 + width], "little")
    told = HEADER.fullmatch(array[8 + width : min(end, 4096)])
    if told is None:
        raise InvalidRequest(f"the array {name!r} has no header that NumPy wrote for texts", "data")
    shape = tuple(int(size) for size in told[3].replace(b" ", b"").split(b",") if size)
    return told[1].decode("latin-1"), told[2] == b"True", shape, memoryview(array)[end:]
