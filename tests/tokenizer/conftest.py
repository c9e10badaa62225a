from pathlib import Path

import pytest

from bluejay.tokenizer import Tokenizer, load_tokenizer, train_bpe

GPT2_FILES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gpt2-bpe"

CORPUS = [
    "Once upon a time there was a little bird who lived in a tall tree.\n",
    "The bird sang every morning, and the tree liked to hear the bird sing.\n",
    "“Good morning, tree!” sang the bird. Il était une fois un arbre. 昔々、一本の木がありました。\n",
]


@pytest.fixture(scope="session")
def gpt2_files() -> Path:
    if not GPT2_FILES.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not at {GPT2_FILES}")
    return GPT2_FILES


@pytest.fixture(scope="session")
def gpt2(gpt2_files: Path) -> Tokenizer:
    return load_tokenizer(gpt2_files)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def small(corpus: list[str]) -> Tokenizer:
    """280 tokens: the end of text, 256 bytes, 23 merges."""
    return train_bpe(corpus, 280)
