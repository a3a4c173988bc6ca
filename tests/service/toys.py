"""Small models made by hand with `onnx.helper`, so that the service's tests need no trained model and no torch."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
INPUTS, HIDDEN = 3, 4


def _save(root: Path, graph: onnx.GraphProto, manifest: dict[str, Any], golden: dict[str, np.ndarray]) -> Path:
    """Writes one version folder as an exporter would, golden outputs from an ONNX Runtime loop of its own."""
    folder = root / manifest["name"] / manifest["version"]
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    expected = unrolled(folder, manifest, golden[f"input.{manifest['input']['name']}"])
    np.savez(folder / "golden.npz", **golden, **expected)
    seal(folder, manifest)
    return folder


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with the sha256 of the files as they are now."""
    manifest["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.onnx", "golden.npz")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite_golden(folder: Path, **changes: np.ndarray | None) -> None:
    """Changes arrays of golden.npz and seals the version again; None drops one."""
    with np.load(folder / "golden.npz") as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del golden[key]
        else:
            golden[key] = value
    np.savez(folder / "golden.npz", **golden)
    seal(folder, json.loads((folder / "manifest.json").read_text()))


def unrolled(folder: Path, manifest: dict[str, Any], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """An ONNX Runtime loop that shares no code with the service: the sequences one after another, a step a run.

    Args:
        folder: holds model.onnx.
        manifest: as JSON.
        inputs: [B, T, ...].

    Returns:
        `output.<name>` [B, T, ...] and `state.<name>` [B, ...], as golden.npz has them.
    """
    session = _loaded((folder / "model.onnx").read_bytes())
    constants = {c["name"]: np.array(c["value"], c["dtype"]).reshape(c["shape"]) for c in manifest["constants"]}
    results: dict[str, list[Any]] = {}
    for sequence in inputs:
        state = {}
        for pair in manifest["state"]:
            value = np.array(pair.get("initial", 0.0), pair["dtype"])
            state[pair["input"]] = np.expand_dims(
                np.broadcast_to(value, pair["shape"]) if value.ndim == 0 else value.reshape(pair["shape"]),
                pair["batch_axis"],
            ).copy()
        columns: dict[str, list[Any]] = {t["name"]: [] for t in manifest["outputs"]}
        for row in sequence:
            x = np.expand_dims(np.asarray(row, inputs.dtype), manifest["input"]["batch_axis"])
            names = [t["name"] for t in manifest["outputs"]] + [p["output"] for p in manifest["state"]]
            values = dict(
                zip(names, session.run(names, {manifest["input"]["name"]: x} | state | constants), strict=True)
            )
            for tensor in manifest["outputs"]:
                columns[tensor["name"]].append(np.take(values[tensor["name"]], 0, axis=tensor["batch_axis"]))
            state = {pair["input"]: values[pair["output"]] for pair in manifest["state"]}
        for name, column in columns.items():
            results.setdefault(f"output.{name}", []).append(np.stack(column))
        for pair in manifest["state"]:
            last = np.take(state[pair["input"]], 0, axis=pair["batch_axis"])
            results.setdefault(f"state.{pair['name']}", []).append(last)
    return {name: np.stack(value) for name, value in results.items()}


@lru_cache(16)
def _loaded(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _manifest(name: str, version: str, **changes: Any) -> dict[str, Any]:
    return {
        "manifest_version": 1,
        "name": name,
        "version": version,
        "description": "A toy.",
        "task": "other",
        "head": "none",
        "constants": [],
        "normalisation": {"kind": "none"},
        "feedback": None,
        "unit": None,
        "parameters": None,
        "files": {},
        "golden": {"sequences": 2, "steps": 5, "tolerance": 1e-5},
        "data": None,
        "training": {},
        "metrics": [],
        "libraries": {},
    } | changes


def _scalar_manifest(name: str, version: str) -> dict[str, Any]:
    """One float in, one out, one kept."""
    tensor = {"dtype": "float32", "shape": [1], "batch_axis": 0}
    return _manifest(
        name,
        version,
        input={"name": "x"} | tensor,
        outputs=[{"name": "y", "role": "prediction"} | tensor],
        state=[{"name": "h", "input": "h", "output": "h_next"} | tensor],
    )


def save_leaky(root: Path, name: str = "toy", version: str = "1", seed: int = 0) -> Path:
    """A gated leaky unit: z = s(W x), h' = h + z (tanh(U h + V x) - h), y = 2 h'. Inputs 3, hidden 4, gate z."""
    rng = np.random.default_rng(seed)
    weights = {
        "W": rng.normal(size=(INPUTS, HIDDEN)),
        "V": rng.normal(size=(INPUTS, HIDDEN)),
        "U": rng.normal(size=(HIDDEN, HIDDEN)),
        "two": np.array(2.0),
    }
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "W"], ["wx"]),
            node("Sigmoid", ["wx"], ["z"]),
            node("MatMul", ["x", "V"], ["vx"]),
            node("MatMul", ["h", "U"], ["uh"]),
            node("Add", ["vx", "uh"], ["a"]),
            node("Tanh", ["a"], ["c"]),
            node("Sub", ["c", "h"], ["d"]),
            node("Mul", ["z", "d"], ["zd"]),
            node("Add", ["h", "zd"], ["h_next"]),
            node("Mul", ["h_next", "two"], ["y"]),
        ],
        name,
        [helper.make_tensor_value_info(n, FLOAT, ["batch", s]) for n, s in (("x", INPUTS), ("h", HIDDEN))],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", HIDDEN]) for n in ("y", "z", "h_next")],
        [numpy_helper.from_array(value.astype(np.float32), key) for key, value in weights.items()],
    )
    tensor = {"dtype": "float32", "shape": [HIDDEN], "batch_axis": 0}
    manifest = _manifest(
        name,
        version,
        input={"name": "x", "dtype": "float32", "shape": [INPUTS], "batch_axis": 0},
        outputs=[{"name": "y", "role": "prediction"} | tensor, {"name": "z", "role": "gate"} | tensor],
        state=[{"name": "h", "input": "h", "output": "h_next"} | tensor],
    )
    return _save(root, graph, manifest, {"input.x": rng.normal(size=(2, 5, INPUTS)).astype(np.float32)})


