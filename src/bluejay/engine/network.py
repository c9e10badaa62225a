"""A model and its tokenizer: what every engine knows of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bluejay.decoding.params import SamplingParams
from bluejay.decoding.processors import processors_for
from bluejay.decoding.sampler import Choice
from bluejay.decoding.stopping import new_token_limit
from bluejay.engine.continuation import Continuation
from bluejay.engine.request import GenerationRequest
from bluejay.errors import ContextLengthExceeded, InvalidRequest, UnsupportedOption
from bluejay.model import LanguageModel
from bluejay.model.kernels import works_by_kernels
from bluejay.model.quantized import Quantization
from bluejay.tokenizer import Tokenizer


class Network:
    """A model, where it is, and which of its ids mean something.

    Args:
        model: the network, in evaluation mode.
        tokenizer: turns tokens into text, and says which ids have a token at all: others are never chosen. Without
            it, events and outputs carry no text, and `stop` is refused.
        device: where the model is.
        dtype: what it computes in.

    Attributes:
        by_kernels: whether kernels alone compute a step, so that it can be recorded and repeated.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.quantized = Quantization.of(model.config) is not None
        self.dtype = dtype
        self.by_kernels = self.quantized or works_by_kernels(model)
        self._forbidden = None if tokenizer is None else self._ids_without_token(tokenizer)

    def prepare(self, place: int, request: GenerationRequest) -> Continuation:
        """Check a request against this model. Raises: RequestError."""
        params, prompt = request.params, list(request.prompt_token_ids)
        config = self.model.config
        self.check_ids(prompt)
        limit = new_token_limit(params, len(prompt), config.n_positions)
        if params.stop_texts and self.tokenizer is None:
            raise UnsupportedOption("stop needs a tokenizer, and this model was opened without one", "stop")
        if params.eos_token_id is not None and (wrong := [i for i in params.eos_ids(None) if i >= config.vocab_size]):
            raise InvalidRequest(
                f"eos_token_id names {wrong[:10]}, expected ids from 0 to {config.vocab_size - 1}", "eos_token_id"
            )
        eos_ids = tuple(i for i in params.eos_ids(config.eos_token_id) if i < config.vocab_size)
        processors = processors_for(
            params, prompt, eos_ids=eos_ids, vocab_size=config.vocab_size, forbidden=self._forbidden
        )
        return Continuation(place, 0, prompt, params, eos_ids, limit, Choice(processors), self.tokenizer)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises: InvalidRequest for token ids that the model does not have."""
        size = self.model.config.vocab_size
        if wrong := sorted({token for token in token_ids if not 0 <= token < size}):
            raise InvalidRequest(f"the prompt holds token ids {wrong[:10]}, expected 0 to {size - 1}", "prompt")

    def prepare_text(self, place: int, text: Sequence[int]) -> Continuation:
        """Check a text that is to be embedded; what it brings has no token. Raises: as `check_text`."""
        self.check_text(text)
        return Continuation(place, 0, list(text), SamplingParams(), (), 0, Choice(), None)

    def check_text(self, text: Sequence[int]) -> None:
        """Check a text that is to be embedded.

        Raises: InvalidRequest if it has no token or one that the model does not have, ContextLengthExceeded if it has
            too many.
        """
        self.check_ids(text)
        if not text:
            raise InvalidRequest("a text has no token; nothing can be embedded", "text")
        self.check_length(len(text))

    def check_length(self, num_tokens: int) -> None:
        """Raises: ContextLengthExceeded for more tokens to read than the model's context holds."""
        longest = self.model.config.n_positions
        if num_tokens > longest:
            raise ContextLengthExceeded(
                f"the text has {num_tokens} tokens to read, and the model's context holds {longest}; shorten it", "text"
            )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., n_embd] -> [..., vocab_size] float32, -inf for ids that must never be chosen."""
        return self.allowed(self.model.logits(hidden_states))

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits without the ids that must never be chosen; changed in place."""
        return logits if self._forbidden is None else logits.masked_fill_(self._forbidden, -torch.inf)

    def _ids_without_token(self, tokenizer: Tokenizer) -> Tensor | None:
        """[V] bool, True for ids that must never be chosen; None if there are none."""
        size = self.model.config.vocab_size
        mask = torch.ones(size, dtype=torch.bool)
        mask[[i for i in tokenizer.known_ids if i < size]] = False
        return mask.to(self.device) if mask.any() else None
