import math

import pytest
import torch

from bluejay.model import ModelConfig, build
from bluejay.train.config import Recipe
from bluejay.train.optim import initialise, learning_rate, make_optimizer

SHAPE = ModelConfig("gptj", vocab_size=500, n_positions=16, n_embd=64, n_layer=2, n_head=2, rotary_dim=8)
NEO = ModelConfig(
    "gpt_neo", 500, 16, 64, 2, 2, attention_layers=("global", "local"), tie_word_embeddings=True, initializer_range=0.05
)


def _recipe(**changes: float) -> Recipe:
    return Recipe(total_steps=100, seq=8, per_replica_batch=1, **changes)  # type: ignore[arg-type]


def test_learning_rate_follows_the_schedule_of_gptj() -> None:
    recipe = _recipe(warmup_steps=10, anneal_steps=80, lr=1.0, end_lr=0.1)
    assert learning_rate(0, recipe) == pytest.approx(0.1)
    assert learning_rate(9, recipe) == pytest.approx(1.0)
    assert learning_rate(9 + 40, recipe) == pytest.approx(0.55)
    assert learning_rate(9 + 80, recipe) == pytest.approx(0.1)
    assert learning_rate(99, recipe) == pytest.approx(0.1)


def test_without_anneal_steps_the_last_step_has_the_last_rate() -> None:
    recipe = _recipe(warmup_steps=10, lr=1.0, end_lr=0.1)
    assert learning_rate(99, recipe) == pytest.approx(0.1)
    assert learning_rate(98, recipe) > 0.1


def test_only_matrices_decay() -> None:
    groups = make_optimizer(build(SHAPE), _recipe(weight_decay=0.3)).param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_gptj_starts_with_the_spreads_of_mesh_transformer_jax() -> None:
    model = build(SHAPE)
    initialise(model, SHAPE, torch.Generator().manual_seed(1))
    weights = dict(model.named_parameters())
    # A normal cut at two deviations has 0.88 of the deviation.
    expected = {
        "transformer.wte.weight": 1 / math.sqrt(500),
        "transformer.h.0.attn.q_proj.weight": 1 / math.sqrt(64),
        "transformer.h.1.mlp.fc_out.weight": 2 / 2 / math.sqrt(64),
        "lm_head.weight": 1 / math.sqrt(64),
    }
    for name, std in expected.items():
        assert float(weights[name].detach().std()) == pytest.approx(0.88 * std, rel=0.05), name
    assert bool((weights["transformer.ln_f.weight"] == 1).all())
    assert not bool(weights["lm_head.bias"].any())


def test_gpt_neo_starts_with_its_initializer_range() -> None:
    model = build(NEO)
    initialise(model, NEO, torch.Generator().manual_seed(1))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    assert [float(p.detach().std()) for p in matrices] == pytest.approx([0.05] * len(matrices), rel=0.1)


def test_the_seed_decides_the_weights() -> None:
    models = [build(SHAPE) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, SHAPE, torch.Generator().manual_seed(seed))
    one, same, other = (model.state_dict()["lm_head.weight"] for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
