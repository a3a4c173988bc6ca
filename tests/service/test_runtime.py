"""One step graph in ONNX Runtime: shapes, axes, constants, and graphs that do not fit."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import runtime
from service.errors import InferenceFailed, ModelUnloadable
from service.graphs import ChunkGraph, StepGraph
from service.registry import load
from service.runtime import OrtRunner
from tests.service import toys


def runner_of(folder: Path) -> OrtRunner:
    """A runner for a version folder."""
    files = load(folder)
    return OrtRunner(files.manifest, files.graph)


def initial(folder: Path, count: int) -> list[np.ndarray]:
    """The initial state of `count` sessions."""
    return [np.stack([pair.initial_value()] * count) for pair in load(folder).manifest.state]


@pytest.mark.parametrize("model", ["toy", "counter"])
def test_a_run_equals_an_independent_loop(repository: Path, model: str) -> None:
    """Every output, gate and state of a batch of sequences has the bits of the loop that knows no service code."""
    folder = repository / model / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    name = manifest["input"]["name"]
    inputs = load(folder).golden[f"input.{name}"]
    outputs = [t["name"] for t in manifest["outputs"]]
    got, state = runner_of(folder).run(inputs, initial(folder, len(inputs)), outputs)
    expected = toys.unrolled(folder, manifest, inputs)
    for output in outputs:
        np.testing.assert_array_equal(got[output], expected[f"output.{output}"])
    for pair, rows in zip(manifest["state"], state, strict=True):
        np.testing.assert_array_equal(rows, expected[f"state.{pair['name']}"])


def test_states_may_be_asked_for_by_name(repository: Path) -> None:
    """Public names of states give the state after each step."""
    folder = repository / "counter" / "1"
    got, state = runner_of(folder).run(np.array([[1, 2, 3]]), initial(folder, 1), ["total", "steps"])
    assert got["total"].tolist() == [[[1.5], [5.5], [14.5]]]
    assert got["steps"].tolist() == [[[2], [4], [6]]]
    assert [rows.tolist() for rows in state] == [[[14.5]], [[6]]]


def test_inputs_and_state_are_left_as_they_were(repository: Path) -> None:
    """A run is a function: what it was given is unchanged."""
    folder = repository / "toy" / "1"
    inputs, state = np.ones((2, 3, toys.INPUTS), np.float32), initial(folder, 2)
    runner_of(folder).run(inputs, state, ["y"])
    assert (inputs == 1).all()
    assert all((rows == 0).all() for rows in state)


def test_what_the_runtime_refuses_is_typed(repository: Path) -> None:
    """An id outside the table fails the run with a typed error."""
    folder = repository / "counter" / "1"
    with pytest.raises(InferenceFailed):
        runner_of(folder).run(np.array([[99]]), initial(folder, 1), ["y"])


@pytest.mark.parametrize("model", ["toy", "counter"])
def test_a_long_chunk_goes_in_parts(repository: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """A chunk of more rows than one run takes is cut, and has the bits that it has in one run."""
    folder = repository / model / "1"
    files = load(folder)
    inputs = np.concatenate([files.golden[f"input.{files.manifest.input.name}"]] * 4, axis=1)
    runner, names = runner_of(folder), list(files.manifest.replies)
    whole, last = runner.run(inputs, initial(folder, 2), names)
    sizes = count_runs(monkeypatch)
    monkeypatch.setattr(runtime, "CHUNK_ROWS", 14)
    parts, state = runner.run(inputs, initial(folder, 2), names)
    assert sizes == [(2, 7), (2, 7), (2, 6)]
    for name in names:
        np.testing.assert_array_equal(parts[name], whole[name])
    for rows, want in zip(state, last, strict=True):
        np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize("model", ["toy", "counter"])
def test_with_buckets_only_powers_of_two_run(repository: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Every size of a batch and of a chunk runs in shapes that warm-up ran, and gives the bits of the exact size."""
    folder = repository / model / "1"
    files = load(folder)
    exact, names = runner_of(folder), list(files.manifest.replies)
    bucketed = OrtRunner(files.manifest, files.graph, buckets=True)
    warmed = count_runs(monkeypatch)
    bucketed.warm_up(6)
    assert {*warmed} == {(1 << rows, 1 << steps) for rows in range(4) for steps in range(6)}
    golden = np.concatenate([files.golden[f"input.{files.manifest.input.name}"]] * 8, axis=1)
    for rows, steps in ((1, 1), (1, 7), (3, 1), (5, 2), (6, 39), (8, 32)):
        inputs = golden[np.arange(rows) % 2, :steps]
        ran = count_runs(monkeypatch)
        got, state = bucketed.run(inputs, initial(folder, rows), names)
        assert {*ran} <= {*warmed}
        want, last = exact.run(inputs, initial(folder, rows), names)
        for a, b in zip([*got.values(), *state], [*want.values(), *last], strict=True):
            np.testing.assert_array_equal(a, b)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sessions and steps of every run of a graph from now on."""
    sizes: list[tuple[int, int]] = []
    for graph in (StepGraph, ChunkGraph):

        def run(self: Any, inputs: np.ndarray, *rest: Any, original: Any = graph.run) -> Any:
            sizes.append(inputs.shape[:2])
            return original(self, inputs, *rest)

        monkeypatch.setattr(graph, "run", run)
    return sizes


def test_arrays_need_not_be_contiguous(repository: Path) -> None:
    """Rows and steps cut out of larger arrays, and a state that is one value for everybody, run as their copies do."""
    folder = repository / "toy" / "1"
    runner = runner_of(folder)
    inputs = np.random.default_rng(0).normal(size=(6, 9, toys.INPUTS)).astype(np.float32)
    state = np.broadcast_to(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (3, toys.HIDDEN))
    for part in (inputs[::2, 4:5], inputs[::2, 1:8:2]):
        got, last = runner.run(part, [state], ["y", "h"])
        want, want_last = runner.run(part.copy(), [state.copy()], ["y", "h"])
        for a, b in zip([*got.values(), *last], [*want.values(), *want_last], strict=True):
            np.testing.assert_array_equal(a, b)


def test_warm_up_learns_what_a_run_takes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a few runs it tells the time of any other, in either form, and so whether it is worth a hop to a worker."""
    now = 0.0

    def step(self: Any, inputs: np.ndarray, state: Any, outputs: Any) -> Any:
        nonlocal now
        now += 10e-6 + 1e-6 * len(inputs)
        return dict.fromkeys(outputs, inputs), state

    def chunk(self: Any, inputs: np.ndarray, state: Any, outputs: Any) -> Any:
        nonlocal now
        rows, steps = inputs.shape[:2]
        now += 20e-6 + steps * (3e-6 + 0.5e-6 * rows)
        return dict.fromkeys(outputs, inputs), state

    monkeypatch.setattr(StepGraph, "run", step)
    monkeypatch.setattr(ChunkGraph, "run", chunk)
    monkeypatch.setattr(time, "thread_time", lambda: now)
    runner = runner_of(repository / "toy" / "1")
    runner.warm_up(256)
    assert runner.expected_seconds(1, 1) == pytest.approx(11e-6)
    assert runner.expected_seconds(100, 1) == pytest.approx(110e-6)
    assert runner.expected_seconds(1, 100) == pytest.approx(20e-6 + 100 * 3.5e-6)
    assert runner.expected_seconds(64, 32) == pytest.approx(2 * 20e-6 + 32 * 35e-6)  # in two parts
    assert runner.expected_seconds(2000, 3) == pytest.approx(3 * 2010e-6)  # step by step
    assert runner.is_short(490, 1)
    assert not runner.is_short(491, 1)
    assert runner.is_short(1, 137)
    assert not runner.is_short(1, 138)
    runner.simplify("the other form")
    assert runner.expected_seconds(1, 100) == pytest.approx(1100e-6)


