"""T steps as one run: the same bits as one by one, for graphs of every kind, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import scan
from service.engine import Engine
from service.errors import InferenceFailed
from service.graphs import ChunkGraph
from service.manifest import initial_state
from service.metrics import Metrics
from service.proof import prove_bits
from service.registry import load
from service.runtime import OrtRunner
from tests.service import toys
from tests.service.conftest import OPTIONS


@pytest.mark.parametrize(
    ("save", "form"),
    [
        (toys.save_leaky, "scan"),
        (toys.save_counter, "scan"),
        (toys.save_branching, "scan"),
        (toys.save_echo, "scan"),
        (toys.save_exploding, "scan"),
        (toys.save_operator, "operator"),
    ],
)
def test_a_chunk_in_one_run_equals_the_unrolled_steps(tmp_path: Path, save: Callable[[Path], Path], form: str) -> None:
    """Outputs, gates and every state after every step, whatever the state's axis, the ids, constants or branches."""
    folder = save(tmp_path)
    files, manifest = load(folder), json.loads((folder / "manifest.json").read_text())
    runner = OrtRunner(files.manifest, files.graph)
    assert runner.chunks == form
    inputs = files.golden[f"input.{files.manifest.input.name}"]
    start = initial_state(files.manifest.state, len(inputs))
    names = list(files.manifest.replies)
    got, last = runner.run(inputs, start, names)
    expected = toys.unrolled(folder, manifest, inputs)
    for tensor in manifest["outputs"]:
        np.testing.assert_array_equal(got[tensor["name"]], expected[f"output.{tensor['name']}"])
    for pair, rows in zip(manifest["state"], last, strict=True):
        np.testing.assert_array_equal(rows, expected[f"state.{pair['name']}"])
        np.testing.assert_array_equal(got[pair["name"]][:, -1], rows)


def test_only_the_recurrence_loops(repository: Path) -> None:
    """The input's products go before the loop, the output after it, for all steps at once; a weight is there once."""
    files = load(repository / "toy" / "1")
    whole = onnx.load_model_from_string(scan.wrap(files.graph, files.manifest)).graph
    (loop,) = (node for node in whole.node if node.op_type == "Scan")
    body = loop.attribute[0].g
    copies = ["Identity"]  # the state is handed on, and is what a chunk returns of h
    assert [node.op_type for node in body.node] == ["MatMul", "Add", "Tanh", "Sub", "Mul", "Add", *copies]
    outside = [node.op_type for node in whole.node if node.op_type not in ("Shape", "Concat", "Reshape")]
    assert outside == ["MatMul", "Sigmoid", "MatMul", "Scan", "Mul"]
    weights = [weight.name for weight in whole.initializer if not weight.name.startswith("latch.")]
    assert sorted(weights) == ["U", "V", "W", "two"]
    assert len(body.initializer) == 0


def test_a_loop_of_whole_steps_is_the_step_graph_node_for_node(repository: Path) -> None:
    """Without hoisting the loop is the only node, and its body the step."""
    files = load(repository / "toy" / "1")
    whole = onnx.load_model_from_string(scan.wrap(files.graph, files.manifest, hoist=False)).graph
    assert [node.op_type for node in whole.node] == ["Scan"]
    step = onnx.load_model_from_string(files.graph).graph
    body = whole.node[0].attribute[0].g
    assert [node.op_type for node in body.node] == [*(node.op_type for node in step.node), "Identity"]


