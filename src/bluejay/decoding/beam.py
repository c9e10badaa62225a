"""Beam search, beam sampling and diverse beam search, without a model: log-probabilities in, tokens and parents out.

The caller keeps one cache row for each running beam and asks in turns:

    search = beam_search(params, prompt, …)
    while not search.done:
        step = search.step(logits)      # [1, V] behind the prompt, then one row for each running beam
        # row i goes on from row step.parents[i] of before, with step.token_ids[i]
    answers = search.finish()

Source: transformers 4.56.2, `_beam_search` (beam search and sampling), `_group_beam_search` with `BeamSearchScorer`.
The arithmetic is in float32 and in their order, so that equal scores fall the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bluejay.decoding.params import SamplingParams
from bluejay.decoding.processors import Processor, diversity, process
from bluejay.decoding.sampler import draw

NEVER = -1e9  # the score of what may not be chosen; transformers' number, because differences to it decide ties


@dataclass(frozen=True)
class BeamStep:
    """The beams that run on: what each appends, and the row of the last step that it continues."""

    token_ids: list[int]
    parents: list[int]


@dataclass(frozen=True)
class Answer:
    """A finished beam.

    Attributes:
        token_ids: the answer, its end-of-text included.
        score: log-probability over length ** length_penalty.
        complete: it ended by itself, by end-of-text or a stop text, and was not cut.
    """

    token_ids: list[int]
    score: float
    complete: bool


@dataclass(frozen=True)
class BeamRules:
    """What a beam search must know of its request.

    Attributes:
        prompt: the tokens before the answer.
        processors: applied to log-probabilities, see `processors_for`.
        eos_ids: tokens that end an answer.
        max_new_tokens: of an answer.
        generator: where draws come from, for beam sampling.
        is_stopped: whether the tokens of an answer hold a stop text; None where there are no stop texts.
    """

    params: SamplingParams
    prompt: list[int]
    processors: Sequence[Processor]
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    generator: torch.Generator | None = None
    is_stopped: Callable[[list[int]], bool] | None = None

    def is_complete(self, token_ids: list[int]) -> bool:
        """Whether an answer ends with its last token."""
        return token_ids[-1] in self.eos_ids or (self.is_stopped is not None and self.is_stopped(token_ids))

    def num_candidates(self, num_beams: int, num_scores: int) -> int:
        """Enough continuations that `num_beams` can run on, however many of them end here."""
        return min(max(2, 1 + len(self.eos_ids)) * num_beams, num_scores)

    def divisor(self, num_tokens: int) -> float:
        """What the log-probability of an answer of this length is divided by."""
        return float(num_tokens**self.params.length_penalty)

    def best_divisor(self, num_tokens: int) -> float:
        """The divisor by which a running beam is judged that has `num_tokens` tokens now."""
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        return self.divisor(self.max_new_tokens if longest else num_tokens)


class Search(Protocol):
    """What every beam search offers."""

    done: bool

    def step(self, logits: Tensor, *, out_of_time: bool = False) -> BeamStep:
        """Continue all beams by one token.

        Args:
            logits: [1, V] behind the prompt, then [running beams, V]; float32.
            out_of_time: end here with what there is.
        """
        ...

    def finish(self) -> list[Answer]:
        """The `num_return_sequences` best answers, best first."""
        ...


def beam_search(rules: BeamRules) -> Search:
    """The search that a request's options ask for."""
    return GroupBeamSearch(rules) if rules.params.mode == "group_beam" else BeamSearch(rules)


