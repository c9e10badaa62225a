"""Every error that Bluejay raises on purpose; knows no HTTP.

    BluejayError
    ├── ConfigError          settings, model config, training config
    ├── CheckpointError      missing, mismatched (all keys at once), corrupt (file and offset)
    ├── RequestError(param)  InvalidRequest, UnsupportedOption, ContextLengthExceeded, ModelNotFound
    ├── AccessError          Unauthenticated, Forbidden, QuotaExceeded(retry_after_s)
    ├── StoreError           the database of accounts and usage cannot be reached or used
    ├── EngineError          Overloaded(retry_after_s), Stopped
    └── KernelError          no kernel for this machine or shape

A message names the thing, the value and the remedy. Where several things are wrong, one error lists them all.
"""

from __future__ import annotations


class BluejayError(Exception):
    """The root: catch this to catch everything that Bluejay reports."""


class ConfigError(BluejayError):
    """A setting, a model config or a training config has a wrong value."""


class CheckpointError(BluejayError):
    """A checkpoint is missing, incomplete, mismatched, corrupt or asks for something unsafe."""


class RequestError(BluejayError):
    """A request cannot be served as asked.

    Args:
        message: what is wrong, the value, the allowed range.
        param: the name of the option at fault, None where it is none of them.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """An option has a value outside its range."""


class UnsupportedOption(RequestError):
    """An option is known but cannot be honoured here."""


class ContextLengthExceeded(RequestError):
    """Prompt and new tokens do not fit into the model's context."""


class ModelNotFound(RequestError):
    """No model of that name or at that path."""


class AccessError(BluejayError):
    """Whoever asks may not have what is asked for."""


class Unauthenticated(AccessError):
    """No key, or none that is known and valid."""


class Forbidden(AccessError):
    """The key is valid, and does not reach this far."""


class QuotaExceeded(AccessError):
    """The plan's limit is used up; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreError(BluejayError):
    """The database cannot be reached or used."""


class EngineError(BluejayError):
    """The engine cannot go on."""


class Overloaded(EngineError):
    """Too much is running; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopped(EngineError):
    """The engine was stopped while the request ran."""


class KernelError(BluejayError):
    """No kernel serves this machine, dtype or shape."""
