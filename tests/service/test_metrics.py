"""The instruments: a histogram that takes whole runs says what prometheus_client's own says."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service import metrics as module
from service.metrics import Metrics, RunHistogram

BOUNDS = (0.25, 1.0, 2.5, 10.0)
LABELS = ("model", "version")


def exposed(registry: CollectorRegistry) -> list[str]:
    """What Prometheus reads, but for the times of creation, which only the one of the library has."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


# Sums of these are exact in whatever order they are added.
values = st.sampled_from(BOUNDS) | st.integers(0, 2**14).map(lambda n: n / 2**10)


@given(
    runs=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.lists(values, max_size=5)), max_size=8), reads=st.booleans()
)
@example(runs=[("a", [*BOUNDS])], reads=False)
def test_it_counts_as_the_librarys_own(runs: list[tuple[str, list[float]]], reads: bool) -> None:
    """Buckets with their bounds inclusive, sums and counts of each model: the text is the same, however often read."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = RunHistogram("h", "Some text.", BOUNDS, LABELS, ours)
    other = Histogram("h", "Some text.", LABELS, buckets=BOUNDS, registry=theirs)
    for model, run in runs:
        mine.labels(model, "1").observe(run)
        child = other.labels(model, "1")
        for value in run:
            child.observe(value)
        if reads:
            exposed(ours)
    assert exposed(ours) == exposed(theirs)


def test_the_instruments_are_named_and_bounded_as_the_librarys_own() -> None:
    """The service's own histograms: every bound is written as the library writes it."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for histogram in (metrics.batch_size, metrics.overhead_seconds):
        other = CollectorRegistry()
        Histogram(histogram._name, histogram._text, LABELS, buckets=histogram._bounds, registry=other).labels("m", "1")
        histogram.labels("m", "1")
        assert set(exposed(other)) <= set(exposed(registry))


def test_what_was_observed_is_folded_before_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads for days: single values are sorted into buckets when there are many, and none is lost."""
    monkeypatch.setattr(module, "_FOLD", 100)
    registry = CollectorRegistry()
    child = RunHistogram("h", "Some text.", BOUNDS, LABELS, registry).labels("m", "1")
    for i in range(1000):
        child.observe([float(i % 4)] * 7)
        assert len(child._fresh) <= 107
    assert 'h_count{model="m",version="1"} 7000.0' in exposed(registry)
    assert 'h_bucket{le="1.0",model="m",version="1"} 3500.0' in exposed(registry)
    assert 'h_sum{model="m",version="1"} 10500.0' in exposed(registry)


def test_a_fold_holds_nobody_up() -> None:
    """No observation has much more to do than another: those before it wait for it by the hundred, not the thousand."""
    child = RunHistogram("h", "Some text.", BOUNDS, LABELS, CollectorRegistry()).labels("m", "1")
    folds = []
    for _ in range(20_000):
        waiting = len(child._fresh)
        child.observe((1.0,))
        if not child._fresh:
            folds.append(waiting + 1)
    assert folds
    assert max(folds) < 1000


def test_a_name_is_taken_once() -> None:
    """The registry refuses a second histogram of the same name, as it does for its own."""
    registry = CollectorRegistry()
    RunHistogram("h", "Some text.", BOUNDS, LABELS, registry)
    with pytest.raises(ValueError, match="Duplicated"):
        RunHistogram("h", "Some text.", BOUNDS, LABELS, registry)


def test_a_run_is_counted_under_its_model_and_version(metrics: Metrics) -> None:
    """One call observes all that a run has to say, under these labels and no other."""
    for version, rows in (("1", 4), ("2", 5)):
        instruments = metrics.model("m", version, lambda: 3)
        instruments.observe_run(rows=rows, steps=2, compute=0.5, queue=[0.125] * rows)
        instruments.observe_answers(0.25, [1.0, 2.0])
    text = exposed(metrics.registry)
    for name, total, count in (
        ("batch_size", 5.0, 1.0),
        ("run_steps", 2.0, 1.0),
        ("compute_seconds", 0.5, 1.0),
        ("answer_seconds", 0.25, 1.0),
        ("queue_seconds", 0.625, 5.0),
        ("overhead_seconds", 3.0, 2.0),
    ):
        assert f'latch_{name}_sum{{model="m",version="2"}} {total}' in text
        assert f'latch_{name}_count{{model="m",version="2"}} {count}' in text
    assert 'latch_sessions_resident{model="m",version="1"} 3.0' in text


def test_a_version_that_is_gone_leaves_no_label(metrics: Metrics) -> None:
    """Not one instrument keeps its children, and others stay; what still counts for it counts for nobody."""
    bare = len(exposed(metrics.registry))
    instruments = metrics.model("m", "1", lambda: 3, lambda: 2)
    metrics.expired.labels("m", "1").inc()
    assert 'latch_sessions{model="m",version="1"} 2.0' in exposed(metrics.registry)
    metrics.model("m", "2", lambda: 3)
    metrics.forget("m", "1")
    instruments.observe_run(rows=1, steps=1, compute=0.5, queue=[0.125])
    instruments.steps.inc()
    text = exposed(metrics.registry)
    assert not [line for line in text if 'version="1"' in line]
    assert [line for line in text if 'version="2"' in line]
    metrics.forget("m", "2")
    assert len(exposed(metrics.registry)) == bare


def test_models_may_come_while_prometheus_reads(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that loads in a worker thread adds its labels in the middle of a scrape."""
    child = metrics.batch_size.labels("m", "1")
    read = child.read

    def meanwhile() -> Any:
        metrics.batch_size.labels("m", "2")
        return read()

    monkeypatch.setattr(child, "read", meanwhile)
    exposed(metrics.registry)
    assert [line for line in exposed(metrics.registry) if 'batch_size_count{model="m",version="2"}' in line]
