"""What quantising the default model costs: bits per byte, at most 0.1 % more with 8 bits and 3 % more with 4."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bluejay.engine import LLM
from bluejay.evaluate.perplexity import perplexity
from bluejay.train.data import documents

DATA = Path(__file__).parents[3] / "shared" / "data"
TEXTS = {"stories": DATA / "stories" / "children_valid.txt", "wikitext2": DATA / "wikitext2" / "wiki.test.raw"}
MOST = {"int8": 1.001, "int4": 1.03}

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the texts of ../shared/data are not here")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits_per_byte(texts: list[str], dtype: str) -> float:
    llm = LLM(dtype=dtype)
    return perplexity(llm.model, llm.tokenizer, texts).bits_per_byte


def beginnings(path: Path, num_chars: int, at_most: int) -> list[str]:
    """Cut documents from all over a text."""
    found = list(documents(path))
    return [text[:num_chars] for text in found[:: max(1, len(found) // at_most)]][:at_most]


# A part is noisier than the whole: 8 bits get twice the room.
@pytest.mark.parametrize(("dtype", "most"), [("int8", 1.002), ("int4", MOST["int4"])])
@pytest.mark.parametrize("name", TEXTS)
def test_quantising_costs_little_on_a_part(name: str, dtype: str, most: float) -> None:
    texts = beginnings(TEXTS[name], 2000, 10)
    assert bits_per_byte(texts, dtype) <= most * bits_per_byte(texts, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_quantising_costs_little(name: str) -> None:
    texts = list(documents(TEXTS[name]))
    floats = bits_per_byte(texts, "float32")
    for dtype, most in MOST.items():
        assert bits_per_byte(texts, dtype) <= most * floats, dtype
