"""The model without a server: steps a second of plain ONNX Runtime, in the form that is quickest for the shape.

Rule: the quickest form counts, also where the service found it: a loop of steps, its graph of a chunk, or its runner.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.machine import Contender
from service import scan
from service.manifest import Array, initial_state
from service.registry import load
from service.runtime import OrtRunner

TRIAL = 0.3
FORMS = ("one run a step", "one run", "runner cpu")


def session(graph: bytes) -> ort.InferenceSession:
    """One thread that does not spin, on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@cache
def form(folder: Path, name: str, batch: int, steps: int) -> Callable[[], None]:
    """A call that moves `batch` sessions on by `steps` steps and computes their outputs."""
    files = load(folder)
    manifest = files.manifest
    x, pairs, y = manifest.input.name, manifest.state, manifest.outputs[0].name
    values = np.random.default_rng(0).random((batch, steps, *manifest.input.shape)).astype(manifest.input.dtype)
    state = initial_state(pairs, batch)
    if name.startswith("runner"):  # the service's own, which also knows other devices
        runner = OrtRunner(manifest, files.graph, device=name.split()[1])

        def call() -> None:
            nonlocal state
            state = runner.run(values, state, [manifest.outputs[0].name])[1]

    elif name == "one run":
        whole = session(scan.wrap(files.graph, manifest))
        feed = {scan.inputs(x): np.ascontiguousarray(values.swapaxes(0, 1))}
        wanted = [scan.sequence(y), *(scan.last(pair.input) for pair in pairs)]
        firsts = [scan.first(pair.input) for pair in pairs]

        def call() -> None:
            nonlocal state
            _, *state = whole.run(wanted, feed | dict(zip(firsts, state, strict=True)))

    else:
        step = session(files.graph)
        columns = [np.ascontiguousarray(values[:, t]) for t in range(steps)]
        wanted = [y, *(pair.output for pair in pairs)]

        def call() -> None:
            nonlocal state
            for column in columns:
                _, *state = step.run(wanted, {x: column} | dict(zip((p.input for p in pairs), state, strict=True)))

    return call


def rate(folder: Path, name: str, batch: int, steps: int, seconds: float) -> float:
    """Steps a second, of all sessions together."""
    call = form(folder, name, batch, steps)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        call()
        count += 1
    return count * batch * steps / elapsed


def best(folder: Path, name: str, batch: int, steps: int, seconds: float) -> float:
    """The same in the quickest call, the one that the rest of the machine disturbed least."""
    call, quickest, end = form(folder, name, batch, steps), float("inf"), time.perf_counter() + seconds
    call()
    while (start := time.perf_counter()) < end or quickest == float("inf"):
        call()
        quickest = min(quickest, time.perf_counter() - start)
    return batch * steps / quickest


def unrolled(folder: Path, rows: Array) -> Array:
    """Outputs [T, ...] of one session's rows [T, ...], a step a run: what the service must give, bit for bit."""
    manifest = load(folder).manifest
    step = session((folder / "model.onnx").read_bytes())
    wanted = [manifest.outputs[0].name, *(pair.output for pair in manifest.state)]
    state, outputs = initial_state(manifest.state, 1), []
    for row in rows:
        feed = dict(zip((pair.input for pair in manifest.state), state, strict=True))
        output, *state = step.run(wanted, feed | {manifest.input.name: row[None]})
        outputs.append(output[0])
    return np.stack(outputs)


def contender(
    pool: ProcessPoolExecutor, folder: Path, name: str, batch: int, steps: int, seconds: float
) -> Contender[float]:
    """One form of a model, measured in `pool`."""
    title = f"{name}, {steps} steps a call"
    return Contender.of(pool, rate, folder, name, batch, steps, seconds, title=title)


def quickest(
    pool: ProcessPoolExecutor, folder: Path, batch: int, chunks: Sequence[int], seconds: float
) -> Contender[float]:
    """Of all forms, and of all numbers of steps a call in `chunks`, the one with the highest rate."""
    forms = [(name, steps) for name in FORMS for steps in chunks]
    rates = {one: pool.submit(best, folder, one[0], batch, one[1], TRIAL).result() for one in forms}
    name, steps = max(rates, key=rates.__getitem__)
    return contender(pool, folder, name, batch, steps, seconds)
