"""Saving: what comes back is equal, memory holds one tensor, and a save that fails leaves no broken model."""

import json
import resource
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bluejay.checkpoints import copy_tokenizer_files, load_model, open_checkpoint, save
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ

Model = GPTJ | GPTNeo


def assert_holds(directory: Path, model: Model, dtype: torch.dtype = torch.float32) -> None:
    checkpoint = open_checkpoint(directory)
    checkpoint.check()
    assert replace(checkpoint.config, torch_dtype=None) == replace(model.config, torch_dtype=None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor.to(dtype))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_both_families_in_every_dtype_come_back_equal(
    tmp_path: Path, tiny_model: Model, dtype: torch.dtype | None
) -> None:
    written = save(tiny_model, tiny_model.config, tmp_path, dtype=dtype)
    assert written == [tmp_path / "model.safetensors", tmp_path / "config.json"]
    assert files(tmp_path) == ["config.json", "model.safetensors"]
    assert_holds(tmp_path, tiny_model, dtype or torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype or torch.float32).removeprefix("torch.")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_as_much_as_was_asked(tmp_path: Path, tiny_model: Model) -> None:
    limit = 40_000
    written = save(tiny_model, tiny_model.config, tmp_path, max_shard_bytes=limit)
    assert_holds(tmp_path, tiny_model)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = tiny_model.state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["weight_map"].keys() == state.keys()
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert {path.name for path in written} == {*shards, "model.safetensors.index.json", "config.json"}
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= limit or len(sizes) == 1


def test_the_same_weights_make_the_same_bytes_whatever_they_come_from(tmp_path: Path, tiny_model: Model) -> None:
    state = tiny_model.state_dict()
    save(tiny_model, tiny_model.config, tmp_path / "module")
    save(dict(reversed(state.items())), tiny_model.config, tmp_path / "mapping")
    torch.save(state, tmp_path / "module" / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path / "module" / "pytorch_model.bin")
    save(checkpoint, checkpoint.config, tmp_path / "checkpoint")
    module = (tmp_path / "module" / "model.safetensors").read_bytes()
    assert (tmp_path / "mapping" / "model.safetensors").read_bytes() == module
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == module


def test_legacy_buffers_and_a_tied_head_are_not_saved(tmp_path: Path, tiny_gpt_neo: GPTNeo) -> None:
    state = dict(tiny_gpt_neo.state_dict())
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save(state, tiny_gpt_neo.config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny_gpt_neo.state_dict())


