"""mesh-transformer-jax checkpoints, slim and full, without jax: step_N/shard_{0…}/{0…}.npz.

Each shard is what one core of a replica held: the leaves of {"opt_state", "params", "step"} in the tree's order, dealt
out over some files. A slim checkpoint has no opt_state. With P parameters in the tree:

    slim   P params, step
    full   Adam's count, P first moments, P second moments, the schedule's count, P params, step

Source: mesh-transformer-jax, checkpoint.py and to_hf_weights.py; the optimiser's leaves are those of optax.chain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bluejay.checkpoints.files import MappedFile, inside, parse_json
from bluejay.checkpoints.formats import MAX_PRINTED, TensorInfo, check_keys, listing
from bluejay.checkpoints.keymaps import MESH_JAX_EMBEDDING, MESH_JAX_LAYER, MESH_JAX_PROJECTION
from bluejay.checkpoints.npz import NpzFile, StoredArray
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import ModelConfig

_SHARD = re.compile(r"shard_(0|[1-9]\d{0,3})")
_FILE = re.compile(r"(0|[1-9]\d{0,3})\.npz")
_EMBEDDING_BIAS, _EMBEDDING = (key for _, key, _ in MESH_JAX_EMBEDDING)
# GPT-J's 50,400 rows are GPT-2's 50,257 tokens, whose end of text is 50,256, and room that no text uses.
_GPT_J_VOCAB, _GPT_2_END_OF_TEXT = 50400, 50256


@dataclass(frozen=True)
class _Part:
    """One shard's array of one parameter."""

    file: NpzFile
    array: StoredArray


@dataclass(frozen=True)
class _Parameter:
    """One parameter: its name in mesh-transformer-jax's tree, how its parts make a whole, and the parts."""

    name: str
    merge: str
    parts: tuple[_Part, ...]

    @property
    def transposed(self) -> bool:
        """Whether Hugging Face has rows where mesh-transformer-jax has columns."""
        return self.name.endswith("/w") and self.name != "embedding/w"

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole's dims, as Hugging Face has them."""
        dims = list(self.parts[0].array.shape)
        if self.merge in ("rows", "columns"):
            dims[self.axis] *= len(self.parts)
        return tuple(reversed(dims) if self.transposed else dims)

    @property
    def axis(self) -> int:
        """Along which the parts are laid end to end, as mesh-transformer-jax has them."""
        return -1 if self.merge == "columns" else 0

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].array.dtype


class MeshJaxCheckpoint:
    """A model as mesh-transformer-jax keeps it; see `Checkpoint`.

    Args:
        path: the directory step_N.
        config: the network.
        num_shards: cores_per_replica, None where the config does not say.
    Raises: CheckpointError if shards, files or arrays are missing or do not match.
    """

    format = "mesh_jax"

    def __init__(self, path: Path, config: ModelConfig, num_shards: int | None = None) -> None:
        self.path = path
        self.config = config
        shards = _find_shards(path, num_shards)
        table = leaf_table(config.n_layer)
        leaves = [list(_param_leaves(files, len(table))) for files in shards]
        self._parameters = {
            key: _Parameter(name, merge, parts)
            for (name, key, merge), parts in zip(table, zip(*leaves, strict=True), strict=True)
        }
        if problems := list(_part_problems(self._parameters.values())):
            raise CheckpointError(f"{path}: the shards do not fit together:\n{listing(problems)}")
        self._tensors = {
            key: TensorInfo(parameter.shape, parameter.dtype, parameter.parts[0].file.path)
            for key, parameter in self._parameters.items()
            if key != _EMBEDDING_BIAS
        }

    @classmethod
    def open(cls, path: Path, config: Path | None = None) -> MeshJaxCheckpoint:
        """Open a directory step_N.

        Args:
            path: the directory that holds shard_0.
            config: mesh-transformer-jax's JSON config, such as 6B_roto_256.json; None for a config.json beside shard_0.
        Raises: CheckpointError, ConfigError.
        """
        if config is None and (path / "config.json").is_file():
            config = inside(path, "config.json")
        if config is None:
            raise ConfigError(
                f"{path}: a mesh-transformer-jax checkpoint does not describe its network; "
                "name its JSON config, such as 6B_roto_256.json (--config)"
            )
        return cls(path, *read_config(config))

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every weight under its Hugging Face name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One weight, put together from the shards.

        Sums (a bias of which each shard has a share, the embedding with its bias) come in float32, so that whoever
        wants float32 of a bfloat16 checkpoint gets them unrounded; all others as stored.

        Raises: CheckpointError if its bytes are damaged.
        """
        whole = _merge(self._parameters[name])
        if name == _EMBEDDING:
            whole = whole.float().add_(_merge(self._parameters[_EMBEDDING_BIAS]))
        return whole

    def check(self) -> None:
        """Hold the weights against the config.

        Raises: CheckpointError that lists all missing, unexpected and misshapen keys.
        """
        check_keys(self._tensors, self.config, self.path)


def is_mesh_jax(path: Path) -> bool:
    """Whether a directory is a step of mesh-transformer-jax: it holds shard_0, shard_1, …"""
    return path.is_dir() and any(_SHARD.fullmatch(entry.name) and entry.is_dir() for entry in path.iterdir())


def leaf_table(n_layer: int) -> list[tuple[str, str, str]]:
    """Name, Hugging Face's key and merge rule of each parameter, in the order of the tree."""
    table = list(MESH_JAX_EMBEDDING)
    for layer in sorted(range(n_layer), key=str):  # the tree's keys are sorted as text: 0, 1, 10, 11, 2
        table += [
            (f"layer_{layer}/{name}", f"transformer.h.{layer}.{key}", merge) for name, key, merge in MESH_JAX_LAYER
        ]
    return [*table, *MESH_JAX_PROJECTION]


