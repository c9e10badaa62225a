"""Learn a byte-level BPE vocabulary from text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import models, pre_tokenizers, trainers

from bluejay.errors import ConfigError
from bluejay.tokenizer.byte_level import Tokenizer, byte_level_backend


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ("<|endoftext|>",)) -> Tokenizer:
    """Learn merges by counting pairs, with GPT-2's split into words.

    The result depends on the texts and not on their order, nor on the number of threads. Special tokens take the first
    ids, then come the 256 bytes, then the merges. A small corpus may have fewer pairs than asked for: see
    `Tokenizer.vocab_size`.

    Args:
        texts: the corpus, in pieces of any length; words never span two pieces.
        vocab_size: tokens to learn, special tokens and bytes included.
        special_tokens: tokens that no text is split into; the first ends a text.
    Raises: ConfigError if `vocab_size` has no room for the bytes and special tokens.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size is {vocab_size}; {len(alphabet)} bytes and {len(special_tokens)} special tokens "
            f"need {smallest}"
        )
    backend = byte_level_backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once says nothing of the language
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(backend, eos_token=special_tokens[0] if special_tokens else None)
