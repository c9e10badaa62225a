"""Loading: right values in any dtype, mapped where that is possible, and little more memory than the weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bluejay.checkpoints import load_model, open_checkpoint, save
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import ModelConfig, build
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ

Model = GPTJ | GPTNeo
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def saved(tmp_path: Path, tiny_model: Model) -> Path:
    save(tiny_model, tiny_model.config, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_arrive_in_the_dtype_asked_for(saved: Path, tiny_model: Model, dtype: torch.dtype | None) -> None:
    model = load_model(saved, dtype=dtype)
    assert type(model) is type(tiny_model)
    assert model.state_dict().keys() == tiny_model.state_dict().keys()
    for name, weight in tiny_model.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == (dtype or torch.float32)
        assert torch.equal(found, weight.to(found.dtype))


def test_a_checkpoint_loads_as_its_path_does(saved: Path, tiny_model: Model) -> None:
    model = load_model(open_checkpoint(saved))
    assert torch.equal(model.transformer.wte.weight, tiny_model.transformer.wte.weight)


@pytest.mark.parametrize("trainable", [False, True])
def test_only_a_trainable_model_asks_for_gradients(saved: Path, trainable: bool) -> None:
    model = load_model(saved, trainable=trainable)
    assert not model.training
    assert all(parameter.requires_grad is trainable for parameter in model.parameters())


def test_writing_to_loaded_weights_never_reaches_the_file(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    for trainable in (False, True):
        model = load_model(saved, trainable=trainable)
        with torch.no_grad():
            model.transformer.wte.weight.fill_(7)
    assert (saved / "model.safetensors").read_bytes() == before


@linux
def test_weights_of_the_right_dtype_are_mapped_and_others_copied(saved: Path) -> None:
    def maps_the_file() -> bool:
        return str(saved / "model.safetensors") in Path("/proc/self/maps").read_text()

    model = load_model(saved)
    assert maps_the_file()
    del model
    assert not maps_the_file()
    models = [load_model(saved, dtype=torch.bfloat16), load_model(saved, trainable=True)]
    assert not maps_the_file()
    del models


def test_of_several_dtypes_the_one_that_holds_them_all_is_taken(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    state: dict[str, Tensor] = {name: weight.bfloat16() for name, weight in tiny_gptj.state_dict().items()}
    state["transformer.ln_f.weight"] = tiny_gptj.transformer.ln_f.weight.detach()
    save(state, tiny_gptj.config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    model = load_model(tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.ln_f.weight, tiny_gptj.transformer.ln_f.weight)


def test_float64_is_loaded_as_float32(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save({name: weight.double() for name, weight in tiny_gptj.state_dict().items()}, tiny_gptj.config, tmp_path)
    assert load_model(tmp_path).transformer.wte.weight.dtype == torch.float32


def test_a_transposed_weight_of_a_bin_is_made_contiguous(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save(tiny_gptj, tiny_gptj.config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = tiny_gptj.state_dict()
    transposed = {name: weight.T.contiguous().T for name, weight in state.items() if weight.dim() == 2}
    torch.save(state | transposed, tmp_path / "pytorch_model.bin")
    model = load_model(tmp_path)
    for name, weight in model.state_dict().items():
        assert weight.is_contiguous()
        assert torch.equal(weight, tiny_gptj.state_dict()[name])


def test_progress_counts_bytes_to_the_end(saved: Path, tiny_model: Model) -> None:
    calls: list[tuple[int, int]] = []
    load_model(saved, dtype=torch.bfloat16, on_progress=lambda *call: calls.append(call))
    total = sum(weight.nbytes for weight in tiny_model.state_dict().values())
    assert calls[-1] == (total, total)
    assert len(calls) == len(tiny_model.state_dict())


def test_wrong_keys_and_dtypes_are_refused(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save(tiny_gptj, tiny_gptj.config, tmp_path)
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8"):
        load_model(tmp_path, dtype=torch.int8)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 301}))
    with pytest.raises(CheckpointError, match=r"misshapen: .*wte.*the config asks for \[301, 32\]"):
        load_model(tmp_path)


# Memory, measured in a process of its own: VmHWM is the most that was ever resident, mapped files included.

MEASURE = """
import sys
from pathlib import Path
import torch
from bluejay.checkpoints import load_model, open_checkpoint, save

def peak_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
before = peak_bytes()
{action}
print(peak_bytes() - before)
"""
LOAD = "load_model(path, dtype=dtype)"
CONVERT = "source = open_checkpoint(path); save(source, source.config, path, dtype=dtype)"


def growth_bytes(action: str, directory: Path, dtype: str) -> int:
    """How far an action raises the memory of a process."""
    code = MEASURE.format(action=action)
    ran = subprocess.run(
        [sys.executable, "-c", code, str(directory), dtype], capture_output=True, text=True, check=True, timeout=300
    )
    return int(ran.stdout)


def write_sparse_bin(config: ModelConfig, directory: Path) -> int:
    """A float32 pytorch_model.bin of zeros that takes no room on the disk; returns the number of weights."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    state = build(config, device="meta").state_dict()
    empty = {name: torch.empty_like(weight, device="cpu") for name, weight in state.items()}
    with torch.serialization.skip_data():
        torch.save(empty, directory / "pytorch_model.bin")
    return sum(weight.numel() for weight in state.values())


def gptj(n_embd: int, n_layer: int) -> ModelConfig:
    return ModelConfig(
        model_type="gptj", vocab_size=8192, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=8, rotary_dim=32
    )


@linux
def test_converting_while_loading_takes_the_new_weights_and_one_old_tensor(tmp_path: Path) -> None:
    numel = write_sparse_bin(gptj(1024, 5), tmp_path)
    assert numel * 4 > 300e6
    largest = 8192 * 1024 * 4
    assert growth_bytes(LOAD, tmp_path, "bfloat16") < numel * 2 + largest + 32 * 2**20


@linux
def test_converting_on_disk_takes_one_tensor(tmp_path: Path) -> None:
    write_sparse_bin(gptj(1024, 5), tmp_path)
    largest = 8192 * 1024 * 4
    # The same run grows by 48 to 91 MiB; why it differs is not known. The bound still refuses a whole model, 155 MB.
    assert growth_bytes(CONVERT, tmp_path, "bfloat16") < 1.5 * largest + 64 * 2**20
    assert load_model(tmp_path).transformer.wte.weight.dtype == torch.bfloat16


@linux
def test_mapped_weights_take_no_memory_until_they_are_used(tmp_path: Path) -> None:
    write_sparse_bin(gptj(1024, 5), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    save(checkpoint, checkpoint.config, tmp_path)
    assert growth_bytes(LOAD, tmp_path, "float32") < 16 * 2**20


@linux
@pytest.mark.slow
def test_four_gigabytes_of_float32_load_within_their_half_and_a_gibibyte(tmp_path: Path) -> None:
    numel = write_sparse_bin(gptj(4096, 5), tmp_path)
    assert numel * 4 > 4e9
    assert growth_bytes(LOAD, tmp_path, "bfloat16") < numel * 2 + 2**29
