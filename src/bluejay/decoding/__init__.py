"""From logits to tokens, purely: options, processors, sampling, beams, and when an answer ends."""

from bluejay.decoding.logprobs import TokenLogprobs
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.stopping import FinishReason

__all__ = ["FinishReason", "SamplingParams", "TokenLogprobs"]
