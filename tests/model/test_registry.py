from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bluejay.model import FAMILIES, PRESETS, CausalAttention, build, num_parameters
from bluejay.model.attention import window_mask


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt-j-6b", 6_050_882_784),
        ("gpt-neo-125m", 125_198_592),
        ("gpt-neo-1.3b", 1_315_575_808),
        ("gpt-neo-2.7b", 2_651_307_520),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(preset, parameters):
    assert num_parameters(PRESETS[preset]) == parameters


def test_each_family_is_built_by_its_own_file():
    for name, family in FAMILIES.items():
        assert family.__module__ == f"bluejay.model.{name}"
        assert {config.model_type for config in PRESETS.values()} >= {name}


def test_gptj_has_hugging_faces_names():
    config = replace(PRESETS["gpt-j-6b"], n_layer=1)
    shapes = {name: tuple(weight.shape) for name, weight in build(config, device="meta").state_dict().items()}
    block = "transformer.h.0."
    square = {f"{block}attn.{name}_proj.weight": (4096, 4096) for name in ("q", "k", "v", "out")}
    assert shapes == square | {
        "transformer.wte.weight": (50400, 4096),
        f"{block}ln_1.weight": (4096,),
        f"{block}ln_1.bias": (4096,),
        f"{block}mlp.fc_in.weight": (16384, 4096),
        f"{block}mlp.fc_in.bias": (16384,),
        f"{block}mlp.fc_out.weight": (4096, 16384),
        f"{block}mlp.fc_out.bias": (4096,),
        "transformer.ln_f.weight": (4096,),
        "transformer.ln_f.bias": (4096,),
        "lm_head.weight": (50400, 4096),
        "lm_head.bias": (50400,),
    }


def test_gpt_neo_has_hugging_faces_names():
    config = replace(PRESETS["gpt-neo-125m"], n_layer=1, attention_layers=("global",))
    shapes = {name: tuple(weight.shape) for name, weight in build(config, device="meta").state_dict().items()}
    block = "transformer.h.0."
    square = {f"{block}attn.attention.{name}_proj.weight": (768, 768) for name in ("q", "k", "v", "out")}
    norms = {f"{block}ln_{i}.{name}": (768,) for i in (1, 2) for name in ("weight", "bias")}
    assert shapes == square | norms | {
        "transformer.wte.weight": (50257, 768),
        "transformer.wpe.weight": (2048, 768),
        f"{block}attn.attention.out_proj.bias": (768,),
        f"{block}mlp.c_fc.weight": (3072, 768),
        f"{block}mlp.c_fc.bias": (3072,),
        f"{block}mlp.c_proj.weight": (768, 3072),
        f"{block}mlp.c_proj.bias": (768,),
        "transformer.ln_f.weight": (768,),
        "transformer.ln_f.bias": (768,),
    }


class RememberingAttention:
    """Keeps every key and value it is given: one row, tokens fed in pieces."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        if layer in self.seen:
            old_k, old_v = self.seen[layer]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self.seen[layer] = k, v
        scores = torch.einsum("thk,jhk->htj", q.float(), k.float()) * scale
        positions = torch.arange(len(k) - len(q), len(k))
        scores = scores.masked_fill(~window_mask(positions, len(k), window), -torch.inf)
        return torch.einsum("htj,jhk->thk", scores.softmax(-1), v.float()).to(q.dtype)


@pytest.mark.parametrize("pieces", [[1] * 20, [13, 1, 1, 5]])
@torch.no_grad()
def test_tokens_in_pieces_give_the_logits_of_the_whole(tiny_model, pieces):
    tokens = torch.randint(300, (20,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20)
    whole = tiny_model.logits(tiny_model(tokens[None], positions[None], CausalAttention()))[0]
    attend = RememberingAttention()
    stepwise = [
        tiny_model.logits(tiny_model(piece, where, attend))
        for piece, where in zip(tokens.split(pieces), positions.split(pieces), strict=True)
    ]
    torch.testing.assert_close(torch.cat(stepwise), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_does_not_feel_its_neighbour_or_its_padding(tiny_model):
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, 12)
    together = tiny_model(tokens, positions, CausalAttention())[0, :7]
    alone = tiny_model(tokens[:1, :7], positions[:1, :7], CausalAttention())[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close_to_float32(tiny_model, dtype):
    tokens = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16)[None]
    exact = tiny_model.logits(tiny_model(tokens, positions, CausalAttention()))
    tiny_model.to(dtype)
    hidden_states = tiny_model(tokens, positions, CausalAttention())
    logits = tiny_model.logits(hidden_states)
    assert hidden_states.dtype == dtype
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_every_weight_gets_a_gradient(tiny_model):
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, 12)
    tiny_model.logits(tiny_model(tokens, positions, CausalAttention())).logsumexp(-1).mean().backward()
    assert [
        name for name, weight in tiny_model.named_parameters() if weight.grad is None or not weight.grad.any()
    ] == []