class BeamSearch:
    """Beam search and beam sampling: running beams, and as many best finished answers."""

    def __init__(self, rules: BeamRules) -> None:
        self._rules = rules
        self._num_beams = rules.params.num_beams
        self._num_tokens = 0
        self._running: list[list[int]] = [[] for _ in range(self._num_beams)]
        # The beams are equal at first, so only the first may be continued. The finished places are empty.
        self._running_scores = torch.full((1, self._num_beams), NEVER)
        self._running_scores[0, 0] = 0
        self._finished = [Answer([], NEVER, False) for _ in range(self._num_beams)]
        self._finished_scores = torch.full((1, self._num_beams), NEVER)
        self._is_finished = torch.zeros(1, self._num_beams, dtype=torch.bool)
        self._can_improve = True
        self.done = False

    def step(self, logits: Tensor, *, out_of_time: bool = False) -> BeamStep:
        """See `Search.step`."""
        candidates = self._candidates(logits)
        if candidates is None:
            self.done = True
            return BeamStep([0] * self._num_beams, [0] * self._num_beams)
        scores, parents, tokens = candidates
        self._num_tokens += 1
        answers = [[*self._running[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        complete = [self._rules.is_complete(answer) for answer in answers]
        cut = out_of_time or self._num_tokens >= self._rules.max_new_tokens
        ends = torch.tensor([[cut or by_itself for by_itself in complete]])

        running_scores = scores + ends * NEVER
        kept = running_scores.topk(self._num_beams).indices
        self._running_scores = running_scores.gather(1, kept)
        places = kept[0].tolist()
        self._running = [answers[place] for place in places]
        self._add_finished(answers, complete, scores, ends)

        self._can_improve = self._can_improve and self._beats_finished()
        self.done = not self._can_improve or self._is_full() or bool(ends.all())
        rows = [min(parents[place], logits.shape[0] - 1) for place in places]  # behind the prompt all beams share a row
        return BeamStep([tokens[place] for place in places], rows)

    def finish(self) -> list[Answer]:
        """See `Search.finish`."""
        return self._finished[: self._rules.params.num_return_sequences]

    def _candidates(self, logits: Tensor) -> tuple[Tensor, list[int], list[int]] | None:
        """Scores [1, N], parents and tokens of the best continuations; None if there is nothing to draw from."""
        log_probs = logits.log_softmax(-1).expand(self._num_beams, -1)
        histories = [self._rules.prompt + answer for answer in self._running]
        log_probs = process(self._rules.processors, log_probs, histories)
        vocab_size = log_probs.shape[-1]
        totals = (log_probs + self._running_scores.to(log_probs.device).T).reshape(1, -1)
        num_candidates = self._rules.num_candidates(self._num_beams, totals.shape[-1])
        if self._rules.generator is None:
            scores, places = totals.topk(num_candidates)
        else:
            drawn = draw(totals, num_candidates, self._rules.generator)
            if drawn is None:
                return None
            scores, places = totals.gather(1, drawn), drawn
        return scores.cpu(), (places // vocab_size)[0].tolist(), (places % vocab_size)[0].tolist()

    def _add_finished(self, answers: list[list[int]], complete: list[bool], scores: Tensor, ends: Tensor) -> None:
        """Let the answers that end here take the places of worse ones."""
        # Only the first num_beams candidates count: the others are there to run on.
        ended = ends & (torch.arange(ends.shape[1]) < self._num_beams)
        full = self._is_full()
        scores = scores / self._rules.divisor(self._num_tokens)
        scores = scores + full * NEVER + (not self._can_improve) * NEVER + ~ended * NEVER
        merged_scores = torch.cat((self._finished_scores, scores), dim=1)
        best = merged_scores.topk(self._num_beams).indices
        self._finished_scores = merged_scores.gather(1, best)
        self._is_finished = torch.cat((self._is_finished, ended), dim=1).gather(1, best)
        merged = [*self._finished, *(Answer(*item) for item in zip(answers, scores[0].tolist(), complete, strict=True))]
        self._finished = [merged[place] for place in best[0].tolist()]

    def _is_full(self) -> bool:
        """Whether there are enough answers for a search that stops early."""
        return self._rules.params.early_stopping is True and bool(self._is_finished.all())

    def _beats_finished(self) -> bool:
        """Whether the best running beam may still become better than the worst finished answer."""
        attainable = self._running_scores[:, :1] / self._rules.best_divisor(self._num_tokens)
        worst = torch.where(self._is_finished, self._finished_scores.min(), NEVER)
        return bool((attainable > worst).any())


@dataclass
class _Group:
    """The beams of one group and its best finished answers."""

    beams: list[list[int]]
    scores: Tensor  # [group size] float32
    answers: list[Answer] = field(default_factory=list)
    worst: float = -NEVER
    done: bool = False

    def add(self, answer: Answer, size: int) -> None:
        """Keep an answer if it is among the `size` best."""
        if len(self.answers) >= size and answer.score <= self.worst:
            return
        self.answers.append(answer)
        self.worst = min(answer.score, self.worst)
        if len(self.answers) > size:
            del self.answers[min(range(size + 1), key=lambda i: self.answers[i].score)]
            self.worst = min(answer.score for answer in self.answers)


class GroupBeamSearch:
    """Diverse beam search: groups choose in turn, and pay for tokens that earlier groups chose in the same step."""

    def __init__(self, rules: BeamRules) -> None:
        self._rules = rules
        self._size = rules.params.num_beams // rules.params.num_beam_groups
        self._num_tokens = 0
        # As in a search of one group: only the first beam of each may be continued at first.
        start = torch.full((self._size,), NEVER)
        start[0] = 0
        self._groups = [
            _Group([[] for _ in range(self._size)], start.clone()) for _ in range(rules.params.num_beam_groups)
        ]
        self.done = False

    def step(self, logits: Tensor, *, out_of_time: bool = False) -> BeamStep:
        """See `Search.step`; a group that is done has no rows any more."""
        num_running = sum(not group.done for group in self._groups) * self._size
        log_probs = logits.log_softmax(-1).expand(num_running, -1)
        self._num_tokens += 1
        chosen: list[int] = []  # by all earlier groups in this step
        step = BeamStep([], [])
        row = 0
        for group in self._groups:
            if group.done:
                # transformers pads a group that is done, and later groups pay for the padding, end-of-text.
                chosen += [self._rules.eos_ids[0]] * self._size
                continue
            tokens, parents = self._advance(group, log_probs[row : row + self._size], chosen)
            chosen += tokens
            if not group.done:
                step.token_ids.extend(tokens)
                # Behind the prompt all beams share a row.
                step.parents.extend(min(row + parent, logits.shape[0] - 1) for parent in parents)
            row += self._size
        self.done = all(group.done for group in self._groups) or out_of_time or self._all_end()
        return step

    def finish(self) -> list[Answer]:
        """See `Search.finish`; beams that still run count as answers that were cut."""
        for group in self._groups:
            if not group.done:
                for beam, score in zip(group.beams, group.scores.tolist(), strict=True):
                    group.add(Answer(beam, self._normed(score), self._is_stopped(beam)), self._size)
        answers = [answer for group in self._groups for answer in group.answers]
        # Of equal answers the later one comes first, as where a sorted list is taken from its end.
        best = sorted(answers, key=lambda answer: answer.score)[::-1]
        return best[: self._rules.params.num_return_sequences]

    def _advance(self, group: _Group, log_probs: Tensor, chosen: list[int]) -> tuple[list[int], list[int]]:
        """Continue a group's beams by one token: the tokens, and the beam of the group that each continues."""
        rules = self._rules
        log_probs = diversity(log_probs, chosen, rules.params.diversity_penalty)
        log_probs = process(rules.processors, log_probs, [rules.prompt + beam for beam in group.beams])
        totals = (log_probs + group.scores.to(log_probs.device)[:, None]).reshape(1, -1)
        scores, places = totals.topk(rules.num_candidates(self._size, totals.shape[-1]))
        values = scores[0].tolist()
        kept: list[tuple[float, int, int]] = []
        for rank, (value, place) in enumerate(zip(values, places[0].tolist(), strict=True)):
            parent, token = divmod(place, log_probs.shape[-1])
            if token not in rules.eos_ids:
                kept.append((value, token, parent))
            elif rank < self._size:  # the others are there to run on
                # transformers drops the end-of-text that was chosen and appends the first one.
                answer = Answer([*group.beams[parent], rules.eos_ids[0]], self._normed(value), True)
                group.add(answer, self._size)
            if len(kept) == self._size:
                break
        group.scores = torch.tensor([value for value, _, _ in kept])
        group.beams = [[*group.beams[parent], token] for _, token, parent in kept]
        group.done = self._is_done(group, max(values))
        return [token for _, token, _ in kept], [parent for _, _, parent in kept]

    def _is_done(self, group: _Group, best: float) -> bool:
        if len(group.answers) < self._size:
            return False
        if self._rules.params.early_stopping is True:
            return True
        return group.worst >= best / self._rules.best_divisor(self._num_tokens)

    def _normed(self, score: float) -> float:
        # Of an answer that ends now, the end-of-text counted.
        return score / self._rules.divisor(self._num_tokens)

    def _is_stopped(self, beam: list[int]) -> bool:
        return self._rules.is_stopped is not None and self._rules.is_stopped(beam)

    def _all_end(self) -> bool:
        if self._num_tokens >= self._rules.max_new_tokens:
            return True
        return all(self._is_stopped(beam) for group in self._groups if not group.done for beam in group.beams)
