import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bluejay.checkpoints import load_model, open_checkpoint
from bluejay.checkpoints.mesh_jax import MeshJaxCheckpoint, is_mesh_jax
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import ModelConfig, num_parameters

WIDTH, VOCAB = 32, 48
RAW = {
    "layers": 2,
    "d_model": WIDTH,
    "n_heads": 8,
    "n_vocab": VOCAB,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 4,
    "seq": 16,
    "cores_per_replica": 2,
    "lr": 1e-4,
    "name": "tiny",
}


def make_tree(num_layers, seed=0):
    """What mesh-transformer-jax trains, unsharded, as {module: {leaf: array}}; numbers that bfloat16 holds exactly."""
    random = np.random.default_rng(seed)

    def array(*shape):
        return (random.integers(-64, 64, shape) / 32).astype(np.float32)

    shapes = {
        "embedding_shard/~/linear": {"w": (VOCAB, WIDTH), "b": (WIDTH,)},
        "projection_shard/~/linear": {"w": (WIDTH, VOCAB), "b": (VOCAB,)},
        "projection_shard/~/replicated_layer_norm": {"scale": (WIDTH,), "offset": (WIDTH,)},
    }
    for layer in range(num_layers):
        place = f"layer_{layer}/~/"
        for name in ("linear", "linear_1", "linear_2", "linear_3"):
            shapes[place + name] = {"w": (WIDTH, WIDTH)}
        shapes[place + "linear_4"] = {"w": (WIDTH, 4 * WIDTH), "b": (4 * WIDTH,)}
        shapes[place + "linear_5"] = {"w": (4 * WIDTH, WIDTH), "b": (WIDTH,)}
        shapes[place + "replicated_layer_norm"] = {"scale": (WIDTH,), "offset": (WIDTH,)}
    return {module: {leaf: array(*shape) for leaf, shape in leaves.items()} for module, leaves in shapes.items()}


def shard_of(tree, shard, num_shards):
    """One core's part, by the modules' roles in layers.py."""

    def part(module, leaf, whole):
        if "layer_norm" in module:
            return whole if shard == 0 else np.ones_like(whole)  # the others stay as they were initialised
        name = module.rsplit("/", 1)[1]
        is_sum = leaf == "b" and (name == "linear_5" or "embedding" in module)
        if is_sum:
            # Unequal shares that add up exactly.
            return whole - (num_shards - 1) * 0.5 if shard == 0 else np.full_like(whole, 0.5)
        by_rows = name in ("linear_3", "linear_5") or "embedding" in module or leaf == "b"
        return np.split(whole, num_shards, axis=0 if by_rows else -1)[shard]

    return {module: {leaf: part(module, leaf, a) for leaf, a in leaves.items()} for module, leaves in tree.items()}


def flatten(tree):
    """jax.tree_flatten: dicts by sorted keys, depth first."""
    return [tree[module][leaf] for module in sorted(tree) for leaf in sorted(tree[module])]


def as_bfloat16(array):
    """What np.savez makes of jax's bfloat16: two bytes without a meaning."""
    if array.dtype != np.float32:
        return array
    return (array.view(np.uint32) >> 16).astype(np.uint16).view("V2")


