"""Steps of decoding without Python between the kernels: the second of a kind is recorded, the others repeat it.

Saying what comes next takes Python and PyTorch some 50 microseconds for each kernel, 15 % of a step of GPT-J-6B in
int4: the weights stream through the caches and take their code along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bluejay import ops
from bluejay.model import Attend, LanguageModel

MOST_ROWS = 16  # a recording keeps all that its kernels wrote, 5 MB a row for GPT-J-6B, and more rows gain little


class RecordingCache(Attend, Protocol):
    """A cache that knows whether a recording still fits.

    Attributes:
        settled: whether this step's keys, values and tables lie where the last step's did.
        recorded: a step that was recorded with them; None once one of them has moved.
    """

    settled: bool
    recorded: object | None


class RecordedStep:
    """One step of some rows: its kernels, what they read first, and what they leave.

    Attributes:
        inputs: as `transformer.embed` gives them, [B, 1, ...].
        logits: [B, vocab_size].
        calls: None if PyTorch computed something in between, which a recording would miss.
    """

    def __init__(self, model: LanguageModel, inputs: tuple[Tensor, ...], cache: RecordingCache) -> None:
        self.inputs = inputs
        with ops.Recording() as calls, _Watched() as watched:
            self.logits = _logits(model, inputs, cache)
        self.calls = None if watched.computed else calls

    def repeat(self, inputs: tuple[Tensor, ...]) -> None:
        """Compute the logits of other tokens, the cache having been told where they stand."""
        assert self.calls is not None
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.calls.replay()


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of operators that compute: not those that take memory or look at the same memory otherwise."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles what runs here; saying so would import PyTorch's compiler, 1.4 s before the second token."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        looks = _memory(args) & _memory((result,)) and not func._schema.is_mutable
        if not looks and not name.startswith("empty"):
            self.computed.add(name)
        return result


def _memory(values: tuple[Any, ...]) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}


def decode(model: LanguageModel, input_ids: Tensor, positions: Tensor, cache: RecordingCache) -> Tensor:
    """The logits behind one token of each row, [B, 1] -> [B, vocab_size]; `cache.begin` was called.

    Args:
        model: of either family, one that works by kernels.
    """
    inputs = _transformer(model).embed(input_ids, positions)
    step = cache.recorded
    # A step is recorded if the last one was like it: then the next one may well be, too.
    if not cache.settled or len(input_ids) > MOST_ROWS or ops.voice() == ops.REFERENCE:
        return _logits(model, inputs, cache)
    if not isinstance(step, RecordedStep):
        cache.recorded = None  # before new memory is taken: an older one, of other rows, holds its own
        cache.recorded = step = RecordedStep(model, inputs, cache)
    elif step.calls is None:
        return _logits(model, inputs, cache)
    else:
        step.repeat(inputs)
    return step.logits.clone()


def _logits(model: LanguageModel, inputs: tuple[Tensor, ...], cache: RecordingCache) -> Tensor:
    hidden: Tensor = _transformer(model).blocks(*inputs, cache)
    return model.logits(hidden[:, 0])


def _transformer(model: LanguageModel) -> Any:
    """What both families have, each with other inputs to its blocks."""
    return model.transformer  # type: ignore[attr-defined]
