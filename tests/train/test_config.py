from collections.abc import Callable
from pathlib import Path

import pytest

from bluejay.errors import ConfigError
from bluejay.train.config import load_config


def test_paths_are_relative_to_the_recipe(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(recipe())
    assert config.output_dir == tmp_path / "run"
    assert config.data.train[0].file == tmp_path / "stories.txt"
    assert config.recipe.tokens_per_step == 32
    assert config.recipe.annealing == 6


def test_flags_replace_the_folders(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "stories.txt").rename(tmp_path / "elsewhere" / "stories.txt")
    config = load_config(path, output_dir=tmp_path / "out", data_dir=tmp_path / "elsewhere")
    assert config.output_dir == tmp_path / "out"
    assert config.data.validation == tmp_path / "elsewhere" / "stories.txt"


def test_everything_wrong_is_said_at_once(recipe: Callable[..., Path]) -> None:
    path = recipe()
    text = path.read_text()
    text = (
        text.replace("lr = 1e-2", 'lr = "fast"')
        .replace("seq = 16", "sequence = 16")
        .replace("n_head = 2", "n_head = 3")
    )
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in ("recipe.toml", "unknown key recipe.sequence", "missing recipe.seq", "recipe.lr is 'fast'", "n_head"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (("total_steps = 8", "total_steps = 0"), "total_steps is 0"),
        (("seq = 16", "seq = 64"), "longer than n_positions 32"),
        (("warmup_steps = 2", "beta2 = 1.5"), "beta2 is 1.5"),
        (("warmup_steps = 2", "warmup_steps = true"), "warmup_steps is True"),
        (("vocab_size = 300", "vocab_size = 400"), "larger than the model's vocab_size"),
        (('dtype = "float32"', 'dtype = "int7"'), "int7"),
        (('train = ["stories.txt"]', 'train = ["gone.txt"]'), "gone.txt: no such file"),
        (('train = ["stories.txt"]', 'train = [{ file = "stories.txt", repeat = 0 }]'), "repeat is 0"),
        (('train = ["stories.txt"]', "train = []"), "must be a list of files"),
        (("seed = 3", 'seed = 3\ntune_model_path = "x"'), "either"),
        (("seed = 3", "seed = -1"), "seed is -1"),
        (("lr = 1e-2", "lr = inf"), "lr is inf"),
        (("rotary_dim = 4", "rotary_dim = 4\nn_iner = 9"), "unknown key model.n_iner"),
        (("[tokenizer]\nvocab_size = 300", ""), "either tokenizer.vocab_size"),
    ],
)
def test_a_wrong_value_is_named(recipe: Callable[..., Path], replace: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(replace=replace))


def test_a_preset_is_a_model(recipe: Callable[..., Path]) -> None:
    path = recipe()
    text = path.read_text()
    start, end = text.index("[model]"), text.index("[data]")
    path.write_text(text[:start] + '[model]\npreset = "gpt-neo-125m"\n' + text[end:])
    config = load_config(path)
    assert config.model is not None and config.model.n_layer == 12