def save_counter(root: Path, name: str = "counter", version: str = "1") -> Path:
    """A graph unlike ours: int64 ids, a state batched on axis 1, a second state, a constant, a learned start.

    total' = total + table[id] (rows 0, 1, 4, 9; another id fails the run), steps' = steps + stride, y = total'.
    """
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Gather", ["table", "id"], ["square"], axis=0),
            node("Unsqueeze", ["square", "zero"], ["row"]),
            node("Add", ["total", "row"], ["total_next"]),
            node("Squeeze", ["total_next", "zero"], ["y"]),
            node("Add", ["steps", "stride"], ["steps_next"]),
        ],
        name,
        [
            helper.make_tensor_value_info("id", INT64, ["batch"]),
            helper.make_tensor_value_info("total", FLOAT, [1, "batch"]),
            helper.make_tensor_value_info("steps", INT64, ["batch", 1]),
            helper.make_tensor_value_info("stride", INT64, []),
        ],
        [
            helper.make_tensor_value_info("y", FLOAT, ["batch"]),
            helper.make_tensor_value_info("total_next", FLOAT, [1, "batch"]),
            helper.make_tensor_value_info("steps_next", INT64, ["batch", 1]),
        ],
        [
            numpy_helper.from_array(np.array([0, 1, 4, 9], np.float32), "table"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
        ],
    )
    manifest = _manifest(
        name,
        version,
        input={"name": "id", "dtype": "int64", "shape": [], "batch_axis": 0},
        outputs=[{"name": "y", "dtype": "float32", "shape": [], "batch_axis": 0, "role": "prediction"}],
        state=[
            {
                "name": "total", "input": "total", "output": "total_next", "dtype": "float32", "shape": [1],
                "batch_axis": 1, "initial": [0.5],
            },
            {
                "name": "steps", "input": "steps", "output": "steps_next", "dtype": "int64", "shape": [1],
                "batch_axis": 0,
            },
        ],
        constants=[{"name": "stride", "dtype": "int64", "shape": [], "value": [2]}],
    )  # fmt: skip
    return _save(root, graph, manifest, {"input.id": np.array([[0, 1, 2, 3, 3], [3, 2, 1, 0, 1]])})


