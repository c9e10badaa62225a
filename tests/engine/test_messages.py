import inspect
import struct
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluejay import errors
from bluejay.decoding import FinishReason, SamplingParams, TokenLogprobs
from bluejay.engine import messages
from bluejay.engine.messages import Fault, Message, ProtocolError, pack, unpack
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import GenerationEvent, GenerationRequest, Usage
from bluejay.engine.statistics import Statistics

HEADER_BYTES = 4
GIVEN: dict[type[Any], set[str]] = {}  # the fields of each dataclass that the strategies below give a value


def _all(kind: type[Any], **values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    GIVEN[kind] = set(values)
    return st.builds(kind, **values)


# Whatever Python takes for a text: beyond the basic plane, and halves of such characters too.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)
COUNTS = st.integers(0, 2**64 - 1)
IDS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(allow_nan=False)
SECONDS = st.none() | st.floats(0, 1e9)

TOKENS = _all(TokenLogprobs, token_id=IDS, logprob=FLOATS, top=st.lists(st.tuples(IDS, FLOATS), max_size=3).map(tuple))
USAGES = _all(
    Usage,
    prompt_tokens=COUNTS,
    cached_tokens=COUNTS,
    generated_tokens=COUNTS,
    drafted_tokens=COUNTS,
    accepted_tokens=COUNTS,
    queued_s=SECONDS,
    first_token_s=SECONDS,
    per_token_s=SECONDS,
)
EVENTS = _all(
    GenerationEvent,
    request=COUNTS,
    index=COUNTS,
    token_ids=st.lists(IDS, max_size=3),
    text=TEXTS,
    logprobs=st.lists(TOKENS, max_size=3),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    beam_score=st.none() | FLOATS,
    prompt_logprobs=st.none() | st.lists(st.none() | TOKENS, max_size=3),
    usage=st.none() | USAGES,
    error=st.none() | TEXTS,
)
WHOLE = st.integers(1, 2**63)
PARAMS = _all(
    SamplingParams,
    max_length=st.none() | WHOLE,
    max_new_tokens=st.none() | WHOLE,
    min_length=WHOLE,
    min_new_tokens=st.none() | WHOLE,
    do_sample=st.booleans(),
    num_beams=st.just(6),
    num_beam_groups=st.just(1),
    diversity_penalty=st.just(0.0),
    early_stopping=st.sampled_from([True, False, "never"]),
    length_penalty=st.floats(-50, 50),
    temperature=st.floats(0, 1e300, exclude_min=True),
    top_k=st.none() | WHOLE,
    top_p=st.none() | st.floats(0, 1),
    min_p=st.none() | st.floats(0, 1),
    typical_p=st.none() | st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(0, 1e300, exclude_min=True),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.none() | st.dictionaries(IDS, st.floats(-100, 100), max_size=3),
    no_repeat_ngram_size=WHOLE,
    encoder_no_repeat_ngram_size=WHOLE,
    bad_words_ids=st.none() | st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=3),
    num_return_sequences=st.integers(1, 6),
    max_time=st.none() | st.floats(0, 1e300),
    remove_invalid_values=st.booleans(),
    stop=TEXTS.filter(bool) | st.lists(TEXTS.filter(bool), max_size=3),
    seed=st.none() | st.integers(0, 2**64 - 1),
    logprobs=st.none() | WHOLE,
    prompt_logprobs=st.none() | WHOLE,
    eos_token_id=st.none() | IDS | st.lists(IDS, min_size=1, max_size=3),
    ignore_eos=st.booleans(),
)
GROUPS = PARAMS.map(lambda p: replace(p, do_sample=False, num_beam_groups=3, diversity_penalty=0.1))
REQUESTS = _all(
    GenerationRequest,
    prompt_token_ids=st.lists(IDS, max_size=5),
    params=PARAMS | GROUPS,
    priority=st.integers(-(2**63), 2**64 - 1),
    tenant=TEXTS,
)
STATISTICS = _all(Statistics, **{field.name: COUNTS for field in fields(Statistics)})
OPTIONS = _all(
    EngineOptions,
    max_num_sequences=WHOLE,
    max_batch_tokens=WHOLE,
    max_stall=st.just(0.0) | st.floats(1, 1e6, exclude_min=True),
    cache_memory_bytes=st.none() | WHOLE,
    cache_dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16", "int8"]),
    block_size=WHOLE,
    prefix_cache=st.booleans(),
)
FAULTS = _all(Fault, name=TEXTS, message=TEXTS, param=st.none() | TEXTS, retry_after_s=st.none() | st.floats(0, 1e9))
MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "Hello": _all(messages.Hello, version=COUNTS),
    "Open": _all(
        messages.Open,
        model=st.none() | TEXTS,
        dtype=TEXTS,
        device=TEXTS,
        threads=COUNTS,
        options=OPTIONS,
        draft=st.none() | TEXTS,
    ),
    "Generate": _all(messages.Generate, number=COUNTS, request=REQUESTS),
    "Cancel": _all(messages.Cancel, number=COUNTS),
    "Count": _all(messages.Count, number=COUNTS),
    "Embed": _all(messages.Embed, number=COUNTS, texts=st.lists(TEXTS | st.lists(IDS, max_size=3), max_size=3)),
    "Progress": _all(messages.Progress, done_bytes=COUNTS, total_bytes=COUNTS),
    "Ready": _all(
        messages.Ready,
        facts=_all(
            messages.Facts,
            model=TEXTS,
            path=TEXTS,
            n_positions=COUNTS,
            n_embd=COUNTS,
            vocab_size=COUNTS,
            num_cache_tokens=COUNTS,
            pid=COUNTS,
        ),
    ),
    "Beat": _all(messages.Beat, step_age_s=st.floats(0, 1e9)),
    "Events": _all(
        messages.Events,
        events=st.lists(EVENTS | st.tuples(COUNTS, COUNTS, st.lists(IDS, max_size=3), TEXTS), max_size=3),
    ),
    "Counted": _all(messages.Counted, number=COUNTS, statistics=STATISTICS),
    "Embedded": _all(messages.Embedded, number=COUNTS, n_embd=COUNTS, vectors=st.binary(max_size=8)),
    "Refused": _all(messages.Refused, number=COUNTS, fault=FAULTS),
    "Failed": _all(messages.Failed, fault=FAULTS),
}


