"""One pytorch_model.bin, read without trust: our own zip and pickle readers, one tensor at a time, nothing executed.

torch.save has written two formats, both a pickle that describes tensors and, apart from it, their storages:

    since 1.6   a zip archive: NAME/data.pkl, NAME/data/0, NAME/data/1, …
    before      five pickles (magic, version, system, the dict, the storages' keys), then each storage: length, data

Source: torch/serialization.py (torch 2.13), `_save` and `_legacy_save`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bluejay.checkpoints.files import MAX_DESCRIPTION_BYTES, MappedFile, check_counts, check_shape, short
from bluejay.checkpoints.formats import TensorInfo
from bluejay.checkpoints.pickle_machine import Global, PickleMachine
from bluejay.checkpoints.stored_zip import MAGIC, Entry, read_contents
from bluejay.errors import CheckpointError

STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


@dataclass(frozen=True)
class Storage:
    """A run of numbers that one or several tensors look at."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Description:
    """A tensor as the pickle has it, its numbers not yet looked at."""

    storage: Storage
    offset: object
    shape: Sequence[object]
    stride: Sequence[object]


@dataclass(frozen=True)
class View:
    """A tensor as a view that stays within its storage; offset and stride count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TorchBinFile:
    """The tensors of one file.

    Attributes:
        tensors: what the pickle says of each.
        num_bytes: the file's size.
    Raises: CheckpointError that names the file and what it asks for.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self.num_bytes = self._file.num_bytes
        is_zip = self._file.read(0, min(4, self.num_bytes)) == MAGIC
        described, self._entries = (_read_zip if is_zip else _read_legacy)(self._file)
        self._views = {
            name: _place(tensor, self._entries.get(tensor.storage.key), f"{path}: {short(name)}")
            for name, tensor in described.items()
        }
        self.tensors = {name: TensorInfo(view.shape, view.storage.dtype, path) for name, view in self._views.items()}
        self._undamaged: set[str] = set()

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file.

        Raises: CheckpointError if its bytes do not match their checksum (checked once, where the file has one).
        """
        view = self._views[name]
        entry = self._entries[view.storage.key]
        flat = self._file.view(entry.start, view.storage.numel, view.storage.dtype)
        if entry.crc and view.storage.key not in self._undamaged:
            if zlib.crc32(flat.view(torch.uint8).numpy().data) != entry.crc:
                raise CheckpointError(
                    f"{self._file.path}: {short(name)} is damaged: bytes {entry.start} to "
                    f"{entry.start + entry.num_bytes} do not match their checksum; fetch the file again"
                )
            self._undamaged.add(view.storage.key)
        return flat[view.offset :].as_strided(view.shape, view.stride)


def _read_zip(file: MappedFile) -> tuple[dict[str, Description], dict[str, Entry]]:
    contents = read_contents(file)
    pickles = [name for name in contents if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{file.path}: is a zip archive with {len(pickles)} data.pkl, not one of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    where = f"{file.path}: data.pkl"
    pickle = _read_entry(file, contents[pickles[0]], where)
    order = contents.get(f"{folder}byteorder")
    if order is not None and _read_entry(file, order, f"{file.path}: byteorder") != b"little":
        raise CheckpointError(f"{file.path}: was saved on a big-endian machine; save it again as safetensors there")
    storages = f"{folder}data/"
    entries = {name.removeprefix(storages): entry for name, entry in contents.items() if name.startswith(storages)}
    return _state_dict(_machine(pickle, str(file.path)).run(), file.path), entries


def _read_entry(file: MappedFile, entry: Entry, where: str) -> bytes:
    if entry.num_bytes > MAX_DESCRIPTION_BYTES:
        raise CheckpointError(f"{where}: has {entry.num_bytes} bytes, at most {MAX_DESCRIPTION_BYTES} are read")
    found = file.read(entry.start, entry.num_bytes)
    if entry.crc and zlib.crc32(found) != entry.crc:
        raise CheckpointError(f"{where}: does not match its checksum; fetch the file again")
    return found


def _read_legacy(file: MappedFile) -> tuple[dict[str, Description], dict[str, Entry]]:
    data = file.read(0, min(file.num_bytes, MAX_DESCRIPTION_BYTES))
    where = str(file.path)
    if not data.startswith(b"\x80"):
        raise CheckpointError(f"{where}: is not a file of torch.save: neither a zip archive nor a pickle")
    results: list[object] = []
    storages: dict[str, Storage] = {}
    position = 0
    for _ in range(5):
        machine = _machine(data, where, position, storages)
        results.append(machine.run())
        position = machine.position
        if results[:2] != [_LEGACY_MAGIC, _LEGACY_VERSION][: len(results)]:
            raise CheckpointError(f"{where}: is a pickle, but not one of torch.save")
    _, _, system, state, keys = results
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{where}: was saved on a big-endian machine; save it again as safetensors there")
    return _state_dict(state, file.path), _legacy_entries(file, keys, storages, position)


def _legacy_entries(file: MappedFile, keys: object, storages: Mapping[str, Storage], position: int) -> dict[str, Entry]:
    """Where each storage is: they follow the pickles in the order of `keys`, each behind its length in numbers."""
    # Nothing but strings is compared: a few nested tuples that share their parts are endless when written out.
    names = [key for key in keys if type(key) is str] if isinstance(keys, list) else []
    if not isinstance(keys, list) or not len(keys) == len(names) == len(storages) or set(names) != set(storages):
        raise CheckpointError(f"{file.path}: its list of storages does not match its tensors")
    entries = {}
    for name in names:
        storage = storages[name]
        numel = int.from_bytes(file.read(position, 8), "little")
        if numel != storage.numel:
            raise CheckpointError(
                f"{file.path}: the storage at byte {position} has {numel} numbers, not {storage.numel}"
            )
        entries[storage.key] = Entry(position + 8, storage.num_bytes, crc=0)
        position += 8 + storage.num_bytes
    if position != file.num_bytes:
        raise CheckpointError(f"{file.path}: has {file.num_bytes} bytes, its tensors need {position}; fetch it again")
    return entries


def _machine(data: bytes, where: str, position: int = 0, storages: dict[str, Storage] | None = None) -> PickleMachine:
    """A pickle machine that knows tensors; it collects their storages in `storages`."""
    seen: dict[str, Storage] = {} if storages is None else storages

    def storage(identity: object) -> Storage:
        kind, dtype, key, _, numel, *view = _as_tuple(identity)
        if kind != "storage" or not isinstance(dtype, Global) or dtype.name not in STORAGE_DTYPES:
            raise CheckpointError(f"{where}: refers to something other than a storage")
        if not isinstance(key, str) or view not in ([], [None]):
            raise CheckpointError(f"{where}: refers to a storage in a way that torch.save does not write")
        found = Storage(key, STORAGE_DTYPES[dtype.name], check_counts([numel], f"{where}: storage {short(key)}")[0])
        if seen.setdefault(key, found) != found:
            raise CheckpointError(f"{where}: storage {short(key)} occurs with two dtypes or sizes")
        return found

    return PickleMachine(
        data,
        where=where,
        position=position,
        constructors={
            "collections.OrderedDict": _ordered_dict,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
        },
        names=frozenset(STORAGE_DTYPES),
        persistent=storage,
    )


def _ordered_dict() -> dict[str, object]:
    return {}


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, requires_grad: object, hooks: object
) -> Description:
    if not isinstance(storage, Storage):
        raise TypeError
    return Description(storage, offset, _as_tuple(shape), _as_tuple(stride))


def _rebuild_parameter(tensor: object, requires_grad: object, hooks: object) -> Description:
    if not isinstance(tensor, Description):
        raise TypeError
    return tensor


def _as_tuple(value: object) -> Sequence[object]:
    if not isinstance(value, tuple):
        raise TypeError
    return value


def _state_dict(found: object, path: Path) -> dict[str, Description]:
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no dict of tensors")
    others = [name for name, value in found.items() if not isinstance(value, Description)]
    if others:
        raise CheckpointError(
            f"{path}: {', '.join(map(short, others[:5]))} are not tensors; if this is a training checkpoint, "
            "save the model's state_dict alone"
        )
    return found


def _place(tensor: Description, entry: Entry | None, where: str) -> View:
    """See that a tensor's storage is in the file and that the tensor stays within it."""
    storage = tensor.storage
    if entry is None:
        raise CheckpointError(f"{where}: its storage {short(storage.key)} is not in the file")
    if entry.num_bytes != storage.num_bytes:
        raise CheckpointError(f"{where}: its storage takes {storage.num_bytes} bytes, the file has {entry.num_bytes}")
    shape, stride = check_shape(tensor.shape, where), check_counts(tensor.stride, where)
    (offset,) = check_counts([tensor.offset], where)
    numel = math.prod(shape)
    last = offset + sum((dim - 1) * step for dim, step in zip(shape, stride, strict=False))
    # A view of more numbers than its storage has repeats itself: small on the disk, without bounds in memory.
    if len(shape) != len(stride) or numel > storage.numel or (numel and last >= storage.numel):
        raise CheckpointError(
            f"{where}: shape {list(shape)}, stride {list(stride)} and offset {offset} leave its storage of "
            f"{storage.numel} numbers"
        )
    return View(storage, offset, shape, stride)
