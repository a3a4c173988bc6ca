"""Every Prometheus instrument of the service, on a registry that is passed in.

Rule: never a session id as a label; labels are bounded by the models and codes that exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_SECONDS = (1e-5, 25e-6, 5e-5, 1e-4, 25e-5, 5e-4, 1e-3, 25e-4, 5e-3, 1e-2, 25e-3, 0.1, 0.25, 1.0, 2.5, 10.0)
_POWERS = tuple(float(2**k) for k in range(14))
# Values that are sorted into buckets at a time: a tenth of a microsecond each, from here on however many there are. All
# histograms of a run come due together, and the loop stands still meanwhile: six times 10,000 took it 6 ms.
_FOLD = 256
_MODEL = ("model", "version")


class _Counts:
    """The observations of one label set: how many per bucket (the last is +Inf), and their sum."""

    def __init__(self, bounds: NDArray[np.float64]) -> None:
        self._bounds = bounds
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._fresh: list[float] = []

    def observe(self, values: Sequence[float]) -> None:
        """Counts values: takes them down, and sorts them into buckets when there are many."""
        self._fresh += values
        if len(self._fresh) > _FOLD:
            self.read()

    def read(self) -> tuple[NDArray[np.int64], float]:
        """Values per bucket, and the sum of all."""
        fresh, self._fresh = self._fresh, []
        if fresh:
            self._counts += np.bincount(np.searchsorted(self._bounds, fresh), minlength=len(self._counts))
            self._sum += sum(fresh)
        return self._counts, self._sum


class RunHistogram(Collector):
    """A histogram that takes the values of a whole run in one call.

    prometheus_client's own takes a lock and a microsecond or two for each value: with several a step, as much as the
    step. This one is written and read from the event loop's thread only.
    """

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = np.array(bounds)
        self._children: dict[tuple[str, ...], _Counts] = {}
        registry.register(self)

    def labels(self, *values: str) -> _Counts:
        """The counts of one set of label values."""
        return self._children.setdefault(values, _Counts(self._bounds))

    def remove(self, *values: str) -> None:
        """Forgets the counts of one set of label values."""
        self._children.pop(values, None)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What Prometheus reads."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in list(self._children.items()):  # a model that loads adds its own, in another thread
            bounds = [*map(floatToGoString, self._bounds), "+Inf"]
            counts, total = child.read()
            family.add_metric(values, list(zip(bounds, np.cumsum(counts).tolist(), strict=True)), total)
        yield family

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Its name, so that the registry refuses a second one."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)


class ModelMetrics:
    """The instruments of one model and version."""

    def __init__(self, metrics: "Metrics", model: str, version: str) -> None:
        key = (model, version)
        self.steps = metrics.steps.labels(*key)
        self.replays = metrics.replays.labels(*key)
        metrics.expired.labels(*key)  # from 0 on; whoever expires them counts
        self.queue_depth = metrics.queue_depth.labels(*key)
        self._batch_size = metrics.batch_size.labels(*key)
        self._run_steps = metrics.run_steps.labels(*key)
        self._queue = metrics.queue_seconds.labels(*key)
        self._compute = metrics.compute_seconds.labels(*key)
        self._answer = metrics.answer_seconds.labels(*key)
        self._overhead = metrics.overhead_seconds.labels(*key)

    def observe_run(self, *, rows: int, steps: int, compute: float, queue: Sequence[float]) -> None:
        """One run: sessions and steps in it, seconds inside the runtime, and for the requests that began with it how
        long they waited.
        """
        self._batch_size.observe((rows,))
        self._run_steps.observe((steps,))
        self._compute.observe((compute,))
        self._queue.observe(queue)

    def observe_answers(self, answer: float, overhead: Sequence[float]) -> None:
        """Answers of one run: seconds since its end, and for each since its request without what the runtime took."""
        self._answer.observe((answer,))
        self._overhead.observe(overhead)


class Metrics:
    """The instruments as attributes. One instance per app, so that two apps in one process do not share counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.steps = Counter(
            "latch_steps", "Steps committed, those of whole sequences (predict) too", _MODEL, registry=registry
        )
        self.replays = Counter("latch_replays", "Duplicates answered without a run", _MODEL, registry=registry)
        self.errors = Counter("latch_errors", "Calls refused or failed, by error code", ["code"], registry=registry)
        self.queue_depth = Gauge("latch_queue_depth", "Requests waiting or running", _MODEL, registry=registry)
        self.sessions = Gauge(
            "latch_sessions", "Live sessions that this process has at hand", _MODEL, registry=registry
        )
        self.resident = Gauge("latch_sessions_resident", "Rows of the slab in use", _MODEL, registry=registry)
        self.expired = Counter("latch_sessions_expired", "Sessions that idled out", _MODEL, registry=registry)

        def histogram(name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = _MODEL) -> RunHistogram:
            return RunHistogram(f"latch_{name}", text, bounds, labels, registry)

        self.batch_size = histogram("batch_size", "Sessions in a run", _POWERS)
        self.run_steps = histogram("run_steps", "Steps of each session in a run", _POWERS)
        self.queue_seconds = histogram("queue_seconds", "From submit to the first run", _SECONDS)
        self.compute_seconds = histogram("compute_seconds", "One run inside the runtime", _SECONDS)
        self.answer_seconds = histogram("answer_seconds", "After a run: save, commit, hand out answers", _SECONDS)
        self.overhead_seconds = histogram(
            "overhead_seconds", "From submit to the answer, without the runtime", _SECONDS
        )

        self.store_seconds = histogram("store_seconds", "One save of the session store", _SECONDS, ())
        self.store_rows = histogram("store_rows", "Sessions in one save", _POWERS, ())

    def observe_save(self, rows: int, seconds: float) -> None:
        """One group commit: sessions in it, and how long it took."""
        self.store_seconds.labels().observe((seconds,))
        self.store_rows.labels().observe((rows,))

    def model(
        self, name: str, version: str, resident: Callable[[], int], sessions: Callable[[], int] = int
    ) -> ModelMetrics:
        """Those of one model version; `resident` counts its rows in use, `sessions` its sessions."""
        self.resident.labels(name, version).set_function(resident)
        self.sessions.labels(name, version).set_function(sessions)
        return ModelMetrics(self, name, version)

    def forget(self, name: str, version: str) -> None:
        """Drops those of a version that is gone, and with them what they hold of it."""
        gauges = (self.queue_depth, self.resident, self.sessions)
        for gauge in gauges:
            gauge.labels(name, version).set_function(float)  # it holds its function in a cycle
        histograms = (
            self.batch_size, self.run_steps, self.queue_seconds, self.compute_seconds, self.answer_seconds,
            self.overhead_seconds,
        )  # fmt: skip
        for instrument in (self.steps, self.replays, self.expired, *gauges, *histograms):
            instrument.remove(name, version)
