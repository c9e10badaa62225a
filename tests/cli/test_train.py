from pathlib import Path

from typer.testing import CliRunner

from bluejay.cli import app
from bluejay.errors import ConfigError

RECIPE = """
output_dir = "run"
[tokenizer]
vocab_size = 280
[model]
model_type = "gpt_neo"
vocab_size = 280
max_position_embeddings = 16
hidden_size = 8
num_layers = 2
num_heads = 2
attention_types = [[["global", "local"], 1]]
window_size = 4
[data]
train = ["stories.txt"]
validation = "stories.txt"
[recipe]
seq = 16
per_replica_batch = 2
total_steps = 2
"""


def test_train_then_generate_then_measure(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("The fox sang.<|endoftext|>" * 40)
    (tmp_path / "recipe.toml").write_text(RECIPE)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout + done.stderr

    said = run("train", str(tmp_path / "recipe.toml"), "--device", "cpu")
    assert "parameters on cpu" in said and "bits per byte" in said and "bluejay generate --model" in said
    assert (tmp_path / "run" / "loss.png").is_file()
    run("train", str(tmp_path / "recipe.toml"), "--fresh")
    model = str(tmp_path / "run" / "model")
    assert "The" in run("generate", "The", "--model", model, "--greedy")
    assert "bits_per_byte" in run("perplexity", str(tmp_path / "stories.txt"), "--model", model)


def test_a_wrong_device_is_said_before_an_old_run_is_removed(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("The fox sang.<|endoftext|>" * 40)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    old = tmp_path / "run" / "checkpoints" / "step_00000001"
    old.mkdir(parents=True)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.toml"), "--fresh", "--device", "cuda:77"])
    assert isinstance(done.exception, ConfigError)
    assert old.is_dir()


def test_settings_reach_the_run(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("The fox sang.<|endoftext|>" * 40)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.toml")], env={"BLUEJAY_DEVICE": "cuda:77"})
    assert isinstance(done.exception, ConfigError)
    assert "cuda:77" in str(done.exception)
