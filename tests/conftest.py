"""What every test stands on: no network, a home of its own, one thread, and two tiny models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

# huggingface_hub reads these when it is imported, so they are set before anything else is.
_HOME = tempfile.TemporaryDirectory(prefix="bluejay-tests-")
os.environ.update(BLUEJAY_HOME=_HOME.name, HF_HOME=_HOME.name, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import torch  # noqa: E402

from bluejay.model import ModelConfig, build  # noqa: E402
from bluejay.model.gpt_neo import GPTNeo  # noqa: E402
from bluejay.model.gptj import GPTJ  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings

Model = GPTJ | GPTNeo

TINY_GPTJ = ModelConfig(
    model_type="gptj",
    vocab_size=300,
    n_positions=128,
    n_embd=32,
    n_layer=2,
    n_head=2,
    rotary_dim=8,
    bos_token_id=0,
    eos_token_id=0,
)
TINY_GPT_NEO = ModelConfig(
    model_type="gpt_neo",
    vocab_size=300,
    n_positions=128,
    n_embd=32,
    n_layer=2,
    n_head=2,
    attention_layers=("global", "local"),
    window_size=8,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def pytest_unconfigure() -> None:
    _HOME.cleanup()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """Build a config's network with seeded weights of such a size that every part of it is felt in the logits."""

    def make(config: ModelConfig, seed: int = 0) -> Model:
        model = build(config, device="meta").to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wte" not in name:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
            else:
                mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
                torch.nn.init.normal_(weight, mean, std=0.3, generator=generator)
        return model.eval()

    return make


@pytest.fixture
def tiny_gptj(make_model: Callable[..., Model]) -> Model:
    return make_model(TINY_GPTJ)


@pytest.fixture
def tiny_gpt_neo(make_model: Callable[..., Model]) -> Model:
    return make_model(TINY_GPT_NEO)


@pytest.fixture(params=["gptj", "gpt_neo"])
def tiny_model(request: pytest.FixtureRequest) -> Model:
    """Each family in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")
