"""Quantised checkpoints: ones made from floats while they are read, and floats made from quantised ones.

    config.json   "quantization_config": {"quant_method": "bluejay", "bits": 4, "group_size": 32, "version": 2}
    *.safetensors NAME.weight uint8, packed · NAME.scales float16 · NAME.bias, LayerNorms float32 · embeddings 16 bits

A layer is quantised because its scales are in the file; the config says with how many bits. Layouts: `ops.reference`.
Both classes are a `Checkpoint`, so that saving, converting and loading need not know where tensors come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bluejay.checkpoints.formats import Checkpoint, TensorInfo
from bluejay.checkpoints.keymaps import EMBEDDINGS, TIED_HEAD_WEIGHT
from bluejay.errors import CheckpointError, KernelError
from bluejay.model import ModelConfig
from bluejay.model.quantized import (
    SCALES,
    WEIGHT,
    Quantization,
    linear_shapes,
    pack_weight,
    quantized_names,
    stored_embedding,
    stored_shapes,
    unpack_weight,
    with_quantization,
)


class QuantizingCheckpoint:
    """A checkpoint of floats, read as a quantised one; see `Checkpoint`.

    Each layer is quantised when it is read, on all of the pool's threads. The last one is kept, so that its weight and
    its scales, read one after the other, cost one quantisation.

    Args:
        source: of floats, checked.
        quantization: what is wanted.
    """

    def __init__(self, source: Checkpoint, quantization: Quantization) -> None:
        self._source, self._quantization = source, quantization
        self.path: Path = source.path
        self.format: str = source.format
        self.config: ModelConfig = with_quantization(source.config, quantization)
        self._layers = linear_shapes(source.config)
        self._packed: tuple[str, Tensor, Tensor] | None = None
        shapes = stored_shapes(self.config, [name + SCALES for name in self._layers])
        self._tensors = {name: self._info(name, shape, dtype) for name, (shape, dtype) in shapes.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the quantised model, a layer's scales behind its weight."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor, as the quantised model keeps it.

        Raises: CheckpointError for damaged bytes and for weights that are no numbers.
        """
        layer = name.removesuffix(WEIGHT).removesuffix(SCALES)
        if layer in self._layers and not name.endswith(".bias"):
            return self._pack(layer)[1 if name.endswith(SCALES) else 0]
        return self._source.read(name).to(self._tensors[name].dtype)

    def check(self) -> None:
        """Hold the floats against the config. Raises: CheckpointError."""
        self._source.check()

    def _info(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> TensorInfo:
        weight = name.removesuffix(SCALES) + WEIGHT if name.endswith(SCALES) else name
        stored = self._source.tensors()[self._name_in_source(weight)]
        if dtype is None:
            dtype = stored_embedding(self._source.read(name)).dtype if name in EMBEDDINGS else torch.float32
        return TensorInfo(shape, dtype, stored.file)

    def _name_in_source(self, name: str) -> str:
        tied = name == TIED_HEAD_WEIGHT and self.config.tie_word_embeddings
        return EMBEDDINGS[0] if tied else name

    def _pack(self, layer: str) -> tuple[Tensor, Tensor]:
        if self._packed is None or self._packed[0] != layer:
            self._packed = None
            name = layer + WEIGHT
            try:
                packed = pack_weight(self._source.read(self._name_in_source(name)), self._quantization)
            except KernelError as error:
                raise CheckpointError(f"{self.path}: {name}: {error}") from None
            self._packed = (layer, *packed)
        return self._packed[1:]


class DequantizedCheckpoint:
    """A quantised checkpoint, read as one of floats; see `Checkpoint`.

    A tied head becomes the embedding again, which was never quantised.

    Args:
        source: quantised, checked.
    """

    def __init__(self, source: Checkpoint) -> None:
        quantization = Quantization.of(source.config)
        assert quantization is not None
        self._source, self._quantization = source, quantization
        self.path: Path = source.path
        self.format: str = source.format
        self.config: ModelConfig = with_quantization(source.config, None)
        self._layers = {name: linear_shapes(self.config)[name] for name in quantized_names(source.tensors())}
        stored = source.tensors()
        self._tensors = {
            name: TensorInfo(shape, torch.float32 if self._is_packed(name) else stored[name].dtype, stored[name].file)
            for name, (shape, _) in stored_shapes(self.config, ()).items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the network of floats."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor; a quantised one as float32."""
        if not self._is_packed(name):
            return self._source.read(name)
        layer = name.removesuffix(WEIGHT)
        scales = self._source.read(layer + SCALES)
        return unpack_weight(self._source.read(name), scales, self._quantization, *self._layers[layer])

    def check(self) -> None:
        """Hold the quantised tensors against the config. Raises: CheckpointError."""
        self._source.check()

    def _is_packed(self, name: str) -> bool:
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) in self._layers
