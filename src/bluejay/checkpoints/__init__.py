"""Bytes on disk to a `state_dict` and back."""

from bluejay.checkpoints.formats import Checkpoint, TensorInfo, open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
