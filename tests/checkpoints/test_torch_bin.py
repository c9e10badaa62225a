"""One pytorch_model.bin: what torch.save writes reads back equal; what is damaged or hostile is refused."""

import io
import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bluejay.checkpoints.torch_bin import STORAGE_DTYPES, TorchBinFile
from bluejay.errors import CheckpointError

zip_and_legacy = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def save(state: object, path: Path, is_zip: bool = True, protocol: int = 2) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    return path


def assert_reads_back(path: Path, state: dict[str, Tensor]) -> None:
    file = TorchBinFile(path)
    assert file.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert file.tensors[name].shape == tensor.shape
        assert file.tensors[name].dtype == tensor.dtype
        found = file.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@zip_and_legacy
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_dtype_reads_back_equal(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in STORAGE_DTYPES.values()}
    assert_reads_back(save(state, tmp_path / "a.bin", is_zip, protocol), state)


@zip_and_legacy
def test_views_and_shared_storages_read_back_equal(tmp_path: Path, is_zip: bool) -> None:
    whole = torch.randn(6, 8)
    state = {
        "whole": whole,
        "tied": whole,
        "transposed": whole.T,
        "row": whole[3],
        "every other": whole[::2, 1::3],
        "empty": whole[:0],
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 7),
        "bfloat16": torch.randn(5).bfloat16()[2:],
    }
    path = save(state, tmp_path / "a.bin", is_zip)
    assert_reads_back(path, state)
    assert path.stat().st_size < 10_000


@zip_and_legacy
def test_a_module_s_state_dict_with_metadata_and_parameters_reads_back_equal(tmp_path: Path, is_zip: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    state = OrderedDict(module.state_dict(keep_vars=True))
    state._metadata = module.state_dict()._metadata
    assert isinstance(state["0.weight"], nn.Parameter)
    assert_reads_back(save(state, tmp_path / "a.bin", is_zip), state)


def test_writing_to_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(4)}, tmp_path / "a.bin")
    before = path.read_bytes()
    file = TorchBinFile(path)
    file.read("a").fill_(1)
    assert file.read("a").tolist() == [0, 0, 0, 0]
    assert path.read_bytes() == before


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.ones(4)}, tmp_path / "a.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert TorchBinFile(path).read("a").tolist() == [1, 1, 1, 1]


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@zip_and_legacy
def test_an_attack_is_refused_by_its_name(tmp_path: Path, is_zip: bool) -> None:
    canary = tmp_path / "canary"
    path = save({"a": torch.zeros(2), "b": Attack(canary)}, tmp_path / "pytorch_model.bin", is_zip)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin asks for __builtin__\.exec"):
        TorchBinFile(path)
    assert not canary.exists()


@pytest.mark.parametrize("part", range(5))
def test_an_attack_in_any_pickle_of_a_legacy_file_is_refused(tmp_path: Path, part: int) -> None:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts[part] = Attack(tmp_path / "canary")
    (tmp_path / "a.bin").write_bytes(b"".join(pickle.dumps(item, 2) for item in parts))
    with pytest.raises(CheckpointError, match=r"asks for __builtin__\.exec"):
        TorchBinFile(tmp_path / "a.bin")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"model": {"a": torch.zeros(1)}, "step": 3},
            "'model', 'step' are not tensors.*save the model's state_dict alone",
        ),
        ([torch.zeros(1)], "holds no dict of tensors"),
        (torch.zeros(1), "holds no dict of tensors"),
        ({3: torch.zeros(1)}, "damaged"),
        ({"a": torch.zeros(1).to_sparse()}, r"asks for torch\._utils\._rebuild_sparse_tensor"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, r"asks for torch\.ComplexFloatStorage"),
        ({"a": torch.UntypedStorage(4)}, r"asks for torch\.storage\.UntypedStorage"),
        (nn.Linear(1, 1), r"asks for torch\.nn\.modules\.linear\.Linear"),
    ],
    ids=["training checkpoint", "list", "tensor", "number as key", "sparse", "complex", "storage", "module"],
)
def test_what_is_no_dict_of_plain_tensors_is_refused(tmp_path: Path, state: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TorchBinFile(save(state, tmp_path / "a.bin"))


@zip_and_legacy
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, is_zip: bool) -> None:
    whole = save({"a": torch.randn(30), "b": torch.randn(3)}, tmp_path / "whole.bin", is_zip).read_bytes()
    cut = tmp_path / "cut.bin"
    for length in sorted({*random.Random(0).sample(range(len(whole)), 150), *range(8), len(whole) - 1}):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.bin"):
            TorchBinFile(cut)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    state = {"a": torch.randn(30), "b": torch.randn(3)}
    whole = save(state, tmp_path / "whole.bin").read_bytes()
    flipped = tmp_path / "flipped.bin"
    chance = random.Random(0)
    for _ in range(600):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        flipped.write_bytes(raw)
        try:
            assert_reads_back(flipped, state)
        except CheckpointError as error:
            assert str(flipped) in str(error)


