"""From a checkpoint to a network, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bluejay.checkpoints.formats import Checkpoint, TensorInfo, check_dtype, open_checkpoint, widest_dtype
from bluejay.checkpoints.quantized import DequantizedCheckpoint
from bluejay.errors import ConfigError
from bluejay.model import build
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.model.quantized import Quantization, WidenedEmbedding, build_quantized, quantized_names


def load_model(
    source: Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trainable: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> GPTJ | GPTNeo:
    """Build the network of a checkpoint and fill it with the weights.

    Peak memory is the weights in their new dtype and one tensor as stored. On the CPU, weights that are stored in the
    dtype asked for are not copied at all but mapped: they are read from the disk as they are used.

    A quantised checkpoint keeps its integers, all of them mapped, and computes in float32.

    Args:
        source: a checkpoint, or where one is; a `QuantizingCheckpoint` quantises layer by layer as it loads.
        dtype: float32, bfloat16 or float16, which also makes floats of quantised weights; None keeps what is stored (of
            several, the one that holds all of them).
        device: where the weights go.
        trainable: whether the parameters ask for gradients; they are then copies, never mapped.
        on_progress: called with the bytes read so far and the bytes in all, as stored.
    Raises: CheckpointError that lists all keys that do not fit the config; ConfigError for another dtype, and for
            quantised weights that are to be trained or to leave the CPU.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    checkpoint.check()
    quantization = Quantization.of(checkpoint.config)
    if quantization is not None and trainable:
        raise ConfigError(
            f"{checkpoint.path}: {quantization.name} weights cannot be trained; train the float weights that they were "
            "made of, or make floats of them: bluejay convert SRC DST --dtype float32"
        )
    if quantization is not None and dtype is None:
        if torch.device(device).type != "cpu":
            raise ConfigError(
                f"device is {str(device)!r}, and {quantization.name} runs on the CPU; use cpu, or a dtype such as "
                "float16, which makes floats of the weights"
            )
        return _load_quantized(checkpoint, quantization, on_progress)
    if quantization is not None:
        checkpoint = DequantizedCheckpoint(checkpoint)
    infos = checkpoint.tensors()
    stored = {info.dtype for info in infos.values()}
    target = check_dtype(dtype) if dtype is not None else widest_dtype(stored)
    mapped = stored == {target} and torch.device(device).type == "cpu" and not trainable
    total = sum(info.num_bytes for info in infos.values())
    done = 0
    weights: dict[str, Tensor] = {}
    # The largest first: while an embedding is held in both dtypes, there is little else.
    for name, info in sorted(infos.items(), key=_by_size, reverse=True):
        weights[name] = checkpoint.read(name).to(device=device, dtype=target, copy=not mapped).contiguous()
        done += info.num_bytes
        if on_progress is not None:
            on_progress(done, total)
    model = build(checkpoint.config, device="meta")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(trainable).eval()


def _load_quantized(
    checkpoint: Checkpoint, quantization: Quantization, on_progress: Callable[[int, int], None] | None
) -> GPTJ | GPTNeo:
    """Build a network with quantised layers; integers, scales and embeddings are views of the mapped file."""
    infos = checkpoint.tensors()
    model = build_quantized(checkpoint.config, quantization, quantized_names(infos), device="meta")
    expected = model.state_dict()
    widened = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, WidenedEmbedding)}
    total = sum(info.num_bytes for info in infos.values())
    done = 0
    weights: dict[str, Tensor] = {}
    # In the checkpoint's order: a layer's weight and scales, which may be made together, follow one another.
    for name, info in infos.items():
        tensor = checkpoint.read(name)
        as_stored = name in widened and tensor.dtype.itemsize == 2
        weights[name] = (tensor if as_stored else tensor.to(expected[name].dtype)).contiguous()
        done += info.num_bytes
        if on_progress is not None:
            on_progress(done, total)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def _by_size(item: tuple[str, TensorInfo]) -> int:
    return item[1].num_bytes