def test_warm_up_beside_others_learns_what_a_run_takes_alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loads while others serve waits for its turns; its short runs are short all the same."""
    run = StepGraph.run

    def waiting(self: Any, inputs: np.ndarray, state: Any, outputs: Any) -> Any:
        time.sleep(0.002)
        return run(self, inputs, state, outputs)

    monkeypatch.setattr(StepGraph, "run", waiting)
    runner = runner_of(repository / "toy" / "1")
    runner.warm_up(256)
    assert runner.is_short(1, 1)


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    """Changes the manifest of a version and seals it again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    toys.seal(folder, manifest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["input"].update(name="u"), "takes"),
        (lambda m: m["outputs"][0].update(name="w"), "does not return w"),
        (lambda m: m["input"].update(shape=[7]), "x has shape"),
        (lambda m: m["input"].update(dtype="int64"), "x is tensor"),
        (lambda m: m["state"][0].update(shape=[4, 1]), "h has 2 axes"),
        (lambda m: m["state"][0].update(shape=[4, 1], batch_axis=2), "h has 2 axes"),
        (lambda m: m["state"][0].update(shape=[5]), "h has shape"),
        (lambda m: m["state"][0].update(output="y2"), "does not return y2"),
        (
            lambda m: m["constants"].append({"name": "k", "dtype": "int64", "shape": [], "value": [1]}),
            "takes",
        ),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest_is_refused(
    tmp_path: Path, edit: Callable[[Any], None], message: str
) -> None:
    """The message says what the graph has and what the manifest says."""
    folder = toys.save_leaky(tmp_path)
    change(folder, edit)
    with pytest.raises(ModelUnloadable, match=message):
        runner_of(folder)


