"""What a checkpoint is and what is wrong with it, found without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bluejay.checkpoints.files import inside
from bluejay.checkpoints.formats import Checkpoint, TensorInfo, key_problems, open_checkpoint
from bluejay.checkpoints.hf import CONFIG
from bluejay.checkpoints.keymaps import TOKENIZER_FILES
from bluejay.checkpoints.mesh_jax import read_config
from bluejay.errors import BluejayError, ConfigError
from bluejay.model import ModelConfig
from bluejay.model.quantized import SCALES, WEIGHT, Quantization, linear_shapes


@dataclass(frozen=True)
class Inspection:
    """What was found at a path.

    Attributes:
        path: what was looked at.
        format: "safetensors", "torch_bin" or "mesh_jax"; None if it could not be opened.
        config: the network; None if no config could be read.
        tensors: every weight under its Hugging Face name.
        tokenizer_files: names of the files that a tokenizer is read from.
        num_tokens: tokens that the tokenizer knows; None if there is none or nobody counted.
        num_token_ids: the largest id of a token + 1, the rows that the embedding must have; None as above.
        problems: everything that is wrong, a line each; empty for a checkpoint that can be used.
    """

    path: Path
    format: str | None = None
    config: ModelConfig | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    tokenizer_files: tuple[str, ...] = ()
    num_tokens: int | None = None
    num_token_ids: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def quantization(self) -> Quantization | None:
        """How the layers that have scales are kept; None for floats, and for a config that will not do."""
        try:
            return None if self.config is None else Quantization.of(self.config)
        except ConfigError:
            return None

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights: 6,050,882,784 for GPT-J-6B; of quantised ones what the integers stand for."""
        return sum(self.dtypes.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that the weights take as stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many parameters there are of each dtype: "float32", "bfloat16" …, or "int8" and "int4" of packed ones."""
        counts: Counter[str] = Counter()
        shapes: dict[str, tuple[int, int]] = {}
        if self.quantization is not None and self.config is not None and not self.problems:
            shapes = {name + WEIGHT: shape for name, shape in linear_shapes(self.config).items()}
        for name, info in self.tensors.items():
            if self.quantization is not None and info.dtype == torch.uint8 and name in shapes:
                counts[self.quantization.name] += math.prod(shapes[name])
            elif not (name.endswith(SCALES) and shapes):
                counts[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
        return dict(counts)


def inspect(
    path: Path, *, config: Path | None = None, count_tokens: Callable[[Path], tuple[int, int]] | None = None
) -> Inspection:
    """Look at a checkpoint of any format; a broken one is described, never an error.

    Headers are read and held against each other, the files' sizes and the config. The weights themselves are not read.

    Args:
        path: a directory or a file.
        config: the config file, where it is not the config.json beside the weights.
        count_tokens: opens the tokenizer in a directory and tells how many tokens it knows, and the
            largest of their ids + 1.
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
    network = checkpoint.config if checkpoint is not None else _read_network(path, config)
    try:
        is_there, directory = path.exists(), path if path.is_dir() else path.parent
        tokenizer_files = tuple(name for name in TOKENIZER_FILES if (directory / name).is_file())
    except OSError:  # opening it has told why
        is_there, directory, tokenizer_files = False, path, ()
    num_tokens = num_token_ids = None
    # mesh-transformer-jax keeps the tokenizer elsewhere, and where nothing is, a tokenizer is not missing.
    if is_there and count_tokens is not None and (tokenizer_files or not _is_mesh_jax(checkpoint)):
        try:
            num_tokens, num_token_ids = count_tokens(directory)
        except (BluejayError, OSError) as error:
            problems.append(str(error))
    if num_token_ids is not None and network is not None and num_token_ids > network.vocab_size:
        problems.append(
            f"the tokenizer has ids up to {num_token_ids - 1}, the embedding has only {network.vocab_size} rows"
        )
    return Inspection(
        path=path,
        format=None if checkpoint is None else checkpoint.format,
        config=network,
        tensors=tensors,
        tokenizer_files=tokenizer_files,
        num_tokens=num_tokens,
        num_token_ids=num_token_ids,
        problems=tuple(problems),
    )


def _read_network(path: Path, config: Path | None) -> ModelConfig | None:
    """The network of weights that do not open, if its config, of either kind, can be read."""
    for read in (ModelConfig.from_file, lambda file: read_config(file)[0]):
        try:
            return read(config or inside(path if path.is_dir() else path.parent, CONFIG))
        except (BluejayError, OSError):
            continue
    return None


def _is_mesh_jax(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and checkpoint.format == "mesh_jax"
