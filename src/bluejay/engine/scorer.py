"""What a model thinks of texts that are already there: log-probabilities and embeddings, without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bluejay.decoding.sampler import TokenLogprobs, token_logprobs
from bluejay.engine.kernel_cache import KernelAttention
from bluejay.engine.network import Network
from bluejay.engine.request import Score
from bluejay.errors import InvalidRequest
from bluejay.model import CausalAttention

LOGITS_CHUNK = 256  # positions whose logits are held at once: 50 MB at GPT-J's vocabulary


class Scorer:
    """Scores and embeds texts with one model.

    Args:
        max_rows: texts that are read together.
    """

    def __init__(self, network: Network, *, max_rows: int = 32) -> None:
        self._network = network
        self._max_rows = max_rows

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """How likely each continuation is behind its context, both as token ids.

        Raises:
            InvalidRequest: if a context has no token.
            ContextLengthExceeded: if context and continuation together are longer than the model's context and one.
        """
        for context, continuation in pairs:
            self._network.check_ids([*context, *continuation])
            if not context:
                raise InvalidRequest("the context has no token; begin it with the end-of-text token", "context")
            self._network.check_length(len(context) + len(continuation) - 1)
        # The last token is only predicted, never read.
        texts = [[*context, *continuation[:-1]] for context, continuation in pairs]
        scores: dict[int, Score] = {}
        for place, hidden in self._hidden_states(texts):
            context, continuation = pairs[place]
            logprob, is_greedy = 0.0, True
            for logits, ids in self._chunks(hidden[len(context) - 1 :], continuation):
                logprob += sum(token.logprob for token in token_logprobs(logits, ids, 0))
                is_greedy = is_greedy and logits.argmax(-1).tolist() == list(ids)
            scores[place] = Score(logprob, is_greedy)
        return [scores[place] for place in range(len(pairs))]

    @torch.inference_mode()
    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The mean over tokens of the last hidden states, [n, n_embd] float32 on the CPU.

        Raises: InvalidRequest if a text has no token, ContextLengthExceeded if it has too many.
        """
        for text in texts:
            self._network.check_text(text)
        means = torch.empty(len(texts), self._network.model.config.n_embd)
        for place, hidden in self._hidden_states(texts):
            means[place] = hidden.float().mean(0)
        return means

    def _chunks(self, hidden: Tensor, token_ids: Sequence[int]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Logits [T, V] and the tokens that they predict, a part at a time."""
        for first in range(0, len(token_ids), LOGITS_CHUNK):
            ids = token_ids[first : first + LOGITS_CHUNK]
            yield self._network.logits(hidden[first : first + len(ids)]), ids

    @torch.inference_mode()
    def logprobs(self, context: Sequence[int], token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """The log-probabilities of tokens behind a context, by reading both at once."""
        if not token_ids:
            return []
        [(_, hidden)] = self._hidden_states([[*context, *token_ids[:-1]]])
        chunks = self._chunks(hidden[len(context) - 1 :], token_ids)
        return [token for logits, ids in chunks for token in token_logprobs(logits, ids, num_top)]

    def _hidden_states(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """Each text's place and last hidden states, [its tokens, n_embd]; texts of like length run together."""
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        attend = KernelAttention() if self._network.by_kernels else CausalAttention()
        for first in range(0, len(texts), self._max_rows):
            places = by_length[first : first + self._max_rows]
            hidden = self._network.model(*padded([texts[place] for place in places], self._network.device), attend)
            for row, place in enumerate(places):
                yield place, hidden[row, : len(texts[place])]


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right with 0, and positions; both [B, T]."""
    width = max(map(len, texts))
    input_ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
    return input_ids, torch.arange(width, device=device).expand(len(texts), -1)
