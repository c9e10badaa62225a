from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.decoding import FinishReason, SamplingParams
from bluejay.decoding.stopping import StopText, finish_reason, new_token_limit
from bluejay.errors import ContextLengthExceeded, InvalidRequest


@pytest.mark.parametrize(
    ("options", "num_prompt", "limit"),
    [
        ({}, 5, 20),
        ({}, 90, 10),
        ({"max_new_tokens": 30}, 5, 30),
        ({"max_length": 12}, 5, 7),
        ({"max_length": 12, "max_new_tokens": 30}, 5, 30),
        ({"max_length": 20}, 5, 15),
        ({"max_new_tokens": 1000}, 99, 1),
        ({"max_length": 1000}, 50, 50),
    ],
)
def test_an_answer_may_have_what_was_asked_for_and_what_fits(options, num_prompt, limit):
    assert new_token_limit(SamplingParams(**options), num_prompt, 100) == limit


@pytest.mark.parametrize("num_prompt", [100, 150])
def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(num_prompt):
    with pytest.raises(ContextLengthExceeded, match=rf"{num_prompt} tokens.*context of 100"):
        new_token_limit(SamplingParams(), num_prompt, 100)


def test_a_prompt_must_have_a_token_and_be_shorter_than_max_length():
    with pytest.raises(InvalidRequest, match="no token"):
        new_token_limit(SamplingParams(), 0, 100)
    with pytest.raises(InvalidRequest, match=r"max_length is 5 .*has 5 tokens.*expected 6 or more") as error:
        new_token_limit(SamplingParams(max_length=5), 5, 100)
    assert error.value.param == "max_length"


def test_text_that_may_begin_a_stop_text_is_held_back():
    stop = StopText(("<end>", "\n\n"))
    assert stop.push("a<e") == "a"
    assert stop.push("x") == "<ex"
    assert stop.push("b\n") == "b"
    assert stop.push("c<en") == "\nc"
    assert not stop.stopped
    assert stop.push("d>!") == ""
    assert stop.stopped
    assert stop.push("more") == "" == stop.finish()


def test_what_is_held_back_at_the_end_is_text_after_all():
    stop = StopText(("<end>",))
    assert stop.push("a<en") == "a"
    assert stop.finish() == "<en"


def test_without_stop_texts_everything_passes():
    stop = StopText(())
    assert stop.push("abc") == "abc"
    assert stop.finish() == ""


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_shown_text_is_the_whole_text_up_to_the_first_stop_text_that_is_complete(pieces, stops):
    stop = StopText(tuple(stops))
    shown = ""
    for piece in pieces:
        shown += stop.push(piece)
        assert not any(text in shown for text in stops)
        if stop.stopped:
            break
    shown += stop.finish()
    text = "".join(pieces)
    assert text.startswith(shown)
    assert stop.stopped == any(text in "".join(pieces) for text in stops)
    if stop.stopped:
        assert any(text[len(shown) :].startswith(s) for s in stops)
    else:
        assert shown == text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"token_id": 9}, FinishReason.STOP),
        ({"num_new_tokens": 4}, FinishReason.LENGTH),
        ({"num_new_tokens": 4, "token_id": 9}, FinishReason.STOP),
        ({"stopped": True}, FinishReason.STOP),
        ({"out_of_time": True}, FinishReason.LENGTH),
    ],
)
def test_an_answer_ends_for_a_reason(arguments, reason):
    given = {"token_id": 1, "num_new_tokens": 1, "eos_ids": (8, 9), "max_new_tokens": 4, **arguments}
    assert finish_reason(**given) == reason


def test_reasons_are_their_texts():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "cancelled", "error", "content_filter"]
    assert FinishReason.STOP == "stop"
