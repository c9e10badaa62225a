"""Open a model for a verb, with the settings applied and a sign of life on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bluejay.settings import load_settings

if TYPE_CHECKING:
    from bluejay.engine import LLM


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
        from bluejay.engine import LLM
        from bluejay.engine.threads import set_model_threads, set_torch_threads

        set_torch_threads(settings.threads)

        def show(done: int, total: int) -> None:
            status.update(f"{label}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

        llm = LLM(settings.model, dtype=settings.dtype, device=settings.device, on_progress=show, draft=draft)
    set_model_threads(llm, settings.threads, one_by_one=one_by_one)
    return llm
