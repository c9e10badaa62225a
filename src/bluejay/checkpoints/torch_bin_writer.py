"""Writes one pytorch_model.bin as torch.save does, holding one tensor at a time.

    zip archive, stored: pytorch_model/data.pkl, …/byteorder, …/data/0, …/data/1, …, …/version

Source: torch/serialization.py (torch 2.13), `_save`; storages start at multiples of 64 bytes, as there.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bluejay.checkpoints.formats import TensorInfo

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT = 64
_ZIP64_EXTRA_BYTES = 20
_RUN = 16 * 2**20  # a tensor is converted in runs of this many numbers: 64 MiB of float32


@dataclass(frozen=True)
class _Storage:
    """Stands for the numbers in the pickle, which names them by a persistent id."""

    key: str
    info: TensorInfo


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        numel = obj.info.num_bytes // obj.info.dtype.itemsize
        return ("storage", _STORAGES[obj.info.dtype], obj.key, "cpu", numel)


@dataclass(frozen=True)
class _StoredTensor:
    """Is pickled as the call that makes the tensor."""

    storage: _Storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.info.shape
        stride = torch.empty(shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        # The function that every .bin file names, private as it is.
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, hooks)


def write_torch_bin(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    on_written: Callable[[int], None],
) -> None:
    """Write one file that `torch.load(path, weights_only=True)` opens.

    Args:
        path: the file, which must not exist.
        tensors: shapes, and the dtypes to write; in this order.
        read: gives a tensor by its name.
        on_written: called with the number of bytes just written.
    Raises: OSError.
    """
    stored = OrderedDict(
        (name, _StoredTensor(_Storage(str(i), info))) for i, (name, info) in enumerate(tensors.items())
    )
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(stored)
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        folder = path.stem
        archive.writestr(f"{folder}/data.pkl", pickled.getvalue())
        archive.writestr(f"{folder}/byteorder", b"little")
        for i, (name, info) in enumerate(tensors.items()):
            entry = zipfile.ZipInfo(f"{folder}/data/{i}")
            entry.extra = _padding(file, entry.filename)
            with archive.open(entry, "w", force_zip64=True) as room:
                for run in torch.split(read(name).detach().reshape(-1), _RUN):
                    raw = run.to(device="cpu", dtype=info.dtype).contiguous().view(torch.uint8)
                    on_written(room.write(raw.numpy().data))
        archive.writestr(f"{folder}/version", b"3\n")


def _padding(file: BinaryIO, name: str) -> bytes:
    """An extra field that makes the data after the entry's header start at a multiple of 64 bytes."""
    start = file.tell() + 30 + len(name) + 4 + _ZIP64_EXTRA_BYTES
    length = -start % _ALIGNMENT
    return struct.pack("<2H", 0x4246, length) + bytes(length)
