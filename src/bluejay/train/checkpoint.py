"""Save and restore a run exactly: weights, optimiser, step. Nothing else is random: batches are a function of the step.

    <output_dir>/checkpoints/step_00000500/
        model.safetensors       weights, float32, Hugging Face's names
        optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, step.<name>
        state.json              step, what the run must agree on, sha256 of the two files

A checkpoint is written under another name, flushed to the disk and renamed: one that has its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bluejay.errors import CheckpointError

_FILES = ("model.safetensors", "optimizer.safetensors")


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, agreement: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` into `folder`.

    Args:
        agreement: what a resumed run must share with this one (seed, shape of the batches, model config).
    Raises: CheckpointError if the disk is full or refuses; what was there before stays whole.
    """
    target = folder / f"step_{step:08d}"
    unfinished = folder / f".unfinished_{step:08d}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        for name, tensors in zip(_FILES, (weights, _moments(model, optimizer)), strict=True):
            save_file(tensors, unfinished / name)
            _flush(unfinished / name)
        state = {"step": step, "agreement": agreement, "sha256": {name: _sha256(unfinished / name) for name in _FILES}}
        (unfinished / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        _flush(unfinished / "state.json")
        shutil.rmtree(target, ignore_errors=True)
        unfinished.replace(target)
        _flush(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{target}: could not be saved: {error}; earlier checkpoints are untouched") from error
    return target


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    return max(folder.glob("step_[0-9]*"), default=None)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, agreement: dict[str, Any]) -> int:
    """Read a checkpoint into `model` and `optimizer`; returns its step.

    Raises: CheckpointError if a file is damaged, or the run differs from the one that saved it (all differences).
    """
    state = _read_state(path)
    differences = [
        f"{key} was {state['agreement'].get(key)!r} and is {value!r}"
        for key, value in agreement.items()
        if state["agreement"].get(key) != json.loads(json.dumps(value))
    ]
    if differences:
        raise CheckpointError(
            f"{path}: belongs to another run: {'; '.join(differences)}; restore the config, or start with --fresh"
        )
    for name in _FILES:
        if not (path / name).is_file() or _sha256(path / name) != state["sha256"][name]:
            raise CheckpointError(
                f"{path / name}: missing or damaged (its sha256 differs); remove {path} to go on from the one before"
            )
    model.load_state_dict(load_file(path / _FILES[0]))
    _load_moments(model, optimizer, load_file(path / _FILES[1]))
    return int(state["step"])


def prune(folder: Path, *, keep_n: int, keep_every: int) -> None:
    """Remove all but the last `keep_n` checkpoints and those whose step is a multiple of `keep_every`."""
    for path in sorted(folder.glob("step_[0-9]*"))[:-keep_n]:
        if int(path.name.removeprefix("step_")) % keep_every:
            shutil.rmtree(path)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not (
            isinstance(state["step"], int) and set(_FILES) <= set(state["sha256"]) and state["agreement"] is not None
        ):
            raise ValueError("fields are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'state.json'}: not readable ({error}); remove {path} to go on from the one before"
        ) from None
    return state  # type: ignore[no-any-return]


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state by the parameter's name, which stays the same when parameters are grouped otherwise."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    return tensors


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (tensor := tensors.get(f"{key}.{name}")) is not None:
                optimizer.state[parameter][key] = tensor.to(parameter.device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
