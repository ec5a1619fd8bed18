"""Metrics of the server, under vLLM's names, so that its dashboards can be used."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as _exposition

from e1jax.sampling.completion import Event
from e1jax.sampling.engine import Engine
from e1jax.serving.answers import finish_reason

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000)


class Timing:
    """When a request came, and when each of its samples last had tokens."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.last: dict[int, float] = {}  # by sample


class Metrics:
    """All are of one model, which is their label `model_name`.

    A sample is a request of vLLM's: one with n=4 counts four times. The cache is used to
    the share of slots that are taken, as a slot is what a waiting sample waits for.
    """

    def __init__(self, engine: Engine, model: str):
        self.registry = CollectorRegistry()
        self._model = model
        shared = {"labelnames": ["model_name"], "registry": self.registry}

        def gauge(name: str, text: str, value) -> None:
            Gauge(name, text, **shared).labels(model).set_function(value)

        gauge(
            "vllm:num_requests_running",
            "Samples that have a slot.",
            lambda: engine.running,
        )
        gauge("vllm:num_requests_waiting", "Samples that wait.", lambda: engine.waiting)
        gauge(
            "vllm:kv_cache_usage_perc",
            "Share of slots that are taken, 0 to 1.",
            lambda: engine.running / engine.slots,
        )

        def histogram(name: str, text: str, buckets: Sequence[float]):
            return Histogram(name, text, **shared, buckets=buckets).labels(model)

        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From request to first token.", _LONG
        )
        self._between = histogram(
            "vllm:inter_token_latency_seconds",
            "Time per token between two steps of a sample.",
            _SHORT,
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From request to last token.", _LONG
        )
        self._prompt_tokens = Counter(
            "vllm:prompt_tokens", "Tokens of prompts.", **shared
        ).labels(model)
        self._tokens = Counter(
            "vllm:generation_tokens", "Tokens of responses.", **shared
        ).labels(model)

        def by_label(name: str, text: str, label: str) -> Counter:
            return Counter(name, text, ["model_name", label], registry=self.registry)

        self._finished = by_label(
            "vllm:request_success", "Samples that are done.", "finished_reason"
        )
        self._ends = by_label(
            "e1jax:thinking_end",
            "Samples that are done, by the end of thinking.",
            "end",
        )

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return _exposition(self.registry)

    def note_prompt(self, tokens: int) -> None:
        """A prompt was taken in."""
        self._prompt_tokens.inc(tokens)

    def note_abort(self, samples: int) -> None:
        """So many samples of a request, perhaps none, were ended before they were done."""
        self._finished.labels(self._model, "abort").inc(samples)

    def note_events(self, timing: Timing, events: Sequence[tuple[int, Event]]) -> None:
        """The events that one step gave of a request, by sample."""
        now = time.monotonic()
        counts: dict[int, int] = {}
        for sample, event in events:
            counts[sample] = counts.get(sample, 0) + len(event.token_ids)
            if event.completion is not None:
                self._whole.observe(now - timing.start)
                reason = finish_reason(event.completion)
                self._finished.labels(self._model, reason).inc()
                end = event.completion.thinking_end or "none"
                self._ends.labels(self._model, end).inc()
        for sample, count in counts.items():
            self._tokens.inc(count)
            if sample not in timing.last:
                self._first.observe(now - timing.start)
            elif count:
                self._between.observe((now - timing.last[sample]) / count)
            timing.last[sample] = now