def test_a_flipped_bit_in_a_tensor_names_file_key_and_place(tmp_path: Path) -> None:
    path = save({"a.weight": torch.full((8,), 3.0)}, tmp_path / "a.bin")
    raw = bytearray(path.read_bytes())
    start = raw.index(torch.full((8,), 3.0).numpy().tobytes())
    raw[start + 5] ^= 1
    path.write_bytes(raw)
    file = TorchBinFile(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"a\.bin: 'a\.weight' is damaged: bytes {start} to {start + 32}"):
            file.read("a.weight")


def test_flipped_bits_in_a_legacy_file_never_crash(tmp_path: Path) -> None:
    whole = save({"a": torch.randn(30), "b": torch.randn(3)}, tmp_path / "whole.bin", is_zip=False).read_bytes()
    chance = random.Random(0)
    for _ in range(300):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (tmp_path / "flipped.bin").write_bytes(raw)
        try:
            file = TorchBinFile(tmp_path / "flipped.bin")
        except CheckpointError:
            continue
        for name in file.tensors:
            file.read(name)


# Archives that torch.save would not write.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor_pickle(
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    numel: int = 4,
    storage: str = "FloatStorage",
    key: bytes = text("0"),
    kind: str = "storage",
) -> bytes:
    """The pickle of {"a": one tensor}, as torch.save spells it, with any numbers."""
    identity = b"(" + text(kind) + f"ctorch\n{storage}\n".encode() + key + text("cpu") + number(numel) + b"t"
    arguments = b"(" + identity + b"Q" + number(offset) + numbers(shape) + numbers(stride) + b"\x89}t"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def archive(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


FOUR_ZEROS = ("m/data/0", bytes(16))


def test_our_own_spelling_is_the_real_one(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin", [("m/data.pkl", tensor_pickle()), FOUR_ZEROS])
    assert TorchBinFile(path).read("a").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (5,)}, "leave its storage"),
        ({"offset": 1}, "leave its storage"),
        ({"offset": 2**61}, "leave its storage"),
        ({"stride": (2,)}, "leave its storage"),
        ({"shape": (2, 3)}, "leave its storage"),
        ({"shape": (2, 2), "stride": (1, 2**61)}, "leave its storage"),
        ({"shape": (2**40,), "stride": (0,)}, "leave its storage"),
        ({"shape": (2, 2), "stride": (1,)}, "leave its storage"),
        ({"shape": (), "stride": (), "offset": 4}, "leave its storage"),
        ({"offset": -1}, "'a': its numbers are not those of a tensor"),
        ({"stride": (-1,)}, "'a': its numbers are not those of a tensor"),
        ({"shape": (-4,)}, "'a': its numbers are not those of a tensor"),
        ({"shape": (2**62,)}, "'a': its numbers are not those of a tensor"),
        ({"shape": (2**40, 2**40), "stride": (1, 1)}, "'a': its shape is not that of a tensor"),
        ({"shape": (1,) * 9, "stride": (1,) * 9}, "'a': its numbers are not those of a tensor"),
        ({"numel": 5}, "takes 20 bytes, the file has 16"),
        ({"numel": 2**61}, "takes 9223372036854775808 bytes"),
        ({"numel": -1}, "storage '0': its numbers are not those of a tensor"),
        ({"storage": "HalfStorage"}, "takes 8 bytes, the file has 16"),
        ({"storage": "QInt8Storage"}, r"asks for torch\.QInt8Storage"),
        ({"key": text("1")}, "its storage '1' is not in the file"),
        ({"key": text("../data.pkl")}, "is not in the file"),
        ({"key": b"N"}, "in a way that torch.save does not write"),
        ({"kind": "module"}, "something other than a storage"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    path = archive(tmp_path / "a.bin", [("m/data.pkl", tensor_pickle(**wrong)), FOUR_ZEROS])
    with pytest.raises(CheckpointError, match=message):
        TorchBinFile(path)


def test_one_storage_with_two_dtypes_is_refused(tmp_path: Path) -> None:
    first, second = tensor_pickle(), tensor_pickle(storage="IntStorage").replace(text("a"), text("b"))
    joined = first[:-1] + second.removeprefix(b"\x80\x02}")
    path = archive(tmp_path / "a.bin", [("m/data.pkl", joined), FOUR_ZEROS])
    with pytest.raises(CheckpointError, match="storage '0' occurs with two dtypes or sizes"):
        TorchBinFile(path)


PICKLED = ("m/data.pkl", tensor_pickle())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([FOUR_ZEROS], "with 0 data.pkl"),
        ([PICKLED, ("n/data.pkl", b""), FOUR_ZEROS], "with 2 data.pkl"),
        ([PICKLED, FOUR_ZEROS, FOUR_ZEROS], "the entry 'm/data/0' is listed twice"),
        ([PICKLED, FOUR_ZEROS, ("m/byteorder", b"big")], "big-endian"),
        ([("m/data.pkl", bytes(9 * 2**20)), FOUR_ZEROS], "data.pkl: has 9437184 bytes"),
    ],
    ids=["no pickle", "two pickles", "twice", "big-endian", "huge pickle"],
)
def test_archives_of_another_make_are_refused(tmp_path: Path, entries: list[tuple[str, bytes]], message: str) -> None:
    path = archive(tmp_path / "a.bin", entries)
    with pytest.raises(CheckpointError, match=message):
        TorchBinFile(path)


