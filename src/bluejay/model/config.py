"""What a network is made of: `ModelConfig`, read from and written to Hugging Face's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bluejay.errors import ConfigError

AttentionKind = Literal["global", "local"]

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")

# Our field -> Hugging Face's key, for each family. GPT-J's own names are the field names.
_HF_KEYS: dict[str, dict[str, str]] = {
    "gptj": {
        "vocab_size": "vocab_size",
        "n_positions": "n_positions",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_inner": "n_inner",
        "rotary_dim": "rotary_dim",
        "activation_function": "activation_function",
    },
    "gpt_neo": {
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_inner": "intermediate_size",
        "activation_function": "activation_function",
        "window_size": "window_size",
    },
}
_COMMON_KEYS = (
    "layer_norm_epsilon",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
# Keys that Bluejay writes itself and so does not carry over.
_DERIVED_KEYS = {
    "model_type",
    "architectures",
    "torch_dtype",
    "dtype",
    "attention_types",
    "attention_layers",
    "transformers_version",
}
_MAX_FILE_BYTES = 4 * 2**20
_MAX_LAYERS = 10_000  # far beyond any network, far below what would hurt
_ARCHITECTURES = {"gptj": "GPTJForCausalLM", "gpt_neo": "GPTNeoForCausalLM"}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one network, with the names of Hugging Face's GPTJConfig for both families.

    Attributes:
        model_type: "gptj" or "gpt_neo", the file in `model/` that builds it.
        vocab_size: rows of the embedding; may exceed the tokens that a tokenizer knows (GPT-J: 50,400 of 50,257).
        n_positions: the longest context, in tokens.
        n_embd, n_layer, n_head: width, blocks, heads per block; a head has `n_embd // n_head` dims.
        n_inner: width of the MLP; None means 4 * n_embd.
        rotary_dim: dims of each head that rotate (GPT-J); None means all of them.
        attention_layers: "global" or "local" for each block (GPT-Neo).
        window_size: keys that a local layer sees, the query's own included (GPT-Neo).
        extras: keys of config.json that Bluejay does not use, carried along when it writes one.

    Raises: ConfigError, with everything that is wrong at once.
    """

    model_type: str
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    rotary_dim: int | None = None
    attention_layers: tuple[AttentionKind, ...] = ()
    window_size: int = 256
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    torch_dtype: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("the model config is wrong: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def rotated_dims(self) -> int:
        return self.rotary_dim if self.rotary_dim is not None else self.head_dim

    def window(self, layer: int) -> int | None:
        """Keys that block `layer` sees, or None where it sees the whole context."""
        return self.window_size if self.attention_layers and self.attention_layers[layer] == "local" else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read Hugging Face's keys.

        Args:
            raw: the parsed config.json.
            where: the file's name, for messages.
        Raises: ConfigError for an unknown family and for missing or wrong keys, all at once.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _HF_KEYS:
            raise ConfigError(
                f"{where}: model_type is {model_type!r}; Bluejay opens {' and '.join(repr(k) for k in _HF_KEYS)}"
            )
        keys = _HF_KEYS[model_type]
        values: dict[str, Any] = {}
        missing: list[str] = []
        for name, key in keys.items():
            if key in raw:
                values[name] = raw[key]
            elif name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
                missing.append(key)
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        values.update({key: raw[key] for key in _COMMON_KEYS if raw.get(key) is not None})
        if model_type == "gptj":
            values["rotary_dim"] = raw.get("rotary_dim", 64)
        else:
            values.setdefault("tie_word_embeddings", True)
            values["attention_layers"] = _attention_layers(raw, values["n_layer"], where)
        used = {*keys.values(), *_COMMON_KEYS, *_DERIVED_KEYS}
        dtype = raw.get("torch_dtype", raw.get("dtype"))
        try:
            return cls(
                model_type=model_type,
                torch_dtype=dtype if isinstance(dtype, str) else None,
                extras={key: value for key, value in raw.items() if key not in used},
                **values,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a config.json; ConfigError names the file and what is wrong in it."""
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ConfigError(f"{path}: is larger than {_MAX_FILE_BYTES:,} bytes, which no config.json is")
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint directory needs a config.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: holds {type(raw).__name__}, expected an object")
        return cls.from_dict(raw, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Hugging Face's config.json: what `from_dict` reads and what transformers opens."""
        raw: dict[str, Any] = {
            **self.extras,
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
        }
        for name, key in _HF_KEYS[self.model_type].items():
            raw[key] = getattr(self, name)
        for key in _COMMON_KEYS:
            raw[key] = getattr(self, key)
        if self.model_type == "gpt_neo":
            raw["attention_layers"] = list(self.attention_layers)
            raw["attention_types"] = [[[kind], 1] for kind in self.attention_layers]
        if self.torch_dtype is not None:
            raw["torch_dtype"] = self.torch_dtype
        return raw


def _attention_layers(raw: Mapping[str, Any], n_layer: Any, where: str) -> tuple[AttentionKind, ...]:
    """Spell out GPT-Neo's `attention_types`: [[["global", "local"], 6]] is twelve layers."""
    if "attention_types" not in raw and isinstance(raw.get("attention_layers"), list):
        return tuple(raw["attention_layers"])
    types = raw.get("attention_types", [[["global", "local"], n_layer // 2 if isinstance(n_layer, int) else 0]])
    layers: list[AttentionKind] = []
    try:
        for pattern, count in types:
            # Counted before anything is made: a hostile count must not fill the memory.
            if not 0 <= len(pattern) * count <= _MAX_LAYERS - len(layers):
                raise ValueError
            layers += list(pattern) * count
    except (TypeError, ValueError):
        raise ConfigError(
            f'{where}: attention_types is {str(types)[:200]}, expected pairs such as [[["global", "local"], 6]] '
            f"of at most {_MAX_LAYERS:,} layers"
        ) from None
    return tuple(layers)


def _problems(config: ModelConfig) -> list[str]:
    found = []
    if config.model_type not in _HF_KEYS:
        found.append(f"model_type is {config.model_type!r}, expected one of {sorted(_HF_KEYS)}")
    sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "window_size"]
    sizes += [name for name in ("n_inner", "rotary_dim") if getattr(config, name) is not None]
    for name in sizes:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31 - 1:
            found.append(f"{name} is {str(value)[:50]}, expected a whole number from 1 to 2^31 - 1")
        elif name == "n_layer" and value > _MAX_LAYERS:
            found.append(f"n_layer is {value}, expected at most {_MAX_LAYERS:,}")
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            found.append(f"{name} is {str(value)[:50]}, expected a token id or null")
    if not isinstance(config.tie_word_embeddings, bool):
        found.append(f"tie_word_embeddings is {config.tie_word_embeddings!r}, expected true or false")
    if config.activation_function not in ACTIVATIONS:
        found.append(f"activation_function is {config.activation_function!r}, expected one of {list(ACTIVATIONS)}")
    for name in ("layer_norm_epsilon", "initializer_range"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            found.append(f"{name} is {str(value)[:50]}, expected a number between 0 and 1")
    if found:
        return found
    if config.n_embd % config.n_head:
        found.append(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    if config.model_type == "gptj" and (config.rotated_dims > config.head_dim or config.rotated_dims % 2):
        found.append(f"rotary_dim {config.rotated_dims} must be even and at most the head size {config.head_dim}")
    if config.model_type == "gpt_neo":
        if len(config.attention_layers) != config.n_layer:
            found.append(f"attention_layers names {len(config.attention_layers)} layers, n_layer is {config.n_layer}")
        if unknown := [kind for kind in config.attention_layers if kind not in ("global", "local")]:
            found.append(f"attention_layers holds {str(unknown[:5])[:200]}, expected 'global' or 'local'")
    return found


def _gpt_neo(n_embd: int, n_layer: int, n_head: int) -> ModelConfig:
    layers: tuple[AttentionKind, ...] = ("global", "local") * (n_layer // 2)
    return ModelConfig(
        model_type="gpt_neo",
        vocab_size=50257,
        n_positions=2048,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        attention_layers=layers,
        tie_word_embeddings=True,
        bos_token_id=50256,
        eos_token_id=50256,
    )


# Sources: the models' own config.json on the Hugging Face hub.
PRESETS: dict[str, ModelConfig] = {
    "gpt-j-6b": ModelConfig(
        model_type="gptj",
        vocab_size=50400,
        n_positions=2048,
        n_embd=4096,
        n_layer=28,
        n_head=16,
        rotary_dim=64,
        bos_token_id=50256,
        eos_token_id=50256,
    ),
    "gpt-neo-125m": _gpt_neo(768, 12, 12),
    "gpt-neo-1.3b": _gpt_neo(2048, 24, 16),
    "gpt-neo-2.7b": _gpt_neo(2560, 32, 20),
}
