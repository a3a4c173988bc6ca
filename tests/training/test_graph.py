"""The step graph: lean for every unit, folded where gates are constant, the same bits in any batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from training.artifact import error
from training.cells import UNITS
from training.config import ModelConfig
from training.errors import ExportError
from training.graph import build_graph, check_parity, onnx_steps, synthetic_inputs
from training.model import RecurrentModel

# Nodes of one bernoulli step, of which two are the head (Gemm, Sigmoid).
NODES = {
    "gru": 13, "gru1": 12, "gru2": 12, "gru3": 8, "mgu": 12, "mgu1": 11, "mgu2": 11, "mgu3": 8,
    "lstm": 13, "rnn": 5, "mingru": 8,
}  # fmt: skip


@pytest.mark.parametrize("cell", UNITS)
def test_step_graphs_are_lean(cell: str) -> None:
    """No node more than the equations need, no product twice, no stored transpose undone at every step."""
    nodes = build_graph(RecurrentModel(ModelConfig(cell, 6, 6, "bernoulli", hidden=5)).eval()).graph.node
    assert len(nodes) == NODES[cell], [node.op_type for node in nodes]
    products = sum(node.op_type in ("Gemm", "MatMul") for node in nodes)
    recurrent = {"gru3": 1, "mgu3": 1, "lstm": 1, "rnn": 1, "mingru": 0}.get(cell, 2)
    assert products == 1 + recurrent + 1
    assert "Transpose" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("reset", ["before", "after"])
@pytest.mark.parametrize("cell", ["gru3", "mgu3"])
def test_constant_gates_fold_into_one_product(cell: str, reset: str) -> None:
    """With either reset the step of a constant-gate unit has a single H x H product, and keeps parity."""
    model = RecurrentModel(ModelConfig(cell, 6, 6, "bernoulli", hidden=5, reset=reset)).eval()
    graph = build_graph(model)
    shapes = [tuple(tensor.dims) for tensor in graph.graph.initializer]
    assert shapes.count((5, 5)) == 1
    assert check_parity(model, graph.SerializeToString()) < 1e-6


@pytest.mark.parametrize("cell", UNITS)
def test_a_row_has_the_same_bits_in_any_batch(cell: str) -> None:
    """The batch axis is free: a row of a batch of five has the very bits it has alone."""
    model = RecurrentModel(ModelConfig(cell, 6, 6, "gaussian", hidden=5)).eval()
    graph = build_graph(model).SerializeToString()
    inputs = np.random.default_rng(0).normal(size=(5, 20, 6)).astype(np.float32)
    together = list(onnx_steps(model, graph, inputs))
    alone = list(onnx_steps(model, graph, inputs[2:3]))
    for many, one in zip(together, alone, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(many[name][2:3], value, err_msg=name)


@pytest.mark.parametrize("lowering", ["primitives", "operator"])
def test_weights_that_come_to_nothing_are_zero(lowering: str) -> None:
    """None is left whose product with an input could be subnormal; those that count keep their bits."""
    model = RecurrentModel(ModelConfig("gru", 6, 6, "bernoulli", hidden=5)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("cells.0.w"):
                value[:, 2] = torch.tensor([1e-45, -1e-39, 2e-38, -1e-31, 1e-29]).repeat(len(value) // 5)
    graph = build_graph(model, lowering)
    weights = [numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
    small = np.concatenate([abs(each[abs(each) < 1e-20]) for each in weights if each.dtype == np.float32])
    assert set(small.tolist()) == {0.0, float(np.float32(1e-29))}
    check_parity(model, graph.SerializeToString())


def in_units(mean: float, deviation: float, head: str = "gaussian", turned: float = 1.0) -> RecurrentModel:
    """A model of values in some unit; `turned` multiplies the head's weights."""
    torch.manual_seed(0)
    model = RecurrentModel(ModelConfig("gru", 6, 2, head, hidden=5)).eval()
    model.y_mean[:], model.y_std[:] = mean, deviation
    with torch.no_grad():
        model.head.weight *= turned
    return model


