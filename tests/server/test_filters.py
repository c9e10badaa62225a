"""What filters find, and what of an answer leaves then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.decoding.logprobs import TokenLogprobs
from bluejay.decoding.params import SamplingParams
from bluejay.decoding.stopping import FinishReason
from bluejay.engine.request import GenerationEvent, Usage
from bluejay.errors import ConfigError, StoreError
from bluejay.server.filters import read_filters
from bluejay.server.metrics import Metrics
from bluejay.server.review import Flagged, Review
from bluejay.server.watch import Watch

SLOW = "^(.*?,){25}P"  # takes for ever where there are many commas and no P
Tables = dict[str, dict[str, Any]]


class Played:
    """A run whose model says what it is given, and what filters told of it."""

    def __init__(self, prompt: str = "Say", **params: Any) -> None:
        self.asked = SimpleNamespace(items=[SimpleNamespace(prompt=prompt, params=SamplingParams(**params))])
        self.prompts = [[1, 2, 3]]
        self.num_untold = 0
        self.noted: list[tuple[str, str, str]] = []
        self.taken = 0

    def count_untold(self, num_tokens: int) -> None:
        self.num_untold += num_tokens

    def prompt_text(self, place: int) -> str:
        return str(self.asked.items[place].prompt)

    def note_filtered(self, place: int, rule: str, action: str, text: str) -> None:
        self.noted.append((rule, action, text))

    async def said(self, pieces: Sequence[tuple[int, str]], reason: FinishReason) -> AsyncGenerator[GenerationEvent]:
        last = {index: place for place, (index, _) in enumerate(pieces)}
        for place, (index, text) in enumerate(pieces):
            self.taken += 1
            yield GenerationEvent(
                0,
                index,
                [place],
                text,
                logprobs=[TokenLogprobs(place, -1.0)],
                finish_reason=reason if last[index] == place else None,
                usage=Usage(3, generated_tokens=len(pieces)) if place == len(pieces) - 1 else None,
            )

    def run(
        self, tables: Tables, pieces: Sequence[tuple[int, str]], reason: FinishReason = FinishReason.LENGTH
    ) -> list[GenerationEvent]:
        async def watched() -> list[GenerationEvent]:
            filters = read_filters(tables, ["m"])
            rules = filters.of("m")
            assert rules is not None
            events = [event async for event in Watch(rules, self, 0).events(self.said(pieces, reason))]  # type: ignore[arg-type]
            await filters.close()
            return events

        return asyncio.run(watched())


def rules(action: str, *words: str, **more: Any) -> Tables:
    return {"r": {"words": list(words), "action": action} | more}


def pieces(text: str, size: int = 3) -> list[tuple[int, str]]:
    return [(0, text[start : start + size]) for start in range(0, len(text), size)]


def text_of(events: Sequence[GenerationEvent], index: int = 0) -> str:
    return "".join(event.text for event in events if event.index == index)


def ids_of(events: Sequence[GenerationEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_settings_are_read_with_all_problems_at_once() -> None:
    tables: Tables = {
        "Bad Name": {"words": ["a"]},
        "a": {"words": "a", "action": "delete", "colour": 1},
        "b": {"patterns": ["(", "a*"], "mask": 3, "prompt": "yes", "time_limit_s": 0},
        "c": {"models": ["nope"], "words": ["x", " "]},
        "d": {},
        "e": {"words": ["x"], "action": "mask", "prompt": True},
    }
    with pytest.raises(ConfigError) as caught:
        read_filters(tables | {"f": 3}, ["m"])
    for part in (
        "[filters.Bad Name]: expected a name",
        "words is 'a', expected a list",
        "action is 'delete', expected flag, mask, stop, refuse",
        "unknown key colour; there are models, words",
        "the pattern '(' is no regular expression",
        "the pattern 'a*' finds the empty text",
        "mask is 3",
        "prompt is 'yes'",
        "time_limit_s is 0",
        "there is no model nope; there are m",
        "none of them blank",
        "[filters.d]: it looks for nothing",
        "a prompt cannot be masked",
        "filters.f is 3, expected a table [filters.f]",
    ):
        assert part in str(caught.value)


def test_rules_belong_to_models() -> None:
    filters = read_filters({"all": {"words": ["a"]}, "one": {"words": ["b"], "models": ["m"]}}, ["m", "n"])
    names = {model: [rule.name for rule in found.rules] for model in "mn" if (found := filters.of(model)) is not None}
    assert names == {"m": ["all", "one"], "n": ["all"]}
    assert read_filters({}, ["m"]).of("m") is None


@pytest.mark.parametrize(
    "words, text, masked",
    [
        (["bad"], "A bad day", "A *** day"),
        (["bad"], "BAD, Bad. badly abad _bad bad", "***, ***. badly abad _bad ***"),
        (["bad", "bad boy"], "bad boy, bad boys", "***, *** boys"),
        (["straße"], "STRASSE, Straße", "***, ***"),
        (["café"], "CAFÉ cafe\u0301 cafe", "*** *** cafe"),
        (["плохо"], "Это Плохо.", "Это ***."),
        (["坏"], "坏 坏人", "*** 坏人"),
        (["c++"], "In C++ and c", "In *** and c"),
        (["a b"], "a b", "***"),
    ],
)
def test_words_are_whole_and_in_any_case(words: list[str], text: str, masked: str) -> None:
    for size in (1, 3, 100):
        assert text_of(Played().run(rules("mask", *words), pieces(text, size))) == masked


def test_flagging_changes_nothing() -> None:
    played = Played()
    said = pieces("a bad day")
    events = played.run(rules("flag", "bad", patterns=["d.y"]), said)
    assert [event.text for event in events] == [text for _, text in said]
    assert ids_of(events) == [0, 1, 2]
    assert played.noted == [("r", "flag", "a bad day")]
    assert played.num_untold == 0


def test_words_hold_back_no_more_than_the_longest_one() -> None:
    out, came = [], 0
    played = Played()
    text = "it was a fine day in the summer of that year"

    async def watched() -> None:
        nonlocal came
        filters = read_filters(rules("mask", "bad"), ["m"])
        async for event in Watch(filters.of("m"), played, 0).events(played.said(pieces(text, 1), FinishReason.LENGTH)):  # type: ignore[arg-type]
            out.append(event)
            came = played.taken
            assert came - len(text_of(out)) <= 4
        await filters.close()

    asyncio.run(watched())
    assert text_of(out) == text
    assert ids_of(out) == list(range(len(text)))
    assert [len(event.logprobs) for event in out] == [len(event.token_ids) for event in out]


def test_nothing_of_what_is_masked_shows_in_tokens() -> None:
    played = Played(logprobs=1)
    events = played.run(rules("mask", "bad"), pieces("good and then bad and good", 1))
    assert text_of(events) == "good and then *** and good"
    told = "".join("good and then bad and good"[token] for token in ids_of(events))
    assert "good and then ".startswith(told)
    assert len(told) >= 8
    assert sum(len(event.logprobs) for event in events) == len(told)
    assert played.num_untold + len(told) == len("good and then bad and good")
    assert played.noted == [("r", "mask", "good and then bad and good")]


def test_expressions_are_held_against_the_whole_answer() -> None:
    played = Played()
    events = played.run({"r": {"patterns": [r"\d{4}-\d{4}"], "action": "mask", "mask": "#"}}, pieces("no 1234-5678."))
    assert [(event.text, event.token_ids, event.logprobs) for event in events] == [("no #.", [], [])]
    assert played.num_untold == 5


@pytest.mark.parametrize("more", [{}, {"patterns": ["never"]}])
def test_stopping_ends_before_what_was_found(more: dict[str, Any]) -> None:
    played = Played()
    said = pieces("a good day, a bad day, a day" + " and another" * 50)
    events = played.run(rules("stop", "bad", **more), said)
    assert text_of(events) == "a good day, a "
    assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]
    assert events[-1].usage is not None
    assert played.noted[0][:2] == ("r", "stop")
    if not more:  # words are known at once, and the model is not asked for more
        assert played.taken < 12


def test_one_of_several_answers_is_stopped() -> None:
    played = Played(num_return_sequences=2, do_sample=True)
    said = [(0, "one "), (1, "two "), (0, "bad "), (1, "is "), (0, "x "), (1, "good"), (0, "y")]
    events = played.run(rules("stop", "bad"), said)
    assert (text_of(events, 0), text_of(events, 1)) == ("one ", "two is good")
    assert sorted((event.index, str(event.finish_reason)) for event in events if event.finish_reason) == [
        (0, "stop"),
        (1, "length"),
    ]
    assert [event.usage is not None for event in events].count(True) == 1
    assert events[-1].usage is not None


def test_refusing_gives_nothing_out() -> None:
    played = Played(logprobs=0)
    events = played.run(rules("refuse", "bad"), pieces("a good day, a bad day"))
    assert [(event.text, event.token_ids, event.logprobs, event.finish_reason) for event in events] == [
        ("", [], [], "content_filter")
    ]
    assert events[0].usage is not None
    clean = Played().run(rules("refuse", "bad"), pieces("a good day"))
    assert (text_of(clean), ids_of(clean)) == ("a good day", [0, 1, 2, 3])


@pytest.mark.parametrize("action, text, reason", [("refuse", "", "content_filter"), ("stop", "", "stop")])
def test_an_expression_without_end_counts_as_found(action: str, text: str, reason: str) -> None:
    played = Played()
    events = played.run({"r": {"patterns": [SLOW], "action": action, "time_limit_s": 0.05}}, pieces("1," * 80))
    assert (text_of(events), events[-1].finish_reason) == (text, reason)
    assert played.noted == [("r: time limit", action, "1," * 80)]


def test_an_expression_without_end_masks_everything() -> None:
    played = Played()
    events = played.run({"r": {"patterns": [SLOW], "action": "mask", "time_limit_s": 0.05}}, pieces("1," * 80))
    assert text_of(events) == "***"


@pytest.mark.parametrize("action, reason", [("refuse", "content_filter"), ("stop", "stop")])
def test_a_prompt_is_looked_at_where_that_is_wanted(action: str, reason: str) -> None:
    played = Played("A BAD prompt", num_return_sequences=2, do_sample=True, prompt_logprobs=0)
    events = played.run(rules(action, "bad", prompt=True), pieces("fine"))
    assert [(event.index, event.text, event.finish_reason) for event in events] == [(0, "", reason), (1, "", reason)]
    assert events[0].prompt_logprobs == [None, None, None]
    assert events[-1].usage == Usage(3)
    assert played.taken == 0
    assert played.noted == [("r: prompt", action, "")]
    assert text_of(Played("A BAD prompt").run(rules(action, "bad"), pieces("fine"))) == "fine"


def test_tokens_beyond_a_stop_text_are_not_told() -> None:
    played = Played(stop="b")
    events = played.run(rules("mask", "bad"), [(0, "a day "), (0, "of ")], FinishReason.STOP)  # the last said "of bad"
    assert (text_of(events), ids_of(events), played.num_untold) == ("a day of ", [0], 1)


def test_a_broken_answer_says_no_more() -> None:
    events = Played().run(rules("mask", "bad"), pieces("a ba"), FinishReason.ERROR)
    assert events[-1].finish_reason == "error"
    assert "b" not in text_of(events)


def test_rules_of_all_kinds_go_together() -> None:
    tables: Tables = {
        "masks": {"words": ["bad boy", "red"], "action": "mask"},
        "stops": {"words": ["boy"], "action": "stop"},
        "flags": {"words": ["day"]},
    }
    for size in (1, 2, 50):
        played = Played()
        events = played.run(tables, pieces("red day, bad boy and more", size))
        assert text_of(events) == "*** day, ***"
        assert {noted[:2] for noted in played.noted} == {("masks", "mask"), ("stops", "stop"), ("flags", "flag")}


WORDS = ["ab", "a", "abc cab", "ß", "ca+"]


@settings(max_examples=60, deadline=None)
@given(st.text("abcß +.,", max_size=40), st.data())
def test_the_pieces_do_not_matter(text: str, data: st.DataObject) -> None:
    whole = Played().run(rules("mask", *WORDS), [(0, text)])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    parts = [(0, text[start:end]) for start, end in pairwise(cuts)] or [(0, text)]
    cut = Played().run(rules("mask", *WORDS), parts)
    assert text_of(cut) == text_of(whole)
    finder = read_filters(rules("mask", *WORDS), ["m"]).of("m")
    assert finder is not None
    judged = finder.rules[0].judge(text)
    assert text_of(whole).count("***") == (0 if judged is None else len(judged.spans))


class Away:
    """A store whose database is away at first."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.kept: list[str] = []

    def add_flagged(self, **values: Any) -> None:
        if self.times > 0:
            self.times -= 1
            raise StoreError("away")
        self.kept.append(values["text"])