def test_weights_of_another_network_are_refused_and_nothing_is_touched(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    state = dict(tiny_gptj.state_dict())
    del state["lm_head.bias"]
    state["transformer.wte.weight"] = torch.zeros(3, 32)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.bias[^$]*misshapen: transformer\.wte\.weight"):
        save(state, tiny_gptj.config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dtype_for_no_network_is_refused(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8, expected one of torch\.float32"):
        save(tiny_gptj, tiny_gptj.config, tmp_path, dtype=torch.int8)


def test_progress_counts_bytes_to_the_end(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    calls: list[tuple[int, int]] = []
    save(tiny_gptj, tiny_gptj.config, tmp_path, dtype=torch.bfloat16, on_progress=lambda *c: calls.append(c))
    total = 2 * sum(tensor.numel() for tensor in tiny_gptj.state_dict().values())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)


class Lazy(Mapping[str, Tensor]):
    """Makes each tensor when it is asked for, and counts how many are alive."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        made = self.state[name].clone()
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_a_lazy_mapping_never_has_more_than_two_tensors_alive(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    lazy = Lazy(tiny_gptj.state_dict())
    save(lazy, tiny_gptj.config, tmp_path)
    assert_holds(tmp_path, tiny_gptj)
    assert lazy.most <= 2  # the one that is being made, and the one before it


# What was there before.


@pytest.fixture
def other(make_model: Callable[..., Model], tiny_gptj: GPTJ) -> Model:
    """A model of the same shape with other weights and another config."""
    return make_model(replace(tiny_gptj.config, layer_norm_epsilon=1e-3), seed=1)


@pytest.mark.parametrize("before", [40_000, 10**9], ids=["from shards", "from one file"])
@pytest.mark.parametrize("after", [30_000, 10**9], ids=["to shards", "to one file"])
def test_an_older_model_is_replaced_whole(
    tmp_path: Path, tiny_gptj: GPTJ, other: Model, before: int, after: int
) -> None:
    save(other, other.config, tmp_path, max_shard_bytes=before)
    (tmp_path / "notes.txt").write_text("mine")
    written = save(tiny_gptj, tiny_gptj.config, tmp_path, max_shard_bytes=after)
    assert files(tmp_path) == sorted([*(path.name for path in written), "notes.txt"])
    assert_holds(tmp_path, tiny_gptj)


def test_a_model_can_be_saved_over_itself(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save(tiny_gptj, tiny_gptj.config, tmp_path, max_shard_bytes=30_000)
    checkpoint = open_checkpoint(tmp_path)
    save(checkpoint, checkpoint.config, tmp_path, dtype=torch.bfloat16)
    assert_holds(tmp_path, tiny_gptj, torch.bfloat16)


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, tiny_gptj: GPTJ, other: Model) -> None:
    save(other, other.config, tmp_path, max_shard_bytes=40_000)
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # the first file that grows past this fails
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            save(tiny_gptj, tiny_gptj.config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before
    assert_holds(tmp_path, other)


def test_a_damaged_source_leaves_the_old_model(tmp_path: Path, tiny_gptj: GPTJ, other: Model) -> None:
    save(other, other.config, tmp_path)
    before = files(tmp_path)
    source = tmp_path.with_name("source.bin")
    torch.save(tiny_gptj.state_dict(), source)
    raw = bytearray(source.read_bytes())
    raw[raw.index(tiny_gptj.lm_head.bias.detach().numpy().tobytes())] ^= 1
    source.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"'lm_head\.bias' is damaged"):
        save(open_checkpoint(source, config=tmp_path / "config.json"), tiny_gptj.config, tmp_path)
    assert files(tmp_path) == before
    assert_holds(tmp_path, other)


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, tiny_gptj: GPTJ, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=r"the weights take [\d,]+ bytes, the disk has 1,000 free"):
        save(tiny_gptj, tiny_gptj.config, tmp_path)
    assert files(tmp_path) == []


def test_a_target_that_is_a_file_is_refused(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="out: the model cannot be written"):
        save(tiny_gptj, tiny_gptj.config, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "model.safetensors").write_bytes(b"half")
    save(tiny_gptj, tiny_gptj.config, tmp_path)
    assert files(tmp_path) == ["config.json", "model.safetensors"]


class Killed(BaseException):
    """Stands for the process's end."""


def opens_as(directory: Path, models: dict[str, Model]) -> str:
    """Which of the models a directory holds: none of them if it is refused, and never a mixture."""
    try:
        found = load_model(directory)
    except (CheckpointError, ConfigError):
        return "refused"
    for name, model in models.items():
        same = all(torch.equal(found.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
        if same and replace(found.config, torch_dtype=None) == model.config:
            return name
    return "a mixture"


@pytest.mark.parametrize("before", [40_000, 10**9], ids=["from shards", "from one file"])
@pytest.mark.parametrize("after", [40_000, 10**9], ids=["to shards", "to one file"])
def test_a_kill_at_any_step_never_leaves_a_mixture(
    tmp_path: Path,
    tiny_gptj: GPTJ,
    other: Model,
    before: int,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"before": other, "after": tiny_gptj}
    replace_file, unlink = Path.replace, Path.unlink
    steps_left = 0

    def step() -> None:
        nonlocal steps_left
        if steps_left == 0:
            raise Killed
        steps_left -= 1

    def killable_replace(self: Path, target: Path) -> Path:
        step()
        return replace_file(self, target)

    def killable_unlink(self: Path, missing_ok: bool = False) -> None:
        step()
        unlink(self, missing_ok)

    seen = []
    for kill_after in range(100):
        target = tmp_path / str(kill_after)
        save(other, other.config, target, max_shard_bytes=before)
        steps_left = kill_after
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killable_replace)
            patch.setattr(Path, "unlink", killable_unlink)
            try:
                save(tiny_gptj, tiny_gptj.config, target, max_shard_bytes=after)
                finished = True
            except Killed:
                finished = False
        seen.append(opens_as(target, models))
        if finished:
            break
    assert set(seen) <= {"before", "refused", "after"}
    assert seen[0] == "before"
    assert seen[-1] == "after"


def test_one_file_of_the_same_network_is_replaced_in_one_step(
    tmp_path: Path, tiny_gptj: GPTJ, make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_model(tiny_gptj.config, seed=1)
    save(old, old.config, tmp_path)
    states = []
    replace_file = Path.replace

    def watched(self: Path, target: Path) -> Path:
        states.append(opens_as(tmp_path, {"old": old, "new": tiny_gptj}))
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    save(tiny_gptj, tiny_gptj.config, tmp_path)
    assert states == ["old", "new"]


# Tokenizers.


def test_a_tokenizer_is_copied_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("vocab.json", "merges.txt", "config.json"):
        (source / name).write_text(name)
    (target / "tokenizer.json").write_text("of another model")
    (target / "config.json").write_text("mine")
    assert {path.name for path in copy_tokenizer_files(source, target)} == {"vocab.json", "merges.txt"}
    assert files(target) == ["config.json", "merges.txt", "vocab.json"]
    assert (target / "vocab.json").read_text() == "vocab.json"
    assert (target / "config.json").read_text() == "mine"


def test_without_a_tokenizer_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").write_text("mine")
    assert copy_tokenizer_files(tmp_path / "source", tmp_path / "target") == []
    assert copy_tokenizer_files(tmp_path / "target", tmp_path / "target") == []
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "mine"


def test_a_tokenizer_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its directory"):
        copy_tokenizer_files(tmp_path / "source", tmp_path / "target")
