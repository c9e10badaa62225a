"""From weights to a directory that transformers opens: safetensors in shards, an index, config.json.

A save is written to TARGET/.saving and moved into place when it is complete and on the disk. Whatever goes wrong before
that (no space, a kill) leaves what was there. The moves are ordered so that no moment shows a directory that opens with
the weights of one model and the config of another: config.json is taken away first and comes back last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bluejay.checkpoints.files import inside
from bluejay.checkpoints.formats import (
    Checkpoint,
    TensorInfo,
    check_dtype,
    check_keys,
    floating,
    weight_names,
    widest_dtype,
)
from bluejay.checkpoints.hf import CONFIG, SAFETENSORS, SAFETENSORS_INDEX
from bluejay.checkpoints.keymaps import TOKENIZER_FILES
from bluejay.checkpoints.safetensors_file import write_safetensors
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import ModelConfig
from bluejay.model.quantized import quantized_names, stored_shapes

STAGING = ".saving"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save(
    tensors: nn.Module | Checkpoint | Mapping[str, Tensor],
    config: ModelConfig,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a model in Hugging Face's layout; peak memory is one tensor.

    Tokenizer files are not touched; see `copy_tokenizer_files`. One save at a time may run in a directory.

    Args:
        tensors: a network, a checkpoint, or weights by name; a mapping may be lazy and is asked for each tensor twice.
        config: the network, written as config.json.
        target: the directory; made if it is not there. A model that is there already is replaced.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own, the only way for quantised ones.
        max_shard_bytes: weights of more than this are cut into shards; a shard holds at least one tensor.
        on_progress: called with the bytes written so far and the bytes in all.
    Returns: the files written.
    Raises: CheckpointError if the weights are not those of the config or cannot be written; ConfigError for another
        dtype.
    """
    infos, read = _source(tensors, config, target)
    check_keys(infos, config, target)
    # In the network's own order, so that the same weights make the same bytes whatever they came from.
    order = stored_shapes(config, infos)
    kept = None if dtype is None else check_dtype(dtype)
    if kept is not None and quantized_names(infos):
        raise ConfigError(f"the weights are quantised and cannot be written as {kept}; convert the saved model")
    infos = {name: replace(infos[name], dtype=kept or infos[name].dtype) for name in order}
    total = sum(info.num_bytes for info in infos.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress is not None:
            on_progress(done, total)

    try:
        with _staging(target) as staging:
            _check_space(target, total)
            shards = _shards(infos, max_shard_bytes)
            for file, part in shards.items():
                write_safetensors(staging / file, part, read, advance)
            if len(shards) > 1:
                weight_map = {name: file for file, part in shards.items() for name in part}
                _write_json(staging / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            stored = str(widest_dtype(floating(infos))).removeprefix("torch.")
            _write_json(staging / CONFIG, replace(config, torch_dtype=stored).to_dict())
            return _move_into_place(staging, target)
    except OSError as error:
        raise CheckpointError(f"{target}: the model cannot be written: {error.strerror or error}") from error


def copy_tokenizer_files(source: Path, target: Path) -> list[Path]:
    """Copy the tokenizer of one model to another, replacing the one that is there; a model without one changes nothing.

    Args:
        source: a model's directory, or a file in it.
        target: a directory.
    Returns: the files written.
    Raises: CheckpointError if a file is a link out of its directory or cannot be copied.
    """
    directory = source if source.is_dir() else source.parent
    found = [path for name in TOKENIZER_FILES if (path := inside(directory, name)).is_file()]
    if not found or (target.exists() and directory.samefile(target)):
        return []
    try:
        with _staging(target) as staging:
            for path in found:
                shutil.copyfile(path, staging / path.name)
            # Half of one tokenizer and half of another would be a third one.
            for name in TOKENIZER_FILES:
                (target / name).unlink(missing_ok=True)
            return [(staging / path.name).replace(target / path.name) for path in found]
    except OSError as error:
        raise CheckpointError(f"{target}: the tokenizer cannot be copied: {error.strerror or error}") from error


def _source(
    tensors: nn.Module | Checkpoint | Mapping[str, Tensor], config: ModelConfig, target: Path
) -> tuple[Mapping[str, TensorInfo], Callable[[str], Tensor]]:
    """What is to be saved, under its Hugging Face name, and how to get it."""
    found = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    if not isinstance(found, Mapping):
        return found.tensors(), found.read
    infos = {}
    stored = weight_names(found, config)
    for name, key in stored.items():
        tensor = found[key]
        infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, target)
    return infos, lambda name: found[stored[name]]


def _shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """Which tensors go to which file, in order."""
    parts: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in infos.items():
        if parts[-1] and filled + info.num_bytes > max_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = info
        filled += info.num_bytes
    if len(parts) == 1:
        return {SAFETENSORS: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """An empty directory on the target's own disk, gone afterwards."""
    staging = target / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging)  # a save that was killed may have left something
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_space(target: Path, num_bytes: int) -> None:
    """Fail before an hour of writing rather than after it."""
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise CheckpointError(f"{target}: the weights take {num_bytes:,} bytes, the disk has {free:,} free")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(staging: Path, target: Path) -> list[Path]:
    """Replace the model of `target`; at no moment does the directory open as a mixture of the two."""
    shards = sorted(path.name for path in staging.glob("*.safetensors"))
    new = [*shards, *(name for name in (SAFETENSORS_INDEX, CONFIG) if (staging / name).exists())]
    old = [SAFETENSORS, SAFETENSORS_INDEX, *(path.name for path in target.iterdir() if _SHARD.fullmatch(path.name))]
    # One file for the same network is replaced in one step: at any moment the model before or this one.
    if new != [SAFETENSORS, CONFIG] or not _same_bytes(staging / CONFIG, target / CONFIG):
        _remove(target, [CONFIG])
        _remove(target, old)
    for name in new:
        if name == CONFIG:
            _sync(target)
        (staging / name).replace(target / name)
    _remove(target, [name for name in old if name not in new])
    return [target / name for name in new]


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _remove(directory: Path, names: Iterable[str]) -> None:
    """Remove what there is of these, and see it done on the disk."""
    for name in names:
        (directory / name).unlink(missing_ok=True)
    _sync(directory)


def _sync(directory: Path) -> None:
    """See that what was moved to or from a directory is so on the disk; Windows does this by itself."""
    if os.name == "posix":
        opened = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
