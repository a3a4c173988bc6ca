"""One step graph in ONNX Runtime: shapes, axes, constants, and graphs that do not fit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import runtime
from service.errors import InferenceFailed, ModelUnloadable, SettingsInvalid
from service.registry import load
from service.runtime import OrtRunner, providers
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


def test_warm_up_learns_which_runs_are_short(repository: Path) -> None:
    """One step of one session belongs on the loop's thread, ten million rows do not."""
    runner = runner_of(repository / "toy" / "1")
    runner.warm_up(64)
    assert runner.is_short(1, 1)
    assert not runner.is_short(10_000_000, 4096)


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


def test_importing_it_leaves_no_trace(tmp_path: Path) -> None:
    """ONNX Runtime writes no device id and no events into the home of whoever runs the service."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    command = [sys.executable, "-c", "import service.runtime"]
    subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []


def test_a_device_that_is_not_there_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for CUDA without a CUDA provider is an error; `auto` takes the CPU."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SettingsInvalid, match="cuda:1"):
        providers("cuda:1")
    assert providers("auto") == providers("cpu") == ["CPUExecutionProvider"]


def test_a_cuda_device_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda:N` names the device to the provider."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    assert providers("cuda:3") == [("CUDAExecutionProvider", {"device_id": "3"})]
    assert providers("auto") == [*providers("cuda"), "CPUExecutionProvider"]


def test_auto_says_when_it_ends_up_on_the_cpu(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA build on a machine without a GPU: `auto` serves on the CPU with a warning, `cuda` refuses."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    open_session = runtime._open

    def without_gpu(graph: bytes, provider: Any, threads: int) -> Any:
        if provider != "CPUExecutionProvider":
            raise ModelUnloadable("no CUDA-capable device is detected")
        return open_session(graph, provider, threads)

    monkeypatch.setattr(runtime, "_open", without_gpu)
    files = load(repository / "toy" / "1")
    assert OrtRunner(files.manifest, files.graph, device="auto").device == "cpu"
    assert "toy runs on the CPU: no CUDA-capable device" in caplog.text
    with pytest.raises(ModelUnloadable, match="no CUDA-capable"):
        OrtRunner(files.manifest, files.graph, device="cuda")
