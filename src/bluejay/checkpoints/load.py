"""From a checkpoint to a network, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bluejay.checkpoints.formats import Checkpoint, TensorInfo, check_dtype, open_checkpoint, widest_dtype
from bluejay.model import build
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ


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

    Args:
        source: a checkpoint, or where one is.
        dtype: float32, bfloat16 or float16; None keeps what is stored (of several, the one that holds all of them).
        device: where the weights go.
        trainable: whether the parameters ask for gradients; they are then copies, never mapped.
        on_progress: called with the bytes read so far and the bytes in all, as stored.
    Raises: CheckpointError that lists all keys that do not fit the config; ConfigError for another dtype.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    checkpoint.check()
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


def _by_size(item: tuple[str, TensorInfo]) -> int:
    return item[1].num_bytes
