"""From any format to any format, one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bluejay.checkpoints.files import inside
from bluejay.checkpoints.formats import Checkpoint, TensorInfo, check_dtype, floating, open_checkpoint, widest_dtype
from bluejay.checkpoints.hf import CONFIG, WEIGHTS
from bluejay.checkpoints.keymaps import GENERATION_CONFIG, TOKENIZER_FILES
from bluejay.checkpoints.mesh_jax import is_mesh_jax
from bluejay.checkpoints.mesh_jax_writer import check_writable, write_mesh_jax
from bluejay.checkpoints.quantized import DequantizedCheckpoint, QuantizingCheckpoint
from bluejay.checkpoints.save import copy_tokenizer_files, save
from bluejay.checkpoints.torch_bin_writer import write_torch_bin
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model.quantized import Quantization

FORMATS = ("safetensors", "torch_bin", "mesh_jax")
TORCH_BIN = "pytorch_model.bin"
_STAGING = ".converting"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def convert(
    source: Path,
    target: Path,
    *,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    to: str = "safetensors",
    cores_per_replica: int = 8,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a checkpoint of any format in another one, with its tokenizer and its generation_config.json.

    Memory holds one tensor, as stored and as written; layers are quantised on all of the pool's threads.
    config.json is written last: an interrupted conversion leaves a directory that does not open.

    Args:
        source: a checkpoint.
        target: a directory; made if it is not there.
        config: the source's config file, where it is not the config.json beside its weights.
        dtype: float32, bfloat16 or float16, which also makes floats of quantised weights; None keeps what is stored.
        quantization: write the linear layers with 8 or 4 bits; to safetensors only, and from weights of floats.
        to: "safetensors" (Hugging Face, in shards of 5 GB), "torch_bin" (one pytorch_model.bin) or "mesh_jax" (slim).
        cores_per_replica: shards of a mesh_jax target.
        force: write into a directory that is not empty, over a Hugging Face model of the same format.
        on_progress: called with the bytes written so far and the bytes in all.
    Returns: the files written.
    Raises: CheckpointError, ConfigError, before anything is written if the source or the target will not do.
    """
    if to not in FORMATS:
        raise ConfigError(f"to is {to!r}, expected one of {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(source, config=config)
    checkpoint.check()
    checkpoint = _as_asked(checkpoint, dtype, quantization, to)
    infos = _as_written(checkpoint, dtype)
    if to == "mesh_jax":
        check_writable(checkpoint.config, cores_per_replica)
    try:
        _check_target(source, target, to, force)
        made = not target.exists()
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be read: {error.strerror or error}") from None
    staging = target / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # a conversion that was killed may have left something
        staging.mkdir(parents=True)
        copy_tokenizer_files(source, staging)
        _copy_generation_config(source, staging)
        if to == "safetensors":
            save(checkpoint, checkpoint.config, staging, dtype=dtype, on_progress=on_progress)
        else:
            _write_other(checkpoint, infos, staging, to, cores_per_replica, on_progress)
        return _move_into_place(staging, target)
    except OSError as error:
        raise CheckpointError(f"{target}: the model cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not (target / CONFIG).exists():
            shutil.rmtree(target, ignore_errors=True)


def _as_asked(
    checkpoint: Checkpoint, dtype: torch.dtype | None, quantization: Quantization | None, to: str
) -> Checkpoint:
    """The source with its weights quantised, or made floats again, where that is asked for.

    Raises: ConfigError for options that exclude one another; CheckpointError for a source that will not do.
    """
    stored = Quantization.of(checkpoint.config)
    if quantization is not None:
        if to != "safetensors" or dtype is not None:
            raise ConfigError(f"quantised weights are written as safetensors and have no dtype, not {to} and {dtype}")
        if stored is not None:
            raise CheckpointError(
                f"{checkpoint.path}: is quantised already ({stored.name}); quantise the float weights"
            )
        return QuantizingCheckpoint(checkpoint, quantization)
    if stored is None:
        return checkpoint
    if dtype is not None:
        return DequantizedCheckpoint(checkpoint)
    if to != "safetensors":
        raise ConfigError(f"{to} holds no {stored.name} weights; name a dtype to make floats of them, such as float16")
    return checkpoint


def _as_written(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    kept = None if dtype is None else check_dtype(dtype)
    return {name: replace(info, dtype=kept or info.dtype) for name, info in checkpoint.tensors().items()}


def _check_target(source: Path, target: Path, to: str, force: bool) -> None:
    """Refuse a target where the source, or a model that would get mixed with this one, is.

    Raises: CheckpointError.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file, expected a directory")
    if target.samefile(source) or target.samefile(source.parent):
        raise CheckpointError(f"{target}: the source is there; convert into another directory")
    there = [path.name for path in target.iterdir() if path.name != _STAGING]
    if there and not force:
        raise CheckpointError(f"{target}: is not empty; choose another directory, or overwrite (--force)")
    written = {"safetensors": WEIGHTS[:2], "torch_bin": (TORCH_BIN,), "mesh_jax": ()}[to]
    others = [name for name in WEIGHTS if name in there and name not in written]
    others += ["shard_0"] * is_mesh_jax(target)
    if others:
        raise CheckpointError(f"{target}: holds {', '.join(others)}, which {to} does not replace; remove it first")


def _copy_generation_config(source: Path, folder: Path) -> None:
    """Copy the options for sampling that the model recommends, where it has any."""
    path = inside(source if source.is_dir() else source.parent, GENERATION_CONFIG)
    if path.is_file():
        shutil.copyfile(path, folder / GENERATION_CONFIG)


def _write_other(
    checkpoint: Checkpoint,
    infos: dict[str, TensorInfo],
    folder: Path,
    to: str,
    cores_per_replica: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write pytorch_model.bin or the shards, and the config that goes with them."""
    total = sum(info.num_bytes for info in infos.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(f"{folder.parent}: the weights take {total:,} bytes, the disk has {free:,} free")
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress is not None:
            on_progress(done, total)

    if to == "torch_bin":
        write_torch_bin(folder / TORCH_BIN, infos, checkpoint.read, advance)
        stored = str(widest_dtype(floating(infos))).removeprefix("torch.")
        described = replace(checkpoint.config, torch_dtype=stored).to_dict()
    else:
        described = write_mesh_jax(folder, checkpoint, infos, cores_per_replica, advance)
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into_place(staging: Path, target: Path) -> list[Path]:
    """Move a complete model into its directory; without config.json, first gone and last to come, it does not open."""
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    entries = sorted(staging.iterdir(), key=lambda path: path.name == CONFIG)
    (target / CONFIG).unlink(missing_ok=True)
    (target / GENERATION_CONFIG).unlink(missing_ok=True)
    # Of the model before, no shard is to stay beside the new ones, and no half of its tokenizer.
    new_tokenizer = any(path.name in TOKENIZER_FILES for path in entries)
    for path in list(target.iterdir()):
        if _WEIGHTS.fullmatch(path.name) or (new_tokenizer and path.name in TOKENIZER_FILES):
            path.unlink()
    for path in entries:
        path.replace(target / path.name)
    return [target / path for path in files]