def test_a_graph_that_does_not_fit_into_a_loop_goes_step_by_step(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are the same, and the model tells why."""
    files = load(repository / "toy" / "1")
    inputs, start = files.golden["input.x"], initial_state(files.manifest.state, 2)
    in_one_run, _ = OrtRunner(files.manifest, files.graph).run(inputs, start, ["y", "z", "h"])

    def refuse(graph: bytes, manifest: Any, *, hoist: bool) -> bytes:
        raise ValueError("no loop for this one")

    monkeypatch.setattr(scan, "wrap", refuse)
    runner = OrtRunner(files.manifest, files.graph)
    assert runner.chunks == "loop: no loop for this one"
    one_by_one, _ = runner.run(inputs, start, ["y", "z", "h"])
    for name, value in one_by_one.items():
        np.testing.assert_array_equal(value, in_one_run[name])


def test_other_bits_in_one_run_are_noticed(repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose chunks differ from their steps in a single bit gives up the one-run form before it serves."""
    files = load(repository / "toy" / "1")
    run_chunk = ChunkGraph.run

    def off_by_a_bit(*arguments: Any) -> Any:
        outputs, state = run_chunk(*arguments)
        return outputs, [np.nextafter(rows, np.float32(9)) for rows in state]

    monkeypatch.setattr(ChunkGraph, "run", off_by_a_bit)
    engine = Engine(files, OPTIONS, metrics)
    assert engine.chunks == "loop: in one run a chunk differs from its steps"
    assert engine.bit_exact


@pytest.mark.parametrize(("off", "form"), [(1e-6, "scan"), (1e-3, "loop: in one run a chunk differs from its steps")])
def test_where_no_bits_are_promised_a_chunk_may_differ_a_little(
    repository: Path, monkeypatch: pytest.MonkeyPatch, off: float, form: str
) -> None:
    """On a GPU, whose kernels depend on the size of a run, a chunk is held to the manifest's tolerance (here 1e-5)."""
    files = load(repository / "toy" / "1")
    run_chunk = ChunkGraph.run
    monkeypatch.setattr(ChunkGraph, "run", lambda *a: (run_chunk(*a)[0], [rows + off for rows in run_chunk(*a)[1]]))
    runner = OrtRunner(files.manifest, files.graph)
    runner.device = "cuda"
    prove_bits(runner, files)
    assert runner.chunks == form


@pytest.mark.parametrize("sessions", [1, 8], ids=["always", "in large batches only"])
def test_a_chunk_that_fails_at_run_time_breaks_no_model(
    repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, sessions: int
) -> None:
    """A model whose steps are sound is served step by step when its one-run form is not."""
    files = load(repository / "toy" / "1")
    run_chunk = ChunkGraph.run

    def fails(graph: ChunkGraph, inputs: Any, *rest: Any) -> Any:
        if len(inputs) >= sessions:
            raise InferenceFailed("not in a loop")
        return run_chunk(graph, inputs, *rest)

    monkeypatch.setattr(ChunkGraph, "run", fails)
    engine = Engine(files, OPTIONS, metrics)
    assert (engine.chunks, engine.bit_exact) == ("loop: not in a loop", True)


def test_golden_vectors_of_one_step_still_prove_the_chunk(
    tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof makes chunks of its own, even where the golden vectors hold a single step."""
    folder = toys.save_leaky(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    inputs = load(folder).golden["input.x"][:, :1]
    np.savez(folder / "golden.npz", **{"input.x": inputs}, **toys.unrolled(folder, manifest, inputs))
    manifest["golden"]["steps"] = 1
    toys.seal(folder, manifest)
    assert Engine(load(folder), OPTIONS, metrics).chunks == "scan"
    run_chunk = ChunkGraph.run
    monkeypatch.setattr(ChunkGraph, "run", lambda *a: (run_chunk(*a)[0], [0 * s for s in run_chunk(*a)[1]]))
    assert Engine(load(folder), OPTIONS, metrics).chunks.startswith("loop: ")


def test_values_that_go_by_two_names_are_told_apart(tmp_path: Path, metrics: Metrics) -> None:
    """An output that is the state, another that is the input, and a state that passes unchanged: all in one run."""
    files = load(toys.save_echo(tmp_path))
    engine = Engine(files, OPTIONS, metrics)
    assert (engine.chunks, engine.bit_exact) == ("scan", True)
    inputs = np.arange(8, dtype=np.float32).reshape(1, 8, 1)
    outputs, state = OrtRunner(files.manifest, files.graph).run(
        inputs, initial_state(files.manifest.state, 1), ["x", "sum_next", "kept", "total"]
    )
    sums = np.cumsum(inputs) + 5 * np.arange(1, 9)
    assert outputs["x"].ravel().tolist() == inputs.ravel().tolist()
    assert outputs["sum_next"].ravel().tolist() == outputs["total"].ravel().tolist() == sums.tolist()
    assert outputs["kept"].ravel().tolist() == [5] * 8
    assert [rows.ravel().tolist() for rows in state] == [[sums[-1]], [5]]


def test_a_row_that_feels_its_neighbours_keeps_its_steps_apart(tmp_path: Path, metrics: Metrics) -> None:
    """Where nodes give other bits for the rows of all steps at once, whole steps loop, and the page says why."""
    files = load(toys.save_mixing(tmp_path))
    engine = Engine(files, OPTIONS, metrics)
    assert engine.chunks == "scan of whole steps: in one run a chunk differs from its steps"
    assert not engine.bit_exact


def test_a_graph_older_than_the_nodes_around_the_loop_loops_whole_steps(tmp_path: Path) -> None:
    """Opset 13 has `Scan`, but no `Shape` that ends before the last axis."""
    folder = toys.save_leaky(tmp_path)
    model = onnx.load(folder / "model.onnx")
    model.opset_import[0].version = 13
    files = load(folder)
    runner = OrtRunner(files.manifest, model.SerializeToString())
    assert runner.chunks.startswith("scan of whole steps: ")
    inputs, start = files.golden["input.x"], initial_state(files.manifest.state, 2)
    np.testing.assert_array_equal(runner.run(inputs, start, ["y"])[0]["y"], files.golden["output.y"])


def test_an_operator_needs_no_loop(tmp_path: Path) -> None:
    """Where the recurrence is one operator and the manifest says so, the operator gets the steps and nothing loops."""
    files = load(toys.save_operator(tmp_path))
    whole = onnx.load_model_from_string(scan.wrap(files.graph, files.manifest, operator=True)).graph
    kinds = [node.op_type for node in whole.node if node.op_type not in ("Constant", "Shape", "Concat", "Reshape")]
    assert kinds == ["Mul", "Unsqueeze", "GRU", "Squeeze", "Squeeze", "Mul"]


def test_what_is_no_operator_loops_whatever_its_manifest_says(tmp_path: Path) -> None:
    """A manifest that promises an operator which the graph does not have costs speed, and the page says why."""
    folder = toys.save_operator(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    leaky = toys.save_leaky(tmp_path)
    unit = json.loads((leaky / "manifest.json").read_text()) | {"unit": manifest["unit"]}
    toys.seal(leaky, unit)
    files = load(leaky)
    assert OrtRunner(files.manifest, files.graph).chunks == "scan: the recurrence is not one operator"
