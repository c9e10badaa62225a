r"""What looks at answers before they leave: rules of the settings file, for each model, and what they find in a text.

[filters.rude]
models = ["bluejay"]            # or "all", which is what counts where nothing is said
words = ["damn", "bloody hell"] # whole words, in any case
patterns = ['\b\d{16}\b']       # regular expressions
action = "mask"                 # flag, mask, stop or refuse
mask = "***"
prompt = false                  # look at the prompt too
time_limit_s = 0.1              # of each regular expression with each text
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import regex

from bluejay.errors import ConfigError

Span = tuple[int, int]

NUM_THREADS = 2  # an expression that runs into its limit holds one of them; the other goes on
MAX_TIME_LIMIT_S = 10.0
KEYS = ("models", "words", "patterns", "action", "mask", "prompt", "time_limit_s")


class Action(StrEnum):
    """What is done where a rule finds something; each equals its text."""

    FLAG = "flag"  # the answer goes out; it is counted, logged, and kept for review
    MASK = "mask"  # what was found is replaced
    STOP = "stop"  # the answer ends before it
    REFUSE = "refuse"  # nothing of the answer goes out


@dataclass(frozen=True)
class Rule:
    """One table of the settings file.

    Attributes:
        words: finds them; `longest` characters are the most that one of them can take, and a boundary behind it.
        prompt: whether the prompt is looked at too.
        time_limit_s: of each of the patterns with each text.
    """

    name: str
    action: Action
    words: regex.Pattern[str] | None = None
    longest: int = 0
    patterns: tuple[regex.Pattern[str], ...] = ()
    mask: str = "***"
    prompt: bool = False
    time_limit_s: float = 0.1

    def judge(self, text: str) -> Hit | None:
        """What it finds in a whole text; may take its time limit for each pattern."""
        spans = [] if self.words is None else [found.span() for found in self.words.finditer(text)]
        try:
            for pattern in self.patterns:
                # `concurrent` lets other threads run meanwhile.
                found = pattern.finditer(text, timeout=self.time_limit_s, concurrent=True)
                spans += [one.span() for one in found]
        except TimeoutError:
            return Hit(self, ((0, len(text)),), timed_out=True)
        return Hit(self, tuple(spans)) if spans else None

    def find_words(self, text: str, begin: int, until: int) -> list[Span]:
        """Its words that begin in that part of a text, which goes on for `longest` behind it or has ended."""
        spans = []
        while self.words is not None and begin < until:
            found = self.words.match(text, begin)
            if found is not None:
                spans.append(found.span())
            begin = begin + 1 if found is None else found.end()
        return spans


@dataclass(frozen=True)
class Hit:
    """What a rule found in a text.

    Attributes:
        spans: where, first and last character but one.
        timed_out: a pattern did not come to an end: the whole text counts as found, to be on the safe side.
    """

    rule: Rule
    spans: tuple[Span, ...]
    timed_out: bool = False

    @property
    def label(self) -> str:
        """The rule's name, as it is counted and kept."""
        return f"{self.rule.name}: time limit" if self.timed_out else self.rule.name


@dataclass(frozen=True)
class Rules:
    """All rules of one model, and where their texts are judged."""

    rules: tuple[Rule, ...]
    filters: Filters = field(repr=False)

    @cached_property
    def acting(self) -> tuple[Rule, ...]:
        """Those that change what goes out."""
        return tuple(rule for rule in self.rules if rule.action is not Action.FLAG)

    @cached_property
    def needs_whole(self) -> bool:
        """Whether nothing may go out before the answer's end: words alone can be known earlier."""
        return any(rule.patterns or rule.action is Action.REFUSE for rule in self.acting)

    @cached_property
    def longest(self) -> int:
        """Characters that are held back of an answer that is sent as it comes."""
        return max((rule.longest for rule in self.acting), default=0)

    async def judge(self, rules: Sequence[Rule], text: str) -> list[Hit]:
        """What these of its rules find in a text; the loop goes on meanwhile."""
        return await self.filters.in_thread(rules, text) if rules and text else []

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what no answer waits for; before the server ends it will be done."""
        self.filters.later(work)


class Filters:
    """The rules of all models.

    Args:
        rules: each with the names of its models, None for all.
    """

    def __init__(self, rules: Iterable[tuple[Rule, frozenset[str] | None]] = ()) -> None:
        self._rules = tuple(rules)
        self._by_model: dict[str, Rules | None] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="filter")
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, model: str) -> Rules | None:
        """The rules of a model, by its name; None where there are none."""
        if model not in self._by_model:
            found = tuple(rule for rule, models in self._rules if models is None or model in models)
            self._by_model[model] = Rules(found, self) if found else None
        return self._by_model[model]

    async def in_thread(self, rules: Sequence[Rule], text: str) -> list[Hit]:
        """What rules find in a text."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _judge_all, rules, text)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that `close` waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Finish what was left for later."""
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self._threads.shutdown()


