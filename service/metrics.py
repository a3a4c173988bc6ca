"""Every Prometheus instrument of the service, on a registry that is passed in.

Rule: never a session id as a label; labels are bounded by the models and codes that exist.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (25e-6, 1e-4, 25e-5, 1e-3, 25e-4, 1e-2, 25e-3, 0.1, 0.25, 1.0, 2.5, 10.0)
_POWERS = tuple(float(2**k) for k in range(14))


class Metrics:
    """The instruments as attributes. One instance per app, so that two apps in one process do not share counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.steps = Counter("latch_steps", "Steps committed", ["model", "version"], registry=registry)
        self.replays = Counter(
            "latch_replays", "Duplicates answered without a run", ["model", "version"], registry=registry
        )
        self.errors = Counter("latch_errors", "Calls refused or failed, by error code", ["code"], registry=registry)
        self.batch_size = Histogram(
            "latch_batch_size", "Sessions in a run", ["model", "version"], buckets=_POWERS, registry=registry
        )
        self.run_steps = Histogram(
            "latch_run_steps",
            "Steps of each session in a run",
            ["model", "version"],
            buckets=_POWERS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "latch_queue_seconds",
            "From submit to the first run",
            ["model", "version"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.compute_seconds = Histogram(
            "latch_compute_seconds",
            "One run inside the runtime",
            ["model", "version"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "latch_queue_depth", "Requests waiting or running", ["model", "version"], registry=registry
        )
        self.sessions = Gauge("latch_sessions", "Live sessions", ["model", "version"], registry=registry)
        self.expired = Counter(
            "latch_sessions_expired", "Sessions that idled out", ["model", "version"], registry=registry
        )
