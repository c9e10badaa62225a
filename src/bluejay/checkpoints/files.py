"""Files that nobody vouches for: names that stay in their directory, strict JSON, bytes mapped and never overrun."""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import re
import stat
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bluejay.errors import CheckpointError

# Headers, indexes and pickles describe a few hundred tensors in some 50 kB; one of more than this is no model of ours,
# and parsing it would take many times its size.
MAX_DESCRIPTION_BYTES = 4 * 2**20
MAX_DIMS = 8

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_LFS_POINTER = b"version https://git-lfs.github.com/"
# Older Pythons do not name this flag. Without it Linux counts a private mapping against memory and refuses to map 24 GB
# on a machine of 16.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)


def short(name: str) -> str:
    """A name out of an untrusted file, quoted, escaped and cut to a length that fits a message."""
    return ascii(name) if len(name) <= 120 else ascii(name[:100]) + "…"


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`, which need not exist.

    A link may lead to a file of the same directory, or from a snapshot of Hugging Face's cache to its blobs:

        hub/models--O--N/snapshots/COMMIT/name -> hub/models--O--N/blobs/HASH [-> hub/blobs/XX/HASH, shared by models]

    Raises: CheckpointError if the name is a path or the file is a link that leads elsewhere.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise CheckpointError(f"{directory}: {short(name)} is not the plain name of a file in this directory")
    path = directory / name
    try:
        real, home = path.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its links lead nowhere: {error}") from None
    repository = home.parent.parent
    blobs = (repository / "blobs", repository.parent / "blobs")
    in_hub_cache = home.parent.name == "snapshots" and any(real.is_relative_to(place) for place in blobs)
    if not real.is_relative_to(home) and not in_hub_cache:
        raise CheckpointError(
            f"{path}: is a link out of its directory, to {real}; copy the file here or open {real} by its own path"
        )
    return path


def parse_json(text: bytes, where: str) -> dict[str, object]:
    """Parse an object, refusing what JSON readers disagree about.

    Raises: CheckpointError for bad UTF-8, bad syntax, a key that occurs twice, or anything but an object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise CheckpointError(f"{where}: the key {short(twice)} occurs twice")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: holds {type(parsed).__name__}, expected an object")
    return parsed


def check_counts(values: Sequence[object], where: str) -> tuple[int, ...]:
    """Dims, strides or sizes out of an untrusted file, as whole numbers that torch can hold.

    Raises: CheckpointError for more than 8 values and for any that is no number from 0 to 2^62.
    """
    counts = tuple(value for value in values if type(value) is int and 0 <= value < 2**62)
    if len(counts) < len(values) or len(counts) > MAX_DIMS:
        raise CheckpointError(f"{where}: its numbers are not those of a tensor")
    return counts


def check_shape(values: Sequence[object], where: str) -> tuple[int, ...]:
    """Dims out of an untrusted file as a shape whose size torch can count, an empty one's strides included.

    Raises: CheckpointError.
    """
    shape = check_counts(values, where)
    if math.prod(max(dim, 1) for dim in shape) >= 2**62:
        raise CheckpointError(f"{where}: its shape is not that of a tensor")
    return shape


class MappedFile:
    """The bytes of one file, mapped into memory while any tensor looks at them.

    The mapping lives as long as a tensor that views it. A caller that converts one tensor at a time so holds the pages
    of one tensor, and one that keeps the views as a model's weights holds one mapping and one file descriptor per file.

    The mapping is private: writing to a view changes neither the file nor what others see.

    Attributes:
        path: the file.
        num_bytes: its size when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = self._look()
        self.num_bytes = self._identity[-1]
        self._map: weakref.ref[mmap.mmap] | None = None
        if self.read(0, min(len(_LFS_POINTER), self.num_bytes)) == _LFS_POINTER:
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run: git lfs pull")

    def _look(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{self.path}: is not a regular file")
        return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)

    def read(self, start: int, num_bytes: int) -> bytes:
        """Copy a short run of bytes.

        Raises: CheckpointError if they are not all there.
        """
        self._check_end(start + num_bytes)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                found = file.read(num_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from None
        self._check_end(start + num_bytes, present=start + len(found))
        return found

    def view(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """The `numel` numbers from byte `start` on, as a tensor over the mapped file.

        They are copied where `start` is not aligned to the dtype. Shapes: -> [numel].
        Raises: CheckpointError if the file has changed or is too short.
        """
        self._check_end(start + numel * dtype.itemsize)
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        raw = torch.frombuffer(self._mapped(), dtype=torch.uint8, count=numel * dtype.itemsize, offset=start)
        return (raw.clone() if start % dtype.itemsize else raw).view(dtype)

    def _check_end(self, end: int, present: int | None = None) -> None:
        present = self.num_bytes if present is None else present
        if end > present:
            raise CheckpointError(
                f"{self.path}: is damaged or cut short: refers to byte {end} and ends at {present}; fetch it again"
            )

    def _mapped(self) -> mmap.mmap:
        mapped = self._map() if self._map is not None else None
        if mapped is None:
            if self._look() != self._identity:
                raise CheckpointError(f"{self.path}: was replaced while it was open; open it again")
            mapped = _map_privately(self.path)
            self._map = weakref.ref(mapped)
        return mapped


def _map_privately(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.name == "nt":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from None
