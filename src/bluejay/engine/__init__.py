"""Requests in, tokens out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bluejay.engine.request import FinishReason, GenerationEvent, RequestOutput, Score, SequenceOutput

if TYPE_CHECKING:
    from bluejay.engine.llm import LLM, load

__all__ = ["LLM", "FinishReason", "GenerationEvent", "RequestOutput", "Score", "SequenceOutput", "load"]


def __getattr__(name: str) -> Any:
    # These two need torch; what a server holds of an engine in another process does without.
    if name in ("LLM", "load"):
        from bluejay.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
