"""Texts out of archives, and archives that are traps."""

from __future__ import annotations

import hashlib
import io
import random
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest

from bluejay.errors import InvalidRequest
from bluejay.server.npz import digest_of_chunks, read_texts


def saved(*arrays: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, *arrays, **named)
    return file.getvalue()


def packed(name: str, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def array(header: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + values


def read(data: bytes) -> list[str]:
    return read_texts(data, max_texts=64, max_bytes=1 << 20)


@pytest.mark.parametrize(
    "arrays",
    [
        np.array("one"),
        np.array(["one"]),
        np.array(["one", "", "“three”", "four\n", "\U0001f426"]),
        np.array([["a", "b"], ["c", "d"]]),
        np.asfortranarray(np.array([["a", "b"], ["c", "d"]])),
        np.array(["big", "endian"]).astype(">U6"),
        np.empty(0, "<U3"),
    ],
)
def test_texts_are_those_that_numpy_saved(arrays: Any) -> None:
    assert read(saved(arrays)) == [str(text) for text in arrays.ravel()]
    compressed = io.BytesIO()
    np.savez_compressed(compressed, arrays)
    assert read(compressed.getvalue()) == [str(text) for text in arrays.ravel()]


def test_items_of_a_list_come_in_the_order_of_their_numbers() -> None:
    names = [str(number) for number in (10, 2, 0, 1, 9)]
    assert read(saved(**{name: np.array(name) for name in names})) == ["0", "1", "2", "9", "10"]
    assert read(saved(*(np.array(name) for name in names))) == names


@pytest.mark.parametrize(
    "data, message",
    [
        (saved(np.array([None])), "pickled objects"),
        (saved(np.arange(3)), "'<i8', expected texts"),
        (saved(np.array([b"bytes"])), "expected texts"),
        (saved(np.zeros(2, [("a", "<U3")])), "no header that NumPy wrote"),
        (b"", "no valid .npz"),
        (b"PK\x05\x06", "no valid .npz"),
        (packed("0.npy", b"text"), "no array of NumPy's format"),
        (packed("0.npy", array("__import__('os').system('x')")), "no header"),
        (packed("0.npy", array("{'descr': '<U3', 'fortran_order': False, 'shape': (2,), }", b"short")), "its shape"),
        (packed("0.npy", array("{'descr': '<U0', 'fortran_order': False, 'shape': (9,), }")), "expected texts"),
        (packed("0.npy", array("{'descr': '<U1', 'fortran_order': False, 'shape': (0, 9), }")), None),
        (packed("0.npy", array("{'descr': '<U1', 'fortran_order': False, 'shape': (999999999999,), }")), "more texts"),
        (
            packed("0.npy", array("{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }", b"\xff" * 4)),
            "none of Unicode",
        ),
        (packed("0.npy", bytes(2 << 20)), "unpacks to 2,097,152 bytes"),
        (packed("0.npy", b"a", zipfile.ZIP_BZIP2), "packed by method 12"),
        (saved(*(np.array("a") for _ in range(65))), "more than 64 arrays"),
        (saved(np.array(["a"] * 65)), "more texts"),
    ],
)
def test_traps_are_refused(data: bytes, message: str | None) -> None:
    if message is None:
        assert read(data) == []
        return
    with pytest.raises(InvalidRequest, match=message):
        read(data)


def test_damage_is_an_error_of_the_request_or_none() -> None:
    whole, chance = saved(np.array(["some text", "and more"]), np.array("third")), random.Random(0)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            texts = read(bytes(data[: chance.randint(len(data) // 2, len(data))] if chance.random() < 0.3 else data))
        except InvalidRequest:
            continue
        assert all(isinstance(text, str) for text in texts)


def test_an_archive_that_lies_about_its_size_is_unpacked_no_further_than_it_says() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.npy", bytes(100 * 2**20))
    data = bytearray(packed.getvalue())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (100).to_bytes(4, "little")  # the unpacked size, as the archive's list has it
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            read_texts(bytes(data), max_texts=10, max_bytes=2**20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_chunks_are_named_as_the_client_names_them() -> None:
    chunks = [(np.array(["a", "b"]), np.arange(3.0)), (np.array(["ccc"]), np.arange(2.0))]
    columns = [hashlib.md5(b"".join(array.tobytes() for array in column)) for column in zip(*chunks, strict=True)]
    named = hashlib.md5(b"".join(column.digest() for column in columns)).hexdigest()
    files = [saved(*chunk) for chunk in chunks]
    assert digest_of_chunks(files, max_arrays=2, max_bytes=1 << 20) == named
    with pytest.raises(InvalidRequest, match="more than 1 arrays"):
        digest_of_chunks(files, max_arrays=1, max_bytes=1 << 20)
    with pytest.raises(InvalidRequest, match="unpacks to"):  # each chunk alone would fit
        digest_of_chunks(files, max_arrays=2, max_bytes=300)
    with pytest.raises(InvalidRequest, match=r"no valid \.npz"):
        digest_of_chunks([b"PK"], max_arrays=2, max_bytes=1 << 20)
