"""From a caller's options to `SamplingParams`; dialects translate names, this refuses what is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bluejay.decoding.params import SamplingParams
from bluejay.errors import InvalidRequest

# Hugging Face's names of what a caller may choose.
OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(SamplingParams))


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
    return SamplingParams(**values)
