"""OpenAI's protocol for models that go on from a text, and the routes for tokens that vLLM has beside it.

    curl http://127.0.0.1:8000/v1/completions -d '{"model": "bluejay", "prompt": "Once upon a time", "max_tokens": 40}'

Source: OpenAI's API reference, completions, embeddings and errors; vLLM's `/tokenize`, `/detokenize` and
`/tokenizer_info`; the prefix /openai is that of KServe's model server.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from array import array
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from bluejay.decoding.params import SamplingParams
from bluejay.errors import ContextLengthExceeded, InvalidRequest, RequestError, UnsupportedOption
from bluejay.server import sse
from bluejay.server.auth import Access
from bluejay.server.call import Dialect, House, TheCall, access, documented, route_class
from bluejay.server.dialects.openai_answers import Completion
from bluejay.server.dialects.openai_bodies import CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from bluejay.server.errors import Failure, NoSuchThing
from bluejay.server.generation import Run, items_of
from bluejay.tokenizer import Tokenizer

# Kinds of errors by status, as OpenAI names them; its client raises a class for each status.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "server_error",
}
CODES = {
    "ContextLengthExceeded": "context_length_exceeded",
    "ModelNotFound": "model_not_found",
    "Overloaded": "overloaded",
    "QuotaExceeded": "rate_limit_exceeded",
    "Unauthenticated": "invalid_api_key",
    "UnsupportedOption": "unsupported_parameter",
}
NO_ANSWER = SamplingParams(max_new_tokens=1)  # of a text that is embedded
OBJECT = {"type": "object"}


def render(failure: Failure) -> Any:
    """OpenAI's error."""
    return {
        "error": {
            "message": failure.message,
            "type": TYPES.get(_status(failure), "invalid_request_error"),
            "param": failure.param,
            "code": CODES.get(failure.kind),
        }
    }


def _status(failure: Failure) -> int:
    """Too much at once is OpenAI's 429: its client then waits as long as it is told."""
    return 429 if failure.kind == "Overloaded" else failure.status


DIALECT = Dialect("openai", render, _status)


def routes(house: House) -> APIRouter:
    """Everything here; below /openai once more, where clients of KServe look for it."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["OpenAI"])
    for prefix in ("", "/openai"):
        own = {"include_in_schema": not prefix}
        done = documented(
            CompletionBody, {**OBJECT, "required": ["id", "object", "created", "model", "choices"]}, **own
        )
        router.post(f"{prefix}/v1/completions", summary="Go on from texts", **done)(completions)
        done = documented(EmbeddingBody, {**OBJECT, "required": ["object", "data", "model", "usage"]}, **own)
        router.post(f"{prefix}/v1/embeddings", summary="Texts as vectors", **done)(embeddings)
        router.post(f"{prefix}/v1/chat/completions", summary="Not served", **documented(None, None, **own))(chat)
    router.post("/tokenize", summary="Text to tokens", **documented(TokenizeBody, OBJECT))(tokenize)
    router.post("/detokenize", summary="Tokens to text", **documented(DetokenizeBody, OBJECT))(detokenize)
    router.get("/tokenizer_info", summary="About the tokenizer", **documented(None, OBJECT))(tokenizer_info)
    return router


@access(Access.USER)
async def completions(call: TheCall) -> Response:
    """`choices` are in the order of the prompts, n for each."""
    body = await call.read(CompletionBody)
    model = call.find(body.model)
    body.check()
    params = body.params(model.options.defaults)
    options = call.house.options
    items = items_of(body.prompt, params, options, reads_only=body.reads_only, cut=not body.max_tokens)
    tokenizer, _ = model.opened()  # before a place is taken: it may fail
    run = await call.begin(model, items, asked_model=body.model)
    answer = Completion(body, run, tokenizer, call.house.writing)
    headers = {"X-Served-Model": model.name}
    if not body.stream:
        return await call.answer(run, run.outputs, answer.whole, run.num_told_logprobs, headers)
    response = call.stream(run, answer.chunks(), on_failure=lambda failure: sse.event(render(failure)))
    response.headers.update(headers)
    return response


@access(Access.USER)
async def chat(call: TheCall) -> Response:
    """There is none: a model of texts knows no roles."""
    raise NoSuchThing(
        "these models go on from a text and know no chat; send the whole text as the prompt of /v1/completions", "model"
    )


@access(Access.USER)
async def embeddings(call: TheCall) -> Response:
    """The mean over a text's tokens of the last hidden states."""
    body = await call.read(EmbeddingBody)
    model = call.find(body.model)
    try:
        width = model.opened()[1].n_embd
        if body.dimensions not in (None, width):
            raise UnsupportedOption(
                f"dimensions is {body.dimensions}, expected none or {width}, the model's", "dimensions"
            )
        items = items_of(body.texts(), NO_ANSWER, call.house.options)
        run = await call.begin(model, items, asked_model=body.model)
        return await call.answer(
            run,
            run.vectors,
            partial(_embedded, body, run),
            len(run.prompts) * width,
            {"X-Served-Model": model.name},
        )
    except RequestError as error:
        raise type(error)(str(error), "input" if error.param in ("prompt", "text") else error.param) from None


