"""Writes slim mesh-transformer-jax checkpoints, one parameter at a time; the reverse of `mesh_jax`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
from torch import Tensor

from bluejay.checkpoints.formats import Checkpoint, TensorInfo
from bluejay.checkpoints.keymaps import MESH_JAX_EMBEDDING
from bluejay.checkpoints.mesh_jax import leaf_table
from bluejay.errors import ConfigError
from bluejay.model import ModelConfig

NUM_FILES = 16  # as mesh-transformer-jax deals a shard out
_EMBEDDING_BIAS, _EMBEDDING = (key for _, key, _ in MESH_JAX_EMBEDDING)


def check_writable(config: ModelConfig, cores_per_replica: int) -> None:
    """Refuse a network that mesh-transformer-jax cannot describe.

    Raises: ConfigError that lists every reason.
    """
    expected = {
        "model_type": "gptj",
        "inner_dim": 4 * config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }
    problems = [
        f"{name} is {getattr(config, name)!r}, it has only {value!r}"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
    if cores_per_replica < 1:
        problems.append(f"cores_per_replica is {cores_per_replica}, expected a whole number from 1")
    else:
        problems += [
            f"{name} {getattr(config, name)} is not a multiple of cores_per_replica {cores_per_replica}"
            for name in ("n_head", "n_embd", "vocab_size")
            if getattr(config, name) % cores_per_replica
        ]
    if problems:
        raise ConfigError(f"mesh-transformer-jax cannot hold this network: {'; '.join(problems)}")


def write_mesh_jax(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    num_shards: int,
    on_written: Callable[[int], None],
) -> dict[str, Any]:
    """Write shard_0, shard_1, … with the parameters and a step of 0.

    Args:
        folder: where the shards go.
        checkpoint: the weights.
        tensors: the dtypes to write.
        num_shards: cores_per_replica.
        on_written: called with the number of bytes of each weight written, counted once.
    Returns: the config, as mesh-transformer-jax spells it.
    Raises: OSError.
    """
    config = checkpoint.config
    table = leaf_table(config.n_layer)
    for shard in range(num_shards):
        (folder / f"shard_{shard}").mkdir()
    for number, places in enumerate(np.array_split(np.arange(len(table) + 1), NUM_FILES)):
        with ExitStack() as stack:
            archives = [
                stack.enter_context(ZipFile(folder / f"shard_{shard}" / f"{number}.npz", "x", ZIP_STORED))
                for shard in range(num_shards)
            ]
            for index, place in enumerate(places.tolist()):
                if place == len(table):
                    parts = [np.array(0, np.int32)] * num_shards
                else:
                    _, key, merge = table[place]
                    parts = [_array(part) for part in _split(_leaf(checkpoint, tensors, key), merge, num_shards)]
                    on_written(tensors[key].num_bytes if key in tensors else 0)
                for archive, part in zip(archives, parts, strict=True):
                    with archive.open(f"arr_{index}.npy", "w", force_zip64=True) as room:
                        np.lib.format.write_array(room, part, allow_pickle=False)
    return {
        "layers": config.n_layer,
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "n_vocab": config.vocab_size,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": config.rotated_dims,
        "seq": config.n_positions,
        "cores_per_replica": num_shards,
    }


def _leaf(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], key: str) -> Tensor:
    """A parameter as mesh-transformer-jax lays it out: matrices [in, out]."""
    if key == _EMBEDDING_BIAS:  # Hugging Face has it in the embedding already
        return torch.zeros(checkpoint.config.n_embd, dtype=tensors[_EMBEDDING].dtype)
    weight = checkpoint.read(key).to(tensors[key].dtype)
    return weight if weight.dim() < 2 or key == _EMBEDDING else weight.T


def _split(whole: Tensor, merge: str, num_shards: int) -> tuple[Tensor, ...]:
    """Each shard's part. Of a sum, the first shard has all, which adds up exactly."""
    if merge == "first":
        return (whole,) * num_shards
    if merge == "sum":
        return (whole, *(torch.zeros_like(whole),) * (num_shards - 1))
    return torch.tensor_split(whole, num_shards, dim=-1 if merge == "columns" else 0)


def _array(part: Tensor) -> np.ndarray[Any, Any]:
    """As numpy has it; bfloat16, which it does not know, as two bytes without a meaning."""
    part = part.contiguous()
    return part.view(torch.int16).numpy().view("V2") if part.dtype == torch.bfloat16 else part.numpy()
