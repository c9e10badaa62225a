"""What a caller may ask of decoding: `SamplingParams`, with the names and meanings of Hugging Face's `generate`."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bluejay.errors import InvalidRequest

Mode = Literal["greedy", "sample", "beam", "beam_sample", "group_beam"]

MAX_BEAMS = 1_000  # each is a row of keys and values: a slip of the hand must not take all memory
MAX_RETURN_SEQUENCES = 1_000
MAX_BIAS = 100  # OpenAI's; an infinite one would bring back what must never be chosen
DEFAULT_NEW_TOKENS = 20  # transformers: the default max_length of 20 counts new tokens where nothing else is said


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    Options that mean nothing in the chosen mode (`temperature` without `do_sample`, `length_penalty` without beams) are
    accepted and have no effect, as in transformers.

    Attributes:
        max_length: tokens of prompt and answer together. Where neither this nor `max_new_tokens` is given, the answer
            has at most 20 tokens.
        max_new_tokens: tokens of the answer; where both are given, this one counts.
        min_length: tokens of prompt and answer together before end-of-text is admitted.
        min_new_tokens: the same for the answer alone; where both are given, this one counts.
        do_sample: draw tokens rather than take the likeliest.
        num_beams: beams of a beam search, at most 1,000; 1 is none.
        num_beam_groups, diversity_penalty: diverse beam search: groups that divide `num_beams`, and what a token costs
            for each time that an earlier group chose it in the same step.
        early_stopping: when a beam search has `num_beams` finished answers: True stops at once, False stops when no
            better one is likely, "never" only when none is possible.
        length_penalty: exponent of the answer's length, by which a beam's score is divided; above 0 favours long ones.
        temperature: divides the logits before a draw.
        top_k: draw among the k likeliest; 0 and None draw among all.
        top_p: draw among the likeliest that together reach this probability; 1 and None draw among all.
        min_p: draw among those with at least this fraction of the likeliest one's probability.
        typical_p: draw among those whose surprise is nearest to the expected one, together of this probability.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely to come again.
        frequency_penalty, presence_penalty: what a token's logit loses for each time that it is in the answer, and for
            being in it at all; from -2 to 2, the prompt does not count. OpenAI's.
        logit_bias: token id -> what is added to its logit before all else; 100 makes it all but certain, -100 keeps it
            away. OpenAI's, and transformers' `sequence_bias` of single tokens.
        no_repeat_ngram_size: n-grams of this size come only once in prompt and answer; 0 is off.
        encoder_no_repeat_ngram_size: n-grams of this size in the prompt do not come in the answer; 0 is off.
        bad_words_ids: token sequences that never come.
        num_return_sequences: answers for one prompt, at most 1,000; needs `do_sample`, or as many beams.
        max_time: seconds from a request's first step; checked after every token.
        remove_invalid_values: take NaN logits as 0 and infinite ones as the largest finite number.
        stop: texts that end the answer; they are not part of it. Looked for in the answer, not in the prompt.
        seed: makes draws repeatable, whatever else is in the batch: with one prompt and one answer, the tokens that
            transformers draws after `torch.manual_seed(seed)`. None draws afresh each time.
        logprobs: for each token of the answer its log-probability and those of this many likeliest; None is off, 0 the
            chosen token alone. They are the model's own, before any option above changes them.
        prompt_logprobs: the same for each token of the prompt.
        eos_token_id: token ids that end the answer; None takes the model's.
        ignore_eos: no token ends the answer.

    Raises: InvalidRequest, with everything that is wrong at once; its `param` is the first.
    Source: transformers 4.56.2, GenerationConfig and `generate`; `stop` is its `stop_strings`. OpenAI's
        API reference, completions, for what is OpenAI's.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    num_return_sequences: int = 1
    max_time: float | None = None
    remove_invalid_values: bool = False
    stop: str | Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        problems = list(_wrong_values(self))
        if not problems:  # how options go together is only asked of options that are right by themselves
            problems = list(_wrong_combinations(self))
        if problems:
            text = "; ".join(
                f"{name} is {reprlib.repr(getattr(self, name))}, {expected}" for name, expected in problems
            )
            raise InvalidRequest(text, param=problems[0][0])
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, float(value))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.logit_bias is not None:
            bias = {token: float(value) for token, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        if self.bad_words_ids is not None:
            object.__setattr__(self, "bad_words_ids", tuple(tuple(word) for word in self.bad_words_ids))
        if self.eos_token_id is not None:
            ids = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)
            object.__setattr__(self, "eos_token_id", ids)

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Options as JSON has them, where the token ids of `logit_bias` are texts: {"50256": -100}.

        Raises: InvalidRequest, with everything that is wrong at once; TypeError for an unknown name.
        """
        if not isinstance(bias := options.get("logit_bias"), Mapping):
            return cls(**options)
        return cls(**{**options, "logit_bias": {_token_id(token): value for token, value in bias.items()}})

    @property
    def mode(self) -> Mode:
        """How tokens are chosen: "greedy", "sample", "beam", "beam_sample" or "group_beam"."""
        if self.num_beams == 1:
            return "sample" if self.do_sample else "greedy"
        if self.num_beam_groups > 1:
            return "group_beam"
        return "beam_sample" if self.do_sample else "beam"

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop`, which is a tuple by now."""
        return tuple(self.stop)

    def eos_ids(self, model_eos: int | None) -> tuple[int, ...]:
        """The ids that end an answer, where the model's own is `model_eos`; empty where nothing does."""
        if self.ignore_eos:
            return ()
        if self.eos_token_id is None:
            return () if model_eos is None else (model_eos,)
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)


# Option -> smallest, largest, whether None may be given. Whole numbers first, then any numbers, then yes or no.
_WHOLE: dict[str, tuple[int, int | None, bool]] = {
    "max_length": (1, None, True),
    "max_new_tokens": (1, None, True),
    "min_length": (0, None, False),
    "min_new_tokens": (0, None, True),
    "num_beams": (1, MAX_BEAMS, False),
    "num_beam_groups": (1, None, False),
    "top_k": (0, None, True),
    "no_repeat_ngram_size": (0, None, False),
    "encoder_no_repeat_ngram_size": (0, None, False),
    "num_return_sequences": (1, MAX_RETURN_SEQUENCES, False),
    "seed": (0, 2**64 - 1, True),
    "logprobs": (0, None, True),
    "prompt_logprobs": (0, None, True),
}
# Smallest, whether the smallest itself is admitted, largest, None.
_NUMBERS: dict[str, tuple[float, bool, float, bool]] = {
    "temperature": (0.0, True, math.inf, False),
    "top_p": (0.0, True, 1.0, True),
    "min_p": (0.0, True, 1.0, True),
    "typical_p": (0.0, False, 1.0, True),
    "repetition_penalty": (0.0, False, math.inf, False),
    "frequency_penalty": (-2.0, True, 2.0, False),
    "presence_penalty": (-2.0, True, 2.0, False),
    "diversity_penalty": (0.0, True, math.inf, False),
    "length_penalty": (-50.0, True, 50.0, False),  # 2,048 tokens to the 50th is still a number
    "max_time": (0.0, True, math.inf, True),
}
_FLAGS = ("do_sample", "remove_invalid_values", "ignore_eos")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all others
        return False


def _wrong_values(params: SamplingParams) -> Iterator[tuple[str, str]]:
    for name, (low, high, optional) in _WHOLE.items():
        value = getattr(params, name)
        if value is None and optional:
            continue
        if not _is_whole(value) or value < low or (high is not None and value > high):
            until = "or more" if high is None else f"to {high}"
            yield name, f"expected a whole number, {low} {until}{', or None' if optional else ''}"
    for name, (least, least_in, most, optional) in _NUMBERS.items():
        value = getattr(params, name)
        if value is None and optional:
            continue
        if not _is_number(value) or not least <= value <= most or (value == least and not least_in):
            start = f"from {least:g}" if least_in else f"above {least:g}"
            until = "" if math.isinf(most) else f" to {most:g}"
            yield name, f"expected a number {start}{until}{', or None' if optional else ''}"
    for name in _FLAGS:
        if not isinstance(getattr(params, name), bool):
            yield name, "expected True or False"
    if params.early_stopping != "never" and not isinstance(params.early_stopping, bool):
        yield "early_stopping", "expected True, False or 'never'"
    yield from _wrong_lists(params)


def _wrong_lists(params: SamplingParams) -> Iterator[tuple[str, str]]:
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop
    if not _is_list(stop, lambda text: isinstance(text, str) and text != ""):
        yield "stop", "expected a text or several, none of them empty"
    words = params.bad_words_ids
    if words is not None and not (_is_list(words, lambda word: _is_list(word, _is_token) and len(word) > 0) and words):
        yield "bad_words_ids", "expected a list of lists of token ids, none of them empty, or None"
    bias = params.logit_bias
    if bias is not None and not (
        isinstance(bias, Mapping)
        and all(map(_is_token, bias))
        and all(_is_number(value) and abs(value) <= MAX_BIAS for value in bias.values())
    ):
        yield "logit_bias", f"expected a table of token ids and numbers from -{MAX_BIAS} to {MAX_BIAS}, or None"
    eos = (params.eos_token_id,) if isinstance(params.eos_token_id, int) else params.eos_token_id
    if eos is not None and not (_is_list(eos, _is_token) and eos):
        yield "eos_token_id", "expected a token id or several, or None; ignore_eos=True is for none at all"


def _is_token(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 2**31


def _token_id(key: Any) -> Any:
    """The token id that a text names; all else stays as it is, and is refused with the other values."""
    is_id = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
    return int(key) if is_id else key


def _is_list(value: Any, admits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(admits(item) for item in value)


def _wrong_combinations(params: SamplingParams) -> Iterator[tuple[str, str]]:
    """What transformers refuses about options that are each in range."""
    if params.do_sample and params.temperature == 0:
        yield "temperature", "expected a number above 0 with do_sample=True; do_sample=False takes the likeliest token"
    if params.num_beams == 1:
        if params.num_return_sequences > 1 and not params.do_sample:
            yield "num_return_sequences", "expected 1 with do_sample=False and num_beams=1: all answers would be equal"
        if params.diversity_penalty > 0:
            yield "diversity_penalty", "expected 0 with num_beams=1; it needs num_beam_groups of 2 or more"
        return
    if params.num_return_sequences > params.num_beams:
        yield "num_return_sequences", f"expected 1 to {params.num_beams}, the value of num_beams"
    if params.num_beam_groups == 1:
        if params.diversity_penalty > 0:
            yield "diversity_penalty", "expected 0 with num_beam_groups=1; it needs num_beam_groups of 2 or more"
        return
    if params.do_sample:
        yield "do_sample", f"expected False with num_beam_groups={params.num_beam_groups}"
    if params.num_beams % params.num_beam_groups:
        yield "num_beam_groups", f"expected a divisor of num_beams={params.num_beams}"
    if params.diversity_penalty == 0:
        yield "diversity_penalty", "expected a number above 0 with beam groups; without, all groups would be equal"
