"""Baseten's package since 0.9. argv: URL, API key, model name. Its own time-out is five seconds."""

import asyncio
import sys
import time

from baseten.client import AsyncInferenceClient, InferenceClient
from baseten.client.inferenceapi import AsyncPredictRequest, InferenceRetryConfig, PredictInput
from steps import Steps

URL, KEY, MODEL = sys.argv[1:]
DEPLOYMENT, ENVIRONMENT = "rqvz1xw", "staging"
PROMPT = {"prompt": "If I was a billionaire, I would", "max_length": 20}

steps = Steps()
client = InferenceClient(api_key=KEY, base_url_override=URL)
api = client.api


def asked(**fields):
    return PredictInput({**PROMPT, **fields})


steps.run("production", lambda: api.predict_production(request=asked()))
steps.run("development", lambda: api.predict_development(request=asked()))
steps.run("environment", lambda: api.predict(env_name=ENVIRONMENT, request=asked()))
steps.run("deployment", lambda: api.predict_deployment(deployment_id=DEPLOYMENT, request=asked()))
steps.run("regional", lambda: api.predict_regional(request=asked()))
steps.run("beams", lambda: api.predict_production(request=asked(num_beams=2, num_return_sequences=2)))


def raw(accept):
    response = api.predict_production_raw(request=asked(), accept=accept)
    body = response.read().decode()
    response.close()
    return {"status": response.status_code, "type": response.headers["content-type"], "body": body}


steps.run("raw", lambda: raw("application/json"))
steps.run("raw, as octets", lambda: raw("application/octet-stream"))

steps.run("no prompt", lambda: api.predict_production(request=PredictInput({"max_length": 20})))
steps.run("a type that is none", lambda: api.predict_production(request=asked(max_length="many")))
steps.run("over the limits", lambda: api.predict_production(request=asked(max_length=9999)))


def queue(send, **options):
    """Send an asynchronous request and follow it to its end."""
    request = AsyncPredictRequest(model_input=PROMPT, **options)
    request_id = send(request).request_id
    seen, until = [], time.monotonic() + 30
    while time.monotonic() < until:
        status = api.get_async_request_status(request_id=request_id)
        if not seen or seen[-1] != status.status:
            seen.append(status.status)
        if status.status not in ("QUEUED", "IN_PROGRESS"):
            break
        time.sleep(0.05)
    return {"request_id": request_id, "seen": seen, "last": status.model_dump()}


steps.run("async: production", lambda: queue(lambda request: api.async_predict_production(request=request)))
steps.run("async: development", lambda: queue(lambda request: api.async_predict_development(request=request)))
steps.run("async: environment", lambda: queue(lambda request: api.async_predict(env_name=ENVIRONMENT, request=request)))
steps.run(
    "async: deployment",
    lambda: queue(lambda request: api.async_predict_deployment(deployment_id=DEPLOYMENT, request=request)),
)
steps.run(
    "async: regional",
    lambda: queue(
        lambda request: api.async_predict_regional(request=request),
        priority=1,
        max_time_in_queue_seconds=60,
        inference_retry_config=InferenceRetryConfig(max_attempts=2),
    ),
)
steps.run(
    "async: a webhook",
    lambda: queue(
        lambda request: api.async_predict_production(request=request), webhook_endpoint="https://example.com/h"
    ),
)


def cancelled():
    request = AsyncPredictRequest(model_input={**PROMPT, "max_length": 500})
    request_id = api.async_predict_production(request=request).request_id
    answer = api.cancel_async_request(request_id=request_id)
    return {"request_id": request_id, "answer": answer.model_dump()}


steps.run("async: cancel", cancelled)
steps.run("async: cancel one that is not", lambda: api.cancel_async_request(request_id="no-such-request"))
steps.run("async: status of one that is not", lambda: api.get_async_request_status(request_id="no-such-request"))
steps.run(
    "async: no prompt", lambda: api.async_predict_production(request=AsyncPredictRequest(model_input={"max_length": 8}))
)
steps.run("a space in a name", lambda: api.predict(env_name="a b", request=asked()))

steps.run("queue: production", api.get_async_queue_status_production)
steps.run("queue: development", api.get_async_queue_status_development)
steps.run("queue: environment", lambda: api.get_async_queue_status(env_name=ENVIRONMENT))
steps.run("queue: deployment", lambda: api.get_async_queue_status_deployment(deployment_id=DEPLOYMENT))
steps.run("queue: regional", api.get_async_queue_status_regional)

steps.run("wake: production", api.wake_production)
steps.run("wake: development", api.wake_development)
steps.run("wake: environment", lambda: api.wake(env_name=ENVIRONMENT))
steps.run("wake: deployment", lambda: api.wake_deployment(deployment_id=DEPLOYMENT))
steps.run("wake: regional", api.wake_regional)


def prefixed():
    """One server, several models: the model's id is in the path instead of the host's name."""
    with InferenceClient(api_key=KEY, base_url_override=f"{URL}/models/{MODEL}") as other:
        return other.api.predict_production(request=asked())


steps.run("below a model's path", prefixed)


def asynchronous():
    async def ask():
        async with AsyncInferenceClient(api_key=KEY, base_url_override=URL) as other:
            answers = await asyncio.gather(*(other.api.predict_production(request=asked()) for _ in range(4)))
            return [answer.model_dump() for answer in answers]

    return asyncio.run(ask())


steps.run("asynchronous client", asynchronous)
client.close()
steps.finish()
