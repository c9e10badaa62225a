"""One TOML file says everything about a training run: `TrainConfig`.

The names under [recipe] and their meanings are mesh-transformer-jax's (configs/6B_roto_256.json), so that its recipes
can be read across. Paths are relative to the TOML file.
"""

from __future__ import annotations

import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from bluejay.errors import ConfigError
from bluejay.model.config import PRESETS, ModelConfig

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        seq: tokens of context in each row.
        per_replica_batch: rows in one forward pass.
        gradient_accumulation_steps: forward passes whose gradients make one step.
        total_steps: optimiser steps of the run.
        warmup_steps, anneal_steps, lr, end_lr: linear from 0 to lr, then half a cosine down to end_lr, then end_lr.
        weight_decay: on parameters with more than one dim only.
        beta1, beta2, eps: Adam's; the defaults are optax's, as GPT-J was trained.
        clip: largest global norm of the gradient.
        z_loss: see `bluejay.train.loss.cross_entropy`.
        val_every, val_batches: validate each so many steps on so many batches of per_replica_batch rows; without
            val_batches on the whole set, with 0 not at all.
        ckpt_every, keep_every, keep_n: save each so many steps; keep the last n and every multiple of keep_every.
        dtype: of the forward pass; weights and Adam's moments stay float32. "auto": bfloat16 where the device has it.
    """

    total_steps: int
    seq: int
    per_replica_batch: int
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    anneal_steps: int | None = None
    lr: float = 1.2e-4
    end_lr: float = 1.2e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    z_loss: float = 0.0
    val_every: int = 500
    val_batches: int | None = None
    ckpt_every: int = 500
    keep_every: int = 10000
    keep_n: int = 3
    dtype: str = "auto"

    @property
    def annealing(self) -> int:
        """Steps of the cosine; all that follow the warm-up where the recipe is silent."""
        return self.anneal_steps if self.anneal_steps is not None else max(1, self.total_steps - self.warmup_steps)

    @property
    def tokens_per_step(self) -> int:
        return self.seq * self.per_replica_batch * self.gradient_accumulation_steps


@dataclass(frozen=True)
class Source:
    """A text file to learn from, and how often it is seen in one epoch."""

    file: Path
    repeat: int = 1


@dataclass(frozen=True)
class Data:
    """The texts: .txt or .jsonl ("text" in each line), plain or compressed as .xz or .gz."""

    train: tuple[Source, ...]
    validation: Path | None = None


@dataclass(frozen=True)
class TokenizerChoice:
    """Learn a vocabulary of this size from the training texts, or open the tokenizer at `path`."""

    vocab_size: int | None = None
    path: Path | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        output_dir: takes tokens, checkpoints, metrics, plot and the finished model.
        model: shape of a network to start from nothing; exclusive with tune_model_path.
        tune_model_path: checkpoint directory to go on from (fine-tuning); the tokenizer comes from there too.
        seed: of the initial weights and of the order of the data.
    """

    output_dir: Path
    data: Data
    recipe: Recipe
    model: ModelConfig | None = None
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)
    tune_model_path: Path | None = None
    seed: int = 10


def load_config(path: Path, *, output_dir: Path | None = None, data_dir: Path | None = None) -> TrainConfig:
    """Read a TOML file.

    Args:
        output_dir: replaces the file's own, relative to the current directory.
        data_dir: replaces the file's `[data] dir`, relative to the current directory.
    Raises: ConfigError with every unknown, missing and wrong key at once.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    here = path.resolve().parent
    if output_dir is not None:
        raw["output_dir"] = str(output_dir.absolute())
    problems: list[str] = []
    raw = _with_data_dir(raw, here, data_dir, problems)
    if isinstance(raw.get("model"), dict):
        raw["model"] = _model_config(raw["model"], problems)
    config = _build(TrainConfig, raw, "", here, problems)
    if config is not None:
        problems += _contradictions(config)
    if problems or config is None:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config  # type: ignore[no-any-return]


def _with_data_dir(raw: dict[str, Any], here: Path, data_dir: Path | None, problems: list[str]) -> dict[str, Any]:
    data = raw.get("data")
    if not isinstance(data, dict):
        return raw
    base = data_dir.absolute() if data_dir is not None else here / str(data.pop("dir", "."))
    data.pop("dir", None)
    out: dict[str, Any] = dict(data)
    if isinstance(data.get("validation"), str):
        out["validation"] = str(base / data["validation"])
    sources = data.get("train")
    if not isinstance(sources, list) or not sources:
        problems.append("data.train must be a list of files, each a name or { file = …, repeat = … }")
        return {**raw, "data": {**out, "train": ()}}
    rows = [{"file": row} if isinstance(row, str) else dict(row) if isinstance(row, dict) else {} for row in sources]
    for row in rows:
        if isinstance(row.get("file"), str):
            row["file"] = str(base / row["file"])
    built = [_build(Source, row, f"data.train[{i}]", here, problems) for i, row in enumerate(rows)]
    return {**raw, "data": {**out, "train": tuple(source for source in built if source is not None)}}


def _model_config(raw: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    """`preset = "gpt-neo-125m"`, or Hugging Face's config.json keys."""
    try:
        if set(raw) == {"preset"}:
            if raw["preset"] not in PRESETS:
                raise ConfigError(f"preset is {raw['preset']!r}, expected one of {sorted(PRESETS)}")
            return PRESETS[raw["preset"]]
        config = ModelConfig.from_dict(raw, where="[model]")
        problems += [f"unknown key model.{key}" for key in config.extras]
        return config
    except ConfigError as error:
        problems.append(str(error))
        return None


