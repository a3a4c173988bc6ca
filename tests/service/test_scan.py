"""T steps as one run: the same bits as one by one, for graphs of every kind, or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import scan
from service.engine import Engine
from service.errors import InferenceFailed
from service.manifest import initial_state
from service.metrics import Metrics
from service.registry import load
from service.runtime import OrtRunner
from tests.service import toys
from tests.service.conftest import OPTIONS


@pytest.mark.parametrize("model", ["toy", "counter"])
def test_a_chunk_in_one_run_equals_the_unrolled_steps(repository: Path, model: str) -> None:
    """Outputs, gates and every state after every step, whatever the state's axis, the ids or the constants."""
    folder = repository / model / "1"
    files, manifest = load(folder), json.loads((folder / "manifest.json").read_text())
    runner = OrtRunner(files.manifest, files.graph)
    assert runner.chunks == "scan"
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


def test_the_wrapped_graph_holds_each_weight_once(repository: Path) -> None:
    """Weights stay outside of the loop, and the loop is the only node."""
    files = load(repository / "toy" / "1")
    wrapped = onnx.load_model_from_string(scan.wrap(files.graph, files.manifest)).graph
    assert [node.op_type for node in wrapped.node] == ["Scan"]
    assert sorted(weight.name for weight in wrapped.initializer) == ["U", "V", "W", "two"]
    body = wrapped.node[0].attribute[0].g
    assert len(body.initializer) == 0
    step = onnx.load_model_from_string(files.graph).graph
    copies = ["Identity"] * (1 + 3)  # the state to hand on, and what a chunk returns of y, z and h
    assert [node.op_type for node in body.node] == [node.op_type for node in step.node] + copies


def test_a_graph_that_does_not_fit_into_a_loop_goes_step_by_step(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are the same, and the model tells why."""
    files = load(repository / "toy" / "1")
    inputs, start = files.golden["input.x"], initial_state(files.manifest.state, 2)
    in_one_run, _ = OrtRunner(files.manifest, files.graph).run(inputs, start, ["y", "z", "h"])

    def refuse(graph: bytes, manifest: Any) -> bytes:
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
    run_scan = OrtRunner._run_scan

    def off_by_a_bit(*arguments: Any) -> Any:
        outputs, state = run_scan(*arguments)
        return outputs, [np.nextafter(rows, np.float32(9)) for rows in state]

    monkeypatch.setattr(OrtRunner, "_run_scan", off_by_a_bit)
    engine = Engine(files, OPTIONS, metrics)
    assert engine.chunks == "loop: in one run a chunk gives other bits than its steps"
    assert engine.bit_exact


@pytest.mark.parametrize("sessions", [1, 8], ids=["always", "in large batches only"])
def test_a_chunk_that_fails_at_run_time_breaks_no_model(
    repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, sessions: int
) -> None:
    """A model whose steps are sound is served step by step when its one-run form is not."""
    files = load(repository / "toy" / "1")
    run_scan = OrtRunner._run_scan

    def fails(runner: OrtRunner, session: Any, inputs: Any, *rest: Any) -> Any:
        if len(inputs) >= sessions:
            raise InferenceFailed("not in a loop")
        return run_scan(runner, session, inputs, *rest)

    monkeypatch.setattr(OrtRunner, "_run_scan", fails)
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
    run_scan = OrtRunner._run_scan
    monkeypatch.setattr(OrtRunner, "_run_scan", lambda *a: (run_scan(*a)[0], [0 * s for s in run_scan(*a)[1]]))
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
