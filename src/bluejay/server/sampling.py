"""From a caller's options to `SamplingParams`; dialects translate names, this refuses what is none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import fields
from typing import Any

from bluejay.decoding.params import SamplingParams
from bluejay.errors import InvalidRequest, UnsupportedOption

# Hugging Face's names of what a caller may choose.
OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(SamplingParams))
MAX_NAMES = 8  # of options that are none
MAX_STOPS = 32  # texts, or ids, that end an answer; OpenAI takes 4
MAX_STOP_CHARS = 256
MAX_BIASES = 1024  # token ids of a table or a list
_SIZES = {"stop": MAX_STOPS, "eos_token_id": MAX_STOPS, "bad_words_ids": MAX_BIASES, "logit_bias": MAX_BIASES}
# Of these the one that is said later counts, by whatever name.
_LENGTHS = ({"max_length", "max_new_tokens"}, {"min_length", "min_new_tokens"})
NOT_TOLD = ("logprobs", "prompt_logprobs")  # most protocols' answers have no place for them


def refuse_untold(values: Mapping[str, Any]) -> None:
    """Raises: UnsupportedOption for what the answers of a protocol cannot tell."""
    for name in NOT_TOLD:
        if values.get(name) is not None:
            raise UnsupportedOption(f"{name} is not told in this API; use /v1/completions for it", name)


def split_known(chosen: Mapping[str, Any], known: Collection[str] = OPTIONS) -> tuple[dict[str, Any], list[str]]:
    """The options that are some, and the other names."""
    kept = {name: value for name, value in chosen.items() if name in known}
    return kept, sorted(chosen.keys() - kept.keys())


def listed(names: Sequence[str]) -> str:
    """Names that callers chose, as far as they can be repeated in an answer, and how many more there are."""
    told = [name[:40] if name.isascii() and name.isprintable() else "?" for name in names[:MAX_NAMES]]
    return ", ".join([*told, f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else told)


def known_only(
    chosen: Mapping[str, Any], *, ignore_unknown: bool, beside: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """The options to go by, and the answer's headers, which name what was passed over where that is wanted.

    Args:
        beside: names that were passed over before.
    """
    if not ignore_unknown:
        return dict(chosen), {}
    kept, others = split_known(chosen)
    others = [*beside, *others]
    return kept, {"X-Ignored-Options": listed(others)} if others else {}


def sampling_params(*layers: Mapping[str, Any] | None) -> SamplingParams:
    """Options of several origins, later ones before earlier ones; what a layer has as None it does not say.

    Raises: InvalidRequest with everything that is wrong, an unknown name too.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        said = {name: value for name, value in (layer or {}).items() if value is not None}
        other = set().union(*(names for names in _LENGTHS if names & said.keys()))
        values = {name: value for name, value in values.items() if name not in other} | said
    if unknown := sorted(set(values) - set(OPTIONS)):
        raise InvalidRequest(
            f"unknown option {', '.join(repr(name[:100]) for name in unknown[:8])}; there are: {', '.join(OPTIONS)}",
            unknown[0][:100],
        )
    _check_sizes(values)
    return SamplingParams.from_json(values)


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raises: InvalidRequest for lists that would keep everybody waiting: each step looks through them."""
    for name, most in _SIZES.items():
        value = values.get(name)
        if isinstance(value, Sized) and not isinstance(value, str) and len(value) > most:
            raise InvalidRequest(f"{name} has {len(value):,} entries, expected at most {most:,}", name)
    words = values.get("bad_words_ids")
    if isinstance(words, list) and sum(len(word) for word in words if isinstance(word, list)) > MAX_BIASES:
        raise InvalidRequest(f"bad_words_ids has more than {MAX_BIASES:,} token ids in all", "bad_words_ids")
    stops = [values.get("stop")] if isinstance(values.get("stop"), str) else values.get("stop")
    if isinstance(stops, list | tuple) and any(isinstance(one, str) and len(one) > MAX_STOP_CHARS for one in stops):
        raise InvalidRequest(f"a stop text has more than {MAX_STOP_CHARS} characters", "stop")