@pytest.mark.parametrize("head", ["gaussian", "regression"])
@pytest.mark.parametrize(("mean", "deviation"), [(2852, 46_333), (0, 1e-9), (1e6, 100), (0, 1)])
def test_parity_does_not_depend_on_the_unit(mean: float, deviation: float, head: str) -> None:
    """Watts that cross zero are as right as volts; and of farads a graph that is wrong is found out."""
    model = in_units(mean, deviation, head)
    assert check_parity(model, build_graph(model).SerializeToString()) < 2e-6
    wrong = build_graph(in_units(mean, deviation, head, turned=-3)).SerializeToString()
    with pytest.raises(ExportError, match=r"differ by .* in '(y|std)'"):
        check_parity(model, wrong)


def test_what_is_not_a_number_is_in_no_parity() -> None:
    """Although both sides say the same."""
    model = in_units(float("nan"), 1)
    with pytest.raises(ExportError, match="differ by nan in 'y'"):
        check_parity(model, build_graph(model).SerializeToString())


def test_an_error_is_measured_by_the_element_that_it_is_of() -> None:
    """A large one beside it hides nothing; near zero the limit is that of numbers near one, or what was said."""
    expected = np.array([[[1e6, 0.5]], [[-1e6, 2.0]]])
    assert error(np.add(expected, [0, 0.5]), expected) == pytest.approx(0.25)
    assert error(np.add(expected, [1e5, 0]), expected) == pytest.approx(0.1)
    assert error(expected / 1e3 + [0, 0.5], expected / 1e3) == pytest.approx(0.5)
    assert error(expected / 1e3 + [0, 0.5], expected / 1e3, [1, 0.1]) == pytest.approx(5)


def test_made_up_inputs_are_in_the_range_of_the_data() -> None:
    """Parity of what no client sends says little: values lie around the data's mean, and chords have four notes."""
    model = in_units(0, 1)
    model.x_mean[:], model.x_std[:] = torch.arange(6.0) * 100, 2
    values = synthetic_inputs(model, 5, 200, 1)
    np.testing.assert_allclose(values.mean(axis=(0, 1)), np.arange(6) * 100, atol=0.5)
    np.testing.assert_allclose(values.std(axis=(0, 1)), 2, atol=0.2)
    chords = synthetic_inputs(RecurrentModel(ModelConfig("gru", 88, 88, "bernoulli", hidden=5)), 5, 200, 1)
    assert set(np.unique(chords)) == {0, 1}
    assert chords.sum(axis=-1).mean() == pytest.approx(4, abs=0.5)


def test_the_operator_is_one_node_for_the_whole_unit() -> None:
    """Lowered to its operator, the fully gated unit is four nodes, in parity, without its gates."""
    model = RecurrentModel(ModelConfig("gru", 6, 6, "bernoulli", hidden=5)).eval()
    graph = build_graph(model, "operator")
    assert [node.op_type for node in graph.graph.node] == [
        *("Unsqueeze", "Unsqueeze", "GRU", "Squeeze"),
        *("Gemm", "Sigmoid"),
    ]
    assert [output.name for output in graph.graph.output] == ["y", "h_next"]
    assert check_parity(model, graph.SerializeToString()) < 1e-6


@pytest.mark.parametrize(
    ("lowering", "settings", "message"),
    [
        ("operator", {"cell": "gru1"}, "only one layer of `gru`"),
        ("operator", {"cell": "gru", "layers": 2}, "only one layer of `gru`"),
        ("operator", {"cell": "gru", "candidate_activation": "relu"}, "sigmoid and tanh"),
        ("fused", {"cell": "gru"}, "unknown lowering 'fused': choose one of primitives, operator"),
    ],
)
def test_a_lowering_that_a_model_does_not_have_is_refused(lowering: str, settings: Any, message: str) -> None:
    """What the operator cannot compute, or only with multiplied zeros, stays primitives."""
    model = RecurrentModel(ModelConfig(**settings, input_size=6, output_size=6, head="bernoulli", hidden=5)).eval()
    with pytest.raises(ExportError, match=message):
        build_graph(model, lowering)


def test_importing_leaves_nothing_in_the_users_home(tmp_path: Path) -> None:
    """ONNX Runtime would leave a device id and a database of usage events there, from its import on."""
    kept = {key: os.environ[key] for key in os.environ if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    code = "import training.graph, onnxruntime"
    subprocess.run([sys.executable, "-c", code], check=True, env=kept | {"HOME": str(tmp_path)})
    assert list(tmp_path.rglob("*")) == []
