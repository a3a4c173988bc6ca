"""The models in models/: each keeps the contract, computes its unit's equations and scores what it says."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from scipy.special import xlog1py, xlogy

from tests.training.oracle import oracle_step
from tests.training.test_cells import FORMULAS
from tests.training.test_export import replay
from training import data
from training.cells import UNITS
from training.config import TrainConfig
from training.data import polymusic
from training.ship import SHIPPED

MODELS = Path("models")
FOLDERS = {name: MODELS / name / "1" for name in SHIPPED}


def manifest_of(name: str) -> dict[str, Any]:
    """The shipped manifest."""
    return json.loads((FOLDERS[name] / "manifest.json").read_text())  # type: ignore[no-any-return]


def session_of(name: str) -> onnxruntime.InferenceSession:
    """The shipped graph on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(FOLDERS[name] / "model.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_keeps_the_contract(name: str) -> None:
    """Schema, checksums, golden replay; name and version are the folder's; no graph is larger than its weights."""
    replay(FOLDERS[name])
    manifest = manifest_of(name)
    assert (manifest["name"], manifest["version"]) == (name, "1")
    sizes = {path.name: path.stat().st_size for path in FOLDERS[name].iterdir()}
    assert sizes.pop("model.onnx") < 4 * manifest["parameters"] + 10_000
    assert max(sizes.values()) < 500_000
    assert {metric["split"] for metric in manifest["metrics"]} == {"valid", "test"}
    unit = manifest["unit"]
    m, n = unit["input_size"], unit["hidden_size"]
    assert unit["parameters"] == FORMULAS[unit["cell"]](m, n, m * n + n * n + n)
    row = SHIPPED[name]
    assert (manifest["data"]["name"], unit["cell"], unit["hidden_size"]) == (row.data, row.cell, row.model["hidden"])
    asked = asdict(row.train) | {key: value for key, value in row.model.items() if key != "hidden"}
    usual = asdict(TrainConfig())  # what is younger than the model had its default
    assert {key: manifest["training"].get(key, usual.get(key)) for key in asked} == asked


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_computes_its_units_equations(name: str) -> None:
    """With weights read out of the graph, the float64 oracle gives the same outputs and states for 100 steps."""
    unit = manifest_of(name)["unit"]
    n, gates = unit["hidden_size"], UNITS[unit["cell"]].gates
    graph = onnx.load(FOLDERS[name] / "model.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    head = {name for name in arrays if name.startswith(("model.head.", "model.skip."))}
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul") and node.input[1] not in head]
    stored = [arrays[node.input[1]].astype(np.float64).T for node in products]
    # The first product is of x with all blocks side by side, the next ones of h; constants that are added are biases.
    weights: dict[str, Any] = {}
    from_x, bias = stored[0], arrays[products[0].input[2]].astype(np.float64)
    recurrent = np.concatenate(stored[1:])
    constant = unit["cell"] in ("gru3", "mgu3")
    names = [] if constant else [f"_{gate}" for gate in gates]
    for index, gate in enumerate(names):
        block = slice(index * n, (index + 1) * n)
        weights[f"u{gate}"] = recurrent[block]
        if len(from_x) > n:
            weights[f"w{gate}"], weights[f"b{gate}"] = from_x[block], bias[block]
        elif len(products[1].input) > 2:
            weights[f"b{gate}"] = arrays[products[1].input[2]].astype(np.float64)[block]
    weights |= {"w": from_x[-n:], "b": bias[-n:], "u": recurrent[-n:]}
    session, rng = session_of(name), np.random.default_rng(5)
    pairs = manifest_of(name)["state"]
    found = {pair["input"]: np.zeros((2, n), dtype=np.float32) for pair in pairs}
    expected = tuple(np.zeros((2, n)) for _ in pairs)
    z = (
        arrays[next(node.input[0] for node in graph.node if node.op_type == "Mul")].astype(np.float64)
        if constant
        else 0
    )
    norm = manifest_of(name)["normalisation"]
    mean, std = np.array(norm.get("mean", 0)), np.array(norm.get("std", 1))
    for _ in range(100):
        x = rng.random((2, unit["input_size"])).astype(np.float32)
        values = session.run([pair["output"] for pair in pairs], {"x": x, **found})
        found = {pair["input"]: value for pair, value in zip(pairs, values, strict=True)}
        raw = (x.astype(np.float64) - mean) / std
        if constant:  # r is folded into U, so what is left of the equations is a fixed leak
            c = np.tanh(raw @ weights["w"].T + expected[0] @ weights["u"].T + weights["b"])
            expected = ((1 - z) * expected[0] + z * c,)
        else:
            expected, _ = oracle_step(unit["cell"], weights, raw, expected)
        for value, wanted in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_weight_of_a_shipped_model_is_next_to_nothing(name: str) -> None:
    """Products with such take some CPUs a hundred times as long."""
    for tensor in onnx.load(FOLDERS[name] / "model.onnx").graph.initializer:
        weights = abs(onnx.numpy_helper.to_array(tensor))
        assert not ((weights > 0) & (weights < 1e-30)).any(), tensor.name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_answers_a_row_alone_as_in_a_batch(name: str) -> None:
    """The same bits in batches of 1 to 129: what a stream gets does not depend on who else is served."""
    session, manifest, rng = session_of(name), manifest_of(name), np.random.default_rng(6)
    for batch in (2, 3, 8, 31, 64, 129):
        feeds = {"x": rng.random((batch, *manifest["input"]["shape"])).astype(np.float32)}
        feeds |= {
            pair["input"]: rng.normal(size=(batch, *pair["shape"])).astype(np.float32) for pair in manifest["state"]
        }
        together = session.run(None, feeds)
        for row in {0, batch // 2, batch - 1}:
            alone = session.run(None, {key: value[row : row + 1] for key, value in feeds.items()})
            for many, one in zip(together, alone, strict=True):
                np.testing.assert_array_equal(many[row : row + 1], one)


def test_sensors_beats_both_baselines() -> None:
    """On the test motors its error is at most 0.8 of the last value's and 0.6 of yesterday's."""
    references = {(one.name, one.metric): one.value for one in data.load("sensors").references}
    mae = next(m["value"] for m in manifest_of("sensors")["metrics"] if (m["name"], m["split"]) == ("mae", "test"))
    assert mae < 0.8 * references["last value", "mae"]
    assert mae < 0.6 * references["seasonal naive (yesterday)", "mae"]


def scores(name: str, found: data.DataSet) -> float:
    """The shipped graph's mean NLL (bernoulli) or MAE in deviations (gaussian) on the test split, step by step."""
    session, manifest = session_of(name), manifest_of(name)
    total, count = 0.0, 0
    std = np.array(manifest["normalisation"].get("std", 1.0))
    for inputs, targets, predicted in found.splits["test"].items:
        state = {pair["input"]: np.zeros((1, *pair["shape"]), dtype=np.float32) for pair in manifest["state"]}
        for x, target, asked in zip(inputs.astype(np.float32), targets.astype(np.float64), predicted, strict=True):
            y, *after = session.run(["y", *(pair["output"] for pair in manifest["state"])], {"x": x[None], **state})
            state = {pair["input"]: value for pair, value in zip(manifest["state"], after, strict=True)}
            if manifest["head"] == "bernoulli":
                # ONNX Runtime's Sigmoid is 0 below about -18, where a float32 could tell more.
                p = np.maximum(y[0].astype(np.float64), 2**-25)
                total += -(xlogy(target, p) + xlog1py(1 - target, -p)).sum() if asked else 0  # 0 log 0 is 0
            else:
                total += np.abs((y[0] - target) / std).mean() if asked else 0
            count += bool(asked)
    return total / count


def test_the_sensors_manifest_tells_its_true_score() -> None:
    """MAE over the test motors, recomputed from the graph one step at a time."""
    told = next(m["value"] for m in manifest_of("sensors")["metrics"] if (m["name"], m["split"]) == ("mae", "test"))
    assert scores("sensors", data.load("sensors")) == pytest.approx(told, abs=1e-3)


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name, row in SHIPPED.items() if row.data in polymusic.SETS])
def test_a_music_manifest_tells_its_true_score(name: str, latch_data: Path) -> None:
    """Test NLL in nats a frame, recomputed from the graph one step at a time."""
    told = next(m["value"] for m in manifest_of(name)["metrics"] if (m["name"], m["split"]) == ("nll", "test"))
    assert scores(name, data.load(SHIPPED[name].data)) == pytest.approx(told, abs=1e-3)
