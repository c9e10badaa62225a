"""What every checkpoint offers, whatever its format, and `open_checkpoint`, which finds out the format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bluejay.checkpoints.files import short
from bluejay.checkpoints.keymaps import HEAD, LEGACY_BUFFER, PREFIX, TIED_HEAD_SCALES, TIED_HEAD_WEIGHT
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import ModelConfig
from bluejay.model.quantized import CONFIG_KEY, SCALES, stored_shapes

# A wrong config can make every one of some hundred keys wrong; a screenful of them tells as much as all.
MAX_PRINTED = 20

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        shape: its dims.
        dtype: as stored.
        file: where its bytes are; of several shards, the first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """A model on disk, opened but not read.

    Attributes:
        path: what was opened, a directory or a file.
        format: "safetensors", "torch_bin" or "mesh_jax".
        config: the network that the weights belong to.
    """

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> str: ...

    @property
    def config(self) -> ModelConfig: ...

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every weight under its Hugging Face name; legacy buffers and a tied head are left out."""
        ...

    def read(self, name: str) -> Tensor:
        """One weight on the CPU, as stored, a view of the mapped file where that is possible.

        Raises: CheckpointError if its bytes are damaged.
        """
        ...

    def check(self) -> None:
        """Hold the weights against the config.

        Raises: CheckpointError that lists all missing, unexpected and misshapen keys.
        """
        ...


def open_checkpoint(path: Path, *, config: Path | None = None) -> Checkpoint:
    """Open a model of any format; reads headers, never weights.

    Args:
        path: a directory (Hugging Face's, or step_N of mesh-transformer-jax), or one .safetensors or .bin file.
        config: the config file, where it is not the config.json beside the weights.
    Raises: CheckpointError if there are no weights, they may not be read or are damaged or unsafe; ConfigError for a
        wrong config.
    """
    try:
        return _open(path, config)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path, config: Path | None) -> Checkpoint:
    from bluejay.checkpoints import hf

    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_dir() and not hf.has_weights(path):
        from bluejay.checkpoints import mesh_jax

        if mesh_jax.is_mesh_jax(path):
            return mesh_jax.MeshJaxCheckpoint.open(path, config)
    return hf.HFCheckpoint.open(path, config)


def weight_names(stored: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each weight -> the name under which it is stored.

    Adds the prefix that a bare model's file lacks; leaves out legacy buffers and the head's weight where it is tied (a
    quantised head is not: its integers are not the embedding's).
    """
    names = list(stored)
    bare = not any(name.startswith(PREFIX) for name in names)
    found = {PREFIX + name if bare and not name.startswith(HEAD) else name: name for name in names}
    if config.tie_word_embeddings and TIED_HEAD_SCALES not in found:
        found.pop(TIED_HEAD_WEIGHT, None)
    return {name: source for name, source in found.items() if not LEGACY_BUFFER.fullmatch(name)}


def key_problems(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[str]:
    """Everything in which `tensors` differ from the network of `config`, one line for each key."""
    # Building a network of ten thousand layers, even without weights, takes a minute.
    if config.n_layer > len(tensors):
        return [f"config: n_layer is {config.n_layer}, but the files hold {len(tensors)} tensors in all"]
    try:
        expected = stored_shapes(config, tensors)
    except ConfigError as error:
        return [f"config: {error}"]
    problems = [f"missing: {name} {list(shape)}" for name, (shape, _) in expected.items() if name not in tensors]
    for name, info in tensors.items():
        if name not in expected:
            problems.append(f"unexpected: {short(name)} {list(info.shape)} in {info.file.name}{_remedy(name, config)}")
            continue
        shape, dtype = expected[name]
        if info.dtype == torch.uint8 and dtype is None:
            problems.append(f"missing: the scales of {name}, which is uint8 in {info.file.name}")
        elif info.shape != shape:
            problems.append(
                f"misshapen: {name} is {list(info.shape)} in {info.file.name}, the config asks for {list(shape)}"
            )
        elif info.dtype != dtype if dtype is not None else not info.dtype.is_floating_point:
            wanted = "floating point" if dtype is None else dtype
            problems.append(f"wrong dtype: {name} is {info.dtype} in {info.file.name}, expected {wanted}")
    return problems


def _remedy(name: str, config: ModelConfig) -> str:
    """What to think of scales that nothing is known of."""
    without = name.endswith(SCALES) and CONFIG_KEY not in config.extras
    return f"; the config has no {CONFIG_KEY}" if without else ""


def check_keys(tensors: Mapping[str, TensorInfo], config: ModelConfig, path: Path) -> None:
    """Refuse tensors that are not those of `config`.

    Raises: CheckpointError that lists every problem (the first 20, and how many more).
    """
    problems = key_problems(tensors, config)
    if not problems:
        return
    raise CheckpointError(
        f"{path}: the weights are not those of the config ({config.model_type}):\n{listing(problems)}"
    )


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which networks are kept.

    Raises: ConfigError for any other.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"dtype is {dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
    return dtype


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of these; float32 for float64, in which no network is run."""
    found = reduce(torch.promote_types, dtypes)
    return torch.float32 if found == torch.float64 else found


def floating(tensors: Mapping[str, TensorInfo]) -> set[torch.dtype]:
    """The dtypes of the weights that are not packed integers."""
    return {info.dtype for info in tensors.values() if info.dtype.is_floating_point}


def listing(problems: Sequence[str]) -> str:
    """Problems as the lines of a message: the first 20, and how many more."""
    more = [f"and {len(problems) - MAX_PRINTED} more"] if len(problems) > MAX_PRINTED else []
    return "\n".join(f"  {line}" for line in [*problems[:MAX_PRINTED], *more])
