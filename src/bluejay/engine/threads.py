"""How many threads a model gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bluejay import ops
from bluejay.model import num_parameters
from bluejay.ops.threads import processors

if TYPE_CHECKING:
    from bluejay.engine.llm import LLM

# A token of a small model is a hundred operations of some 20 microseconds. A second thread brings nothing, and on a
# busy machine the two wait for each other: 127 tokens/s with one, 15 with two, while both cores had other work.
SMALL_MODEL_PARAMETERS = 50_000_000


def set_torch_threads(setting: int) -> None:
    """Give PyTorch the threads that were asked for; else no more than a CPU quota, which it does not ask for itself."""
    there = torch.get_num_threads()
    if (wanted := setting or min(there, processors().threads)) != there:
        torch.set_num_threads(wanted)


def set_model_threads(llm: LLM, setting: int, *, one_by_one: bool) -> None:
    """What an opened model changes about that.

    Args:
        setting: the threads that were asked for; 0 if nobody said.
        one_by_one: tokens will be read singly, or a few at a time; a small model on the CPU then gets one thread.
    """
    small = one_by_one and num_parameters(llm.config) < SMALL_MODEL_PARAMETERS and llm.device.type == "cpu"
    if llm.engine.network.by_kernels:  # PyTorch has one thread now, the kernels have their own
        ops.set_num_threads(setting or (1 if small else ops.num_threads()))
    elif small and not setting:
        torch.set_num_threads(1)
