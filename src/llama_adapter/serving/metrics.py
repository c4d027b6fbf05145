"""What `/metrics` says: Prometheus counters and histograms of one server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MOST_LABELS = 200
"""Adapters that are counted by name; all others are counted as "other"."""
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server; several servers in one process do not mix.

    Args:
        running, waiting: how many answers are in the batch, and in line.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        prefix, by_model = "llama_adapter_", ["model"]
        for name, text, value in (
            ("running_rows", "Answers in the batch.", running),
            ("waiting_rows", "Answers in line.", waiting),
        ):
            Gauge(prefix + name, text, registry=registry).set_function(value)
        self._requests = Counter(prefix + "requests", "Requests.", ["model", "outcome"], registry=registry)
        self._refused = Counter(prefix + "refused", "Requests that were not taken.", ["status"], registry=registry)
        self._prompt = Counter(prefix + "prompt_tokens", "Tokens of prompts.", by_model, registry=registry)
        self._new = Counter(prefix + "generation_tokens", "Tokens of answers.", by_model, registry=registry)
        self._first = Histogram(
            prefix + "time_to_first_token_seconds", "From request to first token.", by_model, registry=registry,
            buckets=BUCKETS,
        )  # fmt: skip
        self._whole = Histogram(
            prefix + "request_seconds", "From request to end.", by_model, registry=registry, buckets=BUCKETS
        )
        self._names: set[str] = set()

    def answered(
        self, model: str, done: bool, prompt_tokens: int, new_tokens: int, first: float | None, whole: float
    ) -> None:
        """Count a request that has ended; `done` is false where it was cut short. Times in seconds."""
        if len(self._names) < MOST_LABELS:
            self._names.add(model)
        label = model if model in self._names else "other"
        self._requests.labels(label, "done" if done else "cut short").inc()
        self._prompt.labels(label).inc(prompt_tokens)
        self._new.labels(label).inc(new_tokens)
        self._whole.labels(label).observe(whole)
        if first is not None:
            self._first.labels(label).observe(first)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