@pytest.mark.parametrize("bomb", ["m/data.pkl", "m/data/0"])
def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, bomb: str) -> None:
    entries = {"m/data.pkl": tensor_pickle(numel=2**24), "m/data/0": bytes(2**26), bomb: bytes(2**26)}
    path = archive(tmp_path / "a.bin", list(entries.items()), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        TorchBinFile(path)


def test_a_zip64_record_at_an_impossible_place_is_refused(tmp_path: Path) -> None:
    raw = bytearray(save({"a": torch.zeros(4)}, tmp_path / "a.bin").read_bytes())
    for place in (2**63, 2**64 - 1, len(raw), 0):
        struct.pack_into("<Q", raw, raw.index(b"PK\x06\x07") + 8, place)
        (tmp_path / "a.bin").write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"a\.bin: (is damaged or cut short|its zip64 record is not)"):
            TorchBinFile(tmp_path / "a.bin")


def patched(source: bytes, patch: Callable[[bytearray, int], None]) -> bytes:
    """The archive with its first entry of the central directory changed; `patch` gets the place of that entry."""
    raw = bytearray(source)
    patch(raw, raw.index(b"PK\x01\x02"))
    return bytes(raw)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (8, "<H", 1, "compressed or encrypted"),
        (10, "<H", 8, "compressed or encrypted"),
        (20, "<I", 7, "compressed or encrypted"),
        (28, "<H", 60_000, "is damaged"),
        (42, "<I", 3, "the header of 'm/data.pkl' at byte 3 is damaged"),
        (42, "<I", 0x7FFFFFFF, "cut short"),
        (42, "<I", 0xFFFFFFFF, "a size or an offset is missing"),
        (0, "<I", 0, "is damaged"),
        (16, "<I", 1, "data.pkl: does not match its checksum"),
    ],
)
def test_a_lying_zip_directory_is_refused(tmp_path: Path, offset: int, layout: str, value: int, message: str) -> None:
    buffer = archive(tmp_path / "good.bin", [("m/data.pkl", tensor_pickle()), FOUR_ZEROS]).read_bytes()
    path = tmp_path / "a.bin"
    path.write_bytes(patched(buffer, lambda raw, at: struct.pack_into(layout, raw, at + offset, value)))
    with pytest.raises(CheckpointError, match=message):
        TorchBinFile(path)