def _judge_all(rules: Sequence[Rule], text: str) -> list[Hit]:
    return [hit for rule in rules if (hit := rule.judge(text)) is not None]


def read_filters(tables: Mapping[str, Any], models: Iterable[str]) -> Filters:
    """The rules of the settings file's [filters.NAME] tables.

    Args:
        models: the names of those that are served.
    Raises: ConfigError with every problem of every table at once.
    """
    problems: list[str] = []
    known = frozenset(models)
    rules = [_rule(name, table, known, problems) for name, table in tables.items()]
    if problems:
        raise ConfigError("; ".join(problems))
    return Filters(rule for rule in rules if rule is not None)


def _rule(
    name: str, table: Any, known: frozenset[str], problems: list[str]
) -> tuple[Rule, frozenset[str] | None] | None:
    where, before = f"[filters.{name}]", len(problems)
    if not regex.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        problems.append(f"{where}: expected a name of small letters, digits, - and _, at most 63")
    if not isinstance(table, Mapping):
        problems.append(f"filters.{name} is {table!r}, expected a table {where}")
        return None
    if unknown := sorted(set(table) - set(KEYS)):
        problems.append(f"{where}: unknown key {', '.join(unknown)}; there are {', '.join(KEYS)}")
    models = _models(where, table.get("models", "all"), known, problems)
    words = _texts(where, "words", table, problems)
    patterns = tuple(_patterns(where, _texts(where, "patterns", table, problems), problems))
    if not table.get("words") and not table.get("patterns"):
        problems.append(f"{where}: it looks for nothing; give words or patterns")
    action, mask, prompt = table.get("action", "flag"), table.get("mask", "***"), table.get("prompt", False)
    if action not in tuple(Action):
        problems.append(f"{where}: action is {action!r}, expected {', '.join(Action)}")
    if not isinstance(mask, str):
        problems.append(f"{where}: mask is {mask!r}, expected a text")
    if not isinstance(prompt, bool):
        problems.append(f"{where}: prompt is {prompt!r}, expected true or false")
    elif prompt and action == Action.MASK:
        problems.append(f"{where}: a prompt cannot be masked; set prompt = false, or action to flag, stop or refuse")
    limit_s = table.get("time_limit_s", 0.1)
    if isinstance(limit_s, bool) or not isinstance(limit_s, int | float) or not 0 < limit_s <= MAX_TIME_LIMIT_S:
        problems.append(f"{where}: time_limit_s is {limit_s!r}, expected seconds above 0, at most {MAX_TIME_LIMIT_S:g}")
    if len(problems) > before:
        return None
    finder = _finder(words) if words else None
    longest = max(map(_most_characters, words), default=0)
    return Rule(name, Action(action), finder, longest, patterns, mask, prompt, float(limit_s)), models


def _models(where: str, value: Any, known: frozenset[str], problems: list[str]) -> frozenset[str] | None:
    if value == "all":
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        problems.append(f'{where}: models is {value!r}, expected a list of names or "all"')
    elif missing := sorted(set(value) - known):
        # A misspelt name would leave a model without its filter, and nobody would know.
        problems.append(f"{where}: there is no model {', '.join(missing)}; there are {', '.join(sorted(known))}")
    else:
        return frozenset(value)
    return None


def _texts(where: str, key: str, table: Mapping[str, Any], problems: list[str]) -> list[str]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        problems.append(f"{where}: {key} is {value!r}, expected a list of texts, none of them blank")
        return []
    return value


def _patterns(where: str, texts: Sequence[str], problems: list[str]) -> Iterator[regex.Pattern[str]]:
    for text in texts:
        try:
            pattern = regex.compile(text)
            if pattern.search("", timeout=1.0) is not None:
                problems.append(f"{where}: the pattern {text!r} finds the empty text, and so everything")
            yield pattern
        except (regex.error, TimeoutError, RecursionError) as error:
            problems.append(f"{where}: the pattern {text!r} is no regular expression: {error}")


def _finder(words: Sequence[str]) -> regex.Pattern[str]:
    """Finds words where no letter, digit or mark stands directly before or behind; the longest of several."""
    forms = {unicodedata.normalize(form, word.strip()) for word in words for form in ("NFC", "NFD")}
    # Full case folding: STRASSE is straße. A list by name is found as a set, in any number of words.
    return regex.compile(r"(?<!\w)\L<words>(?!\w)", regex.IGNORECASE | regex.FULLCASE, words=sorted(forms))


def _most_characters(word: str) -> int:
    """The most that a word can take in a text, in whichever form, and one behind it that shows that it is whole."""
    form = unicodedata.normalize("NFD", word.strip())
    return max(len(form), len(form.casefold()), len(unicodedata.normalize("NFD", form.casefold()))) + 1
