"""What the server in front counts itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest


class FrontMetrics:
    """Requests as clients see them, and what was lost on the way. Has a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(namespace="ropewalk_front", registry=registry)
        self.requests = Counter(
            "ropewalk_front_requests", "HTTP requests by endpoint and status", ("endpoint", "status"), registry=registry
        )
        self.disconnects = Counter(
            "ropewalk_front_disconnects", "Clients that left before their reply was complete", registry=registry
        )
        self.lost = Counter("ropewalk_front_lost", "Requests whose replica was lost", registry=registry)
        self.resumed = Counter("ropewalk_front_resumed", "Streams that went on from another replica", registry=registry)

    def text(self) -> str:
        """In Prometheus' own format."""
        return generate_latest(self._registry).decode()
