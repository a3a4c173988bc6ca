"""Engines are handed out only when they compute what was exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine import Engine, load_engines
from service.errors import GoldenMismatch, ModelBroken, ModelNotFound
from service.metrics import Metrics
from service.registry import ModelKey, load, scan
from tests.service import toys
from tests.service.conftest import OPTIONS


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
    toys.seal(folder, json.loads((folder / "manifest.json").read_text()))


def test_a_model_that_replays_its_golden_vectors_is_live(repository: Path, metrics: Metrics) -> None:
    """The error it loaded with is known and within the manifest's tolerance."""
    engine = Engine(load(repository / "toy" / "1"), OPTIONS, metrics)
    assert engine.golden_error <= engine.manifest.golden.tolerance
    assert engine.device == "cpu"


def test_whether_rows_feel_their_batch_is_told(repository: Path, tmp_path: Path, metrics: Metrics) -> None:
    """An engine knows whether its model gives the same bits alone and in a batch, on this device."""
    for folder in (repository / "toy" / "1", repository / "counter" / "1"):
        assert Engine(load(folder), OPTIONS, metrics).bit_exact
    assert not Engine(load(toys.save_uneven(tmp_path)), OPTIONS, metrics).bit_exact


@pytest.mark.parametrize("key", ["output__y", "output__z", "state__h"])
def test_a_model_that_computes_something_else_is_refused(tmp_path: Path, metrics: Metrics, key: str) -> None:
    """A golden value off by more than the tolerance, in any output or state, keeps the model out."""
    folder = toys.save_leaky(tmp_path)
    value = load(folder).golden[key.replace("__", ".")].copy()
    value.flat[-1] += 1e-3
    rewrite_golden(folder, **{key: value})
    with pytest.raises(GoldenMismatch, match=key.replace("__", r"\.")):
        Engine(load(folder), OPTIONS, metrics)


def test_golden_vectors_that_are_not_a_number_are_no_match(tmp_path: Path, metrics: Metrics) -> None:
    """NaN is not within any tolerance."""
    folder = toys.save_leaky(tmp_path)
    value = load(folder).golden["output.y"].copy()
    value[0, 0, 0] = np.nan
    rewrite_golden(folder, output__y=value)
    with pytest.raises(GoldenMismatch):
        Engine(load(folder), OPTIONS, metrics)


def test_missing_golden_vectors_are_named(tmp_path: Path, metrics: Metrics) -> None:
    """The array that is not there is told, with the shape that is expected."""
    folder = toys.save_leaky(tmp_path)
    rewrite_golden(folder, output__z=None)
    with pytest.raises(GoldenMismatch, match=r"output\.z is missing"):
        Engine(load(folder), OPTIONS, metrics)


def test_one_broken_model_does_not_stop_the_others(tmp_path: Path, metrics: Metrics) -> None:
    """The good version is served and is the default; the broken one is named when asked for."""
    toys.save_leaky(tmp_path, version="1")
    rewrite_golden(toys.save_leaky(tmp_path, version="2"), output__z=None)
    (toys.save_counter(tmp_path) / "model.onnx").unlink()
    found = scan(tmp_path)
    engines = load_engines(found.found, found.broken, OPTIONS, metrics)
    assert [engine.key for engine in engines] == [ModelKey("toy", "1")]
    assert set(engines.broken) == {ModelKey("toy", "2"), ModelKey("counter", "1")}
    assert engines.get("toy").key.version == "1"
    with pytest.raises(ModelBroken, match="toy/2"):
        engines.get("toy", "2")
    with pytest.raises(ModelBroken, match="counter/1"):
        engines.get("counter")


@pytest.mark.parametrize(
    "change",
    [
        {"state": [{"name": "h", "input": "h", "output": "h_next", "dtype": "float32", "shape": [4], "batch_axis": 1}]},
        {"constants": [{"name": "k", "dtype": "int64", "shape": [], "value": [1e30]}]},
    ],
    ids=["an axis that is not there", "a constant that does not fit"],
)
def test_a_model_broken_in_any_way_is_only_reported(tmp_path: Path, metrics: Metrics, change: Any) -> None:
    """A manifest that the schema allows and the runtime trips over stops its own model alone."""
    folder = toys.save_leaky(tmp_path)
    toys.save_counter(tmp_path)
    toys.seal(folder, json.loads((folder / "manifest.json").read_text()) | change)
    found = scan(tmp_path)
    engines = load_engines(found.found, found.broken, OPTIONS, metrics)
    assert ([engine.key.name for engine in engines], list(engines.broken)) == (["counter"], [ModelKey("toy", "1")])


def test_golden_vectors_of_another_kind_are_only_reported(tmp_path: Path, metrics: Metrics) -> None:
    """Text where numbers belong keeps the model out and stops nobody."""
    folder = toys.save_leaky(tmp_path)
    rewrite_golden(folder, output__y=load(folder).golden["output.y"].astype(str))
    engines = load_engines(scan(tmp_path).found, {}, OPTIONS, metrics)
    assert list(engines.broken) == [ModelKey("toy", "1")]


def test_the_highest_version_is_the_default(tmp_path: Path, metrics: Metrics) -> None:
    """Versions are numbers: 10 beats 9."""
    for version in ("9", "10"):
        toys.save_leaky(tmp_path, version=version)
    found = scan(tmp_path)
    engines = load_engines(found.found, {}, OPTIONS, metrics)
    assert engines.get("toy").key.version == "10"
    assert [engine.key.version for engine in engines.versions("toy")] == ["9", "10"]
    assert engines.get("toy", "9").key.version == "9"


@pytest.mark.parametrize(("name", "version"), [("nope", None), ("toy", "7")])
def test_an_unknown_model_says_what_there_is(
    repository: Path, metrics: Metrics, name: str, version: str | None
) -> None:
    """The error lists the loaded names."""
    found = scan(repository)
    engines = load_engines(found.found, {}, OPTIONS, metrics)
    with pytest.raises(ModelNotFound, match="counter, exploding, toy"):
        engines.get(name, version)
