"""What a server may be told when it is started."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bluejay.errors import ConfigError, InvalidRequest
from bluejay.server.sampling import sampling_params


@dataclass(frozen=True)
class ModelOptions:
    """One model that a server offers.

    Attributes:
        name: what it is called in answers and in the list of models.
        source: path or hub name, as `LLM` takes it.
        aliases: other names that callers may use.
        defaults: sampling options where a caller says nothing, by Hugging Face's names; a dialect's own come before.
        draft: as `LLM`.
    """

    name: str
    source: str
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    draft: str | None = None


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves; times are in seconds.

    Attributes:
        host, port: where it listens; port 0 is any free one.
        grpc_port: of the Open Inference Protocol over gRPC; None: not at all, 0: any free one.
        strict_names: a server with a single model then answers to its own names alone, not to those that hosted
            services gave to GPT-J and GPT-Neo.
        insecure: serve other addresses than the loopback without any key.
        max_running: sequences that a model works on together.
        max_queue: sequences that may wait beside them; whoever comes then is told when to come again.
        max_prompts: prompts of one request.
        max_sequences: answers of one request, over all its prompts; beams count.
        max_tokens: tokens that one request may make the model read and write.
        max_body_bytes: of one request.
        max_logprobs: likeliest tokens told beside each token.
        max_told_logprobs: log-probabilities that one request may be told, over all its prompts and answers: one for
            each token, and one for each of the likeliest tokens beside it.
        request_timeout_s: a request that takes longer ends with an error.
        header_timeout_s, body_timeout_s: a client that takes longer to send them is let go.
        write_timeout_s: so is one that does not read for so long.
        idle_timeout_s: a connection without a request is closed.
        max_connections: of HTTP, where further ones are told to come again; as many of gRPC, where they are closed.
        drain_s: what is running may take so long to end when the server is told to stop.
        farewell_s: at its end the server says "not ready" for so long before it stops listening, so that nobody who
            shares the load among several is taken by surprise.
        ignore_unknown: KServe V1, Baseten and Neuro then pass over options that are none, as the hosted services did,
            and say so; without it they are refused.
        kserve_always_nested: `predictions` is a list of lists for a single instance too.
        kserve_defaults: sampling options of the KServe dialect, as the hosted service had them.
        baseten_failed: the word for a failed prediction; the original code said "error", its document "failed".
        baseten_max_length, baseten_min_length: what `max_length` and `min_length` are cut to there.
        max_jobs: asynchronous requests that wait or run; one project may have half of them. As many results are kept.
        max_kept_bytes: of asynchronous requests and their results, and again of uploaded data; one project's half.
        keep_s: so long results and uploads are kept in memory, at most.
        keep_flagged: keep what a filter flags, for a person to look at; it holds prompts and answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8081
    strict_names: bool = False
    insecure: bool = False
    max_running: int = 64
    max_queue: int = 256
    max_prompts: int = 256
    max_sequences: int = 512
    max_tokens: int = 262_144
    max_body_bytes: int = 4 * 2**20
    max_logprobs: int = 20
    max_told_logprobs: int = 524_288
    request_timeout_s: float = 600.0
    header_timeout_s: float = 8.0
    body_timeout_s: float = 8.0
    write_timeout_s: float = 8.0
    idle_timeout_s: float = 60.0
    max_connections: int = 4096
    drain_s: float = 30.0
    farewell_s: float = 1.0
    ignore_unknown: bool = False
    kserve_always_nested: bool = False
    kserve_defaults: Mapping[str, Any] = field(default_factory=dict)
    baseten_failed: Literal["failed", "error"] = "failed"
    baseten_max_length: int = 512
    baseten_min_length: int = 64
    max_jobs: int = 1024
    max_kept_bytes: int = 64 * 2**20
    keep_s: float = 3600.0
    keep_flagged: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected a whole number, {least} or more"
            for name, least in _WHOLE.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}, expected a number of seconds above 0"
            for name in _SECONDS
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < math.inf
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}, expected true or false"
            for name in ("insecure", "strict_names", "keep_flagged", "ignore_unknown", "kserve_always_nested")
            if type(getattr(self, name)) is not bool
        ]
        ports = [self.port] if self.grpc_port is None else [self.port, self.grpc_port]
        problems += [
            f"port {port!r} is none, expected 0 to 65535"
            for port in ports
            if type(port) is not int or not 0 <= port <= 65535
        ]
        if not isinstance(self.host, str) or not self.host:
            problems.append(f"host is {self.host!r}, expected an address or a name")
        try:
            sampling_params(_table(self.kserve_defaults))
        except InvalidRequest as error:
            problems.append(f"kserve_defaults: {error}")
        if self.baseten_failed not in ("failed", "error"):
            problems.append(f"baseten_failed is {self.baseten_failed!r}, expected failed or error")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def _table(value: Any) -> Mapping[str, Any]:
    """Raises: InvalidRequest if it is none."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{value!r:.80} came, expected a table of options")
    return value


_WHOLE = {
    "max_running": 1,
    "max_queue": 0,
    "max_prompts": 1,
    "max_sequences": 1,
    "max_tokens": 1,
    "max_body_bytes": 1024,
    "max_logprobs": 0,
    "max_told_logprobs": 0,
    "max_connections": 1,
    "baseten_max_length": 1,
    "baseten_min_length": 0,
    "max_jobs": 1,
    "max_kept_bytes": 1024,
}
_SECONDS = (
    "request_timeout_s",
    "header_timeout_s",
    "body_timeout_s",
    "write_timeout_s",
    "idle_timeout_s",
    "drain_s",
    "farewell_s",
    "keep_s",
)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