def write_checkpoint(folder, tree, num_shards, *, full=False, bfloat16=False, num_files=16, columns_first=False):
    for shard in range(num_shards):
        params = flatten(shard_of(tree, shard, num_shards))
        if columns_first:
            params = [np.asfortranarray(array) for array in params]
        step = [np.array(383500, np.int32)]
        moments = [np.full_like(array, 7) for array in params]
        optimiser = [np.array(1, np.int32), *moments, *moments, np.array(2, np.int32)] if full else []
        leaves = [*optimiser, *params, *step]
        if bfloat16:
            leaves = [as_bfloat16(array) for array in leaves]
        path = folder / f"shard_{shard}"
        path.mkdir(parents=True)
        # Cut as np.array_split cuts: the first files hold one more.
        ends = np.cumsum([len(leaves) // num_files + (i < len(leaves) % num_files) for i in range(num_files)])
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            np.savez(path / f"{i}.npz", *leaves[start:end])
    return folder


def write_config(path, **changes):
    path.write_text(json.dumps({key: value for key, value in {**RAW, **changes}.items() if value is not None}))
    return path


def expected_state_dict(tree, num_layers):
    """The facts about the mapping, written out once more: every Linear transposed, q v k o, the bias folded."""

    def weight(module, leaf="w"):
        array = torch.from_numpy(tree[module][leaf])
        return array.T if array.dim() == 2 and "embedding" not in module else array

    state = {
        "transformer.wte.weight": weight("embedding_shard/~/linear") + weight("embedding_shard/~/linear", "b"),
        "lm_head.weight": weight("projection_shard/~/linear"),
        "lm_head.bias": weight("projection_shard/~/linear", "b"),
        "transformer.ln_f.weight": weight("projection_shard/~/replicated_layer_norm", "scale"),
        "transformer.ln_f.bias": weight("projection_shard/~/replicated_layer_norm", "offset"),
    }
    for layer in range(num_layers):
        ours, theirs = f"transformer.h.{layer}.", f"layer_{layer}/~/"
        for name, number in (("q", ""), ("v", "_1"), ("k", "_2"), ("out", "_3")):
            state[f"{ours}attn.{name}_proj.weight"] = weight(f"{theirs}linear{number}")
        for name, number in (("fc_in", 4), ("fc_out", 5)):
            state[f"{ours}mlp.{name}.weight"] = weight(f"{theirs}linear_{number}")
            state[f"{ours}mlp.{name}.bias"] = weight(f"{theirs}linear_{number}", "b")
        state[f"{ours}ln_1.weight"] = weight(f"{theirs}replicated_layer_norm", "scale")
        state[f"{ours}ln_1.bias"] = weight(f"{theirs}replicated_layer_norm", "offset")
    return state


@pytest.mark.parametrize("num_layers", [2, 12])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True], ids=["slim", "full"])
@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_a_checkpoint_reads_back_as_its_source(tmp_path, num_shards, full, bfloat16, num_layers):
    tree = make_tree(num_layers)
    folder = write_checkpoint(tmp_path / "step_9", tree, num_shards, full=full, bfloat16=bfloat16)
    config = write_config(tmp_path / "config.json", layers=num_layers, cores_per_replica=num_shards)
    checkpoint = open_checkpoint(folder, config=config)
    checkpoint.check()
    assert checkpoint.format == "mesh_jax"
    expected = expected_state_dict(tree, num_layers)
    assert set(checkpoint.tensors()) == set(expected)
    for name, info in checkpoint.tensors().items():
        assert info.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        assert info.shape == tuple(expected[name].shape)
        # Equal to the last bit: the numbers fit bfloat16, and a sum is not rounded to it.
        assert torch.equal(checkpoint.read(name).float(), expected[name]), name


def test_a_checkpoint_loads_as_a_model(tmp_path):
    tree = make_tree(2)
    folder = write_checkpoint(tmp_path / "step_9", tree, 2, bfloat16=True)
    checkpoint = open_checkpoint(folder, config=write_config(tmp_path / "config.json"))
    model = load_model(checkpoint)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in model.parameters()) == num_parameters(model.config)
    for name, weight in expected_state_dict(tree, 2).items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16())


@pytest.mark.parametrize("num_files", [1, 3, 27])
def test_any_number_of_files_will_do(tmp_path, num_files):
    tree = make_tree(2)
    folder = write_checkpoint(tmp_path / "step_9", tree, 2, num_files=num_files)
    checkpoint = open_checkpoint(folder, config=write_config(tmp_path / "config.json"))
    for name, weight in expected_state_dict(tree, 2).items():
        assert torch.equal(checkpoint.read(name), weight)


def test_arrays_laid_out_by_columns_are_read(tmp_path):
    tree = make_tree(2)
    folder = write_checkpoint(tmp_path / "step_9", tree, 2, columns_first=True)
    checkpoint = open_checkpoint(folder, config=write_config(tmp_path / "config.json"))
    for name, weight in expected_state_dict(tree, 2).items():
        assert torch.equal(checkpoint.read(name), weight)


def test_shards_are_counted_where_the_config_does_not_say(tmp_path):
    folder = write_checkpoint(tmp_path / "step_9", make_tree(2), 8)
    open_checkpoint(folder, config=write_config(tmp_path / "config.json", cores_per_replica=None)).check()


