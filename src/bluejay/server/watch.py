"""Answers on their way out, held against a model's rules: nothing leaves before it is judged.

Rules that only flag let everything pass, and look at the text when the answer has ended. Of rules that act, words can
be decided as soon as the longest one could be complete, so only that much of the end is held back:

    text   |———— gone out ————|—— held back ——|
                           pos^               ^end     end - pos <= longest

A regular expression can look as far as it likes, and what is refused must not have begun: such answers go out whole, at
their end. Tokens and log-probabilities go out with the text that they make, and not at all once something was found.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bluejay.decoding.logprobs import TokenLogprobs
from bluejay.decoding.stopping import FinishReason
from bluejay.engine.request import GenerationEvent, Usage
from bluejay.server.filters import Action, Hit, Rule, Rules, Span

if TYPE_CHECKING:
    from bluejay.server.generation import Run

BROKEN = (FinishReason.ERROR, FinishReason.CANCELLED)


@dataclass
class Told:
    """Tokens, what is told of them, and where in the answer their text ends."""

    end: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, other: GenerationEvent | Told) -> None:
        """Take over what another one holds."""
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs


class Answer:
    """One answer as far as it has come.

    Attributes:
        text: as the model said it.
        hits: what rules that act found in it, by its label.
        stopped: nothing more of it goes out.
        ended: its last event went out.
    """

    def __init__(self, rules: Rules, stops: bool) -> None:
        self.text = ""
        self.num_tokens = 0
        self.hits: dict[str, Hit] = {}
        self.stopped = False
        self.ended = False
        self._rules = rules
        self._stops = stops
        self._is_cut = False
        self._pos = 0  # so far the text has gone out
        self._scanned = dict.fromkeys((rule.name for rule in rules.acting), 0)
        self._held: list[Told] = []
        self._open = Told()  # their text has not come yet

    def push(self, event: GenerationEvent) -> None:
        """Take what the model said."""
        self.text += event.text
        self.num_tokens += len(event.token_ids)
        self._open.add(event)
        # The tokens of a stop text are not part of the text, and the last may say more than the stop text: never told.
        self._is_cut = self._stops and event.finish_reason is FinishReason.STOP
        if event.text and not self._is_cut:
            self._close_open()

    def _close_open(self) -> None:
        self._open.end = len(self.text)
        self._held.append(self._open)
        self._open = Told()

    def advance(self, *, at_end: bool) -> str:
        """What may go out by the rules' words, of what has come."""
        until = len(self.text) if at_end else len(self.text) - self._rules.longest
        found: list[tuple[Span, Rule]] = []
        for rule in self._rules.acting:
            spans = rule.find_words(self.text, self._scanned[rule.name], until)
            self._scanned[rule.name] = max(until, self._scanned[rule.name], *(end for _, end in spans), 0)
            if spans:
                self.hits.setdefault(rule.name, Hit(rule, tuple(spans)))
            found += [(span, rule) for span in spans]
        return self._out(found, until)

    def settle(self, hits: Sequence[Hit]) -> str:
        """What may go out of the whole answer."""
        self.hits |= {hit.label: hit for hit in hits}
        if self.refused:
            return ""
        return self._out([(span, hit.rule) for hit in hits for span in hit.spans], len(self.text))

    @property
    def refused(self) -> bool:
        """Whether nothing of it goes out."""
        return any(hit.rule.action is Action.REFUSE for hit in self.hits.values())

    def _out(self, found: list[tuple[Span, Rule]], until: int) -> str:
        """The text from where it stands, less what was found; where several overlap, masked once, by the first."""
        parts = []
        for (begin, end), rule in sorted(found, key=lambda one: (one[0][0], one[1].action is not Action.STOP)):
            if begin >= self._pos:
                parts.append(self.text[self._pos : begin])
            if rule.action is Action.STOP:
                self.stopped, self._pos = True, max(self._pos, begin)
                return "".join(parts)
            if begin >= self._pos:
                parts.append(rule.mask)
            self._pos = max(self._pos, end)
        if until > self._pos:
            parts.append(self.text[self._pos : until])
            self._pos = until
        return "".join(parts)

    def tokens(self, *, at_end: bool) -> tuple[Told, int]:
        """Tokens that may be told, and the number of those that are not."""
        if at_end and not self._is_cut:
            self._close_open()
        told, num_untold = Told(), 0
        while self._held and (at_end or self.stopped or self._held[0].end <= self._pos or self.hits):
            one = self._held.pop(0)
            if self.hits:
                num_untold += len(one.token_ids)
            else:
                told.add(one)
        if at_end or self.stopped:
            num_untold += len(self._open.token_ids)
            self._open = Told()
        return told, num_untold


