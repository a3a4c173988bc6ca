"""Which versions are live, which is the default, and that one broken model stops no other."""

import asyncio
import json
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from service.engine import load_engines
from service.errors import ModelBroken, ModelDraining, ModelNotFound
from service.metrics import Metrics
from service.registry import ModelKey, load, load_all
from tests.service import toys
from tests.service.conftest import OPTIONS


def test_one_broken_model_does_not_stop_the_others(tmp_path: Path, metrics: Metrics) -> None:
    """The good version is served and is the default; the broken one is named when asked for."""
    toys.save_leaky(tmp_path, version="1")
    toys.rewrite_golden(toys.save_leaky(tmp_path, version="2"), output__z=None)
    (toys.save_counter(tmp_path) / "model.onnx").unlink()
    found = load_all(tmp_path)
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
    found = load_all(tmp_path)
    engines = load_engines(found.found, found.broken, OPTIONS, metrics)
    assert ([engine.key.name for engine in engines], list(engines.broken)) == (["counter"], [ModelKey("toy", "1")])


def test_golden_vectors_of_another_kind_are_only_reported(tmp_path: Path, metrics: Metrics) -> None:
    """Text where numbers belong keeps the model out and stops nobody."""
    folder = toys.save_leaky(tmp_path)
    toys.rewrite_golden(folder, output__y=load(folder).golden["output.y"].astype(str))
    engines = load_engines(load_all(tmp_path).found, {}, OPTIONS, metrics)
    assert list(engines.broken) == [ModelKey("toy", "1")]


def test_the_highest_version_is_the_default(tmp_path: Path, metrics: Metrics) -> None:
    """Versions are numbers: 10 beats 9."""
    for version in ("9", "10"):
        toys.save_leaky(tmp_path, version=version)
    found = load_all(tmp_path)
    engines = load_engines(found.found, {}, OPTIONS, metrics)
    assert engines.get("toy").key.version == "10"
    assert [engine.key.version for engine in engines.live("toy")] == ["9", "10"]
    assert engines.get("toy", "9").key.version == "9"


@pytest.mark.parametrize(("name", "version"), [("nope", None), ("toy", "7")])
def test_an_unknown_model_says_what_there_is(
    repository: Path, metrics: Metrics, name: str, version: str | None
) -> None:
    """The error lists the loaded names."""
    found = load_all(repository)
    engines = load_engines(found.found, {}, OPTIONS, metrics)
    with pytest.raises(ModelNotFound, match="counter, exploding, toy"):
        engines.get(name, version)


def test_a_draining_version_is_there_for_its_sessions_only(tmp_path: Path, metrics: Metrics) -> None:
    """New sessions get the highest of the others, or are told; added again, it is as it was."""
    for version in ("1", "2"):
        toys.save_leaky(tmp_path, version=version)
    engines = load_engines(load_all(tmp_path).found, {}, OPTIONS, metrics)
    one, two = engines.live("toy")
    engines.drain(two)
    assert (engines.get("toy"), engines.serving("toy", "2"), list(engines)) == (one, two, [one, two])
    engines.check(one)
    for ask in (lambda: engines.get("toy", "2"), lambda: engines.check(two)):
        with pytest.raises(ModelDraining, match="toy/2 is being removed"):
            ask()
    engines.drain(one)
    with pytest.raises(ModelDraining, match="toy"):
        engines.get("toy")
    assert engines.names() == []
    engines.add(two)
    assert engines.get("toy") is two
    engines.remove(one)
    with pytest.raises(ModelNotFound, match="loaded: toy"):
        engines.serving("toy", "1")


def test_what_is_broken_holds_nothing_of_what_was_loaded(tmp_path: Path, metrics: Metrics) -> None:
    """The error that readiness shows for ever has no traceback, whose frames hold the graph and the engine."""
    toys.rewrite_golden(toys.save_leaky(tmp_path), output__z=None)
    engines = load_engines(load_all(tmp_path).found, {}, OPTIONS, metrics)
    error = engines.broken[ModelKey("toy", "1")]
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)
    with pytest.raises(ModelBroken) as told:
        engines.get("toy")
    assert told.value.extras == {"reason": "golden_mismatch"}


@pytest.mark.anyio
async def test_one_that_failed_keeps_no_other_from_ending(
    tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task ended with a fault, which was reported as that happened; closing it is no second one."""
    toys.save_leaky(tmp_path)
    engine = load_engines(load_all(tmp_path).found, {}, OPTIONS, metrics).get("toy")
    failing = AsyncMock(side_effect=RuntimeError("a fault of ours"))
    monkeypatch.setattr(engine.batcher, "serve", failing)
    engine.start()
    await asyncio.sleep(0)
    await engine.close()
    failing.assert_awaited_once()
