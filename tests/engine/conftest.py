from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bluejay.checkpoints import save
from bluejay.engine import LLM
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.tokenizer.training import train_bpe

TEXT = "the fox and the jay sang in the wood, and the owl heard them. "


@pytest.fixture
def model_dir(tmp_path: Path, tiny_gptj: GPTJ) -> Path:
    """A checkpoint with weights, config and a tokenizer that knows fewer ids than the embedding has rows."""
    target = tmp_path / "tiny"
    save(tiny_gptj, tiny_gptj.config, target)
    train_bpe([TEXT] * 4, 280).save(target)
    return target


@pytest.fixture
def llm(model_dir: Path) -> LLM:
    return LLM(model_dir)


@pytest.fixture
def llm_of(tmp_path: Path) -> Callable[[GPTJ | GPTNeo], LLM]:
    def make(model: GPTJ | GPTNeo) -> LLM:
        target = tmp_path / model.config.model_type
        save(model, model.config, target)
        train_bpe([TEXT] * 4, 280).save(target)
        return LLM(target)

    return make
