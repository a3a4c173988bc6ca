"""The user's own file: loaded again for its run, refused when it has changed."""

from pathlib import Path

import numpy as np
import pytest

from training import data
from training.checkpoint import Run
from training.config import TrainConfig
from training.data import own
from training.errors import DataError
from training.trainer import configure


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Two slow waves."""
    path = tmp_path / "waves.csv"
    rows = [f"{np.sin(row / 9):.4f},{np.cos(row / 7):.4f}" for row in range(300)]
    path.write_text("\n".join(["a,b", *rows]) + "\n")
    return path


def test_a_run_finds_its_file_again(csv: Path, tmp_path: Path) -> None:
    """With the options that it was loaded with, through run.json, and equal to what went in."""
    found = own.load("csv", csv, targets=("a",), horizon=3, window=32)
    run = Run(found.info, configure(found, "gru"), TrainConfig(), {})
    run.save(tmp_path / "run")
    back = Run.load(tmp_path / "run")
    assert back == run
    back.same_as(run)
    again = data.load_again(back.data)
    assert again.info == found.info
    for split, items in found.splits.items():
        for mine, theirs in zip(items.items, again.splits[split].items, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_changed_file_is_refused(csv: Path) -> None:
    """The message names the file and both checksums."""
    info = own.load("csv", csv, targets=("a",)).info
    csv.write_text(csv.read_text() + "1,2\n")
    with pytest.raises(DataError, match=rf"waves\.csv has changed since the run .* then {info.sha256}"):
        data.load_again(info)


def test_a_named_set_is_loaded_by_its_name() -> None:
    """As it always was."""
    assert data.load_again(data.load("digits").info).info.name == "digits"


def test_a_forecast_of_own_columns_starts_from_their_last_values(csv: Path) -> None:
    """Its head gives changes; a target that is no input has no last value to start from."""
    assert configure(own.load("csv", csv, targets=("b", "a")), "gru").residual == (1, 0)
    assert configure(own.load("csv", csv, targets=("b",), inputs=("a",)), "gru").residual == ()
