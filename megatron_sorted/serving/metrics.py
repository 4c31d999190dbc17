"""Metrics in Prometheus' format: counts of the worker, and times that clients saw."""

from collections.abc import Iterator
from dataclasses import fields

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError:  # an installation of before version 0.8: all but /metrics is served
    prometheus_client = None

from starlette.responses import Response

from megatron_sorted.decoding.batching.options import BatchingCounts
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.request_log import RequestRecord
from megatron_sorted.serving.worker import GenerationWorker

PREFIX = "megatron_sorted"
GAUGES = {
    "requests_waiting": "Requests that wait now.",
    "requests_running": "Requests whose texts are written now.",
    "texts_waiting": "Texts that wait now.",
    "texts_running": "Texts that are written now.",
    "cache_bytes_running": "Memory of the texts that are written now.",
    "cache_bytes_kept": "Memory of kept beginnings of texts.",
    "cache_bytes_budget": "Limit on the memory of running and kept texts; 0 before it is known.",
}
COUNTERS = {
    "requests_finished": "Requests whose texts are complete.",
    "requests_cancelled": "Requests whose client left.",
    "requests_refused": "Requests that found the queue full, or waited too long.",
    "requests_failed": "Requests that ended with another error.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts whose keys and values were kept from earlier texts.",
    "generated_tokens": "New tokens.",
    "drafted_tokens": "Tokens that were drafted.",
    "accepted_tokens": "Drafted tokens that are in texts.",
    "layers_run": "Layers that ran, summed over all tokens that ran through them.",
    "rounds": "Forward passes, each of all texts that were ready.",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")
"""Paths by which responses are counted; a client must not make a series of its own."""


class WorkerCounts:
    """A collector of the worker's counts, read when they are asked for.

    Args:
        worker: The owner of the counts.
    """

    def __init__(self, worker: GenerationWorker):
        self.worker = worker

    def collect(self) -> "Iterator[Metric]":
        """Yield a metric for each count."""
        counts = self.worker.counts
        for name in (one.name for one in fields(BatchingCounts)):
            value = getattr(counts, name)
            if name in GAUGES:
                yield GaugeMetricFamily(f"{PREFIX}_{name}", GAUGES[name], value)
            else:
                yield CounterMetricFamily(f"{PREFIX}_{name}", COUNTERS[name], value)


class Metrics:
    """The metrics of one server; without the library there are none.

    Args:
        worker: The owner of the model.
    """

    def __init__(self, worker: GenerationWorker):
        self.registry = None
        if prometheus_client is None:
            return
        prometheus_client.disable_created_metrics()  # a second series of each, which few use
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        registry.register(WorkerCounts(worker))
        self.responses = prometheus_client.Counter(
            f"{PREFIX}_responses",
            "Responses by path and status.",
            ("path", "status"),
            registry=registry,
        )
        self.depths = prometheus_client.Counter(
            f"{PREFIX}_tokens_by_depth",
            "New tokens of requests that have ended, by the depth of the exit that chose them.",
            ("depth",),
            registry=registry,
        )
        self.first, self.token, self.whole = (
            prometheus_client.Histogram(
                f"{PREFIX}_{name}_seconds", text, buckets=buckets, registry=registry
            )
            for name, text, buckets in (
                ("time_to_first_token", "Time from a request to its first token.", SECONDS),
                ("time_per_output_token", "Mean time between a text's tokens.", TOKEN_SECONDS),
                ("request", "Time from a request for texts to the end of its response.", SECONDS),
            )
        )

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        if self.registry is None:
            return
        path = record.path if record.path in PATHS else "other"
        self.responses.labels(path, str(record.status)).inc()
        if record.usage is None:
            return
        self.whole.observe(record.seconds)
        if record.seconds_to_first_token is not None:
            self.first.observe(record.seconds_to_first_token)
        for seconds in record.usage.seconds_per_token():
            self.token.observe(seconds)
        for depth, count in record.usage.depths.items():
            self.depths.labels(str(depth)).inc(count)

    def response(self) -> Response:
        """Return the metrics as Prometheus reads them.

        Raises:
            RefusedError: The library is missing.
        """
        if self.registry is None:
            raise RefusedError(
                "metrics: the package prometheus_client is missing. "
                "Install it with: pip install 'megatron_sorted[serve]'",
                status=501,
            )
        return Response(
            prometheus_client.generate_latest(self.registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )
