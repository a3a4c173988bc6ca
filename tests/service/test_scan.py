"""T steps as one run: the same bits as one by one, for graphs of every kind, or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import scan
from service.engine import Engine
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
    assert [node.op_type for node in body.node] == [node.op_type for node in step.node] + ["Identity"]


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