def _sent(message: Message) -> Message:
    frame = pack(message)
    assert struct.unpack(">I", frame[:HEADER_BYTES]) == (len(frame) - HEADER_BYTES,)
    assert messages.num_body_bytes(frame[:HEADER_BYTES]) == len(frame) - HEADER_BYTES
    return unpack(frame[HEADER_BYTES:])


def _types(value: Any) -> Any:
    """The types within a value, which equality does not tell: 1 == 1.0 == True."""
    if hasattr(value, "__dataclass_fields__"):
        return type(value), [_types(getattr(value, field.name)) for field in fields(value)]
    return (type(value), list(map(_types, value))) if isinstance(value, list | tuple) else type(value)


@given(st.one_of(list(MESSAGES.values())))
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    received = _sent(message)
    assert received == message
    assert _types(received) == _types(message)


def test_every_kind_of_message_is_among_those() -> None:
    assert set(MESSAGES) == {kind.__name__ for kind in get_args(Message)} == set(messages.KINDS)


@pytest.mark.parametrize("kind", GIVEN)
def test_every_field_is_given_a_value_above(kind: type[Any]) -> None:
    # One that was forgotten would be tried with its default alone.
    assert GIVEN[kind] == {field.name for field in fields(kind)}


def test_every_dataclass_that_travels_is_among_those() -> None:
    read = {kind for kind in vars(messages).values() if isinstance(kind, type) and is_dataclass(kind)}
    assert read | {TokenLogprobs, Usage, SamplingParams} == set(GIVEN)


def test_other_kinds_of_whole_numbers_and_sequences_arrive_as_plain_ones() -> None:
    numpy = pytest.importorskip("numpy")
    params = SamplingParams()
    for ids in (numpy.arange(3), list(numpy.arange(3))):
        received = _sent(messages.Generate(0, GenerationRequest(ids if isinstance(ids, list) else tuple(ids), params)))
        assert received == messages.Generate(0, GenerationRequest([0, 1, 2], params))
    assert _sent(messages.Generate(0, GenerationRequest(range(3), params))) == received