@pytest.mark.parametrize("size", [10**6, 0xFFFFFFFE])
def test_an_entry_past_the_end_of_the_data_is_refused(tmp_path: Path, size: int) -> None:
    def grow(raw: bytearray, at: int) -> None:
        struct.pack_into("<II", raw, at + 20, size, size)

    buffer = archive(tmp_path / "good.bin", [("m/data.pkl", tensor_pickle()), FOUR_ZEROS]).read_bytes()
    (tmp_path / "a.bin").write_bytes(patched(buffer, grow))
    with pytest.raises(CheckpointError, match="runs past the end of the data"):
        TorchBinFile(tmp_path / "a.bin")


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("m/data/0", bytes(16))
    hidden = inner.getvalue()[: 30 + 8 + 16]  # an entry of its own within the data of the pickle's
    buffer = archive(
        tmp_path / "good.bin", [("m/data.pkl", tensor_pickle() + hidden), ("m/data/0", bytes(16))]
    ).read_bytes()

    raw = bytearray(buffer)
    second = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 4)
    struct.pack_into("<I", raw, second + 42, raw.index(hidden))
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match="the entry 'm/data/0' overlaps another"):
        TorchBinFile(tmp_path / "a.bin")


@pytest.mark.parametrize("claimed", [9 * 2**20, 0xFFFFFFFE])
def test_a_huge_zip_directory_is_not_read(tmp_path: Path, claimed: int) -> None:
    raw = bytearray(archive(tmp_path / "a.bin", [("m/data.pkl", tensor_pickle()), FOUR_ZEROS]).read_bytes())
    struct.pack_into("<I", raw, len(raw) - 10, claimed)
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"claims a zip directory of {claimed} bytes"):
        TorchBinFile(tmp_path / "a.bin")


@pytest.mark.parametrize("place", ["header", "size"])
def test_offsets_of_64_bits_are_read(tmp_path: Path, place: str) -> None:
    """The form that files over 4 GB have, in a small one."""
    pickled, zeros = tensor_pickle(), bytes(16)

    def local(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, 0, 0, 0, 0, zlib.crc32(data), 0, 0, len(name), 0) + name + data
        )

    def central(name: bytes, data: bytes, header: int) -> bytes:
        size = 0xFFFFFFFF if place == "size" else len(data)
        wide = [len(data), len(data)] if place == "size" else []
        shown = 0xFFFFFFFF if place == "header" else header
        wide += [header] if place == "header" else []
        extra = struct.pack("<2H2x2H", 0x7075, 2, 1, 8 * len(wide)) + struct.pack(f"<{len(wide)}Q", *wide)
        fixed = (0, 0, 0, 0, 0, 0, zlib.crc32(data), size, size, len(name), len(extra), 0, 0, 0, 0, shown)
        return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fixed) + name + extra

    entries = [(b"m/data.pkl", pickled), (b"m/data/0", zeros)]
    data, directory = b"", b""
    for name, content in entries:
        directory += central(name, content, len(data))
        data += local(name, content)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), len(data))
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data) + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "a.bin"
    path.write_bytes(data + directory + end64 + locator + end)
    assert TorchBinFile(path).read("a").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02K\x01.", b"PK\x03\x04", bytes(100), b"\x93NUMPY" + bytes(99)]
)
def test_what_torch_save_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        TorchBinFile(tmp_path / "a.bin")


@pytest.mark.parametrize("opcode", [b"\x85", b"q\x00h\x00\x86"], ids=["deep", "shared"])
def test_keys_of_storages_that_are_no_strings_are_refused(tmp_path: Path, opcode: bytes) -> None:
    # One tuple in another, or each twice in the next; written out, 40 of the latter would fill any memory.
    times = 5000 if opcode == b"\x85" else 20
    path = save({"a": torch.zeros(1)}, tmp_path / "a.bin", is_zip=False)
    with path.open("rb") as file:
        for _ in range(4):
            for operation, _, _ in pickletools.genops(file):
                if operation.name == "STOP":
                    break
        before = path.read_bytes()[: file.tell()]
    path.write_bytes(before + b"\x80\x02])" + opcode * times + b"a.")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="its list of storages does not match its tensors"):
            TorchBinFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
