"""Hugging Face's directories: config.json, and weights as safetensors or pytorch_model.bin, whole or in shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from bluejay.checkpoints.files import MAX_DESCRIPTION_BYTES, MappedFile, inside, parse_json, short
from bluejay.checkpoints.formats import TensorInfo, check_keys, listing, weight_names
from bluejay.checkpoints.safetensors_file import SafetensorsFile
from bluejay.checkpoints.torch_bin import TorchBinFile
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import ModelConfig
from bluejay.model.quantized import Quantization

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
INDEX_SUFFIX = ".index.json"
# What is looked for, in this order; safetensors first, as in transformers.
WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


class TensorFile(Protocol):
    """One file of tensors: what is in it, and each tensor on its own."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def num_bytes(self) -> int: ...

    def read(self, name: str) -> Tensor: ...


class HFCheckpoint:
    """A model in Hugging Face's layout; see `Checkpoint`.

    Args:
        path: what was opened, for messages.
        config: the network.
        owners: which file holds each key.
    Raises: CheckpointError if the weights are quantised in a way that Bluejay does not read, or the keys claim more
        bytes than the files could hold.
    """

    def __init__(self, path: Path, config: ModelConfig, owners: Mapping[str, TensorFile]) -> None:
        try:
            Quantization.of(config)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.path = path
        self.config = config
        files = set(owners.values())
        self.format = "torch_bin" if any(isinstance(file, TorchBinFile) for file in files) else "safetensors"
        self._where = {name: (owners[stored], stored) for name, stored in weight_names(owners, config).items()}
        self._tensors = {name: file.tensors[stored] for name, (file, stored) in self._where.items()}
        held = sum(file.num_bytes for file in files)
        claimed = sum(info.num_bytes for info in self._tensors.values())
        # Tensors of a .bin may share bytes, as a tied head does; if all of them shared all, they would fill the memory.
        if claimed > 2 * held:
            raise CheckpointError(f"{path}: claims weights of {claimed} bytes in files of {held}")

    @classmethod
    def open(cls, path: Path, config: Path | None = None) -> HFCheckpoint:
        """Open a directory or a single file; `config` stands in for the config.json beside the weights.

        Raises: CheckpointError, ConfigError.
        """
        if path.is_dir():
            weights = _find_weights(path)
            model_config = ModelConfig.from_file(config or inside(path, CONFIG))
        else:
            weights = path
            model_config = ModelConfig.from_file(config or path.parent / CONFIG)
        if weights.name.endswith(INDEX_SUFFIX):
            return cls(path, model_config, _open_shards(weights))
        file = _open_file(weights)
        return cls(path, model_config, dict.fromkeys(file.tensors, file))

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every weight under its Hugging Face name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One weight, a view of the mapped file.

        Raises: CheckpointError if its bytes are damaged.
        """
        file, stored = self._where[name]
        return file.read(stored)

    def check(self) -> None:
        """Hold the weights against the config.

        Raises: CheckpointError that lists all missing, unexpected and misshapen keys.
        """
        check_keys(self._tensors, self.config, self.path)


def has_weights(directory: Path) -> bool:
    """Whether a directory has any of Hugging Face's files of weights, be it a link that leads nowhere."""
    return any(os.path.lexists(directory / name) for name in WEIGHTS)


def _find_weights(directory: Path) -> Path:
    """The file or the index that holds the weights of a directory."""
    for name in WEIGHTS:
        if os.path.lexists(directory / name):
            return inside(directory, name)
    raise CheckpointError(f"{directory}: holds no weights; looked for {', '.join(WEIGHTS)} and meta.json with shard_0")


def _open_file(path: Path) -> TensorFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return TorchBinFile(path)
    raise CheckpointError(f"{path}: is neither .safetensors nor .bin, .pt or .pth")


def _open_shards(index: Path) -> dict[str, TensorFile]:
    """The file that holds each key of an index.

    Raises: CheckpointError that lists every key that is not in its file, in two files or not in the index.
    """
    weight_map = _read_weight_map(index)
    files = {name: _open_file(_shard(index, name, weight_map)) for name in sorted(set(weight_map.values()))}
    problems = []
    for key, name in weight_map.items():
        if key not in files[name].tensors:
            problems.append(f"{short(key)} should be in {name} and is not")
    for name, file in files.items():
        for key in file.tensors:
            if key not in weight_map:
                problems.append(f"{short(key)} is in {name} but not in the index")
            elif weight_map[key] != name:
                problems.append(f"{short(key)} is in {name}, the index says {weight_map[key]}")
    if problems:
        raise CheckpointError(f"{index}: does not match its shards:\n" + listing(problems))
    return {key: files[name] for key, name in weight_map.items()}


def _shard(index: Path, name: str, weight_map: Mapping[str, str]) -> Path:
    path = inside(index.parent, name)
    if not path.exists():
        key = next(key for key, file in weight_map.items() if file == name)
        raise CheckpointError(f"{index}: {short(key)} should be in {name}, and there is no such file")
    return path


def _read_weight_map(index: Path) -> dict[str, str]:
    file = MappedFile(index)
    if file.num_bytes > MAX_DESCRIPTION_BYTES:
        raise CheckpointError(f"{index}: has {file.num_bytes} bytes, at most {MAX_DESCRIPTION_BYTES} are read")
    found = parse_json(file.read(0, file.num_bytes), str(index)).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: has no weight_map, which says what file holds what key")
    names: dict[str, str] = {}
    for key, name in found.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: the file of {short(key)} is {type(name).__name__}, expected a name")
        names[key] = name
    return names