def read_config(path: Path) -> tuple[ModelConfig, int | None]:
    """Read mesh-transformer-jax's JSON config: the network, and cores_per_replica where it is given.

    Raises: ConfigError that names every missing, wrong and unsupported value.
    """
    file = MappedFile(path)
    raw = parse_json(file.read(0, min(file.num_bytes, 1 << 20)), str(path))
    problems = [
        f"{key} is {raw[key]!r:.60}, Bluejay opens {supported!r}" if key in raw else f"{key} is missing"
        for key, supported in (("norm", "layernorm"), ("pe", "rotary"))
        if raw.get(key) != supported
    ]
    sizes: dict[str, int] = {}
    for key in ("layers", "d_model", "n_heads", "n_vocab", "seq", "pe_rotary_dims", "cores_per_replica"):
        value = raw.get(key)
        if type(value) is int and value >= 1:
            sizes[key] = value
        elif key in raw:
            problems.append(f"{key} is {value!r:.60}, expected a whole number from 1")
        elif key not in ("pe_rotary_dims", "cores_per_replica"):
            problems.append(f"{key} is missing")
    shards = sizes.get("cores_per_replica", 1)
    problems += [
        f"{key} {sizes[key]} is not a multiple of cores_per_replica {shards}"
        for key in ("n_heads", "n_vocab", "d_model")
        if sizes.get(key, 0) % shards
    ]
    if problems:
        raise ConfigError(f"{path}: not a config of mesh-transformer-jax that Bluejay opens: {'; '.join(problems)}")
    end_of_text = _GPT_2_END_OF_TEXT if sizes["n_vocab"] == _GPT_J_VOCAB else None
    try:
        config = ModelConfig(
            model_type="gptj",
            vocab_size=sizes["n_vocab"],
            n_positions=sizes["seq"],
            n_embd=sizes["d_model"],
            n_layer=sizes["layers"],
            n_head=sizes["n_heads"],
            rotary_dim=sizes.get("pe_rotary_dims", sizes["d_model"] // sizes["n_heads"]),
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, sizes.get("cores_per_replica")


def _find_shards(path: Path, num_shards: int | None) -> list[list[Path]]:
    """The files of each shard, in order.

    Raises: CheckpointError that lists every shard and file that is missing or one too many.
    """
    there = {entry.name for entry in path.iterdir() if _SHARD.fullmatch(entry.name) and entry.is_dir()}
    count = num_shards if num_shards is not None else max(len(there), 1)
    # No more than can be told: the config may claim any number.
    names = [f"shard_{i}" for i in range(min(count, len(there) + MAX_PRINTED))]
    problems = [f"{name} is missing, there should be {count}" for name in names if name not in there]
    problems += [f"{name} is there, but cores_per_replica is {count}" for name in sorted(there - set(names))]
    files = {name: {entry.name for entry in inside(path, name).iterdir()} for name in names if name in there}
    numbers = {int(match[1]) for found in files.values() for file in found if (match := _FILE.fullmatch(file))}
    expected = [f"{i}.npz" for i in range(max(numbers, default=0) + 1)]
    for name, found in files.items():
        problems += [f"{name}/{file} is missing" for file in expected if file not in found]
    if problems:
        raise CheckpointError(f"{path}: is not complete:\n{listing(problems)}")
    return [[inside(path / name, file) for file in expected] for name in names]


def _param_leaves(paths: list[Path], num_params: int) -> Iterator[_Part]:
    """The shard's arrays that are parameters; their headers are read, those of the optimiser's are not."""
    files = [NpzFile(path) for path in paths]
    found = sum(file.num_arrays for file in files)
    slim, full = num_params + 1, 3 * num_params + 3
    if found not in (slim, full):
        raise CheckpointError(
            f"{paths[0].parent}: holds {found} arrays; the config's layers make {slim} (slim) or {full} (full), "
            "so layers is wrong or files are missing"
        )
    first = 0 if found == slim else 2 * num_params + 2
    leaves = [(file, index) for file in files for index in range(file.num_arrays)]
    for file, index in leaves[first : first + num_params]:
        yield _Part(file, file.look(index))


def _part_problems(parameters: Iterable[_Parameter]) -> Iterator[str]:
    """Arrays that are not what the tree has in their place, or not alike in all shards."""
    for parameter in parameters:
        first = parameter.parts[0].array
        num_dims = 2 if parameter.name.endswith("/w") else 1
        for part in parameter.parts:
            array = part.array
            where = f"{part.file.path.parent.name}/{part.file.path.name} {array.name} ({parameter.name})"
            if len(array.shape) != num_dims or not array.dtype.is_floating_point:
                yield f"{where} is {array.dtype} {list(array.shape)}, expected floating point of {num_dims} dims"
            elif (array.shape, array.dtype) != (first.shape, first.dtype):
                yield f"{where} is {array.dtype} {list(array.shape)}, shard 0 has {first.dtype} {list(first.shape)}"


def _merge(parameter: _Parameter) -> Tensor:
    """The whole of a parameter, as Hugging Face lays it out."""
    parts = parameter.parts
    if parameter.merge == "first":
        return parts[0].file.read(parts[0].array)
    if parameter.merge == "sum":
        return torch.stack([part.file.read(part.array).float() for part in parts]).sum(0)
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    # One part at a time, so that memory holds the whole and a part.
    rooms = (whole.T if parameter.transposed else whole).chunk(len(parts), parameter.axis)
    for part, room in zip(parts, rooms, strict=True):
        room.copy_(part.file.read(part.array))
    return whole
