"""A model that does not compute what was exported is not served, and what it promises about bits is measured."""

from pathlib import Path

import numpy as np
import pytest

from service import proof
from service.engine import Engine
from service.errors import GoldenMismatch
from service.metrics import Metrics
from service.registry import load
from tests.service import toys
from tests.service.conftest import OPTIONS


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
    toys.rewrite_golden(folder, **{key: value})
    with pytest.raises(GoldenMismatch, match=key.replace("__", r"\.")):
        Engine(load(folder), OPTIONS, metrics)


@pytest.mark.parametrize(("size", "error"), [(0.5, 1e-2), (1e4, 1e-6)])
def test_an_error_is_judged_by_the_size_of_the_values(size: float, error: float) -> None:
    """Where watts cross zero, 32-bit floats are as exact as thousands of watts are; another element is judged alone."""
    want = np.array([[[0.0, 3.0], [size, 3.0]]])
    got = want + np.array([[[1e-2, 0.0], [0.0, 0.0]]])
    assert proof._error(got, want) == pytest.approx(error)


def test_golden_vectors_that_are_not_a_number_are_no_match(tmp_path: Path, metrics: Metrics) -> None:
    """NaN is not within any tolerance."""
    folder = toys.save_leaky(tmp_path)
    value = load(folder).golden["output.y"].copy()
    value[0, 0, 0] = np.nan
    toys.rewrite_golden(folder, output__y=value)
    with pytest.raises(GoldenMismatch):
        Engine(load(folder), OPTIONS, metrics)


def test_missing_golden_vectors_are_named(tmp_path: Path, metrics: Metrics) -> None:
    """The array that is not there is told, with the shape that is expected."""
    folder = toys.save_leaky(tmp_path)
    toys.rewrite_golden(folder, output__z=None)
    with pytest.raises(GoldenMismatch, match=r"output\.z is missing"):
        Engine(load(folder), OPTIONS, metrics)
