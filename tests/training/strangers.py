"""Step graphs that the training package never saw, made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WIDTH, HIDDEN = 6, 4


def value(name: str, shape: list[Any], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    """A declared tensor."""
    return helper.make_tensor_value_info(name, dtype, shape)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
    opset: int = 17,
) -> Path:
    """A model of opset 17, older than our own exports."""
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "stranger", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def voice(path: Path, batch: Any = "batch") -> Path:
    """Like a voice detector: h and c stacked in `state` [2, B, 4], batched on axis 1; a rate that chooses a branch.

    x [B, ?] of 6 samples; at 16000 they are halved first. c' = c + tanh(x W + h U), h' = tanh(c'), speech = s(h' V).
    """
    node = helper.make_node
    rng = np.random.default_rng(7)

    def branch(name: str, op: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([op], name, [], [value(op.output[0], [batch, WIDTH])])

    nodes = [
        node("Equal", ["rate", "wide"], ["is_wide"]),
        node(
            "If", ["is_wide"], ["samples"],
            then_branch=branch("halve", node("Mul", ["x", "half"], ["halved"])),
            else_branch=branch("keep", node("Identity", ["x"], ["kept"])),
        ),
        node("Split", ["state", "ones"], ["h3", "c3"], axis=0),
        node("Squeeze", ["h3", "zero"], ["h"]),
        node("Squeeze", ["c3", "zero"], ["c"]),
        node("MatMul", ["samples", "W"], ["xw"]),
        node("MatMul", ["h", "U"], ["hu"]),
        node("Add", ["xw", "hu"], ["a"]),
        node("Tanh", ["a"], ["g"]),
        node("Add", ["c", "g"], ["c_next"]),
        node("Tanh", ["c_next"], ["h_next"]),
        node("Unsqueeze", ["h_next", "zero"], ["h1"]),
        node("Unsqueeze", ["c_next", "zero"], ["c1"]),
        node("Concat", ["h1", "c1"], ["stateN"], axis=0),
        node("MatMul", ["h_next", "V"], ["hv"]),
        node("Sigmoid", ["hv"], ["speech"]),
    ]  # fmt: skip
    weights = {
        "W": rng.normal(size=(WIDTH, HIDDEN)).astype(np.float32),
        "U": rng.normal(size=(HIDDEN, HIDDEN)).astype(np.float32),
        "V": rng.normal(size=(HIDDEN, 1)).astype(np.float32),
        "half": np.float32(0.5),
        "wide": np.int64(16000),
        "ones": np.array([1, 1], np.int64),
        "zero": np.array([0], np.int64),
    }
    weights = {name: np.asarray(array) for name, array in weights.items()}
    inputs = [value("x", [batch, "samples"]), value("state", [2, batch, HIDDEN]), value("rate", [], INT64)]
    return save(path, nodes, inputs, [value("speech", [batch, 1]), value("stateN", [2, batch, HIDDEN])], weights)


def memory(path: Path, *nodes: onnx.NodeProto, **shapes: list[Any]) -> Path:
    """Sums: y = x + h and h' = y unless `nodes` say otherwise; x [B, 2], `shapes` declare other tensors than these."""
    declared = {"x": ["batch", 2], "h": ["batch", 2], "y": ["batch", 2], "h_next": ["batch", 2]} | shapes
    steps = list(nodes) or [helper.make_node("Add", ["x", "h"], ["y"]), helper.make_node("Identity", ["y"], ["h_next"])]
    weights = {"zero": np.array(0, np.int64), "big": np.array(1e30, np.float32)}
    return save(
        path, steps, [value(name, declared[name]) for name in ("x", "h")],
        [value(name, declared[name]) for name in ("y", "h_next")], weights,
    )  # fmt: skip


def words(path: Path) -> Path:
    """Ids [B] in, counts and their mean kept in two states of their own axes: seen [5, B] and steps int64 [B, 1]."""
    node = helper.make_node
    nodes = [
        node("OneHot", ["id", "five", "off_on"], ["hot"], axis=0),
        node("Add", ["seen", "hot"], ["seen_next"]),
        node("Add", ["steps", "one"], ["steps_next"]),
        node("Transpose", ["seen_next"], ["counts"], perm=[1, 0]),
    ]
    weights = {
        "five": np.array(5, np.int64),
        "off_on": np.array([0, 1], np.float32),
        "one": np.array(1, np.int64),
    }
    inputs = [value("id", ["n"], INT64), value("seen", [5, "n"]), value("steps", ["n", 1], INT64)]
    outputs = [value("counts", ["n", 5]), value("seen_next", [5, "n"]), value("steps_next", ["n", 1], INT64)]
    return save(path, nodes, inputs, outputs, weights)