def test_gpt_j_6bs_config_is_the_preset(tmp_path):
    from bluejay.checkpoints.mesh_jax import read_config
    from bluejay.model import PRESETS

    six_b = {"layers": 28, "d_model": 4096, "n_heads": 16, "n_vocab": 50400, "pe_rotary_dims": 64, "seq": 2048}
    config, num_shards = read_config(write_config(tmp_path / "6B_roto_256.json", **six_b, cores_per_replica=8))
    assert config == PRESETS["gpt-j-6b"]
    assert num_shards == 8


def test_a_config_without_rotary_dims_rotates_the_whole_head(tmp_path):
    from bluejay.checkpoints.mesh_jax import read_config

    config, _ = read_config(write_config(tmp_path / "config.json", pe_rotary_dims=None))
    assert config.rotary_dim == 4
    assert config.eos_token_id is None


def test_all_that_is_wrong_with_a_config_is_named_at_once(tmp_path):
    config = write_config(
        tmp_path / "config.json", pe="learned", norm="rmsnorm", layers="two", n_vocab=49, seq=None, d_model=0
    )
    with pytest.raises(ConfigError) as caught:
        MeshJaxCheckpoint.open(tmp_path, config)
    message = str(caught.value)
    for part in (
        "norm is 'rmsnorm', Bluejay opens 'layernorm'",
        "pe is 'learned', Bluejay opens 'rotary'",
        "layers is 'two'",
        "n_vocab 49 is not a multiple of cores_per_replica 2",
        "seq is missing",
        "d_model is 0",
    ):
        assert part in message


def test_a_config_is_needed(tmp_path):
    folder = write_checkpoint(tmp_path / "step_9", make_tree(2), 2)
    with pytest.raises(ConfigError, match=r"6B_roto_256\.json"):
        open_checkpoint(folder)


def test_only_a_directory_with_shards_is_one(tmp_path):
    assert not is_mesh_jax(tmp_path)
    (tmp_path / "shard_x").mkdir()
    (tmp_path / "shard_0").touch()
    assert not is_mesh_jax(tmp_path)
    (tmp_path / "shard_1").mkdir()
    assert is_mesh_jax(tmp_path)


@pytest.fixture
def written(tmp_path):
    folder = write_checkpoint(tmp_path / "step_9", make_tree(2), 2)
    return folder, write_config(tmp_path / "config.json")


def rewrite(path: Path, changes):
    """Replace some of a file's arrays."""
    with np.load(path) as arrays:
        kept = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    for index, array in changes.items():
        kept[index] = array
    np.savez(path, *kept)


def test_missing_files_and_shards_are_named_at_once(written):
    folder, config = written
    (folder / "shard_0" / "3.npz").unlink()
    (folder / "shard_1" / "15.npz").unlink()
    with pytest.raises(CheckpointError, match=r"shard_0/3\.npz is missing\n.*shard_1/15\.npz is missing"):
        open_checkpoint(folder, config=config)


def test_a_missing_shard_is_named(written):
    folder, config = written
    (folder / "shard_1").rename(folder / "gone")
    with pytest.raises(CheckpointError, match="shard_1 is missing, there should be 2"):
        open_checkpoint(folder, config=config)


def test_a_shard_too_many_is_named(written, tmp_path):
    folder, _ = written
    with pytest.raises(CheckpointError, match="shard_1 is there, but cores_per_replica is 1"):
        open_checkpoint(folder, config=write_config(tmp_path / "one.json", cores_per_replica=1))


def test_a_wrong_number_of_arrays_tells_what_is_expected(written, tmp_path):
    folder, _ = written
    with pytest.raises(CheckpointError, match=r"shard_0: holds 27 arrays; .*37 \(slim\) or 111 \(full\)"):
        open_checkpoint(folder, config=write_config(tmp_path / "three.json", layers=3))


def test_a_truncated_file_is_named(written):
    folder, config = written
    path = folder / "shard_1" / "4.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"shard_1/4\.npz.*cut short"):
        open_checkpoint(folder, config=config)


