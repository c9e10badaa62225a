"""`LLM`: open a model by name, generate, stream, score and embed text, in process."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bluejay import checkpoints, ops
from bluejay.checkpoints import hub
from bluejay.checkpoints.hub_cache import DEFAULT_MODEL
from bluejay.decoding.params import SamplingParams
from bluejay.engine.engine import Engine
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.request import (
    NO_TOKEN,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    RequestOutput,
    Score,
)
from bluejay.engine.scorer import Scorer
from bluejay.errors import BluejayError, CheckpointError, ConfigError, EngineError, InvalidRequest, RequestError
from bluejay.model.device import available_memory_bytes, choose_device, choose_dtype
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.model.kernels import work_by_kernels, works_by_kernels
from bluejay.model.quantized import QUANTIZED_DTYPES, Quantization
from bluejay.tokenizer import load_tokenizer

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]


class LLM:
    """A model and its tokenizer, ready to work.

    Args:
        model: a checkpoint directory, the name of a pulled model ("gpt-j-6b", "owner/name@revision"), or None for the
            default model that comes with the package.
        dtype: "float32", "bfloat16", "float16", or "auto": as stored, but float32 on a CPU where float16 was stored
            and the memory allows it (else bfloat16), and bfloat16 on a GPU where float32 was stored. "int8" and "int4"
            quantise the weights while they load; a model that is stored so is opened so, or made floats again.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto": a GPU if there is one; the CPU for int8 and int4, which run
            on it alone, on the threads of `bluejay.ops.set_num_threads`. PyTorch then gets one: its own threads and
            those would wait for each other.
        on_progress: called with bytes read and bytes in all while weights load.
        options: how many requests run together, and how much memory their keys and values get.
        draft: guess tokens ahead, which changes no text: "ngram", by what came before in it; a smaller model with the
            same tokens, by path or name; "auto": the model's own draft, in the folder draft/ beside its weights, or
            "ngram" where it has none. None: not at all.

    Attributes:
        engine: what runs the requests.
        name, path: what was asked for, and the directory it was found in.
        config, tokenizer, model, device, dtype: what was opened. The network only serves; `bluejay.load` opens one with
            Hugging Face's `state_dict()`.

    Raises: ModelNotFound, CheckpointError, ConfigError.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        on_progress: Progress | None = None,
        options: EngineOptions | None = None,
        draft: str | Path | None = None,
    ) -> None:
        self.name = str(model) if model is not None else DEFAULT_MODEL
        self.path = hub.resolve(self.name)
        self.model, self.dtype, self.device = _load_to_serve(self.path, dtype, device, on_progress)
        self.config = self.model.config
        self.tokenizer = load_tokenizer(self.path if self.path.is_dir() else self.path.parent)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has ids up to {self.tokenizer.vocab_size - 1}, the model's embedding has "
                f"{self.config.vocab_size} rows: they belong to different models"
            )
        network = Network(self.model, self.tokenizer, device=self.device, dtype=self.dtype)
        self.engine = Engine(network, options, draft=self._open_draft(draft, dtype, device))
        self._scorer = Scorer(network)

    def _open_draft(self, draft: str | Path | None, dtype: str, device: str) -> Network | Literal["ngram"] | None:
        if draft == "auto":
            own = self.path / "draft"
            draft = own if own.is_dir() else "ngram"
        if draft is None or draft == "ngram":
            return None if draft is None else "ngram"
        path = hub.resolve(str(draft))
        tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
        # GPT-J's tokenizer has some more ids than GPT-Neo's, which guesses for it all the same.
        common = set(tokenizer.known_ids) & set(self.tokenizer.known_ids)
        if not common or any(tokenizer.token_text(i) != self.tokenizer.token_text(i) for i in common):
            raise ConfigError(
                f"{draft}: the draft model has other tokens than {self.name}; take one that was trained with the same "
                'tokenizer, or "ngram"'
            )
        # What is quantised runs on the CPU beside a GPU, and its draft with it.
        beside = "cpu" if self.device.type == "cpu" else device
        model, draft_dtype, draft_device = _load_to_serve(path, dtype, beside, None)
        return Network(model, tokenizer, device=draft_device, dtype=draft_dtype)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Go on from each prompt.

        Args:
            prompts: one prompt or several, each a text or token ids. An empty text begins at <|endoftext|>, as
                documents did in training.
            params: options for all prompts, or one for each; None is `SamplingParams()`: 20 tokens, the likeliest ones.
        Returns: one output for each prompt, in their order; `output.text` is the new text alone.
        Raises: RequestError, before anything runs.
        """
        texts = _as_list(prompts)
        requests = self._requests(texts, params)
        outputs = self.engine.generate(requests)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text if isinstance(text, str) else self.tokenizer.decode(output.prompt_token_ids)
        return outputs

    def generate_each(
        self, prompts: Iterable[tuple[Prompt, SamplingParams] | BluejayError], *, ahead: int = 256
    ) -> Iterator[RequestOutput | BluejayError]:
        """Go on from each prompt, of a file as long as it may be; yields one output for each, in their order.

        Prompts are fetched as they are needed: at most `ahead` are on their way. What is wrong with one of them, or
        went wrong, comes in its place and stops nobody else; an error among the prompts is passed on.
        """
        results: dict[int, RequestOutput | BluejayError] = {}
        places: dict[int, int] = {}  # of requests on their way, by the engine's number
        inbox: deque[GenerationEvent] = deque()
        source, num_fetched, num_yielded, more = iter(prompts), 0, 0, True
        try:
            while more or num_yielded < num_fetched:
                while more and num_fetched - num_yielded < ahead:
                    if (item := next(source, None)) is None:
                        more = False
                        break
                    self._begin(item, num_fetched, places, results, inbox)
                    num_fetched += 1
                if places:
                    self.engine.advance(inbox)
                while inbox:
                    self._note(inbox.popleft(), places, results)
                while num_yielded < num_fetched and num_yielded not in places.values():
                    yield results.pop(num_yielded)
                    num_yielded += 1
        finally:
            for number in places:
                self.engine.cancel(number)

    def _begin(
        self,
        item: tuple[Prompt, SamplingParams] | BluejayError,
        place: int,
        places: dict[int, int],
        results: dict[int, RequestOutput | BluejayError],
        inbox: deque[GenerationEvent],
    ) -> None:
        """Give the engine one prompt of many, or note why it does not take it."""
        if isinstance(item, BluejayError):
            results[place] = item
            return
        prompt, params = item
        try:
            request = GenerationRequest(self.encode(prompt), params)
            places[self.engine.add(request, inbox)] = place
        except RequestError as error:
            results[place] = error
            return
        results[place] = output = RequestOutput.blank(request)
        output.prompt = prompt if isinstance(prompt, str) else self.tokenizer.decode(output.prompt_token_ids)

    def _note(
        self, event: GenerationEvent, places: dict[int, int], results: dict[int, RequestOutput | BluejayError]
    ) -> None:
        """Add an event to its output; an output whose last event it was is no longer on its way."""
        place = places[event.request]
        output = results[place]
        if event.error is not None:
            results[place] = EngineError(event.error)
        elif isinstance(output, RequestOutput):
            output.add(event)
        if event.usage is not None:
            del places[event.request]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the new text of one prompt as it comes, in pieces of whole characters.

        A beam search knows its text only at the end and yields it then. Raises: RequestError, before anything runs;
        EngineError where the engine failed, or no token could be chosen.
        """
        return _texts(self.stream_events([prompt], params))

    def stream_events(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[GenerationEvent]:
        """What each step brings to each sequence: token ids, text, log-probabilities, why it ended.

        Raises: RequestError, before anything runs.
        """
        return self.engine.stream(self._requests(list(prompts), params))

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """How likely each continuation is behind its context, and whether greedy decoding would say it.

        Spaces at the end of a context count as the continuation's, and both are encoded together, so that words meet
        as they do in a text. Where a token spans the border ("Onc" and "e upon"), it and all behind it are scored: what
        counts as context ends with the last token that the context alone begins with, too. A context of which no token
        is left is <|endoftext|>, as an empty one is. Source: lm-eval's `_encode_pair`, but for the border.
        Raises: RequestError for an empty continuation, or a pair longer than the model's context.
        """
        return self._scorer.score([self._encode_pair(*pair) for pair in pairs])

    def embed(self, texts: str | Sequence[Prompt]) -> Tensor:
        """One vector for each text: the mean over its tokens of the last hidden states.

        Args:
            texts: one text, or several; each of several may come as token ids.
        Returns: [n, n_embd] float32, on the CPU. Raises: RequestError for an empty or too long text.
        """
        return self._scorer.embed(self.encode_texts([texts] if isinstance(texts, str) else texts))

    def encode_texts(self, texts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of texts that are to be embedded; none for an empty one.

        Raises: InvalidRequest for what is neither a text nor whole numbers.
        """
        return [self.tokenizer.encode(text) if isinstance(text, str) else _ids(text) for text in texts]

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt begins with; <|endoftext|> for an empty text.

        Raises: InvalidRequest for a prompt that is neither a text nor whole numbers.
        """
        if not isinstance(prompt, str):
            return _ids(prompt)
        ids = self.tokenizer.encode(prompt)
        return ids if ids or self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[GenerationRequest]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"there are {len(prompts)} prompts and {len(params)} sets of options; give one for all or one for each",
                param="params",
            )
        return [GenerationRequest(self.encode(prompt), own) for prompt, own in zip(prompts, params, strict=True)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not continuation:
            raise InvalidRequest("the continuation is empty; there is nothing to score", param="continuation")
        if not kept:
            return self.encode(""), self.tokenizer.encode(continuation)
        whole = self.tokenizer.encode(kept + continuation)
        pairs = zip(self.tokenizer.encode(kept), whole[:-1], strict=False)
        border = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return whole[:border] or self.encode(""), whole[border:]


def load(
    model: str | Path | None = None, *, dtype: str = "auto", device: str = "auto", trainable: bool = False
) -> GPTJ | GPTNeo:
    """Open just the network: `forward(input_ids, positions, attend)` and `logits(hidden_states)`.

    Args: as `LLM`; `trainable` makes parameters that ask for gradients.
    """
    path = hub.resolve(str(model) if model is not None else DEFAULT_MODEL)
    return _load(path, dtype, device, None, trainable=trainable)[0]


def _load_to_serve(
    path: Path, dtype: str, device: str, on_progress: Progress | None
) -> tuple[GPTJ | GPTNeo, torch.dtype, torch.device]:
    """As `_load`; a network of float32 on the CPU then works by our kernels, where there are some."""
    model, loaded_dtype, loaded_device = _load(path, dtype, device, on_progress)
    if works_by_kernels(work_by_kernels(model)):
        torch.set_num_threads(1)
    return model, loaded_dtype, loaded_device


def _load(
    path: Path, dtype: str, device_name: str, on_progress: Progress | None, *, trainable: bool = False
) -> tuple[GPTJ | GPTNeo, torch.dtype, torch.device]:
    """The network, the dtype that it computes in, and where it is."""
    device = choose_device(device_name)
    checkpoint = checkpoints.open_checkpoint(path)
    checkpoint.check()  # a checkpoint without weights has no dtype to choose from
    stored_as = Quantization.of(checkpoint.config)
    if dtype in QUANTIZED_DTYPES or (dtype == "auto" and stored_as is not None):
        wanted = Quantization(QUANTIZED_DTYPES[dtype]) if stored_as is None else stored_as
        if dtype not in ("auto", wanted.name):
            raise ConfigError(f"dtype is {dtype}, {path} is stored as {wanted.name}; quantise the float weights")
        if stored_as is None:
            checkpoint = checkpoints.QuantizingCheckpoint(checkpoint, wanted)
        device = torch.device("cpu") if device_name == "auto" else device
        quantized = checkpoints.load_model(checkpoint, device=device, trainable=trainable, on_progress=on_progress)
        if ops.voice() != ops.REFERENCE:
            torch.set_num_threads(1)
        return quantized, torch.float32, device
    if stored_as is not None:
        checkpoint = checkpoints.DequantizedCheckpoint(checkpoint)
    infos = checkpoint.tensors().values()
    stored = {info.dtype for info in infos}
    num_parameters = sum(info.num_bytes // info.dtype.itemsize for info in infos)
    chosen = choose_dtype(dtype, stored, device, num_parameters, available_memory_bytes())
    model = checkpoints.load_model(
        checkpoint, dtype=chosen, device=device, trainable=trainable, on_progress=on_progress
    )
    return model, chosen, device


def _texts(events: Iterator[GenerationEvent]) -> Iterator[str]:
    """The pieces of one prompt's first answer. Raises: EngineError where it fails."""
    for event in events:
        if event.error is not None:
            raise EngineError(event.error)
        if event.index == 0:
            if event.text:
                yield event.text
            if event.finish_reason == FinishReason.ERROR:
                raise EngineError(NO_TOKEN)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, or ids) or several."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        listed: list[Any] = list(prompts)
    except TypeError:
        raise _no_prompt(prompts) from None
    return [listed] if listed and all(map(_is_id, listed)) else listed


def _ids(prompt: Sequence[Any]) -> list[int]:
    """Token ids of any kind of whole number, NumPy's and PyTorch's too."""
    try:
        listed = list(prompt)
    except TypeError:
        raise _no_prompt(prompt) from None
    if wrong := [item for item in listed if not _is_id(item)]:
        raise _no_prompt(wrong[0])
    return [operator.index(item) for item in listed]


def _is_id(item: Any) -> bool:
    if getattr(item, "ndim", 0):  # a row of a matrix, also of one column
        return False
    try:
        operator.index(item)
    except TypeError:
        return False
    return True


def _no_prompt(given: object) -> InvalidRequest:
    return InvalidRequest(
        f"the prompt is or holds {given!r} ({type(given).__name__}), expected a text or token ids, whole numbers",
        param="prompt",
    )
