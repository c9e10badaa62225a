"""GPT-J: one LayerNorm per block, attention and MLP side by side, rotary positions, an untied head with a bias.

Source: Wang and Komatsuzaki 2021, mesh-transformer-jax (layers.py); parameter names are Hugging Face's GPTJForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bluejay.model.attention import Attend
from bluejay.model.config import ModelConfig
from bluejay.model.layers import ACTIVATION, Embedding, Head, Linear, rotary_turns, rotate


class Attention(nn.Module):
    """Queries and keys are turned by their positions, then met by `attend`; no biases.

    Shapes (H heads, K head dim): x [..., n_embd]; q, k, v [..., H, K] -> [..., n_embd].
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.rotate: Callable[[Tensor, Tensor], Tensor] = rotate
        self.scale = 1 / math.sqrt(config.head_dim)
        self.q_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.out_proj = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        heads = (*x.shape[:-1], self.n_head, -1)
        q = self.rotate(self.q_proj(x).view(heads), turns)
        k = self.rotate(self.k_proj(x).view(heads), turns)
        v = self.v_proj(x).view(heads)
        mixed = attend(self.layer, q, k, v, scale=self.scale, window=None)
        return self.out_proj(mixed.flatten(-2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with biases around gelu_new: [..., n_embd] -> [..., inner_dim] -> [..., n_embd]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc_in = Linear(config.n_embd, config.inner_dim)
        self.fc_out = Linear(config.inner_dim, config.n_embd)
        self.activation = ACTIVATION[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(self.activation(self.fc_in(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(h) + mlp(h), both reading the same h = LayerNorm(x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        # May write into its first argument, which nobody else must hold.
        self.add: Callable[[Tensor, Tensor], Tensor] = torch.add

    def forward(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        h = self.ln_1(x)
        return self.add(self.add(self.attn(h, turns, attend), x), self.mlp(h))


class Transformer(nn.Module):
    """Embedding, blocks, last LayerNorm; the turns of the positions are computed once for all blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.rotary_dim = config.rotated_dims

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks read: [..., n_embd], and the turns of the positions."""
        return self.wte(input_ids), rotary_turns(positions, self.rotary_dim)

    def blocks(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """All blocks and the last LayerNorm: [..., n_embd] -> [..., n_embd]."""
        for block in self.h:
            x = block(x, turns, attend)
        return self.ln_f(x)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return self.blocks(*self.embed(input_ids, positions), attend)


class GPTJ(nn.Module):
    """The whole network; `state_dict()` has Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=True, tied=config.tie_word_embeddings)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the last LayerNorm.

        Shapes: input_ids, positions [...] int64 (training [B, T]) -> [..., n_embd].
        """
        return self.transformer(input_ids, positions, attend)  # type: ignore[no-any-return]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., n_embd] -> [..., vocab_size] in float32."""
        return self.lm_head(hidden_states, self.transformer.wte.weight)  # type: ignore[no-any-return]