def test_what_is_flagged_waits_for_the_database() -> None:
    async def keep(store: Away, within_s: float) -> Metrics:
        metrics = Metrics()
        review = Review(store, metrics, max_waiting=3)
        for text in "abcde":
            review.add(Flagged("id", None, "m", "r", "flag", "p", text))
        await review.close(within_s)
        return metrics

    store = Away(1)
    metrics = asyncio.run(keep(store, 30))
    assert store.kept == ["a", "b", "c"]
    counted = {
        result: metrics.registry.get_sample_value("bluejay_flagged_total", {"result": result}) for result in RESULTS
    }
    assert counted == {"kept": 3, "retried": 1, "dropped": 2}
    lost = Away(10**9)
    metrics = asyncio.run(keep(lost, 0.1))
    assert metrics.registry.get_sample_value("bluejay_flagged_total", {"result": "dropped"}) == 5


RESULTS = ("kept", "retried", "dropped")
SETTINGS = """
[server]
keep_flagged = true

[filters.tame]
words = ["a", "the", "was"]
action = "mask"
mask = "[-]"

[filters.secret]
words = ["xyzzy"]
action = "refuse"
prompt = true

[filters.stories]
patterns = ['.']
"""
PREDICT = "/v1/models/bluejay:predict"


def test_a_server_filters_counts_and_keeps(start_server: Callable[..., AbstractContextManager[Any]]) -> None:
    parameters = {"max_length": 40, "do_sample": False}
    with start_server(settings=SETTINGS) as serving:
        with serving.client() as http:
            body = {"instances": ["Once upon a time there", "Say xyzzy now"], "parameters": parameters}
            answer = http.post(PREDICT, json=body).json()["predictions"]
            measured = http.get("/metrics").text
        assert serving.stop() == 0
        log = serving.log
    [[tame], [refused]] = answer
    assert "[-]" in tame["generated_text"]
    assert " was " not in tame["generated_text"]
    assert refused["generated_text"] == "Say xyzzy now"
    assert 'bluejay_filtered_total{action="mask",model="bluejay",rule="tame"} 1.0' in measured
    assert 'bluejay_filtered_total{action="refuse",model="bluejay",rule="secret: prompt"} 1.0' in measured
    assert "xyzzy" not in log
    assert "Once upon" not in log
    kept = kept_in(serving.home)
    assert {(row.rule, row.action) for row in kept} == {
        ("tame", "mask"),
        ("secret: prompt", "refuse"),
        ("stories", "flag"),
    }
    assert {row.prompt for row in kept} == {"Once upon a time there", "Say xyzzy now"}
    assert all("[-]" not in row.text for row in kept)


def kept_in(home: Any) -> list[Any]:
    from bluejay.accounts.store import Store

    store = Store.open(f"sqlite:///{home}/data/bluejay/bluejay.db")
    try:
        return store.list_flagged()
    finally:
        store.close()


def test_a_wrong_filter_keeps_the_server_from_starting(tmp_path: Any) -> None:
    import subprocess
    import sys

    (tmp_path / "config.toml").write_text("[filters.x]\npatterns = ['(']\n")
    done = subprocess.run(
        [sys.executable, "-m", "bluejay", "serve", "--port", "0", "--grpc-port", "-1"],
        env={"PATH": "", "HOME": str(tmp_path), "BLUEJAY_CONFIG": str(tmp_path / "config.toml")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "[filters.x]: the pattern '(' is no regular expression" in done.stderr
    assert not (tmp_path / ".local").exists()