def test_a_fixed_batch_axis_is_refused(tmp_path: Path) -> None:
    """A graph exported for one session at a time cannot be batched, and says so."""
    folder = toys.save_leaky(tmp_path)
    model = onnx.load(folder / "model.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    change(folder, lambda _: None)
    with pytest.raises(ModelUnloadable, match="batch axis 0 of x is fixed at 1"):
        runner_of(folder)


def test_an_unreadable_graph_is_refused(tmp_path: Path) -> None:
    """Bytes that are no ONNX, under a correct sha256, are a typed error."""
    folder = toys.save_leaky(tmp_path)
    (folder / "model.onnx").write_bytes(b"this is not a graph")
    change(folder, lambda _: None)
    with pytest.raises(ModelUnloadable, match="cannot be loaded"):
        runner_of(folder)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin"])
def test_weights_outside_the_graph_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    """A graph that points at another file is not loaded, wherever that lies: no sha256 covers it."""
    folder = toys.save_leaky(tmp_path)
    model = onnx.load(folder / "model.onnx")
    monkeypatch.chdir(folder)
    (folder / location).write_bytes(bytes(model.graph.initializer[0].raw_data))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "48")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    change(folder, lambda _: None)
    with pytest.raises(ModelUnloadable):
        runner_of(folder)


def test_auto_says_when_it_ends_up_on_the_cpu(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA build on a machine without a GPU: `auto` serves on the CPU with a warning, `cuda` refuses."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    open_session = runtime.open_session

    def without_gpu(graph: bytes, provider: Any, threads: int) -> Any:
        if provider != "CPUExecutionProvider":
            raise ModelUnloadable("no CUDA-capable device is detected")
        return open_session(graph, provider, threads)

    monkeypatch.setattr(runtime, "open_session", without_gpu)
    files = load(repository / "toy" / "1")
    assert OrtRunner(files.manifest, files.graph, device="auto").device == "cpu"
    assert "toy runs on the CPU: no CUDA-capable device" in caplog.text
    with pytest.raises(ModelUnloadable, match="no CUDA-capable"):
        OrtRunner(files.manifest, files.graph, device="cuda")
