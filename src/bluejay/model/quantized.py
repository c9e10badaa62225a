"""Quantised layers, put into a network from outside: the families' files know nothing of them.

Quantised are the linear layers of the blocks and the head, be it tied. LayerNorms and biases are float32, embeddings
keep 16 bits and are widened row by row, and the network computes in float32 on the CPU. Layouts and numbers are told in
`bluejay.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bluejay import ops
from bluejay.errors import ConfigError
from bluejay.model.config import ModelConfig
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.model.kernels import PACKED_AT_ONCE, elementwise_by_kernels, in_parts
from bluejay.model.layers import Embedding, Head, Linear
from bluejay.model.registry import build
from bluejay.ops import reference
from bluejay.ops.memory import prefer_huge_pages

QUANTIZED_DTYPES = {"int8": 8, "int4": 4}
CONFIG_KEY = "quantization_config"
WEIGHT, SCALES = ".weight", ".scales"
_METHOD, _VERSION = "bluejay", 2


@dataclass(frozen=True)
class Quantization:
    """How weights are kept: `bits` 8 or 4, and so many of them share a scale.

    Raises: ConfigError for numbers that Bluejay does not write.
    """

    bits: int
    group_size: int = 32

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in (4, 8) or type(self.bits) is not int:
            problems.append(f"bits is {str(self.bits)[:50]}, expected 4 or 8")
        if self.group_size not in reference.GROUP_SIZES or type(self.group_size) is not int:
            problems.append(f"group_size is {str(self.group_size)[:50]}, expected 32 or 64")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """The packed weight's shape."""
        steps = self._num_groups(in_features) * self.group_size // reference.INPUTS_PER_STEP[self.bits]
        return (-(-out_features // reference.TILE), steps, 4 * reference.TILE)

    def scales_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """The packed scales' shape."""
        return (-(-out_features // reference.TILE), self._num_groups(in_features), reference.TILE)

    def _num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds under `quantization_config`."""
        return {"quant_method": _METHOD, "bits": self.bits, "group_size": self.group_size, "version": _VERSION}

    @classmethod
    def of(cls, config: ModelConfig) -> Quantization | None:
        """What a config says of its weights; None if they are floats.

        Raises: ConfigError for another program's way of quantising, and for wrong values.
        """
        raw = config.extras.get(CONFIG_KEY)
        if raw is None:
            return None
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        if method != _METHOD:
            raise ConfigError(
                f"{CONFIG_KEY}: quant_method is {str(method)[:50]!r}, Bluejay opens only its own ({_METHOD!r}); "
                "take the model's float weights and quantise them: bluejay convert SRC DST --quantize int8"
            )
        if raw.get("version") != _VERSION:
            raise ConfigError(
                f"{CONFIG_KEY}: version is {str(raw.get('version'))[:50]}, this Bluejay reads {_VERSION}; "
                "quantise the model's float weights again: bluejay convert SRC DST --quantize int8"
            )
        try:
            return cls(raw.get("bits"), raw.get("group_size"))
        except ConfigError as error:
            raise ConfigError(f"{CONFIG_KEY}: {error}") from None


def with_quantization(config: ModelConfig, quantization: Quantization | None) -> ModelConfig:
    """The same network, its weights kept in another way; None for floats."""
    extras = {key: value for key, value in config.extras.items() if key != CONFIG_KEY}
    if quantization is not None:
        extras[CONFIG_KEY] = quantization.to_dict()
    return replace(config, extras=extras)


class _Packed(nn.Module):
    """Integers and scales of a linear layer, as buffers: nothing here learns.

    Attributes (N outputs): weight uint8 and scales float16, packed as in `ops.reference`; bias [N] float32 or None.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, quantization: Quantization, *, bias: bool, device: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantization = quantization
        shape = (out_features, in_features)
        weight = torch.empty(quantization.weight_shape(*shape), dtype=torch.uint8, device=device)
        scales = torch.empty(quantization.scales_shape(*shape), dtype=torch.float16, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def multiply(self, x: Tensor) -> Tensor:
        """Shapes: x [..., K] float32 -> [..., N] float32."""
        linear = ops.linear_int8 if self.quantization.bits == 8 else ops.linear_int4
        return linear(x, self.weight, self.scales, self.bias, out_features=self.out_features)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over the weights [N, K] and the bias [N] of a layer of floats."""
        self.weight, self.scales = pack_weight(weight, self.quantization)
        self.bias = None if bias is None else bias.detach().float()

    def dequantized(self) -> Tensor:
        """The weights that the integers stand for, [N, K] float32."""
        return unpack_weight(self.weight, self.scales, self.quantization, self.out_features, self.in_features)


class _PackedLinear(_Packed):
    bits: ClassVar[int]

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, group_size: int = 32, device: Any = None
    ) -> None:
        super().__init__(in_features, out_features, Quantization(self.bits, group_size), bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in_features] float32 -> [..., out_features] float32."""
        return self.multiply(x)


class Int8Linear(_PackedLinear):
    """A linear layer with weights of 8 bits and activations that are quantised on the fly."""

    bits = 8


class Int4Linear(_PackedLinear):
    """A linear layer with weights of 4 bits and activations that are quantised on the fly."""

    bits = 4


class QuantizedHead(_Packed):
    """Hidden states to logits, as `layers.Head`; a tied one has packed weights of its own."""

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """hidden_states [..., n_embd] float32 -> logits [..., vocab_size]; the embedding is not looked at."""
        return self.multiply(hidden_states)


class WidenedEmbedding(Embedding):
    """An embedding whose rows are kept in 16 bits and handed out as float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: input [...] int64 -> [..., n_embd] float32."""
        return super().forward(input).float()


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a network is quantised."""
    return any(isinstance(module, _Packed) for module in model.modules())


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The layers that can be quantised, by name, in the network's order: (outputs, inputs)."""
    return dict(_linears(build(config, device="meta")))


def _linears(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, (module.out_features, module.in_features)
        elif isinstance(module, Head):
            config: Any = model.config
            yield name, (config.vocab_size, config.n_embd)


def quantized_names(stored: Iterable[str]) -> set[str]:
    """The layers that are quantised: those that have scales."""
    return {name.removesuffix(SCALES) for name in stored if name.endswith(SCALES)}


def stored_shapes(config: ModelConfig, stored: Iterable[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """What a network's file must hold, in the order in which it is written: shape, and dtype where it is not free.

    Args:
        stored: the names in the file; a layer is quantised if its scales are among them.
    Raises: ConfigError if the config's `quantization_config` will not do.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    quantization = Quantization.of(config)
    model = build(config, device="meta")
    # Packed tensors come first: their sizes are whole cache lines, so that all of them begin with one.
    names = quantized_names(stored)
    for name, shape in _linears(model):
        if quantization is not None and name in names:
            found[name + WEIGHT] = quantization.weight_shape(*shape), torch.uint8
            found[name + SCALES] = quantization.scales_shape(*shape), torch.float16
    for name, tensor in model.state_dict().items():
        found.setdefault(name, (tuple(tensor.shape), None))
    return found


def build_quantized(
    config: ModelConfig, quantization: Quantization, names: Collection[str] | None = None, *, device: str = "cpu"
) -> GPTJ | GPTNeo:
    """Make the network of a config with quantised layers, not yet filled.

    Args:
        names: which linear layers are quantised; None for all. The others are float32.
        device: "cpu" or, for a network that takes no memory, "meta".
    """
    model = build(config, device="meta")
    for name, (out_features, in_features) in list(_linears(model)):
        if names is None or name in names:
            old = model.get_submodule(name)
            has_bias = old.bias is not None
            model.set_submodule(name, _empty(old, in_features, out_features, quantization, has_bias, "meta"))
    _widen_embeddings(model)
    elementwise_by_kernels(model)
    model.config = with_quantization(config, quantization)
    if device != "meta":
        model = model.to_empty(device=device)
        for weight in model.buffers():
            prefer_huge_pages(weight)
    return model.requires_grad_(False).eval()


def _empty(
    old: nn.Module, in_features: int, out_features: int, quantization: Quantization, bias: bool, device: str
) -> _Packed:
    """A quantised layer for the place of one of floats."""
    if isinstance(old, Head):
        return QuantizedHead(in_features, out_features, quantization, bias=bias, device=device)
    kind = Int8Linear if quantization.bits == 8 else Int4Linear
    return kind(in_features, out_features, bias=bias, group_size=quantization.group_size, device=device)


def _widen_embeddings(model: GPTJ | GPTNeo) -> None:
    """Let embeddings of 16 bits feed blocks that compute in float32; a head of floats that is tied needs float32."""
    tied = isinstance(model.lm_head, Head) and model.lm_head.weight is None
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Embedding) and not (tied and name.endswith("wte")):
            new = WidenedEmbedding(old.num_embeddings, old.embedding_dim, device="meta")
            new.weight = old.weight
            model.set_submodule(name, new)


def stored_embedding(weight: Tensor) -> Tensor:
    """An embedding as a quantised model keeps it: 16 bits stay what they are, float32 becomes float16 if it fits."""
    if weight.dtype.itemsize == 2:
        return weight
    fits = bool((weight.abs().amax() < torch.finfo(torch.float16).max).item())  # NaN does not fit either
    return weight.half() if fits else weight.float()


def quantize(
    model: GPTJ | GPTNeo,
    bits: int,
    group_size: int = 32,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> GPTJ | GPTNeo:
    """Quantise a network in place, layer by layer, each one's float weights freed at once.

    Args:
        model: of floats, on the CPU; it can no longer be trained.
        bits: 8 or 4.
        group_size: 32 or 64 weights share a scale.
        on_progress: called with the weights quantised so far and the weights in all.
    Returns: the same network, now computing in float32.
    Raises: ConfigError for other numbers, or a network that is quantised or not on the CPU; KernelError for weights
        that are NaN or infinite, the network then being quantised in part.
    """
    quantization = Quantization(bits, group_size)
    if is_quantized(model):
        raise ConfigError("the network is quantised already; quantise the one of floats")
    if {parameter.device.type for parameter in model.parameters()} != {"cpu"}:
        raise ConfigError("the network is not on the CPU, where int8 and int4 run; move it there: model.to('cpu')")
    layers = list(_linears(model))
    total = sum(out_features * in_features for _, (out_features, in_features) in layers)
    done = 0
    for name, (out_features, in_features) in layers:
        old: Any = model.get_submodule(name)
        new = _empty(old, in_features, out_features, quantization, old.bias is not None, "meta")
        weight = model.transformer.wte.weight if old.weight is None else old.weight
        new.fill(weight.detach(), old.bias)
        model.set_submodule(name, new)
        done += out_features * in_features
        if on_progress is not None:
            on_progress(done, total)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
        elif isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(stored_embedding(module.weight.detach()))
    _widen_embeddings(model)
    elementwise_by_kernels(model)
    model.config = with_quantization(model.config, quantization)
    return model.requires_grad_(False).eval()


def random_quantized(config: ModelConfig, bits: int, group_size: int = 32, *, seed: int = 0) -> GPTJ | GPTNeo:
    """A network of random weights, written straight into the quantised form: memory holds never more than that.

    Weights have a standard deviation of 0.02, so that activations stay as large as a trained network's.
    """
    model = build_quantized(config, Quantization(bits, group_size), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _Packed):
            _randomise(module, generator)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=torch.float16)
            module.weight = nn.Parameter(weight.normal_(0, 0.02, generator=generator), requires_grad=False)
    return model


def _randomise(layer: _Packed, generator: torch.Generator) -> None:
    # Whole words at a time: drawing 6 G numbers one by one would take a minute.
    layer.weight.view(torch.int64).random_(-(2**63), None, generator=generator)
    spread = 4.6  # of the integers -8 … 7, all as likely
    if layer.quantization.bits == 8:
        layer.weight.bitwise_and_(127).add_(reference.WEIGHT_OFFSET[8] - 64)  # the integers -64 … 63
        spread = 37.0
    # Signs in turn: the mean of the integers, -1/2, would otherwise be a direction that all layers share.
    layer.scales.fill_(0.02 / spread)
    layer.scales[:, 1::2] *= -1
    if layer.bias is not None:
        layer.bias.zero_()


def pack_weight(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Quantise and pack the weights [N, K] of a layer, on all of the pool's threads.

    Returns: weight uint8 and scales float16, the same for any number of threads.
    Raises: KernelError for NaN and infinity.
    """
    N, K = weight.shape
    packed = prefer_huge_pages(torch.empty(quantization.weight_shape(N, K), dtype=torch.uint8))
    scales = prefer_huge_pages(torch.empty(quantization.scales_shape(N, K), dtype=torch.float16))
    rounded = reference.quantize_int8 if quantization.bits == 8 else reference.quantize_int4
    at_once = max(1, PACKED_AT_ONCE // K // reference.TILE)

    def pack(tile: int) -> None:
        rows = weight[tile * reference.TILE : (tile + at_once) * reference.TILE]
        found = reference.pack(
            *rounded(rows, quantization.group_size), bits=quantization.bits, group_size=quantization.group_size
        )
        packed[tile : tile + at_once], scales[tile : tile + at_once] = found

    in_parts(pack, packed.shape[0], at_once)
    return packed, scales


def unpack_weight(
    weight: Tensor, scales: Tensor, quantization: Quantization, out_features: int, in_features: int
) -> Tensor:
    """The weights that a layer's integers stand for, [out_features, in_features] float32; holds little besides."""
    out = torch.empty(out_features, in_features)
    at_once = max(1, PACKED_AT_ONCE // in_features // reference.TILE)
    for tile in range(0, weight.shape[0], at_once):
        rows = out[tile * reference.TILE : (tile + at_once) * reference.TILE]
        rows[:] = reference.dequantize(
            weight[tile : tile + at_once],
            scales[tile : tile + at_once],
            bits=quantization.bits,
            out_features=rows.shape[0],
            in_features=in_features,
        )
    return out
