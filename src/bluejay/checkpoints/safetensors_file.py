"""One .safetensors file, read without trust and written without holding it in memory.

    | 8 bytes, little-endian | header, JSON, that long | data, every byte of it in exactly one tensor |

The reader is stricter than the format's own: a key that occurs twice, a gap or an overlap is an error.

Source: the format's description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bluejay.checkpoints.files import MAX_DESCRIPTION_BYTES, MappedFile, check_shape, parse_json, short
from bluejay.checkpoints.formats import TensorInfo
from bluejay.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Data begin with a whole cache line, which is what packed weights are read in.
_ALIGNMENT = 64

# A tensor is converted and written in runs of this many numbers: 64 MiB of float32.
_RUN = 16 * 2**20


class SafetensorsFile:
    """The tensors of one file.

    Attributes:
        tensors: what the header says of each.
        num_bytes: the file's size.
    Raises: CheckpointError that names the file and, where there is one, the key.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self.num_bytes = self._file.num_bytes
        self.tensors, self._starts = _parse_header(self._file)

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file."""
        info = self.tensors[name]
        return self._file.view(self._starts[name], math.prod(info.shape), info.dtype).view(info.shape)


def _parse_header(file: MappedFile) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """What the header says, and the byte of the file at which each tensor starts."""
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    if header_bytes > MAX_DESCRIPTION_BYTES:
        raise CheckpointError(
            f"{file.path}: claims a header of {header_bytes} bytes, at most {MAX_DESCRIPTION_BYTES} are read; "
            "the file is damaged or not safetensors"
        )
    header = parse_json(file.read(8, header_bytes), f"{file.path}: header")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors, runs = {}, []
    for name, entry in header.items():
        where = f"{file.path}: {short(name)}"
        tensors[name], begin, end = _parse_entry(entry, where, file.path)
        runs.append((data_start + begin, data_start + end, name))
    position = data_start
    for start, stop, name in sorted(runs):
        if start != position:
            fault = "overlaps another tensor" if start < position else "leaves a gap before it"
            raise CheckpointError(f"{file.path}: {short(name)} starts at byte {start} and {fault}")
        position = stop
    if position != file.num_bytes:
        raise CheckpointError(
            f"{file.path}: is {file.num_bytes} bytes long, its tensors end at byte {position}; fetch the file again"
        )
    return tensors, {name: start for start, _, name in runs}


def _parse_entry(entry: object, where: str, path: Path) -> tuple[TensorInfo, int, int]:
    """One tensor of the header, with its first and last byte within the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        named = short(dtype) if isinstance(dtype, str) else "no name"
        raise CheckpointError(f"{where}: has dtype {named}, Bluejay reads {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise CheckpointError(f"{where}: shape and data_offsets must be lists")
    info = TensorInfo(check_shape(shape, where), DTYPES[dtype], path)
    if len(offsets) != 2 or not all(type(at) is int and 0 <= at < 2**63 for at in offsets):
        raise CheckpointError(f"{where}: data_offsets must be two byte counts")
    begin, end = offsets
    if end - begin != info.num_bytes:
        raise CheckpointError(f"{where}: {dtype} {list(info.shape)} takes {info.num_bytes} bytes, not {end - begin}")
    return info, begin, end


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    on_written: Callable[[int], None],
) -> None:
    """Write one file, holding one tensor at a time, and see it safely on the disk.

    Args:
        path: the file, which must not exist.
        tensors: shapes, and the dtypes to write; in this order.
        read: gives a tensor by its name.
        on_written: called with the number of bytes just written.
    Raises: OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + info.num_bytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in tensors.items():
            _write_tensor(file, read(name), info.dtype, on_written)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype, on_written: Callable[[int], None]) -> None:
    for run in torch.split(tensor.detach().reshape(-1), _RUN):
        raw = run.to(device="cpu", dtype=dtype).contiguous().view(torch.uint8)
        on_written(file.write(raw.numpy().data))