def save_uneven(root: Path, name: str = "uneven", version: str = "1") -> Path:
    """A graph in which a row feels its batch: y = h' = x + 0 * h + 1e-6 * (sessions in the run)."""
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Shape", ["x"], ["sizes"]),
            node("Gather", ["sizes", "zero"], ["batch"]),
            node("Cast", ["batch"], ["count"], to=FLOAT),
            node("Mul", ["count", "little"], ["shift"]),
            node("Mul", ["h", "nothing"], ["past"]),
            node("Add", ["x", "past"], ["now"]),
            node("Add", ["now", "shift"], ["h_next"]),
            node("Identity", ["h_next"], ["y"]),
        ],
        name,
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("x", "h")],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("y", "h_next")],
        [
            numpy_helper.from_array(np.array(value, dtype), key)
            for key, value, dtype in (("zero", 0, np.int64), ("little", 1e-6, np.float32), ("nothing", 0, np.float32))
        ],
    )
    manifest = _scalar_manifest(name, version)
    return _save(root, graph, manifest, {"input.x": np.ones((2, 5, 1), np.float32)})


def save_branching(root: Path, name: str = "branching", version: str = "1") -> Path:
    """A graph with branches that read what is outside of them: h' = h + 3 x for odd ids, h - 3 x for even ones, y = h.

    The id is a constant input, and y the state before the step.
    """
    node, value = helper.make_node, helper.make_tensor_value_info

    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node(op, ["h", "thrice"], [f"{op}_h"])], op, [], [value(f"{op}_h", FLOAT, ["batch", 1])]
        )

    graph = helper.make_graph(
        [
            node("Mul", ["x", "three"], ["thrice"]),
            node("Mod", ["id", "two"], ["rest"]),
            node("Cast", ["rest"], ["odd"], to=TensorProto.BOOL),
            node("If", ["odd"], ["h_next"], then_branch=branch("Add"), else_branch=branch("Sub")),
            node("Mul", ["h", "one"], ["y"]),
        ],
        name,
        [value("x", FLOAT, ["batch", 1]), value("h", FLOAT, ["batch", 1]), value("id", INT64, [])],
        [value("y", FLOAT, ["batch", 1]), value("h_next", FLOAT, ["batch", 1])],
        [
            numpy_helper.from_array(np.array(number, dtype), key)
            for key, number, dtype in (
                ("one", 1, np.float32), ("three", 3, np.float32), ("two", 2, np.int64),
            )
        ],
    )  # fmt: skip
    manifest = _scalar_manifest(name, version)
    manifest["constants"] = [{"name": "id", "dtype": "int64", "shape": [], "value": [7]}]
    return _save(root, graph, manifest, {"input.x": np.arange(10, dtype=np.float32).reshape(2, 5, 1)})


