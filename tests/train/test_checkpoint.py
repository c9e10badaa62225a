import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from bluejay.errors import CheckpointError
from bluejay.train import checkpoint


def _stepped() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    model, optimizer = _stepped()
    path = checkpoint.save(tmp_path, 7, model, optimizer, {"seed": 1})
    other = nn.Linear(4, 3)
    restored = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert checkpoint.restore(path, other, restored, {"seed": 1}) == 7
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg_sq"], restored.state[other.weight]["exp_avg_sq"])
    assert int(restored.state[other.bias]["step"]) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _stepped()
    before = checkpoint.save(tmp_path, 1, model, optimizer, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*untouched"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert checkpoint.latest(tmp_path) == before
    assert checkpoint.restore(before, model, optimizer, {}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [before.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": "x"}', '{"step": 1, "sha256": {}}'])
def test_an_unreadable_state_is_named(tmp_path: Path, content: str) -> None:
    model, optimizer = _stepped()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.restore(path, model, optimizer, {})
