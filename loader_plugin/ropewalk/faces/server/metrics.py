"""Metrics for Prometheus, in a registry of their own: several servers in one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ropewalk.engine.engine import Engine
from ropewalk.faces.server.jobs import Finished

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """Counts, times, and the state of queue, scheduler and pages."""

    def __init__(self, engine: Engine) -> None:
        queue, scheduler, model = engine.queue, engine.scheduler, engine.model
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "ropewalk_requests", "HTTP requests by endpoint and status", ("endpoint", "status"), registry=registry
        )
        self.disconnects = Counter(
            "ropewalk_disconnects", "Clients that left before their reply was complete", registry=registry
        )
        self.queue_seconds = self._histogram("queue", "waiting for a turn")
        self.first_text_seconds = self._histogram("first_text", "from the request to the first text of its reply")
        self.request_seconds = self._histogram("request", "from the request to the end of its reply")
        self._tokens = Counter(
            "ropewalk_tokens",
            "Tokens by kind: of prompts, computed or found in a cache; of replies; guessed ahead, and of those right",
            ("kind",),
            registry=registry,
        )
        gauges = {
            "running": ("requests that have their turn", lambda: queue.num_running),
            "waiting": ("requests in the queue", lambda: queue.num_waiting),
            "max_running": ("requests that can run at a time", lambda: queue.num_turns),
            "queue_limit": ("requests that may wait", lambda: -1 if queue.limit is None else queue.limit),
            "steps": ("steps of the model so far", lambda: scheduler.num_steps),
            "rows": ("rows computed in these steps", lambda: scheduler.num_rows),
            "preempted": ("times that a request had to give its pages up so far", lambda: scheduler.num_preempted),
            "cache_bytes": ("memory for keys and values", lambda: model.cache_memory),
            "cache_used_bytes": ("memory of the pages in use", lambda: model.cache_used),
            "cache_shared_bytes": ("of those, pages that are only kept for later", lambda: model.cache_shared),
        }
        kept = engine.kept
        if kept.folder is not None:
            gauges["kept_bytes"] = ("size of the kept prompts", lambda: kept.folder.used_bytes)
            gauges["kept_recalled"] = ("kept prompts taken into memory so far", lambda: kept.num_recalled)
        for name, (text, value) in gauges.items():
            Gauge(f"ropewalk_{name}", text[0].upper() + text[1:], registry=registry).set_function(value)

    def count_reply(self, done: Finished) -> None:
        """The tokens of a reply."""
        self._tokens.labels("prompt").inc(done.stats.prompt_tokens - done.cached_tokens)
        self._tokens.labels("cached").inc(done.cached_tokens)
        self._tokens.labels("reply").inc(done.num_tokens)
        self._tokens.labels("guessed").inc(done.stats.guessed_tokens)
        self._tokens.labels("accepted").inc(done.stats.accepted_tokens)

    def request_totals(self) -> tuple[float, float]:
        """(seconds, number) of the requests that were answered in full."""
        samples = {sample.name: sample.value for metric in self.request_seconds.collect() for sample in metric.samples}
        return samples["ropewalk_request_seconds_sum"], samples["ropewalk_request_seconds_count"]

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"ropewalk_{name}_seconds", f"Seconds {text}", buckets=SECONDS, registry=self._registry)
