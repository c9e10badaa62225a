"""Text to token ids and back: byte-level BPE, as GPT-2, GPT-J and GPT-Neo use it."""

from bluejay.tokenizer.byte_level import Tokenizer
from bluejay.tokenizer.loading import load_tokenizer
from bluejay.tokenizer.stream import TextStream
from bluejay.tokenizer.training import train_bpe

__all__ = ["TextStream", "Tokenizer", "load_tokenizer", "train_bpe"]
