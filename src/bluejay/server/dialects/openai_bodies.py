"""What OpenAI's clients send, and what it means in the engine's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictStr, WithJsonSchema

from bluejay.decoding.params import SamplingParams
from bluejay.errors import InvalidRequest, UnsupportedOption
from bluejay.server.generation import Prompt
from bluejay.server.sampling import MAX_BIASES, MAX_STOPS, sampling_params

DEFAULTS = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 0}  # OpenAI's; top_k has no bound there

# OpenAI's names -> the engine's. What is in neither list has the same name.
NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "n": "num_return_sequences"}
# Of the door, not of decoding.
_OUTSIDE = ("model", "prompt", "suffix", "best_of", "echo", "stream", "stream_options", "seed", "user")
_LENGTHS = ("max_new_tokens", "max_length")

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def _prompts(value: Any) -> list[Prompt]:
    """One text, several, one list of token ids, or several: always as several."""
    listed = value if isinstance(value, list) else [value]
    if listed and set(map(type, listed)) == {int}:
        listed = [listed]
    if not listed or not all(isinstance(item, str) or _is_ids(item) for item in listed):
        raise ValueError("expected a text, several, a list of token ids from 0, or several such lists, and none empty")
    return listed


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**31


Prompts = Annotated[
    list[Any],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]},
    ),
]


def _biases(value: Any) -> dict[int, float]:
    """Token ids, which are texts where JSON has them, and what is added to their logits."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"expected a table of at most {MAX_BIASES:,} token ids")
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"{token[:40]!r} is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {token} is {str(bias)[:40]}, expected a number from -100 to 100")
    return {int(token): bias for token, bias in value.items()}