class Watch:
    """The answers to one prompt of a request."""

    def __init__(self, rules: Rules, run: Run, place: int) -> None:
        self._rules = rules
        self._run = run
        self._place = place
        self._params = run.asked.items[place].params
        self._answers: dict[int, Answer] = {}
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    async def events(self, source: AsyncGenerator[GenerationEvent, None]) -> AsyncGenerator[GenerationEvent, None]:
        """What may go out, as soon as it may. A source that is not needed to its end is closed."""
        try:
            if (reason := await self._judge_prompt()) is not None:
                for event in self._nothing(reason):
                    yield event
                return
            async with aclosing(source) as events:
                async for event in events:
                    for out in [event] if self._only_notes(event) else await self._take(event):
                        yield out
                    if self._all_stopped():
                        for out in self._farewell():
                            yield out
                        return
        finally:
            self._note_all()

    def _only_notes(self, event: GenerationEvent) -> bool:
        """Take an event that goes out as it is."""
        if self._rules.acting:
            return False
        self._answer(event).text += event.text
        return True

    def _answer(self, event: GenerationEvent) -> Answer:
        if event.index not in self._answers:
            self._answers[event.index] = Answer(self._rules, bool(self._params.stop))
        return self._answers[event.index]

    async def _take(self, event: GenerationEvent) -> list[GenerationEvent]:
        answer, at_end = self._answer(event), event.finish_reason is not None
        self._prompt_logprobs = event.prompt_logprobs or self._prompt_logprobs
        answer.ended = at_end
        if answer.stopped:
            return [self._silent(event, FinishReason.STOP)] if at_end else []
        if event.finish_reason in BROKEN:
            return [self._silent(event, event.finish_reason)]
        answer.push(event)
        if not self._rules.needs_whole:
            text = answer.advance(at_end=at_end)
        elif at_end:
            text = answer.settle(await self._rules.judge(self._rules.acting, answer.text))
        else:
            return []
        return self._out(event, answer, text)

    def _out(self, event: GenerationEvent, answer: Answer, text: str) -> list[GenerationEvent]:
        at_end = event.finish_reason is not None
        told, num_untold = answer.tokens(at_end=at_end)
        self._run.count_untold(num_untold)
        reason = event.finish_reason
        if at_end and (answer.refused or answer.stopped):
            reason = FinishReason.FILTERED if answer.refused else FinishReason.STOP
        if not (text or told.token_ids or at_end):
            return []
        return [
            replace(
                event,
                text=text,
                token_ids=told.token_ids,
                logprobs=told.logprobs,
                finish_reason=reason,
                prompt_logprobs=self._take_prompt_logprobs(),
            )
        ]

    def _silent(self, event: GenerationEvent, reason: FinishReason | None) -> GenerationEvent:
        """The end of an answer of which nothing more is said."""
        return replace(
            event,
            text="",
            token_ids=[],
            logprobs=[],
            finish_reason=reason,
            prompt_logprobs=self._take_prompt_logprobs(),
        )

    def _take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """They come with the first event, and go with the first one that goes out."""
        taken, self._prompt_logprobs = self._prompt_logprobs, None
        return taken

    def _all_stopped(self) -> bool:
        """Whether nothing of any answer is still to go out, though the model goes on."""
        answers = self._answers.values()
        return (
            len(answers) == self._params.num_return_sequences
            and all(answer.ended or answer.stopped for answer in answers)
            and not all(answer.ended for answer in answers)
        )

    def _farewell(self) -> list[GenerationEvent]:
        """The ends of answers that were stopped, and the request's."""
        left = sorted(index for index, answer in self._answers.items() if not answer.ended)
        num_generated = sum(answer.num_tokens for answer in self._answers.values())
        return self._ends(left, FinishReason.STOP, num_generated)

    def _nothing(self, reason: FinishReason) -> list[GenerationEvent]:
        """No answer at all."""
        if self._params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * len(self._run.prompts[self._place])
        return self._ends(range(self._params.num_return_sequences), reason, 0)

    def _ends(self, indexes: Sequence[int], reason: FinishReason, num_generated: int) -> list[GenerationEvent]:
        usage = Usage(len(self._run.prompts[self._place]), generated_tokens=num_generated)
        return [
            GenerationEvent(
                self._place,
                index,
                [],
                finish_reason=reason,
                prompt_logprobs=self._take_prompt_logprobs(),
                usage=usage if index == indexes[-1] else None,
            )
            for index in indexes
        ]

    async def _judge_prompt(self) -> FinishReason | None:
        """Why nothing is to be generated, if so."""
        rules = [rule for rule in self._rules.rules if rule.prompt]
        if not rules:
            return None
        prompt = await asyncio.to_thread(self._run.prompt_text, self._place)
        hits = await self._rules.judge(rules, prompt)
        for hit in hits:
            self._run.note_filtered(self._place, f"{hit.label}: prompt", hit.rule.action, "")
        actions = {hit.rule.action for hit in hits}
        if Action.REFUSE in actions:
            return FinishReason.FILTERED
        return FinishReason.STOP if Action.STOP in actions else None

    def _note_all(self) -> None:
        """Tell of everything that was found; what rules that only flag find is looked for off the answer's path."""
        flagging = [rule for rule in self._rules.rules if rule.action is Action.FLAG]
        for answer in self._answers.values():
            for label, hit in answer.hits.items():
                self._run.note_filtered(self._place, label, hit.rule.action, answer.text)
            if flagging and answer.text:
                self._rules.later(self._flag(flagging, answer.text))

    async def _flag(self, rules: Sequence[Rule], text: str) -> None:
        for hit in await self._rules.judge(rules, text):
            self._run.note_filtered(self._place, hit.label, hit.rule.action, text)