def _body(kind: str, value: Any) -> bytes:
    return msgpack.packb([kind, value])


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x91" * 5000, "not msgpack"),
        (b"\x80\x03c", "not msgpack"),
        (msgpack.packb(7), "expected one of"),
        (_body("Nonsense", {}), "expected one of"),
        (_body("Cancel", 3), r"lacks the fields \['number'\]"),
        (_body("Cancel", {}), r"lacks the fields \['number'\] and has the unknown fields \[\]"),
        (_body("Cancel", {"number": 1, "why": 2}), r"unknown fields \[\"'why'\"\]"),
        (_body("Cancel", {"number": "1"}), "'1' came, expected int"),
        (_body("Cancel", {"number": True}), "True came, expected int"),
        (_body("Cancel", {"number": msgpack.ExtType(4, b"x")}), "came, expected int"),
        (_body("Embed", {"number": 1, "texts": "ab"}), "expected a list"),
        (_body("Beat", {"step_age_s": None}), "expected a number"),
        (_body("Ready", {"facts": {"pid": 1}}), "Facts lacks the fields"),
    ],
)
def test_what_is_no_message_is_named(body: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        unpack(body)


@given(st.binary(max_size=50))
def test_no_bytes_do_anything_but_fail(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(body)


@given(EVENTS, st.sampled_from([field.name for field in fields(GenerationEvent)]))
def test_each_field_must_be_there(event: GenerationEvent, name: str) -> None:
    body = msgpack.unpackb(
        pack(messages.Events([event]))[HEADER_BYTES:], unicode_errors="surrogatepass", strict_map_key=True
    )
    del body[1]["events"][0][name]
    with pytest.raises(ProtocolError, match=f"GenerationEvent lacks the fields .'{name}'."):
        unpack(msgpack.packb(body, unicode_errors="surrogatepass"))


def test_options_that_this_version_refuses_are_named() -> None:
    frame = pack(messages.Open(None, "auto", "auto", 0, EngineOptions(), None))
    body = msgpack.unpackb(frame[HEADER_BYTES:])
    body[1]["options"]["block_size"] = 0
    with pytest.raises(ProtocolError, match="EngineOptions: block_size is 0"):
        unpack(msgpack.packb(body))


@pytest.mark.parametrize("value", [2**64, {"a"}, object()])
def test_what_cannot_be_sent_is_named(value: Any) -> None:
    with pytest.raises(ProtocolError, match="Cancel cannot be sent"):
        pack(messages.Cancel(value))


def test_a_frame_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 100)
    pack(messages.Embed(1, ["a" * 50]))
    with pytest.raises(ProtocolError, match="at most 100 are sent"):
        pack(messages.Embed(1, ["a" * 100]))
    with pytest.raises(ProtocolError, match="expected at most 100"):
        messages.num_body_bytes(struct.pack(">I", 101))


def test_a_hello_of_another_version_is_refused() -> None:
    messages.check_version(messages.Hello(messages.PROTOCOL_VERSION))
    with pytest.raises(ProtocolError, match=f"speaks protocol 99, this one {messages.PROTOCOL_VERSION}"):
        messages.check_version(messages.Hello(99))
    with pytest.raises(ProtocolError, match="expected Hello"):
        messages.check_version(messages.Beat(0.0))


def _error(kind: type[errors.BluejayError]) -> errors.BluejayError:
    if issubclass(kind, errors.RequestError):
        return kind("why", "top_p")
    return kind("why", 3.5) if issubclass(kind, errors.Overloaded | errors.QuotaExceeded) else kind("why")


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.BluejayError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_raised_as_what_it_was(kind: type[errors.BluejayError]) -> None:
    error = _error(kind)
    back = Fault.of(error).error()
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_an_error_of_elsewhere_becomes_the_engines() -> None:
    assert str(Fault.of(ZeroDivisionError("by 0")).error()) == "ZeroDivisionError: by 0"
    unknown = Fault("SomethingNewer", "why").error()
    assert type(unknown) is errors.EngineError and "SomethingNewer: why" in str(unknown)
    assert type(Fault.of(ProtocolError("what")).error()) is errors.EngineError
    assert type(Fault("annotations", "why").error()) is errors.EngineError
