import math
from pathlib import Path

import pytest
import torch

from bluejay.errors import InvalidRequest
from bluejay.evaluate.perplexity import perplexity, windows
from bluejay.model import CausalAttention
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.tokenizer import Tokenizer
from bluejay.tokenizer.training import train_bpe

TEXT = "the fox and the jay sang in the wood " * 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 280)


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 4, 2), (5, 4, 2), (6, 4, 1), (30, 8, 8), (31, 8, 3)])
def test_windows_score_each_target_once_with_enough_context(length: int, context: int, stride: int) -> None:
    scored = []
    for window, count in windows(torch.arange(length), context, stride):
        assert len(window) <= context + 1
        targets = window[1:].tolist()
        assert targets[-count] - window[0].item() > context - stride or window[0] == 0
        scored += targets[-count:]
    assert scored == list(range(1, length))


def test_a_short_text_costs_what_one_forward_says(tiny_model: GPTJ | GPTNeo, tokenizer: Tokenizer) -> None:
    text = "the fox sang"
    ids = torch.tensor([tokenizer.eos_token_id or 0, *tokenizer.encode(text)])
    with torch.inference_mode():
        hidden = tiny_model(ids[None, :-1], torch.arange(len(ids) - 1)[None], CausalAttention())
        logprobs = tiny_model.logits(hidden)[0].log_softmax(-1)
    nats = -float(logprobs[torch.arange(len(ids) - 1), ids[1:]].sum())
    found = perplexity(tiny_model, tokenizer, [text])
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 12, rel=1e-5)
    assert found.word_perplexity == pytest.approx(math.exp(nats / 3), rel=1e-5)


def test_documents_add_up(tiny_gptj: GPTJ, tokenizer: Tokenizer) -> None:
    both = perplexity(tiny_gptj, tokenizer, ["the fox", "the jay sang"])
    alone = [perplexity(tiny_gptj, tokenizer, [text]) for text in ("the fox", "the jay sang")]
    assert both.nats == pytest.approx(sum(one.nats for one in alone))
    assert both.num_documents == 2
    assert both.num_bytes == len("the foxthe jay sang")


def test_nothing_to_score_is_said(tiny_gptj: GPTJ, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no text"):
        perplexity(tiny_gptj, tokenizer, [""])
    with pytest.raises(InvalidRequest, match="stride is 0"):
        perplexity(tiny_gptj, tokenizer, ["x"], stride=0)


def test_the_default_model_keeps_its_promise() -> None:
    from bluejay.engine import LLM
    from bluejay.train.data import documents

    text = Path(__file__).parents[3] / "shared" / "data" / "stories" / "children_valid.txt"
    if not text.is_file():
        pytest.skip("../shared/data/stories/children_valid.txt is not there")
    llm = LLM()
    sample = list(documents(text))[:3]
    assert perplexity(llm.model, llm.tokenizer, sample).bits_per_byte < 1.6  # the whole file: see the model card
