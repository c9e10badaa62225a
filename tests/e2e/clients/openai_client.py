"""The `openai` package. argv: URL, API key, model name. $WRONG_KEY is a key that the server must refuse."""

import asyncio
import os
import sys

import openai
from steps import Steps

URL, KEY, MODEL = sys.argv[1:]
steps = Steps()
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
PROMPT = "Once upon a time"


def complete(name, prompt=PROMPT, **options):
    return steps.run(
        name, lambda: client.completions.create(**{"model": MODEL, "max_tokens": 8, **options}, prompt=prompt)
    )


steps.run("models", lambda: list(client.models.list()))
steps.run("model", lambda: client.models.retrieve(MODEL))
steps.run("unknown model", lambda: client.models.retrieve("no-such-model"))

complete("greedy", temperature=0)
complete("greedy again", temperature=0)
complete("defaults", max_tokens=openai.omit)
complete("one token", temperature=0, max_tokens=1)
complete("no token", temperature=0, max_tokens=0, echo=True, logprobs=1)
complete("seed 7", temperature=1.0, seed=7)
complete("seed 7 again", temperature=1.0, seed=7)
complete("n", temperature=1.0, n=3, seed=1)
complete("best_of", temperature=1.0, best_of=4, n=2, seed=1, logprobs=0)
complete("best_of less than n", best_of=1, n=2)
complete("echo", temperature=0, echo=True)
complete("logprobs", temperature=0, logprobs=3)
complete("echo with logprobs", temperature=0, echo=True, logprobs=2)
complete("logprobs 0", temperature=0, logprobs=0)
complete("stop", temperature=0, max_tokens=40, stop=["a"])
complete("stop by a list", temperature=0, max_tokens=40, stop=[".", ","])
complete("penalties", temperature=0, max_tokens=24, presence_penalty=2.0, frequency_penalty=2.0)
complete("no penalties", temperature=0, max_tokens=24)
complete("top_p", temperature=1.0, top_p=1e-6, seed=3)
complete("user", temperature=0, user="somebody")

complete("token ids", prompt=[1, 2, 3], temperature=0)
complete("batch of texts", prompt=["Once upon a time", "One day a fox"], temperature=0)
complete("batch of token ids", prompt=[[1, 2, 3], [4, 5]], temperature=0, echo=True)
complete("batch with n", prompt=["Once upon a time", "One day a fox"], n=2, seed=5)
complete("logit_bias", prompt=[1, 2, 3], temperature=0, max_tokens=4, logit_bias={"42": 100})
complete("logit_bias against", prompt=[1, 2, 3], temperature=0, max_tokens=4, logit_bias={"42": 100, "43": -100})

complete("beams", temperature=0, extra_body={"num_beams": 3, "length_penalty": 1.0})
complete("groups of beams", temperature=0, extra_body={"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5})
complete("top_k 1", temperature=1.0, seed=11, extra_body={"top_k": 1})
complete("repetition_penalty", temperature=0, max_tokens=24, extra_body={"repetition_penalty": 1.3})


def streamed(prompt=PROMPT, **options):
    asked = {"model": MODEL, "max_tokens": 8, "temperature": 0, **options}
    chunks = list(client.completions.create(prompt=prompt, stream=True, **asked))
    return [chunk.model_dump(exclude_unset=True) for chunk in chunks]


steps.run("stream", streamed)
steps.run("stream with usage", lambda: streamed(stream_options={"include_usage": True}))
steps.run(
    "stream of several", lambda: streamed(prompt=["Once upon a time", "One day a fox"], n=2, seed=1, temperature=1.0)
)
steps.run("stream with logprobs", lambda: streamed(logprobs=2))
steps.run("stream with echo", lambda: streamed(echo=True))
steps.run(
    "stream of an unknown model",
    lambda: list(client.completions.create(model="no-such-model", prompt="a", stream=True)),
)


def left_early():
    """Take one chunk and go: the server must not mind."""
    with client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, stream=True) as stream:
        return next(iter(stream)).model_dump(exclude_unset=True)


steps.run("stream left early", left_early)
steps.run("after it", lambda: client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1))


def embed(name, **options):
    return steps.run(name, lambda: client.embeddings.create(**{"model": MODEL, "input": "a blue jay", **options}))


embed("embedding")  # the client asks for base64 by itself, and decodes it
embed("embedding as floats", encoding_format="float")
embed("embedding as base64", encoding_format="base64")
embed("embeddings", input=["a blue jay", "a fox", "a blue jay"])
embed("embeddings of token ids", input=[[1, 2, 3], [4, 5]])
embed("embedding of token ids", input=[1, 2, 3])
embed("embedding of nothing", input="")
embed("embedding with dimensions", dimensions=7)
embed("embedding of an unknown model", model="no-such-model")

complete("error: unknown model", model="no-such-model")
complete("error: temperature", temperature=-1.0)
complete("error: type of max_tokens", max_tokens="many")
complete("error: too many tokens", max_tokens=10**6)
complete("error: too long", prompt="word " * 5000)
complete("error: suffix", suffix="the end")
complete("error: n", n=0)
complete("error: huge n", n=10**6)
complete("error: token id", prompt=[10**6])
complete("error: no prompt", prompt=[])
complete("error: logit_bias", logit_bias={"42": 1000})
complete("error: penalty", presence_penalty=3.0)
complete("error: unknown option", extra_body={"no_such_option": 1})
steps.run("error: beams with a stream", lambda: streamed(extra_body={"num_beams": 3, "num_beam_groups": 2}))
steps.run(
    "error: chat", lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
)

steps.run(
    "timeout", lambda: client.with_options(timeout=0.001).completions.create(model=MODEL, prompt=PROMPT, max_tokens=200)
)
steps.run(
    "request id",
    lambda: client.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=1).headers[
        "x-request-id"
    ],
)

if wrong_key := os.environ.get("WRONG_KEY"):
    stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key=wrong_key, max_retries=0)
    steps.run("wrong key", lambda: stranger.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1))
    steps.run("wrong key: models", lambda: list(stranger.models.list()))


def flood(count=64):
    """More requests at once than a small server takes: each ends in an answer or in the client's RateLimitError."""

    async def one(asked):
        try:
            answer = await asked.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0)
            return {"text": answer.choices[0].text}
        except openai.APIStatusError as error:
            headers = error.response.headers
            return {
                "raised": type(error).__name__,
                "status": error.status_code,
                "retry-after": headers.get("retry-after"),
            }

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as asked:
            return await asyncio.gather(*(one(asked) for _ in range(count)))

    return asyncio.run(all_at_once())


steps.run("many at once", flood)


def asynchronous():
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as asked:
            whole = await asked.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
            stream = await asked.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].text async for chunk in stream]
            vector = await asked.embeddings.create(model=MODEL, input="a blue jay")
            return {"whole": whole.choices[0].text, "pieces": pieces, "width": len(vector.data[0].embedding)}

    return asyncio.run(ask())


steps.run("asynchronous", asynchronous)
steps.finish()
