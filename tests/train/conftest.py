from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

STORIES = [
    "Once upon a time a fox met a jay in the wood.",
    "The jay sang to the fox, and the fox sat down to hear the song.",
    "A little girl went to the wood to find the fox and the jay.",
]

RECIPE = """
output_dir = "run"
seed = 3
[tokenizer]
vocab_size = 300
[model]
model_type = "gptj"
vocab_size = 304
n_positions = 32
n_embd = 16
n_layer = 2
n_head = 2
rotary_dim = 4
[data]
train = ["stories.txt"]
validation = "stories.txt"
[recipe]
seq = 16
per_replica_batch = 2
total_steps = {steps}
warmup_steps = 2
lr = 1e-2
end_lr = 1e-3
val_every = 4
ckpt_every = 4
dtype = "float32"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small corpus and a recipe beside it; returns the recipe's path."""

    def write(*, steps: int = 8, replace: tuple[str, str] | None = None, name: str = "recipe.toml") -> Path:
        (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES * 20), encoding="utf-8")
        text = RECIPE.format(steps=steps)
        if replace is not None:
            assert replace[0] in text
            text = text.replace(*replace)
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
