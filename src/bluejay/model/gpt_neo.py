"""GPT-Neo: learned positions, blocks in sequence, global and local attention in turn, unscaled scores, a tied head.

Source: Black et al. 2021, gpt-neo; parameter names are Hugging Face's GPTNeoForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bluejay.model.attention import Attend
from bluejay.model.config import ModelConfig
from bluejay.model.layers import ACTIVATION, Embedding, Head, Linear


class SelfAttention(nn.Module):
    """Global, or local with a window, as the layer's number says; only the output projection has a bias.

    Shapes (H heads, K head dim): x [..., n_embd]; q, k, v [..., H, K] -> [..., n_embd].
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.window = config.window(layer)
        self.q_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.out_proj = Linear(config.n_embd, config.n_embd, bias=True)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        heads = (*x.shape[:-1], self.n_head, -1)
        q = self.q_proj(x).view(heads)
        k = self.k_proj(x).view(heads)
        v = self.v_proj(x).view(heads)
        # Scores are not divided by sqrt(head_dim): GPT-Neo was trained without.
        mixed = attend(self.layer, q, k, v, scale=1.0, window=self.window)
        return self.out_proj(mixed.flatten(-2))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Only a name: Hugging Face keeps the projections under `attn.attention`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config, layer)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        return self.attention(x, attend)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with biases around gelu_new: [..., n_embd] -> [..., inner_dim] -> [..., n_embd]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_dim)
        self.c_proj = Linear(config.inner_dim, config.n_embd)
        self.activation = ACTIVATION[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then MLP, each behind a LayerNorm of its own and added to what it read."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        # May write into its first argument, which nobody else must hold.
        self.add: Callable[[Tensor, Tensor], Tensor] = torch.add

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.add(self.attn(self.ln_1(x), attend), x)
        return self.add(self.mlp(self.ln_2(x)), x)


class Transformer(nn.Module):
    """Embeddings of tokens and of positions, blocks, last LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor]:
        """What the blocks read, [..., n_embd]."""
        return (self.wte(input_ids) + self.wpe(positions),)

    def blocks(self, x: Tensor, attend: Attend) -> Tensor:
        """All blocks and the last LayerNorm: [..., n_embd] -> [..., n_embd]."""
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return self.blocks(*self.embed(input_ids, positions), attend)


class GPTNeo(nn.Module):
    """The whole network; `state_dict()` has Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False, tied=config.tie_word_embeddings)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the last LayerNorm.

        Shapes: input_ids, positions [...] int64 (training [B, T]) -> [..., n_embd].
        """
        return self.transformer(input_ids, positions, attend)  # type: ignore[no-any-return]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., n_embd] -> [..., vocab_size] in float32."""
        return self.lm_head(hidden_states, self.transformer.wte.weight)  # type: ignore[no-any-return]
