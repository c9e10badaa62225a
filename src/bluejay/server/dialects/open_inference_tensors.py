"""What a request of the Open Inference Protocol means, over HTTP and gRPC alike: tensors in, tensors out.

    text_input   BYTES  [n] or [n, 1]   n prompts; other names made of "text", "input" or "prompt" mean the same
    input_ids    INT64  [n, t]          n prompts of t token ids
    temperature  FP32   [1]             any option, as a tensor of one element; parameters say the same

Source: the Open Inference Protocol (KServe's "V2"); Triton's binary tensors and its text_input, text_output.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np

from bluejay.decoding.params import SamplingParams
from bluejay.engine.request import GenerationEvent, RequestOutput
from bluejay.errors import InvalidRequest, UnsupportedOption
from bluejay.server.generation import Item, Prompt, items_of
from bluejay.server.options import ServerOptions
from bluejay.server.sampling import OPTIONS, refuse_untold, sampling_params
from bluejay.tokenizer import Tokenizer

PROMPT_NAME = re.compile(r"(text|input|prompt)s?([_-]*(text|input|prompt)s?)?[_-]*\d{0,3}", re.IGNORECASE)
MAX_TENSORS = 256  # of a request
MAX_DIMS = 2  # no tensor here has more
MAX_ELEMENTS = 2**20  # of one tensor, before anything is made for them
NO_TOKEN = -1  # fills rows of output_ids that are shorter than the longest; the id of no token
LENGTH = struct.Struct("<I")  # stands before each element of a binary BYTES tensor

# Datatype -> how numpy reads it from bytes. BYTES is read here; BF16 is numpy's not.
DATATYPES = {
    "BOOL": "?",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
}
INPUTS = (("text_input", "BYTES", (-1,)), ("input_ids", "INT64", (-1, -1)))
OUTPUTS = (
    ("text_output", "BYTES", (-1,)),
    ("finish_reason", "BYTES", (-1,)),
    ("num_tokens", "INT64", (-1,)),
    ("output_ids", "INT64", (-1, -1)),
)
OUTPUT_NAMES = tuple(name for name, _, _ in OUTPUTS)
# Names that Triton's backends of language models have, beside Hugging Face's.
ALIASES = {"max_tokens": "max_new_tokens", "exclude_input_in_output": "exclude_prompt"}
FLAGS = ("exclude_prompt", "stream")


@dataclass(frozen=True)
class Tensor:
    """A tensor, its values row after row: text for BYTES, else numbers or booleans."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]

    def raw(self) -> bytes:
        """As a binary tensor."""
        if self.datatype != "BYTES":
            return np.array(self.values, DATATYPES[self.datatype]).tobytes()
        texts = [text.encode(errors="replace") for text in self.values]
        return b"".join(part for text in texts for part in (LENGTH.pack(len(text)), text))


@dataclass(frozen=True)
class Inference:
    """What is to be generated, and which tensors are to tell of it.

    Attributes:
        is_column: the prompts came as [n, 1]; the answers then are [n, answers of each].
        exclude_prompt, stream: None where the caller did not say.
    """

    prompts: Sequence[Prompt]
    is_column: bool
    params: SamplingParams
    exclude_prompt: bool | None
    stream: bool | None
    outputs: tuple[str, ...]

    def items(self, options: ServerOptions) -> list[Item]:
        """For the service. Raises: InvalidRequest for more prompts than one request may have."""
        return items_of(self.prompts, self.params, options)


def tensor_of_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """A tensor whose values were told one by one. Raises: InvalidRequest for values that are none of the datatype."""
    size = _size(name, datatype, shape)
    if len(values) != size:
        raise InvalidRequest(
            f"input {name[:100]!r}: the shape {list(shape)} holds {size:,} elements, the data {len(values):,}", "inputs"
        )
    read = _reader(name, datatype)
    return Tensor(name, datatype, tuple(shape), [read(value) for value in values])


