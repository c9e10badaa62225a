"""The models of the package: whole, small, and saying something."""

import re

import pytest
import torch

from bluejay import LLM, SamplingParams
from bluejay.checkpoints import hub
from bluejay.checkpoints.hub_cache import DEFAULT_MODEL_DIR
from bluejay.model import num_parameters

STORY = SamplingParams(max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, seed=1)


def test_all_files_together_take_at_most_40_mb() -> None:
    assert sum(path.stat().st_size for path in DEFAULT_MODEL_DIR.rglob("*") if path.is_file()) <= 40e6


@pytest.mark.parametrize("name", ["default", "default-draft"])
def test_files_are_those_that_were_committed(name: str) -> None:
    found = hub.verify(name)
    assert found.damaged == ()
    assert found.num_checked >= 6


@pytest.mark.parametrize("name", ["default", "default-draft"])
def test_a_story_is_words_of_english(name: str) -> None:
    text = LLM(name).generate("Once upon a time there was a little", STORY)[0].text
    words = [word.strip('.,;:!?"').lower() for word in text.split()]
    common = set(re.findall(r"\w+", "a and the to was he she it in of that had they his her you i with for on as at"))
    assert len(words) > 25
    assert sum(word in common for word in words) > 0.25 * len(words)


def test_model_and_draft_share_a_vocabulary_and_a_context() -> None:
    model, draft = LLM(), LLM("default-draft")
    assert model.tokenizer.fingerprint() == draft.tokenizer.fingerprint()
    assert (model.config.vocab_size, model.config.n_positions) == (draft.config.vocab_size, draft.config.n_positions)
    assert model.config.n_positions >= 1024
    assert num_parameters(draft.config) * 4 < num_parameters(model.config)
    assert model.dtype == torch.float32  # float16 on disk
