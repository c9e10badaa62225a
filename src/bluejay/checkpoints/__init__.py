"""Bytes on disk to a `state_dict` and back."""

from bluejay.checkpoints.convert import convert
from bluejay.checkpoints.formats import Checkpoint, TensorInfo, open_checkpoint
from bluejay.checkpoints.inspection import Inspection, inspect
from bluejay.checkpoints.load import load_model
from bluejay.checkpoints.quantized import DequantizedCheckpoint, QuantizingCheckpoint
from bluejay.checkpoints.save import copy_tokenizer_files, save

__all__ = [
    "Checkpoint",
    "DequantizedCheckpoint",
    "Inspection",
    "QuantizingCheckpoint",
    "TensorInfo",
    "convert",
    "copy_tokenizer_files",
    "inspect",
    "load_model",
    "open_checkpoint",
    "save",
]
