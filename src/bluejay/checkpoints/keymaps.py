"""Name tables, data only: which keys of a checkpoint are weights, and what they are called elsewhere."""

from __future__ import annotations

import re

# Hugging Face's prefix for all but the head; a file saved from the bare GPTJModel or GPTNeoModel lacks it.
PREFIX = "transformer."
HEAD = "lm_head."
TIED_HEAD_WEIGHT = "lm_head.weight"
TIED_HEAD_SCALES = "lm_head.scales"  # where they are, the head is quantised and has weights of its own

# Kept in 16 bits where the layers are quantised; the first is the head's weight, too, where that is tied.
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")

# Attention masks and their fill value, which older versions of transformers saved with the weights; GPT-Neo's files
# have the masks of some layers only.
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

# What a model's authors recommend for sampling; whoever has it generates otherwise than whoever lacks it.
GENERATION_CONFIG = "generation_config.json"

# mesh-transformer-jax keeps its arrays without names, in the order of its parameter tree. Each row: the array's place
# in the tree, the key it becomes, and how the shards' parts make a whole: "rows" and "columns" are laid end to end
# along the first and the last axis, "sum" is added up, "first" is shard 0's (the others were never trained).
# Matrices are [in, out], transposed to what Hugging Face has; the embedding is [vocab, width] in both.
MESH_JAX_EMBEDDING = (
    ("embedding/b", "transformer.wte.bias", "sum"),  # Hugging Face has no such bias: it is added to every row
    ("embedding/w", "transformer.wte.weight", "rows"),
)
MESH_JAX_LAYER = (
    ("linear/w", "attn.q_proj.weight", "columns"),
    ("linear_1/w", "attn.v_proj.weight", "columns"),  # v before k
    ("linear_2/w", "attn.k_proj.weight", "columns"),
    ("linear_3/w", "attn.out_proj.weight", "rows"),
    ("linear_4/b", "mlp.fc_in.bias", "rows"),
    ("linear_4/w", "mlp.fc_in.weight", "columns"),
    ("linear_5/b", "mlp.fc_out.bias", "sum"),
    ("linear_5/w", "mlp.fc_out.weight", "rows"),
    ("replicated_layer_norm/offset", "ln_1.bias", "first"),
    ("replicated_layer_norm/scale", "ln_1.weight", "first"),
)
MESH_JAX_PROJECTION = (
    ("projection/linear/b", "lm_head.bias", "rows"),
    ("projection/linear/w", "lm_head.weight", "columns"),
    ("projection/replicated_layer_norm/offset", "transformer.ln_f.bias", "first"),
    ("projection/replicated_layer_norm/scale", "transformer.ln_f.weight", "first"),
)