Biases = Annotated[
    dict[int, float],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "maxProperties": MAX_BIASES,
        }
    ),
]
Ids = Annotated[list[int], Field(max_length=MAX_BIASES, fail_fast=True)]
Text = Annotated[StrictStr, Field(min_length=1, max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    model: str | None = Field(None, description="The model's name; needed where there are several.")


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="One more chunk at the end, with the tokens that it took.")


class CompletionBody(_Body):
    """A prompt or several to go on from; OpenAI's options, and below them those of Hugging Face's generate."""

    prompt: Prompts = Field(description="A text, several, a list of token ids, or several such lists.")
    suffix: str | None = Field(None, description="Not supported: these models only go on.")
    max_tokens: int | None = Field(None, ge=0, le=2**31, description="New tokens; 16 where nothing is said.")
    temperature: float | None = Field(None, ge=0, description="0 takes the likeliest tokens.")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, description="Answers for each prompt.")
    best_of: int | None = Field(None, ge=1, description="Make so many, and return the n likeliest by token.")
    echo: bool | None = Field(None, description="Begin answers with the prompt; with max_tokens 0 it is only read.")
    logprobs: int | None = Field(None, ge=0, description="So many likeliest tokens beside each token.")
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description="Ends an answer."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = Field(None, description="Token id -> what is added to its logit, from -100 to 100.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    user: str | None = Field(None, description="Taken and not looked at.")

    min_tokens: int | None = Field(None, ge=0)
    max_new_tokens: int | None = Field(None, ge=1, description="As max_tokens.")
    min_new_tokens: int | None = Field(None, ge=0, description="As min_tokens.")
    max_length: int | None = Field(None, ge=1, description="The same with the prompt counted.")
    min_length: int | None = Field(None, ge=0)
    do_sample: bool | None = Field(None, description="Where nothing is said: if the temperature is above 0, no beams.")
    num_beams: int | None = Field(None, ge=1)
    num_beam_groups: int | None = Field(None, ge=1)
    diversity_penalty: float | None = Field(None, ge=0)
    early_stopping: bool | Literal["never"] | None = None
    length_penalty: float | None = Field(None, ge=-50, le=50)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    encoder_no_repeat_ngram_size: int | None = Field(None, ge=0)
    bad_words_ids: Annotated[list[Ids], Field(max_length=MAX_BIASES, fail_fast=True)] | None = None
    max_time: float | None = Field(None, ge=0)
    remove_invalid_values: bool | None = None
    eos_token_id: int | Annotated[list[int], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None

    @property
    def num_answers(self) -> int:
        """Answers for each prompt that go back."""
        return self.n or 1

    @property
    def reads_only(self) -> bool:
        """Whether nothing is to be generated."""
        return self.max_tokens == 0

    def check(self) -> None:
        """Raises: RequestError for options that do not go together, or that nobody here can serve."""
        if self.suffix:
            raise UnsupportedOption(
                "suffix is not supported: these models go on from a text, they fill no gap", "suffix"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is given, expected none without stream", "stream_options")
        for name in ("max_tokens", "min_tokens"):
            if getattr(self, name) is not None and getattr(self, NAMES[name]) is not None:
                raise InvalidRequest(f"{name} and {NAMES[name]} say the same, expected one of them", name)
        if self.best_of is not None:
            self._check_best_of(self.best_of)

    def _check_best_of(self, best_of: int) -> None:
        if best_of < self.num_answers:
            raise InvalidRequest(f"best_of is {best_of}, expected n={self.num_answers} or more", "best_of")
        if best_of > self.num_answers and self.stream:
            raise InvalidRequest(f"best_of is {best_of}, expected n={self.num_answers} with stream", "best_of")
        if (self.num_beams or 1) > 1:
            raise InvalidRequest("best_of is for answers without beams, which are ranked by themselves", "best_of")

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """In the engine's words. Raises: InvalidRequest in OpenAI's.

        Args:
            defaults: of the model.
        """
        said = {NAMES.get(name, name): value for name, value in self if name not in _OUTSIDE and value is not None}
        said["seed"] = None if self.seed is None else self.seed % 2**64
        said["num_return_sequences"] = self.best_of or self.num_answers
        if self.best_of is not None and self.best_of > self.num_answers:
            said["logprobs"] = self.logprobs or 0
        if self.echo and self.logprobs is not None:
            said["prompt_logprobs"] = self.logprobs
        if self.reads_only:
            said["max_new_tokens"] = 1
        own = dict(DEFAULTS)
        if any(name in said or name in defaults for name in _LENGTHS):
            del own["max_new_tokens"]
        if any(name in said for name in _LENGTHS):  # what a caller says of lengths stands before all of the model's
            defaults = {name: value for name, value in defaults.items() if name not in _LENGTHS}
        merged = {**own, **defaults, **{name: value for name, value in said.items() if value is not None}}
        try:
            return sampling_params(_mode(merged, said))
        except InvalidRequest as error:
            raise _in_their_words(error) from None


def _mode(merged: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Whether tokens are drawn, where nobody says so: if the temperature is above 0, and there are no beams."""
    beams = merged.get("num_beams", 1) > 1
    if "do_sample" not in said and ("temperature" in said or "num_beams" in said or "do_sample" not in merged):
        merged["do_sample"] = merged["temperature"] > 0 and not beams
    if not merged["do_sample"] and not beams and merged["num_return_sequences"] > 1:
        # Several likeliest answers are equal. The engine makes them by draws that have no choice.
        narrow = {"top_k": 1, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "temperature": 1.0}
        return {**merged, **narrow, "do_sample": True}
    return merged


def _in_their_words(error: InvalidRequest) -> InvalidRequest:
    """The error with OpenAI's names of options."""
    text, param = str(error), error.param
    for theirs, ours in NAMES.items():
        text, param = text.replace(ours, theirs), theirs if param == ours else param
    return InvalidRequest(text, param)


class EmbeddingBody(_Body):
    """A text or several, each to become a vector."""

    input: Prompts = Field(description="A text, several, a list of token ids, or several such lists.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is of little-endian float32.")
    dimensions: int | None = Field(None, ge=1, description="The vectors' width; another than the model's is refused.")
    user: str | None = Field(None, description="Taken and not looked at.")

    def texts(self) -> Sequence[Prompt]:
        """What to embed. Raises: InvalidRequest for an empty text."""
        if any(not text for text in self.input):
            raise InvalidRequest("input holds an empty text, which has nothing to embed", "input")
        return self.input


class TokenizeBody(_Body):
    """A text to cut into tokens."""

    prompt: str
    add_special_tokens: bool = Field(True, description="These models' tokenizers add none.")
    return_token_strs: bool | None = Field(None, description="Also each token as the vocabulary spells it.")


class DetokenizeBody(_Body):
    """Tokens to put together."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
