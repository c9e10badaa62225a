"""What Prometheus is told; labels are bounded: models and dialects of this server, statuses, outcomes."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from bluejay.engine.statistics import Statistics
    from bluejay.server.generation import Run
    from bluejay.server.models import ServedModel

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# Of an engine's statistics; they begin anew with each worker, so they are gauges.
ENGINE = {
    "running": "Requests that the engine works on",
    "waiting": "Requests that wait in it",
    "num_blocks": "Blocks of the cache of keys and values",
    "held_blocks": "Blocks that sequences hold",
    "cached_blocks": "Blocks remembered for prompts to come",
    "steps": "Forward passes",
    "prompt_tokens": "Tokens of prompts that began",
    "cached_tokens": "Of those, found in the cache",
    "generated_tokens": "Tokens that were chosen",
    "drafted_tokens": "Tokens guessed by speculation",
    "accepted_tokens": "Tokens guessed rightly",
    "preemptions": "Requests that had to begin again",
}


class Metrics:
    """All counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by = ("model", "dialect")
        self._requests = Counter(
            "bluejay_requests",
            "Requests that were admitted, by how they ended",
            (*by, "outcome"),
            registry=self.registry,
        )
        self._answers = Counter("bluejay_http_answers", "HTTP answers", ("dialect", "status"), registry=self.registry)
        self._tokens = Counter("bluejay_tokens", "Tokens", (*by, "kind"), registry=self.registry)
        self._running = Gauge("bluejay_requests_running", "Requests that are admitted", by, registry=self.registry)
        self._first_token = Histogram(
            "bluejay_first_token_seconds",
            "From a request to its first token",
            by,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "bluejay_per_token_seconds",
            "From one token of an answer to the next",
            by,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._engine = {
            name: Gauge(f"bluejay_engine_{name}", text, ("model",), registry=self.registry)
            for name, text in ENGINE.items()
        }
        self._ready = Gauge("bluejay_model_ready", "1 if the model takes requests", ("model",), registry=self.registry)
        self._inside = Gauge(
            "bluejay_model_sequences", "Sequences that run or wait for the model", ("model",), registry=self.registry
        )
        self._pending = Gauge(
            "bluejay_usage_pending", "Ended requests whose usage is not in the database yet", registry=self.registry
        )
        self._filtered = Counter(
            "bluejay_filtered",
            "What filters found, by the rule's name and what it did",
            ("model", "rule", "action"),
            registry=self.registry,
        )
        self._review = Counter(
            "bluejay_flagged",
            "Generations for review: kept, retried where the database was away, dropped where too many waited for it",
            ("result",),
            registry=self.registry,
        )
        self._took = Histogram(
            "bluejay_request_seconds", "From a request to its end", by, buckets=SECONDS, registry=self.registry
        )

    def begun(self, run: Run) -> None:
        """A request was admitted."""
        self._running.labels(*_labels(run)).inc()

    def first_token(self, run: Run, seconds: float) -> None:
        """Its first token came."""
        self._first_token.labels(*_labels(run)).observe(seconds)

    def ended(self, run: Run, outcome: str) -> None:
        """It ended."""
        labels = _labels(run)
        self._running.labels(*labels).dec()
        self._requests.labels(*labels, outcome).inc()
        self._took.labels(*labels).observe(time.monotonic() - run.caller.received_s)
        usage = run.usage
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("generated", usage.generated_tokens),
            ("delivered", run.num_delivered),
        ):
            self._tokens.labels(*labels, kind).inc(count)
        for one in run.usages.values():
            if one.per_token_s is not None:
                self._per_token.labels(*labels).observe(one.per_token_s)

    def filtered(self, model: str, rule: str, action: str) -> None:
        """A filter found something."""
        self._filtered.labels(model, rule, action).inc()

    def reviewed(self, result: str, count: int = 1) -> None:
        """Something was kept for review, or could not be."""
        self._review.labels(result).inc(count)

    def engine(self, model: ServedModel, statistics: Statistics | None) -> None:
        """What a model's engine counts, as it is now; None if it does not tell."""
        self._ready.labels(model.name).set(model.ready)
        self._inside.labels(model.name).set(model.gate.num_inside)
        for name, gauge in self._engine.items():
            if statistics is not None:
                gauge.labels(model.name).set(getattr(statistics, name))
            else:  # what it counted before is not what it counts now
                with suppress(KeyError):
                    gauge.remove(model.name)

    def ledger(self, num_pending: int) -> None:
        """How much usage waits for the database."""
        self._pending.set(num_pending)

    def answered(self, dialect: str, status: int) -> None:
        """An HTTP answer was begun."""
        self._answers.labels(dialect, str(status)).inc()


def _labels(run: Run) -> tuple[str, str]:
    return run.asked.model.name, run.asked.dialect
