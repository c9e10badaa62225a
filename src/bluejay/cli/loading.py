"""Open a model for a verb, with the settings applied and a sign of life on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bluejay.settings import load_settings

if TYPE_CHECKING:
    from bluejay.engine import LLM

# A token of a small model is a hundred operations of some 20 microseconds. A second thread brings nothing, and on a
# busy machine the two wait for each other: 127 tokens/s with one, 15 with two, while both cores had other work.
SMALL_MODEL_PARAMETERS = 50_000_000


def open_llm(
    model: str | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    one_by_one: bool = False,
    draft: str | None = None,
) -> LLM:
    """Open the model that flags, environment or settings file name; shows how far the weights are.

    Args:
        one_by_one: tokens will be read singly; a small model on the CPU then gets one thread, if nobody says otherwise.
        draft: as `LLM`.
    """
    settings = load_settings({"model": model, "dtype": dtype, "device": device, "threads": threads})
    from rich.console import Console
    from rich.markup import escape

    label = escape(f"loading {settings.model}")
    with Console(stderr=True).status(label) as status:
        import torch

        from bluejay import ops
        from bluejay.engine import LLM
        from bluejay.model import num_parameters
        from bluejay.model.quantized import is_quantized

        set_torch_threads(settings.threads)

        def show(done: int, total: int) -> None:
            status.update(f"{label}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

        llm = LLM(settings.model, dtype=settings.dtype, device=settings.device, on_progress=show, draft=draft)
    small = one_by_one and num_parameters(llm.config) < SMALL_MODEL_PARAMETERS and llm.device.type == "cpu"
    if is_quantized(llm.model):  # PyTorch has one thread now, the kernels have their own
        ops.set_num_threads(settings.threads or (1 if small else ops.num_threads()))
    elif small and not settings.threads:
        torch.set_num_threads(1)
    return llm


def set_torch_threads(setting: int) -> None:
    """Give PyTorch the threads that were asked for; else no more than a CPU quota, which it does not ask for itself."""
    import torch

    from bluejay.ops.threads import processors

    there = torch.get_num_threads()
    if (wanted := setting or min(there, processors().threads)) != there:
        torch.set_num_threads(wanted)
