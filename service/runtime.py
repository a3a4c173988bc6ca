"""`OrtRunner`: one model in ONNX Runtime, in the form that is quickest for the size of the run.

Rule: a run is a pure function of inputs and state, with the same bits in whatever form; it keeps nothing. It knows no
session and no queue.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import NamedTuple

import numpy as np

from service import scan
from service.device import open_session, providers
from service.errors import ModelUnloadable
from service.graphs import ChunkGraph, Results, StepGraph
from service.manifest import Array, Manifest, initial_state

log = logging.getLogger(__name__)

# A run shorter than this is cheaper on the event loop's own thread than a hop to a worker (20 to 300 us).
INLINE_SECONDS = 500e-6

# A run of chunks takes no longer than this: somebody may come who has to wait for its end.
LONGEST_SECONDS = 5e-3

# Rows (sessions times steps) that one run of a chunk takes at most. Beyond it, what passes between the parts of the
# graph outgrows the cache: one run of 8,192 rows costs up to 1.3 times its steps, where 1,024 cost 0.4 to 1 times.
CHUNK_ROWS = 1024

# Steps of a chunk in one run where only shapes that were warmed may run.
BUCKET_STEPS = 32


class _Cost(NamedTuple):
    """Seconds: of a run, and beside it of each step, and of each row of each step."""

    run: float = 0.0
    step: float = 0.0
    row: float = 0.0


class OrtRunner:
    """Runs the step graph of `manifest` for a batch of sessions.

    Args:
        manifest: the contract that the graph must fit.
        graph: the bytes of model.onnx.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: threads that one run may use.
        buckets: whether sessions and steps of a run are powers of two: by default on a GPU, where the first run of a
            shape may take seconds. On a CPU a new shape costs nothing.

    Raises:
        ModelUnloadable: the runtime cannot read the graph, or its tensors are not the manifest's.
    """

    def __init__(
        self, manifest: Manifest, graph: bytes, *, device: str = "cpu", threads: int = 1, buckets: bool | None = None
    ) -> None:
        *choices, last = providers(device)
        for provider in choices:
            try:
                session = open_session(graph, provider, threads)
                break
            except ModelUnloadable as error:
                log.warning("%s runs on the CPU: %s", manifest.name, error)
        else:
            provider = last
            session = open_session(graph, provider, threads)
        self.device = session.get_providers()[0].removesuffix("ExecutionProvider").lower()
        self._manifest = manifest
        self._buckets = self.device != "cpu" if buckets is None else buckets
        self._step = StepGraph(session, manifest)
        self._step_cost, self._chunk_cost = _Cost(), _Cost()
        self._chunk: ChunkGraph | None = None

        def chunk_graph(**form: bool) -> ChunkGraph:
            return ChunkGraph(open_session(scan.wrap(graph, manifest, **form), provider, threads), manifest)

        self._chunk_forms = [("scan", partial(chunk_graph)), ("scan of whole steps", partial(chunk_graph, hoist=False))]
        if manifest.unit is not None and manifest.unit.get("lowering") == "operator":
            self._chunk_forms.insert(0, ("operator", partial(chunk_graph, operator=True)))
        self.simplify("")

    def simplify(self, reason: str) -> None:
        """Gives up the form that a chunk has, for the next simpler one; `chunks` tells which it is, and why."""
        while self._chunk_forms:
            name, make = self._chunk_forms.pop(0)
            try:
                self._chunk = make()
            except Exception as error:  # noqa: BLE001 - whatever does not fit into a loop still runs step by step
                reason = str(error)
            else:
                self.chunks = f"{name}: {reason}" if reason else name
                return
        self._chunk = None
        self.chunks = f"loop: {reason}"

    @property
    def in_one_run(self) -> bool:
        """Whether a chunk is more than a loop over runs of one step."""
        return self._chunk is not None

    def run(self, inputs: Array, state: Sequence[Array], outputs: Sequence[str]) -> Results:
        """Advances B sessions by T steps each.

        Args:
            inputs: [B, T, *input.shape] of the input's dtype.
            state: one [B, *shape] a state pair, in the manifest's order.
            outputs: public names of what to return.

        Returns:
            For each name [B, T, *shape], and the new state like `state`; to be read only, they may share memory.

        Raises:
            InferenceFailed: the runtime refused; nothing was changed.
        """
        names, (rows, steps) = tuple(outputs), inputs.shape[:2]
        if steps == 1 or self._steps_at_once(rows, steps) == steps:
            return self._run_once(inputs, state, names)
        parts, start = [], 0
        while start < steps:
            at_once = self._steps_at_once(rows, steps - start)
            part, state = self._run_once(inputs[:, start : start + at_once], state, names)
            parts.append(part)
            start += at_once
        return {name: np.concatenate([part[name] for part in parts], axis=1) for name in names}, list(state)

    def _run_once(self, inputs: Array, state: Sequence[Array], outputs: tuple[str, ...]) -> Results:
        """As `run`, in one run of one graph."""
        graph = self._step if self._chunk is None or inputs.shape[1] == 1 else self._chunk
        if not self._buckets:
            return graph.run(inputs, state, outputs)
        rows = len(inputs)
        filled = (1 << (rows - 1).bit_length()) - rows

        def fill(value: Array) -> Array:
            """With copies of the first row: whatever the values may be, these are some of them."""
            return np.concatenate([value, np.repeat(value[:1], filled, axis=0)])

        values, state = graph.run(fill(inputs), [fill(value) for value in state], outputs)
        return {name: value[:rows] for name, value in values.items()}, [value[:rows] for value in state]

    def _steps_at_once(self, rows: int, steps: int) -> int:
        """How many of `steps` the next run takes; 1 is a run of the step graph."""
        if self._chunk is None:
            return 1
        steps = min(steps, max(1, CHUNK_ROWS // rows))
        return 1 << min(steps, BUCKET_STEPS).bit_length() - 1 if self._buckets else steps

    def warm_up(self, max_rows: int) -> None:
        """Runs every bucket, where there are buckets, and learns from a few shapes what a run of any shape takes."""
        self._chunk_forms.clear()  # what serves is settled; they hold the graph
        many = max(2, max_rows)
        if self._buckets:
            for rows in (1 << i for i in range((many - 1).bit_length() + 1)):
                for steps in (1 << i for i in range(self._steps_at_once(rows, BUCKET_STEPS).bit_length())):
                    self._measure(rows, steps, times=1)
        one = self._measure(1, 1)
        row = max(0.0, (self._measure(many, 1) - one) / (many - 1))
        self._step_cost = _Cost(0.0, one - row, row)
        if self._chunk is not None:
            few, long = min(many, CHUNK_ROWS // 16), BUCKET_STEPS
            short = self._measure(1, 2)
            step = max(0.0, (self._measure(1, long) - short) / (long - 2))
            row = max(0.0, (self._measure(few, 8) - short - 6 * step) / 8 / (few - 1))
            self._chunk_cost = _Cost(short - 2 * step, step - row, row)

    def is_short(self, rows: int, steps: int) -> bool:
        """Whether a run of this size belongs on the event loop's own thread, as measured at warm-up."""
        if steps == 1:  # asked for every run: without two calls more
            return self._step_cost.step + rows * self._step_cost.row <= INLINE_SECONDS
        return self.expected_seconds(rows, steps) <= INLINE_SECONDS

    def is_long(self, rows: int, steps: int) -> bool:
        """Whether nobody should have to wait for the end of a run of this size."""
        return self.expected_seconds(rows, steps) > LONGEST_SECONDS

    def expected_seconds(self, rows: int, steps: int) -> float:
        """How long a run of this size takes."""
        at_once = self._steps_at_once(rows, steps)
        cost = self._step_cost if at_once == 1 else self._chunk_cost
        return ceil(steps / at_once) * cost.run + steps * (cost.step + rows * cost.row)

    def _measure(self, rows: int, steps: int, times: int = 2) -> float:
        """Seconds of the quickest of some runs, after a first that finds everything cold."""
        # A model that loads while others serve waits for its turns; on a CPU only what its own thread does counts.
        clock = time.thread_time if self.device == "cpu" else time.perf_counter
        inputs = np.zeros((rows, steps, *self._manifest.input.shape), self._manifest.input.dtype)
        state = initial_state(self._manifest.state, rows)
        outputs = [self._manifest.outputs[0].name]
        self.run(inputs, state, outputs)
        seconds = []
        for _ in range(times):
            start = clock()
            self.run(inputs, state, outputs)
            seconds.append(clock() - start)
        return min(seconds)
