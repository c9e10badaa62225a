import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bluejay.checkpoints import load_model
from bluejay.errors import CheckpointError, ConfigError
from bluejay.train import loop
from bluejay.train.config import load_config
from bluejay.train.loop import train


def _events() -> tuple[list[loop.Event], loop.Observer]:
    seen: list[loop.Event] = []
    return seen, seen.append


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_learns_and_leaves_a_model_that_opens(recipe: Callable[..., Path], tmp_path: Path) -> None:
    seen, observe = _events()
    target = train(load_config(recipe(steps=40)), observe, device="cpu")
    losses = [event.loss for event in seen if isinstance(event, loop.Stepped)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert load_model(target).config.eos_token_id == 0
    assert {"tokenizer.json", "vocab.json", "merges.txt", "config.json"} <= {path.name for path in target.iterdir()}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [event.model_path for event in seen if isinstance(event, loop.Finished)] == [target]


def test_an_interrupted_run_ends_in_the_same_weights(recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole = train(load_config(recipe(), output_dir=tmp_path / "whole"), lambda _: None, device="cpu")

    def interrupt(event: loop.Event) -> None:
        if isinstance(event, loop.Stepped) and event.step == 5:
            signal.raise_signal(signal.SIGINT)

    config = load_config(recipe(), output_dir=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt, device="cpu")
    resumed = train(config, lambda _: None, resume=True, device="cpu")
    expected, actual = _weights(whole), _weights(resumed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_metrics_hold_each_step_once_after_a_resume(recipe: Callable[..., Path], tmp_path: Path) -> None:
    def crash(event: loop.Event) -> None:
        if isinstance(event, loop.Stepped) and event.step == 7:
            raise RuntimeError("power cut")

    config = load_config(recipe())
    with pytest.raises(RuntimeError):
        train(config, crash, device="cpu")
    train(config, lambda _: None, resume=True, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [4, 8]


def test_accumulating_gradients_equals_one_large_batch(recipe: Callable[..., Path], tmp_path: Path) -> None:
    large = load_config(
        recipe(replace=("per_replica_batch = 2", "per_replica_batch = 4")), output_dir=tmp_path / "large"
    )
    parts = load_config(
        recipe(replace=("per_replica_batch = 2", "per_replica_batch = 2\ngradient_accumulation_steps = 2")),
        output_dir=tmp_path / "parts",
    )
    expected = _weights(train(large, lambda _: None, device="cpu"))
    actual = _weights(train(parts, lambda _: None, device="cpu"))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)


def test_a_run_is_never_overwritten_by_accident(recipe: Callable[..., Path]) -> None:
    config = load_config(recipe())
    with pytest.raises(ConfigError, match="no checkpoint to resume"):
        train(config, lambda _: None, resume=True, device="cpu")
    train(config, lambda _: None, device="cpu")
    with pytest.raises(ConfigError, match="--resume"):
        train(config, lambda _: None, device="cpu")
    loop.start_over(config)
    train(config, lambda _: None, device="cpu")


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(recipe())
    train(config, lambda _: None, device="cpu")
    weights = tmp_path / "run" / "checkpoints" / "step_00000008" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"step_00000008/model\.safetensors.*damaged"):
        train(config, lambda _: None, resume=True, device="cpu")


def test_a_resumed_run_must_be_the_same_run(recipe: Callable[..., Path]) -> None:
    train(load_config(recipe()), lambda _: None, device="cpu")
    other = load_config(recipe(replace=("seed = 3", "seed = 4")))
    with pytest.raises(CheckpointError, match="seed was 3 and is 4"):
        train(other, lambda _: None, resume=True, device="cpu")


def test_a_resumed_run_must_read_the_same_texts(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(recipe())
    train(config, lambda _: None, device="cpu")
    texts = (tmp_path / "stories.txt").read_text()
    (tmp_path / "stories.txt").write_text(texts.replace("fox", "cat", 1))
    with pytest.raises(CheckpointError, match=r"texts was .*stories\.txt-"):
        train(config, lambda _: None, resume=True, device="cpu")


def test_old_checkpoints_go_and_milestones_stay(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(recipe(replace=("ckpt_every = 4", "ckpt_every = 1\nkeep_n = 2\nkeep_every = 3")))
    train(config, lambda _: None, device="cpu")
    kept = sorted(path.name[-2:] for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["03", "06", "07", "08"]


def test_fine_tuning_goes_on_from_a_model(recipe: Callable[..., Path], tmp_path: Path) -> None:
    first = train(load_config(recipe(steps=30)), lambda _: None, device="cpu")
    path = recipe(name="tune.toml")
    text = path.read_text()
    start, end = text.index("[tokenizer]"), text.index("[data]")
    text = f'tune_model_path = "{first}"\n' + text[:start].replace('"run"', '"tuned"') + text[end:]
    path.write_text(text)
    seen, observe = _events()
    tuned = train(load_config(path), observe, device="cpu")
    losses = [event.loss for event in seen if isinstance(event, loop.Stepped)]
    assert losses[0] < 4.5  # a new network starts near log(304) = 5.7
    assert (tuned / "tokenizer.json").is_file()
    assert not torch.equal(_weights(first)["lm_head.weight"], _weights(tuned)["lm_head.weight"])


def test_bits_per_byte_agrees_with_its_definition(recipe: Callable[..., Path]) -> None:
    seen, observe = _events()
    config = load_config(recipe())
    train(config, observe, device="cpu")
    run = loop.Run(load_config(recipe(), output_dir=config.output_dir), observe, torch.device("cpu"))
    run.restore()
    assert run.validation is not None
    seq = config.recipe.seq
    nats, num_bytes = 0.0, 0
    run.model.requires_grad_(False)
    for row in range(run.validation.rows(seq)):
        ids = torch.from_numpy(run.validation.row(row, seq))
        hidden = run.model(ids[None, :-1], torch.arange(seq)[None], loop.CausalAttention())
        logprobs = run.model.logits(hidden).log_softmax(-1)[0]
        nats -= float(logprobs[torch.arange(seq), ids[1:]].sum())
        eos = run.tokenizer.eos_token_id
        num_bytes += len(run.tokenizer.decode([int(i) for i in ids[1:] if i != eos]).encode())
    last = [event for event in seen if isinstance(event, loop.Validated)][-1]
    assert last.bits_per_byte == pytest.approx(nats / 0.6931471805599453 / num_bytes, rel=1e-4)


def test_a_diverging_step_leaves_the_weights_alone(recipe: Callable[..., Path]) -> None:
    run = loop.Run(load_config(recipe()), lambda _: None, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with torch.no_grad():
        run.model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(ConfigError, match=r"at step 1 the loss is nan.*lower recipe\.lr"):
        run.step(0)
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "transformer.ln_f.weight")
    assert not run._metrics.exists()


@pytest.mark.parametrize(("val_batches", "rows"), [("", "all"), ("val_batches = 2", 4), ("val_batches = 0", 0)])
def test_val_batches_are_batches(recipe: Callable[..., Path], val_batches: str, rows: int | str) -> None:
    seen, observe = _events()
    run = loop.Run(
        load_config(recipe(replace=('dtype = "float32"', f'dtype = "float32"\n{val_batches}'))),
        observe,
        torch.device("cpu"),
    )
    assert run.validation is not None
    read: list[int] = []
    row = type(run.validation).row

    def counted(self: object, index: int, seq: int) -> object:
        read.append(index)
        return row(run.validation, index, seq)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.validation), "row", counted)
        run.validate(1)
    assert read == list(range(run.validation.rows(16) if rows == "all" else int(rows)))
    assert any(isinstance(event, loop.Validated) for event in seen) == bool(read)


def test_a_line_that_a_crash_cut_does_not_stop_a_resume(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(recipe())
    train(config, lambda _: None, device="cpu")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    train(config, lambda _: None, resume=True, device="cpu")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in rows][-1] == 8


def test_an_output_dir_that_cannot_be_is_named(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"output_dir .*run cannot be made"):
        train(load_config(path), lambda _: None, device="cpu")
