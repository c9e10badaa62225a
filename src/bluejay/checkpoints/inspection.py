"""What a checkpoint is and what is wrong with it, found without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bluejay.checkpoints.formats import Checkpoint, TensorInfo, key_problems, open_checkpoint
from bluejay.checkpoints.keymaps import TOKENIZER_FILES
from bluejay.errors import BluejayError
from bluejay.model import ModelConfig


@dataclass(frozen=True)
class Inspection:
    """What was found at a path.

    Attributes:
        path: what was looked at.
        format: "safetensors", "torch_bin" or "mesh_jax"; None if it could not be opened.
        config: the network; None if it could not be opened.
        tensors: every weight under its Hugging Face name.
        tokenizer_files: names of the files that a tokenizer is read from.
        num_tokens: tokens that the tokenizer knows; None if there is none or nobody counted.
        problems: everything that is wrong, a line each; empty for a checkpoint that can be used.
    """

    path: Path
    format: str | None = None
    config: ModelConfig | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    tokenizer_files: tuple[str, ...] = ()
    num_tokens: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights: 6,050,882,784 for GPT-J-6B."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that the weights take as stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """How many parameters there are of each dtype."""
        counts: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            counts[info.dtype] += math.prod(info.shape)
        return dict(counts)


def inspect(path: Path, *, config: Path | None = None, count_tokens: Callable[[Path], int] | None = None) -> Inspection:
    """Look at a checkpoint of any format; a broken one is described, never an error.

    Headers are read and held against each other, the files' sizes and the config. The weights themselves are not read.

    Args:
        path: a directory or a file.
        config: the config file, where it is not the config.json beside the weights.
        count_tokens: opens the tokenizer in a directory and tells how many tokens it knows.
    """
    problems: list[str] = []
    checkpoint: Checkpoint | None = None
    tensors: Mapping[str, TensorInfo] = {}
    try:
        checkpoint = open_checkpoint(path, config=config)
        tensors = checkpoint.tensors()
        problems += key_problems(tensors, checkpoint.config)
    except (BluejayError, OSError) as error:
        problems.append(str(error))
    directory = path if path.is_dir() else path.parent
    tokenizer_files = tuple(name for name in TOKENIZER_FILES if (directory / name).is_file())
    num_tokens = None
    # mesh-transformer-jax keeps the tokenizer elsewhere, and where nothing is, a tokenizer is not missing.
    if path.exists() and count_tokens is not None and (tokenizer_files or not _is_mesh_jax(checkpoint)):
        try:
            num_tokens = count_tokens(directory)
        except BluejayError as error:
            problems.append(str(error))
    if num_tokens is not None and checkpoint is not None and num_tokens > checkpoint.config.vocab_size:
        problems.append(
            f"the tokenizer knows {num_tokens} tokens, the embedding has only {checkpoint.config.vocab_size} rows"
        )
    return Inspection(
        path=path,
        format=None if checkpoint is None else checkpoint.format,
        config=None if checkpoint is None else checkpoint.config,
        tensors=tensors,
        tokenizer_files=tokenizer_files,
        num_tokens=num_tokens,
        problems=tuple(problems),
    )


def _is_mesh_jax(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and checkpoint.format == "mesh_jax"