def tensor_of_bytes(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """A binary tensor. Raises: InvalidRequest where the bytes do not fit the shape."""
    size = _size(name, datatype, shape)
    if datatype == "BYTES":
        return tensor_of_values(name, datatype, shape, list(islice(_elements(name, raw), size + 1)))
    kind = np.dtype(DATATYPES[datatype])
    if len(raw) != size * kind.itemsize:
        raise InvalidRequest(
            f"input {name[:100]!r}: the shape {list(shape)} of {datatype} takes {size * kind.itemsize:,} bytes, and "
            f"there are {len(raw):,}",
            "inputs",
        )
    return Tensor(name, datatype, tuple(shape), np.frombuffer(raw, kind).tolist())


def read_inference(
    tensors: Sequence[Tensor],
    parameters: Mapping[str, Any],
    outputs: Sequence[str],
    defaults: Mapping[str, Any],
) -> Inference:
    """What a request asks for.

    Args:
        parameters: options by name.
        outputs: names of tensors; none for the answer alone, in the form in which the prompts came.
        defaults: options where the caller says nothing.
    Raises: InvalidRequest for what is missing, told twice, or not known.
    """
    holding: Tensor | None = None
    chosen: dict[str, Any] = {}
    for tensor in tensors:
        if tensor.name == "input_ids" or PROMPT_NAME.fullmatch(tensor.name):
            if holding is not None:
                raise InvalidRequest(
                    f"inputs {holding.name!r} and {tensor.name!r} both hold prompts; send one", "inputs"
                )
            holding = tensor
        else:
            _choose(chosen, tensor.name, _option(tensor))
    if holding is None:
        raise InvalidRequest(f"inputs hold no prompts; expected one of: {_known_inputs()}", "inputs")
    prompts = _ids(holding) if holding.name == "input_ids" else _texts(holding)
    wanted = _wanted(outputs) or (("output_ids",) if holding.name == "input_ids" else ("text_output",))
    for name, value in parameters.items():
        _choose(chosen, name, value)
    flags, params = read_options(chosen, defaults)
    return Inference(prompts, len(holding.shape) == 2 and holding.datatype == "BYTES", params, *flags, wanted)


def read_options(
    chosen: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[tuple[bool | None, bool | None], SamplingParams]:
    """The flags `exclude_prompt` and `stream`, None where not said, and how to generate: greedily by default.

    Raises: InvalidRequest with everything that is wrong.
    """
    named: dict[str, Any] = {}
    for name, value in chosen.items():
        _choose(named, ALIASES.get(name, name), value)
    for name in FLAGS:
        if not isinstance(named.get(name), bool | None):
            raise InvalidRequest(f"{name} is {str(named[name])[:80]!r}, expected true or false", name)
    refuse_untold(named)
    exclude_prompt, stream = (named.pop(name, None) for name in FLAGS)
    return (exclude_prompt, stream), sampling_params(defaults, named)


def answer_tensors(asked: Inference, outputs: Sequence[RequestOutput], tokenizer: Tokenizer) -> list[Tensor]:
    """The tensors that were asked for, in the order of the asking; all answers to the first prompt come first."""
    answers = [(place, sequence) for place, output in enumerate(outputs) for sequence in output.sequences]
    shape = (len(outputs), len(answers) // len(outputs)) if asked.is_column else (len(answers),)
    whole = not asked.exclude_prompt

    def tensor(name: str) -> Tensor:
        if name == "text_output":
            starts = [prompt_text(prompt, tokenizer) if whole else "" for prompt in asked.prompts]
            return Tensor(name, "BYTES", shape, [starts[place] + sequence.text for place, sequence in answers])
        if name == "finish_reason":
            return Tensor(name, "BYTES", shape, [str(sequence.finish_reason) for _, sequence in answers])
        if name == "num_tokens":
            return Tensor(name, "INT64", shape, [len(sequence.token_ids) for _, sequence in answers])
        rows = [(outputs[place].prompt_token_ids if whole else []) + sequence.token_ids for place, sequence in answers]
        width = max(map(len, rows))
        values = [token for row in rows for token in row + [NO_TOKEN] * (width - len(row))]
        return Tensor(name, "INT64", (len(rows), width), values)

    return [tensor(name) for name in asked.outputs]


def check_stream(asked: Inference) -> None:
    """Raises: UnsupportedOption where pieces are to tell more than what is new."""
    if asked.stream is not False and asked.exclude_prompt is False:
        raise UnsupportedOption(
            "exclude_prompt is false, and pieces of an answer tell only what is new; leave it out, or ask with stream "
            "false",
            "exclude_prompt",
        )


def piece_tensors(asked: Inference, event: GenerationEvent) -> list[Tensor]:
    """The tensors that were asked for, of a piece of one answer; none where it brings nothing that they show."""
    if not event.text and event.finish_reason is None and not {"num_tokens", "output_ids"} & set(asked.outputs):
        return []
    reason = "" if event.finish_reason is None else str(event.finish_reason)
    tensors = {
        "text_output": Tensor("text_output", "BYTES", (1,), [event.text]),
        "finish_reason": Tensor("finish_reason", "BYTES", (1,), [reason]),
        "num_tokens": Tensor("num_tokens", "INT64", (1,), [len(event.token_ids)]),
        "output_ids": Tensor("output_ids", "INT64", (1, len(event.token_ids)), event.token_ids),
    }
    return [tensors[name] for name in asked.outputs]


def prompt_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """A prompt as text, however it came."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


def parsed(name: str, text: str) -> Any:
    """An option that travels as text, in the type that the option has; the text itself where it is none of it."""
    kind = _KINDS.get(ALIASES.get(name, name), "bool" if ALIASES.get(name, name) in FLAGS else "str")
    with suppress(ValueError, RecursionError):
        if "str" not in kind and ("Sequence" in kind or "Mapping" in kind):
            return json.loads(text)
        if "bool" in kind and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if "float" in kind:
            return float(text)
        if "int" in kind:
            return int(text)
    return text


_KINDS = {field.name: str(field.type) for field in fields(SamplingParams)}


def _size(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Elements of a shape; nothing is made for them yet."""
    if datatype != "BYTES" and datatype not in DATATYPES:
        known = ", ".join(("BYTES", *DATATYPES))
        raise InvalidRequest(
            f"input {name[:100]!r}: the datatype is {datatype[:100]!r}, expected one of {known}", "inputs"
        )
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(
            f"input {name[:100]!r}: the shape has {len(shape):,} dimensions, expected at most {MAX_DIMS}", "inputs"
        )
    if any(not 0 <= dim < 2**63 for dim in shape):
        raise InvalidRequest(
            f"input {name[:100]!r}: the shape is {str(list(shape))[:100]}, expected dimensions of 0 or more", "inputs"
        )
    if (size := math.prod(shape)) > MAX_ELEMENTS:
        raise InvalidRequest(
            f"input {name[:100]!r}: the shape {list(shape)} holds {size:,} elements, expected at most {MAX_ELEMENTS:,}",
            "inputs",
        )
    return size


def _elements(name: str, raw: bytes) -> Iterator[bytes]:
    """The elements of a binary BYTES tensor."""
    place = 0
    while place < len(raw):
        end = place + LENGTH.size
        if end <= len(raw):
            end += LENGTH.unpack_from(raw, place)[0]
        if end > len(raw) or end < place + LENGTH.size:
            raise InvalidRequest(
                f"input {name[:100]!r}: the binary data ends within an element; each begins with its length in 4 "
                "bytes, little-endian",
                "inputs",
            )
        yield raw[place + LENGTH.size : end]
        place = end


def _reader(name: str, datatype: str) -> Callable[[Any], Any]:
    """What turns one value, as JSON or protobuf has it, into one of the datatype."""

    def wrong(value: Any, why: str = "") -> InvalidRequest:
        return InvalidRequest(f"input {name[:100]!r}: {str(value)[:80]!r} is no {datatype}{why}", "inputs")

    def text(value: Any) -> str:
        if not isinstance(value, str | bytes):
            raise wrong(value)
        try:
            return value if isinstance(value, str) else value.decode()
        except UnicodeDecodeError as error:
            raise wrong(value[:20], f" in UTF-8, at byte {error.start}") from None

    if datatype == "BYTES":
        return text
    kind = np.dtype(DATATYPES[datatype])
    bounds = np.iinfo(kind) if kind.kind in "iu" else None

    def number(value: Any) -> Any:
        if bounds is not None:
            fits = type(value) is int and bounds.min <= value <= bounds.max
        else:
            fits = type(value) is bool if kind.kind == "b" else type(value) in (int, float)
        if not fits:
            raise wrong(value)
        return value

    return number


def _texts(tensor: Tensor) -> list[str]:
    if tensor.datatype != "BYTES":
        raise InvalidRequest(
            f"input {tensor.name!r} is {tensor.datatype}, expected BYTES; token ids are called input_ids", "inputs"
        )
    if len(tensor.shape) == 0 or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
        raise InvalidRequest(
            f"input {tensor.name!r}: the shape is {list(tensor.shape)}, expected [n] or [n, 1]", "inputs"
        )
    return list(tensor.values)


def _ids(tensor: Tensor) -> list[list[int]]:
    if "INT" not in tensor.datatype:
        raise InvalidRequest(
            f"input 'input_ids' is {tensor.datatype}, expected INT64 or another whole number", "inputs"
        )
    if len(tensor.shape) != 2 or tensor.shape[1] == 0:
        raise InvalidRequest(
            f"input 'input_ids': the shape is {list(tensor.shape)}, expected [prompts, tokens of each]", "inputs"
        )
    width = tensor.shape[1]
    return [list(tensor.values[start : start + width]) for start in range(0, len(tensor.values), width)]


def _option(tensor: Tensor) -> Any:
    """An option that came as a tensor."""
    if tensor.name not in (*OPTIONS, *ALIASES, *FLAGS):
        raise InvalidRequest(
            f"unknown input {tensor.name[:100]!r}; expected one of: {_known_inputs()}, and options by name", "inputs"
        )
    if len(tensor.values) != 1:
        raise InvalidRequest(
            f"input {tensor.name!r} is an option, and has {len(tensor.values):,} elements; expected 1", tensor.name
        )
    return tensor.values[0]


def _wanted(outputs: Sequence[str]) -> tuple[str, ...]:
    for place, name in enumerate(outputs):
        if name not in OUTPUT_NAMES:
            raise InvalidRequest(
                f"unknown output {name[:100]!r}; expected some of: {', '.join(OUTPUT_NAMES)}", "outputs"
            )
        if name in outputs[:place]:
            raise InvalidRequest(f"output {name!r} is asked for twice", "outputs")
    return tuple(outputs)


def _choose(chosen: dict[str, Any], name: str, value: Any) -> None:
    if name in chosen:
        raise InvalidRequest(f"{name[:100]} is told twice", name[:100])
    chosen[name] = value


def _known_inputs() -> str:
    return ", ".join(f"{name} ({datatype})" for name, datatype, _ in INPUTS)
