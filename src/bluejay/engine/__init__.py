"""Requests in, tokens out."""

from bluejay.engine.llm import LLM, load
from bluejay.engine.request import FinishReason, GenerationEvent, RequestOutput, Score, SequenceOutput

__all__ = ["LLM", "FinishReason", "GenerationEvent", "RequestOutput", "Score", "SequenceOutput", "load"]