def _build(cls: Any, raw: Mapping[str, Any], where: str, here: Path, problems: list[str]) -> Any:
    """Make a dataclass from parsed TOML; what is wrong goes into `problems`."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    prefix = f"{where}." if where else ""
    before = len(problems)
    problems += [f"unknown key {prefix}{key}; known are {', '.join(known)}" for key in raw if key not in known]
    values: dict[str, Any] = {}
    for name, f in known.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], f"{prefix}{name}", here, problems)
        elif f.default is MISSING and f.default_factory is MISSING:
            problems.append(f"missing {prefix}{name}")
    return cls(**values) if len(problems) == before else None


def _value(hint: Any, value: Any, name: str, here: Path, problems: list[str]) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is ModelConfig or get_origin(hint) is tuple:
        return value  # built already
    if isinstance(value, dict) and hasattr(hint, "__dataclass_fields__"):
        return _build(hint, value, name, here, problems)
    if hint is Path and isinstance(value, str):
        return here / value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or isinstance(value, bool):
        expected = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}.get(hint, "a table")
        problems.append(f"{name} is {value!r}, expected {expected}")
    return value


def _contradictions(config: TrainConfig) -> list[str]:
    found = []
    r = config.recipe
    for name in ("total_steps", "seq", "per_replica_batch", "gradient_accumulation_steps", "val_every", "ckpt_every"):
        if getattr(r, name) < 1:
            found.append(f"recipe.{name} is {getattr(r, name)}, expected at least 1")
    if not 0 <= config.seed < 2**63:
        found.append(f"seed is {config.seed}, expected 0 to 2^63 - 1")
    for name in ("warmup_steps", "val_batches", "lr", "end_lr", "weight_decay", "z_loss", "eps"):
        value = getattr(r, name)
        if value is not None and not 0 <= value < math.inf:
            found.append(f"recipe.{name} is {value}, expected a number of 0 or more")
    for name in ("keep_every", "keep_n", "annealing"):
        if getattr(r, name) < 1:
            found.append(
                f"recipe.{name.replace('annealing', 'anneal_steps')} is {getattr(r, name)}, expected 1 or more"
            )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(r, name) < 1:
            found.append(f"recipe.{name} is {getattr(r, name)}, expected at least 0 and below 1")
    if not r.clip > 0:
        found.append(f"recipe.clip is {r.clip}, expected more than 0")
    if r.dtype not in DTYPES:
        found.append(f"recipe.dtype is {r.dtype!r}, expected one of {list(DTYPES)}")
    found += [f"{s.file}: repeat is {s.repeat}, expected 1 or more" for s in config.data.train if s.repeat < 1]
    files = [source.file for source in config.data.train]
    files += [config.data.validation] if config.data.validation is not None else []
    found += [f"{file}: no such file" for file in files if not file.is_file()]
    return found + _model_contradictions(config)


def _model_contradictions(config: TrainConfig) -> list[str]:
    found = []
    if (config.model is None) == (config.tune_model_path is None):
        found.append("give either [model] (a new network) or tune_model_path (a checkpoint to go on from)")
    if config.tune_model_path is not None:
        if config.tokenizer != TokenizerChoice():
            found.append("[tokenizer] does not go with tune_model_path: a fine-tuned model keeps its tokenizer")
    elif (config.tokenizer.path is None) == (config.tokenizer.vocab_size is None):
        found.append("give either tokenizer.vocab_size (to learn one) or tokenizer.path (to open one)")
    if config.model is not None:
        if config.recipe.seq > config.model.n_positions:
            found.append(f"recipe.seq {config.recipe.seq} is longer than n_positions {config.model.n_positions}")
        vocab = config.tokenizer.vocab_size
        if vocab is not None and vocab > config.model.vocab_size:
            found.append(
                f"tokenizer.vocab_size {vocab} is larger than the model's vocab_size {config.model.vocab_size}"
            )
    return found
