"""From a caller's options to `SamplingParams`; dialects translate names, this refuses what is none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from bluejay.decoding.params import SamplingParams
from bluejay.errors import InvalidRequest, UnsupportedOption

# Hugging Face's names of what a caller may choose.
OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(SamplingParams))
NOT_TOLD = ("logprobs", "prompt_logprobs")  # most protocols' answers have no place for them


def refuse_untold(values: Mapping[str, Any]) -> None:
    """Raises: UnsupportedOption for what the answers of a protocol cannot tell."""
    for name in NOT_TOLD:
        if values.get(name) is not None:
            raise UnsupportedOption(f"{name} is not told in this API; use /v1/completions for it", name)


def split_known(chosen: Mapping[str, Any], known: Collection[str] = OPTIONS) -> tuple[dict[str, Any], list[str]]:
    """The options that are some, and the other names, as far as they can be repeated in an answer."""
    kept = {name: value for name, value in chosen.items() if name in known}
    others = sorted(chosen.keys() - kept.keys())
    return kept, [name[:40] if name.isascii() and name.isprintable() else "?" for name in others[:8]]


def known_only(chosen: Mapping[str, Any], *, ignore_unknown: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The options to go by, and the answer's headers, which name what was passed over where that is wanted."""
    if not ignore_unknown:
        return dict(chosen), {}
    kept, others = split_known(chosen)
    return kept, {"X-Ignored-Options": ", ".join(others)} if others else {}


def sampling_params(*layers: Mapping[str, Any] | None) -> SamplingParams:
    """Options of several origins, later ones before earlier ones; what a layer has as None it does not say.

    Raises: InvalidRequest with everything that is wrong, an unknown name too.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {name: value for name, value in (layer or {}).items() if value is not None}
    if unknown := sorted(set(values) - set(OPTIONS)):
        raise InvalidRequest(
            f"unknown option {', '.join(repr(name[:100]) for name in unknown[:8])}; there are: {', '.join(OPTIONS)}",
            unknown[0][:100],
        )
    if isinstance(values.get("logit_bias"), Mapping):  # in JSON the keys of a table are texts
        values["logit_bias"] = {_token_id(token): bias for token, bias in values["logit_bias"].items()}
    return SamplingParams(**values)


def _token_id(token: Any) -> Any:
    return int(token) if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10 else token
