"""One .safetensors file: what the library writes is read, what we write it reads, and nothing hostile gets through."""

import json
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.checkpoints.formats import TensorInfo
from bluejay.checkpoints.safetensors_file import DTYPES, SafetensorsFile, write_safetensors
from bluejay.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes = bytes(8), claimed: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES.values()}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tensor.shape
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    source = {"a": torch.randn(3, 5), "b": torch.randn(4, 2).T, "c": torch.empty(0, 2)}
    infos = {name: TensorInfo(tuple(t.shape), torch.bfloat16, path) for name, t in source.items()}
    written: list[int] = []
    write_safetensors(path, infos, source.__getitem__, written.append)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.offset_keys()) == ["a", "b", "c"]
        for name in source:
            assert torch.equal(file.get_tensor(name), source[name].bfloat16())
    assert sum(written) == (15 + 8) * 2
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_data_that_is_not_aligned_is_read_all_the_same(tmp_path: Path) -> None:
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    file = SafetensorsFile(write(tmp_path / "a.safetensors", header, data))
    assert file.read("a").tolist() == [1.5, -2.0]


def test_writing_to_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": F32})
    file = SafetensorsFile(path)
    file.read("a").fill_(1)
    assert file.read("a").tolist() == [0, 0]
    assert path.read_bytes().endswith(bytes(8))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {}}', "key 'a' occurs twice"),
        (b'{"a": {"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', "key 'dtype' occurs twice"),
        (b"not json", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1]", "holds list, expected an object"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        ({"a": 3}, "'a': the header must give dtype, shape and data_offsets"),
        ({"a": {**F32, "file": "/etc/passwd"}}, "and nothing else"),
        ({"a": {**F32, "dtype": "F8_E4M3"}}, "has dtype 'F8_E4M3'"),
        ({"a": {**F32, "dtype": ["F32"]}}, "has dtype no name"),
        ({"a": {**F32, "shape": 2}}, "must be lists"),
        ({"a": {**F32, "shape": [-2]}}, "'a': its numbers are not those of a tensor"),
        ({"a": {**F32, "shape": [2.0]}}, "'a': its numbers are not those of a tensor"),
        ({"a": {**F32, "shape": [True]}}, "'a': its numbers are not those of a tensor"),
        ({"a": {**F32, "shape": [2**63]}}, "'a': its numbers are not those of a tensor"),
        ({"a": {**F32, "shape": [2**40, 2**40]}}, "'a': its shape is not that of a tensor"),
        ({"a": {**F32, "shape": [1] * 9}}, "'a': its numbers are not those of a tensor"),
        ({"a": {**F32, "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}}, "its shape is not that of a tensor"),
        ({"a": {**F32, "shape": [3]}}, "takes 12 bytes, not 8"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "takes 8 bytes, not -8"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, "two byte counts"),
        ({"a": {**F32, "data_offsets": [0, 4, 8]}}, "two byte counts"),
        ({"a": {**F32, "data_offsets": [2**62, 2**62 + 8]}}, "leaves a gap before it"),
        ({"a": F32, "b": F32}, "'b' starts at byte .* and overlaps another tensor"),
        ({"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, "its tensors end at byte"),
        ({"a": {**F32, "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at byte"),
        ({"\ud800" + "x" * 500: {**F32, "shape": [3]}}, r"'\\ud800x+'…: F32"),
    ],
)
def test_a_broken_header_is_refused_with_its_reason(tmp_path: Path, header: object, message: str) -> None:
    path = write(tmp_path / "a.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 2**40, 9 * 2**20])
def test_a_huge_header_length_takes_no_memory(tmp_path: Path, claimed: int) -> None:
    path = write(tmp_path / "a.safetensors", {"a": F32}, claimed=claimed)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"claims a header of {claimed} bytes"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", {"a": F32}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_a_file_replaced_while_open_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": F32})
    file = SafetensorsFile(path)
    write(path, {"a": {**F32, "dtype": "I32"}}, bytes(9))
    with pytest.raises(CheckpointError, match="was replaced while it was open"):
        file.read("a")


def test_a_git_lfs_pointer_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        SafetensorsFile(path)


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "d.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F8"]) | json_values,
        "shape": st.lists(st.integers(0, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values,
    },
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), data=st.binary(max_size=16))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz-header.safetensors", header, data)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    assert sum(file.read(name).nbytes for name in file.tensors) == len(data)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz-byte.safetensors", {"a": F32, "__metadata__": {"format": "pt"}})
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    assert sum(file.read(name).nbytes for name in file.tensors) == 8