def save_operator(root: Path, name: str = "operator", version: str = "1") -> Path:
    """An ONNX `GRU` of 4 units over 2 x (x has 3 values), y = 3 h', in a manifest that says so."""
    rng = np.random.default_rng(4)
    node = helper.make_node
    weights = {"W": (1, 3 * HIDDEN, INPUTS), "R": (1, 3 * HIDDEN, HIDDEN), "B": (1, 6 * HIDDEN)}
    graph = helper.make_graph(
        [
            node("Mul", ["x", "two"], ["xx"]),
            node("Unsqueeze", ["xx", "zero"], ["sequence"]),
            node("Unsqueeze", ["h", "zero"], ["first"]),
            node("GRU", ["sequence", "W", "R", "B", "", "first"], ["", "last"], hidden_size=HIDDEN),
            node("Squeeze", ["last", "zero"], ["h_next"]),
            node("Mul", ["h_next", "three"], ["y"]),
        ],
        name,
        [helper.make_tensor_value_info(n, FLOAT, ["batch", s]) for n, s in (("x", INPUTS), ("h", HIDDEN))],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", HIDDEN]) for n in ("y", "h_next")],
        [
            *(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), k) for k, shape in weights.items()),
            *(numpy_helper.from_array(np.float32(value), key) for key, value in (("two", 2), ("three", 3))),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
        ],
    )
    tensor = {"dtype": "float32", "shape": [HIDDEN], "batch_axis": 0}
    manifest = _manifest(
        name,
        version,
        input={"name": "x", "dtype": "float32", "shape": [INPUTS], "batch_axis": 0},
        outputs=[{"name": "y", "role": "prediction"} | tensor],
        state=[{"name": "h", "input": "h", "output": "h_next"} | tensor],
        unit={
            "cell": "gru", "lowering": "operator", "blend": "keep", "reset": "before", "gate_activation": "sigmoid",
            "candidate_activation": "tanh", "input_size": INPUTS, "hidden_size": HIDDEN, "layers": 1,
            "learned_initial_state": False, "parameters": 108,
        },
    )  # fmt: skip
    return _save(root, graph, manifest, {"input.x": rng.normal(size=(2, 5, INPUTS)).astype(np.float32)})


def save_mixing(root: Path, name: str = "mixing", version: str = "1") -> Path:
    """A graph whose rows feel the rows before them: h' = h / 2 + (x summed over the batch so far), y = h'."""
    graph = helper.make_graph(
        [
            helper.make_node("CumSum", ["x", "zero"], ["sum"]),
            helper.make_node("Mul", ["h", "half"], ["past"]),
            helper.make_node("Add", ["past", "sum"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["y"]),
        ],
        name,
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("x", "h")],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("y", "h_next")],
        [numpy_helper.from_array(np.array(0, np.int64), "zero"), numpy_helper.from_array(np.float32(0.5), "half")],
    )
    manifest = _scalar_manifest(name, version)
    manifest["golden"]["sequences"] = 1  # two would not give together what they give alone
    return _save(root, graph, manifest, {"input.x": np.ones((1, 5, 1), np.float32)})


def save_echo(root: Path, name: str = "echo", version: str = "1") -> Path:
    """Values under two names: sum' = sum + x + kept is output and state, x is input and output, kept' = kept = 5."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "kept"], ["plus"]), helper.make_node("Add", ["sum", "plus"], ["sum_next"])],
        name,
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("x", "sum", "kept")],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("sum_next", "x", "kept")],
    )
    tensor = {"dtype": "float32", "shape": [1], "batch_axis": 0}
    manifest = _manifest(
        name,
        version,
        input={"name": "x"} | tensor,
        outputs=[{"name": n, "role": "prediction"} | tensor for n in ("sum_next", "x")],
        state=[
            {"name": "total", "input": "sum", "output": "sum_next"} | tensor,
            {"name": "kept", "input": "kept", "output": "kept", "initial": [5.0]} | tensor,
        ],
    )
    return _save(root, graph, manifest, {"input.x": np.ones((2, 5, 1), np.float32)})


def save_exploding(root: Path, name: str = "exploding", version: str = "1") -> Path:
    """H' = 1e30 h + x: two large inputs in a row leave float32."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["h", "huge"], ["hh"]),
            helper.make_node("Add", ["hh", "x"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["y"]),
        ],
        name,
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("x", "h")],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", 1]) for n in ("y", "h_next")],
        [numpy_helper.from_array(np.array(1e30, np.float32), "huge")],
    )
    manifest = _scalar_manifest(name, version)
    return _save(root, graph, manifest, {"input.x": np.zeros((2, 5, 1), np.float32)})