def test_a_damaged_array_is_named(written):
    folder, config = written
    path = folder / "shard_1" / "1.npz"  # the leaves 2 and 3: q and v of the first layer
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    checkpoint = open_checkpoint(folder, config=config)
    with pytest.raises(CheckpointError, match=r"shard_1/1\.npz: arr_0\.npy is damaged"):
        checkpoint.read("transformer.h.0.attn.q_proj.weight")


def test_an_array_of_objects_is_refused_and_not_unpickled(written, tmp_path):
    folder, config = written
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    np.savez(folder / "shard_0" / "0.npz", np.array([Trap()], dtype=object), np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match=r"0\.npz: arr_0\.npy: holds pickled objects"):
        open_checkpoint(folder, config=config)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4), ">f4"), "dtype '>f4'"),
        (np.zeros((3, 4), np.complex64), "dtype '<c8'"),
        (np.zeros((3, 4), [("a", "f4")]), "expected that of a plain array"),
        (np.zeros((3, 4), np.int32), "expected floating point of 2 dims"),
        (np.zeros((3,), np.float32), "expected floating point of 2 dims"),
        (np.zeros((3, 4), np.float32), r"shard 0 has torch\.float32 \[32, 16\]"),
        (np.zeros((32, 16), np.float16), r"is torch\.float16 \[32, 16\], shard 0 has torch\.float32"),
    ],
)
def test_an_array_that_does_not_fit_is_named(written, array, message):
    folder, config = written
    rewrite(folder / "shard_1" / "1.npz", {0: array})
    with pytest.raises(CheckpointError, match=rf"shard_1/1\.npz.*arr_0.*{message}"):
        open_checkpoint(folder, config=config)


def test_shapes_of_another_network_are_listed(written, tmp_path):
    folder, _ = written
    checkpoint = open_checkpoint(folder, config=write_config(tmp_path / "wide.json", d_model=64))
    with pytest.raises(CheckpointError, match=r"misshapen: .*q_proj\.weight is \[32, 32\] in 1\.npz, .* \[64, 64\]"):
        checkpoint.check()


def test_a_compressed_archive_is_refused(written):
    folder, config = written
    path = folder / "shard_0" / "0.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(1000))
    with pytest.raises(CheckpointError, match=r"0\.npz.*compressed.*numpy\.savez"):
        open_checkpoint(folder, config=config)


def test_arrays_with_names_are_refused(written):
    folder, config = written
    np.savez(folder / "shard_0" / "0.npz", b=np.zeros(3, np.float32), w=np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match=r"holds 2 arrays, but arr_0\.npy is not among them"):
        open_checkpoint(folder, config=config)


def test_a_header_that_lies_about_its_shape_is_named(written):
    folder, config = written
    path = folder / "shard_1" / "1.npz"
    path.write_bytes(path.read_bytes().replace(b"'shape': (32, 16)", b"'shape': (99, 99)"))
    with pytest.raises(CheckpointError, match=r"1\.npz: arr_0\.npy: .* \[99, 99\] does not fill"):
        open_checkpoint(folder, config=config)


def test_claimed_shards_beyond_number_cost_no_memory(tmp_path):
    folder = tmp_path / "step_1"
    (folder / "shard_0").mkdir(parents=True)
    config = write_config(tmp_path / "c.json", cores_per_replica=2**30, n_heads=2**30, d_model=2**30, n_vocab=2**30)
    with pytest.raises((CheckpointError, ConfigError)):
        open_checkpoint(folder, config=config)


def test_the_config_is_that_of_the_network(written):
    folder, config = written
    assert open_checkpoint(folder, config=config).config == ModelConfig(
        "gptj", vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=8, rotary_dim=4
    )


def test_a_directory_without_shards_is_told_so(tmp_path):
    with pytest.raises(CheckpointError, match="shard_0 is missing, there should be 1"):
        MeshJaxCheckpoint.open(tmp_path, write_config(tmp_path / "c.json", cores_per_replica=None))


def test_a_dim_of_thousands_of_digits_is_named(written):
    folder, config = written
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 5000},), }}\n".encode()
    with zipfile.ZipFile(folder / "shard_0" / "0.npz", "w") as archive:
        for i in range(2):
            archive.writestr(f"arr_{i}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(CheckpointError, match=r"0\.npz: arr_0\.npy: its shape is '9+'…, which no tensor has"):
        open_checkpoint(folder, config=config)
