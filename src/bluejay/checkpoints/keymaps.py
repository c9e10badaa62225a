"""Name tables, data only: which keys of a checkpoint are weights, and what they are called elsewhere."""

from __future__ import annotations

import re

# Hugging Face's prefix for all but the head; a file saved from the bare GPTJModel or GPTNeoModel lacks it.
PREFIX = "transformer."
HEAD = "lm_head."
TIED_HEAD_WEIGHT = "lm_head.weight"

# Attention masks and their fill value, which transformers before 4.28 saved with the weights; GPT-Neo saved them for
# some of its layers only.
LEGACY_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(attention\.)?(masked_)?bias")

# Everything that a tokenizer may be read from, OpenAI's names for GPT-2's files included.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)
