"""From logits to tokens, purely: options, processors, sampling, beams, and when an answer ends."""

from bluejay.decoding.params import SamplingParams
from bluejay.decoding.sampler import TokenLogprobs
from bluejay.decoding.stopping import FinishReason

__all__ = ["FinishReason", "SamplingParams", "TokenLogprobs"]