def _embedded(body: EmbeddingBody, run: Run, vectors: list[list[float]]) -> dict[str, Any]:
    form = _in_base64 if body.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": index, "embedding": form(one)} for index, one in enumerate(vectors)]
    used = {"prompt_tokens": run.num_prompt_tokens, "total_tokens": run.num_prompt_tokens}
    return {"object": "list", "data": data, "model": run.asked.model.name, "usage": used}


def _in_base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client reads them."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


@access(Access.USER)
async def tokenize(call: TheCall) -> Response:
    """In vLLM's form."""
    body = await call.read(TokenizeBody)
    tokenizer, facts = call.find(body.model).opened()
    if len(body.prompt) > (most := facts.n_positions * tokenizer.longest_token_bytes):
        raise ContextLengthExceeded(
            f"the prompt has {len(body.prompt):,} characters, expected at most {most:,}", "prompt"
        )
    async with call.counted():
        [tokens] = await call.house.service.tokenise(tokenizer, [body.prompt])
        spelled = await asyncio.to_thread(_spelled, tokenizer, tokens) if body.return_token_strs else None
    return call.reply(
        {"count": len(tokens), "max_model_len": facts.n_positions, "tokens": tokens, "token_strs": spelled}
    )


def _spelled(tokenizer: Tokenizer, tokens: list[int]) -> list[str | None]:
    return [tokenizer.token_text(token) for token in tokens]


@access(Access.USER)
async def detokenize(call: TheCall) -> Response:
    """In vLLM's form; special tokens are spelled out."""
    body = await call.read(DetokenizeBody)
    tokenizer, facts = call.find(body.model).opened()
    most = call.house.options.max_tokens
    if len(body.tokens) > most:
        raise InvalidRequest(f"tokens has {len(body.tokens):,} ids, expected at most {most:,}", "tokens")
    if wrong := [token for token in body.tokens if token >= facts.vocab_size]:
        raise InvalidRequest(f"tokens holds {wrong[:10]}, expected ids from 0 to {facts.vocab_size - 1}", "tokens")
    async with call.counted():
        return call.reply({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})


@access(Access.USER)
async def tokenizer_info(call: TheCall) -> Response:
    """What evaluation programs ask before they take the server's tokenizer; `?model=` where there are several."""
    tokenizer, facts = call.find(call.request.query_params.get("model")).opened()
    token, token_id = tokenizer.eos_token, tokenizer.eos_token_id
    return call.reply(
        {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": token,
            "eos_token": token,
            "unk_token": token,
            "pad_token": None,
            "bos_token_id": token_id,
            "eos_token_id": token_id,
            "chat_template": None,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": facts.n_positions,
        }
    )
