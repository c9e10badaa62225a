"""What a server and its worker process say to each other: dataclasses, as msgpack, each in a frame with its length.

frame     length of the body, 4 bytes, big-endian | body
body      [kind, {field: value, ...}]; dataclasses within it are maps of their fields too

No pickle: bytes from the other side can only become the values that the fields' types name, never code. Every field
must be there and no other may: two sides of different versions part at once, and say why.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack

from bluejay import errors
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import GenerationEvent, GenerationRequest
from bluejay.engine.statistics import Statistics
from bluejay.errors import BluejayError, EngineError, Overloaded, QuotaExceeded, RequestError

PROTOCOL_VERSION = 2  # of the messages below, and of every dataclass in them
MAX_FRAME_BYTES = 16 * 2**20  # a million token ids; understanding such a one keeps the server's loop for a second
HEADER = struct.Struct(">I")

Read = Callable[[Any], Any]


class ProtocolError(EngineError):
    """Something cannot be sent, or was sent and cannot be understood."""


@dataclass(frozen=True)
class Hello:
    """The first message of both sides; this one never changes."""

    version: int


@dataclass(frozen=True)
class Open:
    """To the worker, once: what `LLM` is to open, and the threads it gets; 0 is as many as are good."""

    model: str | None
    dtype: str
    device: str
    threads: int
    options: EngineOptions
    draft: str | None


@dataclass(frozen=True)
class Generate:
    """To the worker. `number` is the asker's, and names the request in everything that follows."""

    number: int
    request: GenerationRequest


@dataclass(frozen=True)
class Cancel:
    """To the worker: end this request or question; nothing happens if it has ended."""

    number: int


@dataclass(frozen=True)
class Count:
    """To the worker: tell the engine's statistics."""

    number: int


@dataclass(frozen=True)
class Embed:
    """To the worker: one vector for each text, which may come as token ids."""

    number: int
    texts: list[str | list[int]]


@dataclass(frozen=True)
class Progress:
    """From the worker: how far the weights are."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Facts:
    """What a worker has opened.

    Attributes:
        model: the name that was asked for.
        path: the directory it was found in, the tokenizer's files beside the weights.
        n_positions, n_embd, vocab_size: the model's.
        num_cache_tokens: how many tokens the engine's cache holds.
        pid: the worker's process.
    """

    model: str
    path: str
    n_positions: int
    n_embd: int
    vocab_size: int
    num_cache_tokens: int
    pid: int


@dataclass(frozen=True)
class Ready:
    """From the worker, once: requests are welcome."""

    facts: Facts


@dataclass(frozen=True)
class Beat:
    """From the worker, all the time: it lives. `step_age_s` is how long its step has lasted, 0 between steps."""

    step_age_s: float


# The asker's number, the answer's index, its new tokens and their text: all that most events hold, in a quarter of the
# bytes and of the time.
Said = tuple[int, int, list[int], str]


@dataclass(frozen=True)
class Events:
    """From the worker: what a step brought, in order; each event's `request` is the asker's number."""

    events: list[Said | GenerationEvent]


def told(event: GenerationEvent, number: int) -> Said | GenerationEvent:
    """An event as it is sent, under the asker's number."""
    more = (event.logprobs, event.finish_reason, event.beam_score, event.prompt_logprobs, event.usage, event.error)
    if more == _NO_MORE:
        return (number, event.index, event.token_ids, event.text)
    return replace(event, request=number)


_NO_MORE: tuple[object, ...] = ([], None, None, None, None, None)


@dataclass(frozen=True)
class Counted:
    """From the worker: an answer to `Count`."""

    number: int
    statistics: Statistics


@dataclass(frozen=True)
class Embedded:
    """From the worker: an answer to `Embed`; `vectors` is float32 in the machine's order, one behind the other."""

    number: int
    n_embd: int
    vectors: bytes


@dataclass(frozen=True)
class Fault:
    """An error on its way to the other side.

    Attributes:
        name: its class.
        param, retry_after_s: the error's own; None where it has none.
    """

    name: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """Describe an error; one that is not Bluejay's becomes an `EngineError` that names it."""
        if not isinstance(error, BluejayError):
            return cls("EngineError", f"{type(error).__name__}: {error}")
        param = getattr(error, "param", None)
        return cls(type(error).__name__, str(error), param, getattr(error, "retry_after_s", None))

    def error(self) -> BluejayError:
        """The same error, to be raised here; `EngineError` for a class that `bluejay.errors` does not have."""
        found = getattr(errors, self.name, None)
        if not (isinstance(found, type) and issubclass(found, BluejayError)):
            return EngineError(f"{self.name}: {self.message}")
        if issubclass(found, RequestError):
            return found(self.message, self.param)
        if issubclass(found, Overloaded | QuotaExceeded):
            return found(self.message, self.retry_after_s or 0.0)
        return found(self.message)


@dataclass(frozen=True)
class Refused:
    """From the worker: the request or question of this number cannot be answered; others go on."""

    number: int
    fault: Fault


@dataclass(frozen=True)
class Failed:
    """From the worker, as its last message: it cannot go on."""

    fault: Fault


Message = (
    Hello
    | Open
    | Generate
    | Cancel
    | Count
    | Embed
    | Progress
    | Ready
    | Beat
    | Events
    | Counted
    | Embedded
    | Refused
    | Failed
)
KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def pack(message: Message) -> bytes:
    """A message as a frame. Raises: ProtocolError if it holds what no message can, or is too large."""
    try:
        # surrogatepass: what Python takes for a text comes out as the same text, and is judged where it is used.
        body: bytes = msgpack.packb([type(message).__name__, message], default=_plain, unicode_errors="surrogatepass")
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{type(message).__name__} cannot be sent: {error}") from None
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"{type(message).__name__} takes {len(body):,} bytes, at most {MAX_FRAME_BYTES:,} are sent")
    return HEADER.pack(len(body)) + body


def num_body_bytes(header: bytes) -> int:
    """How long the body behind a header is. Raises: ProtocolError if it is longer than any of ours."""
    length: int = HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {length:,} bytes is announced, expected at most {MAX_FRAME_BYTES:,}")
    return length


def unpack(body: bytes) -> Message:
    """The message in a frame's body. Raises: ProtocolError if there is none, or not one of this version."""
    try:
        # strict_map_key: tables of token ids have whole numbers for keys; a key that no map can have is a TypeError.
        value = msgpack.unpackb(body, unicode_errors="surrogatepass", strict_map_key=False)
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a message is not msgpack: {type(error).__name__}: {error}") from None
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in KINDS):
        raise ProtocolError(f"a message is {value!r:.80}, expected one of {', '.join(KINDS)} and its fields")
    kind: Any = KINDS[value[0]]
    message: Message = _reader(kind)(value[1])
    return message


def check_version(message: Message) -> None:
    """Raises: ProtocolError if the other side's first message is not the hello of this version."""
    if not isinstance(message, Hello):
        raise ProtocolError(f"the first message is {type(message).__name__}, expected Hello")
    if message.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the other side speaks protocol {message.version}, this one {PROTOCOL_VERSION}: server and worker are of "
            "different versions of Bluejay; start the server again"
        )


def _plain(value: Any) -> Any:
    """What msgpack is to write for a value that it does not know itself."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Integral):  # NumPy's
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Sequence):  # a range
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r:.80} ({type(value).__name__})")


@cache
def _reader(hint: Any) -> Read:
    """What turns a plain value into one of a type, or raises ProtocolError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass_reader(hint)
    if origin in (Union, UnionType):
        return _union_reader(arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _row_reader(tuple(map(_reader, arguments)))
    if origin in (list, tuple, Sequence):
        return _list_reader(_reader(arguments[0]), tuple if origin is tuple else list)
    if origin is Mapping:
        return _map_reader(*map(_reader, arguments))
    if origin is Literal:
        return _expect(lambda value: value in arguments and type(value) is not bool, " or ".join(map(repr, arguments)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_reader(hint)
    if hint is float:  # a whole number where a float is meant stays what it was
        return _expect(lambda value: type(value) in (float, int), "a number")
    if hint in (int, str, bytes, bool, NoneType):
        return _exactly(hint)
    raise TypeError(f"messages cannot hold {hint!r}")


def _expect(admits: Callable[[Any], bool], expected: str) -> Read:
    def read(value: Any) -> Any:
        if not admits(value):
            raise ProtocolError(f"{reprlib.repr(value)} came, expected {expected}")
        return value

    return read


def _exactly(kind: type[Any]) -> Read:
    """As `_expect`, with a call less: most of what comes is of these types."""

    def read(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise ProtocolError(f"{reprlib.repr(value)} came, expected {kind.__name__}")

    return read


def _enum_reader(kind: type[Enum]) -> Read:
    members = {member.value: member for member in kind}
    check = _expect(lambda value: isinstance(value, str) and value in members, " or ".join(map(repr, members)))
    return lambda value: members[check(value)]


def _list_reader(read: Read, make: type[list[Any]] | type[tuple[Any, ...]]) -> Read:
    check = _expect(lambda value: type(value) is list, "a list")
    return lambda value: make(map(read, check(value)))


def _map_reader(read_key: Read, read_value: Read) -> Read:
    check = _expect(lambda value: type(value) is dict, "a table")
    return lambda value: {read_key(key): read_value(one) for key, one in check(value).items()}


def _row_reader(readers: tuple[Read, ...]) -> Read:
    check = _expect(lambda value: type(value) is list and len(value) == len(readers), f"a list of {len(readers)}")
    # A list, then a tuple: a generator would cost as much as what it reads, and each token comes in such a row.
    return lambda value: tuple([read(item) for read, item in zip(readers, check(value), strict=True)])


def _union_reader(kinds: tuple[Any, ...]) -> Read:
    readers = [_reader(kind) for kind in kinds if kind is not NoneType]

    # Tables are dataclasses and never rows: to try would cost more than to read, and who waits is the server's loop.
    of_tables = [_reader(kind) for kind in kinds if kind is not NoneType and get_origin(kind) is not tuple]

    def read(value: Any) -> Any:
        if value is None and NoneType in kinds:
            return None
        if type(value) is dict and len(of_tables) == 1:
            return of_tables[0](value)
        for one in readers[:-1]:
            try:
                return one(value)
            except ProtocolError:
                continue
        return readers[-1](value)

    return read


def _dataclass_reader(kind: type[Any]) -> Read:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind) if field.init}

    def read(value: Any) -> Any:
        if type(value) is not dict or value.keys() != readers.keys():
            there = value.keys() if type(value) is dict else set()
            missing, unknown = sorted(readers.keys() - there), sorted(map(repr, there - readers.keys()))
            raise ProtocolError(f"{kind.__name__} lacks the fields {missing} and has the unknown fields {unknown}")
        try:
            return kind(**{name: one(value[name]) for name, one in readers.items()})
        except BluejayError as error:
            raise ProtocolError(f"{kind.__name__}: {error}") from None

    return read
