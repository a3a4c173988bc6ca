"""Runs side by side: ranked within their data set by the valid score."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from training import compare
from training.checkpoint import Run
from training.config import ModelConfig, TrainConfig
from training.data.sequences import DataSet
from training.errors import CheckpointError, ConfigError


def finished(folder: Path, data: DataSet, valid: float, test: float, steps: int = 9, **info: Any) -> Path:
    """A run folder that says it scored so, over so many steps."""
    metrics = [
        {"name": "nll", "split": split, "value": value, "unit": "nats/frame"}
        for split, value in (("valid", valid), ("test", test))
    ]
    scored = {"valid": steps, "test": steps}
    result = {"epochs": 3, "best_epoch": 2, "seconds": 1.5, "metrics": metrics, "scored": scored}
    model = ModelConfig("gru", 6, 6, "bernoulli", hidden=5, layers=2)
    Run(replace(data.info, **info), model, TrainConfig(), {}, result).save(folder)
    return folder


def test_the_best_valid_score_comes_first(tiny: DataSet, tmp_path: Path) -> None:
    """Not the best test score; runs on other data stand by themselves."""
    folders = [
        finished(tmp_path / "worse", tiny, 2.0, 0.5),
        finished(tmp_path / "other", tiny, 0.1, 0.1, name="other"),
        finished(tmp_path / "better", tiny, 1.0, 0.9),
    ]
    rows = compare.compare(folders)
    assert [row.folder.name for row in rows] == ["other", "better", "worse"]
    assert rows[1].parameters == 3 * (6 * 5 + 25 + 5) + 3 * (25 + 25 + 5) + 6 * 6
    cells = dict(zip(compare.COLUMNS, rows[1].cells(), strict=True))
    assert (cells["hidden"], cells["valid"], cells["test"]) == ("2 x 5", "1", "0.9")
    assert (cells["weights"], cells["seed"], cells["epochs"]) == (str(rows[1].parameters), "1", "3")
    compare.plot(tmp_path / "compare.png", rows)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "other",
    [
        {"description": "b"},
        {"sha256": "0" * 64},
        {"split": "50/25/25"},
        {"own": {"season": 7}},
        {"steps": 5},
        *({"own": {"season": 0} | more} for more in ({"max_gap": 7}, {"by": "machine"}, {"draw": 2})),
    ],
)
def test_other_rows_or_questions_are_another_contest(tiny: DataSet, tmp_path: Path, other: dict[str, Any]) -> None:
    """Each is ranked by itself, however well it scored; what only says where a file lies is none."""
    own = {"path": "/a", "season": 0}
    finished(tmp_path / "worse", tiny, 2.0, 0.5, own=own)
    finished(tmp_path / "same", tiny, 1.0, 0.5, own=own | {"path": "/b"})
    finished(tmp_path / "other", tiny, 0.1, 0.1, **({"own": own} | other))
    rows = compare.compare([tmp_path / name for name in ("worse", "other", "same")])
    assert [row.folder.name for row in rows if row.contest == rows[-1].contest] in (["same", "worse"], ["other"])
    assert len({row.contest for row in rows}) == 2


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    """Refused by its name, before anything is drawn."""
    with pytest.raises(ConfigError, match=r"a plot is a \.png, not .*x\.xyz"):
        compare.plot(tmp_path / "x.xyz", [])


def test_an_unfinished_run_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """It has no score to compare."""
    folder = finished(tmp_path / "run", tiny, 1.0, 1.0)
    replace(Run.load(folder), result=None).save(folder)
    with pytest.raises(CheckpointError, match="has not finished: fit it to the end, or leave it out"):
        compare.compare([folder])


def test_a_plot_has_a_panel_for_each_contest(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own runs alone, each at its parameters and its test score."""
    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda picture, *_, **__: pictures.append(picture))
    folders = [
        finished(tmp_path / "one", tiny, 1.0, 2.0),
        finished(tmp_path / "two", tiny, 1.5, 1.75),
        finished(tmp_path / "other", tiny, 3.0, 4.0, name="unlike"),
    ]
    rows = compare.compare(folders)
    compare.plot(tmp_path / "compare.png", rows)
    shown = [[tuple(mark) for mark in axes.collections[0].get_offsets().tolist()] for axes in pictures[0].axes]
    assert shown == [[(rows[0].parameters, 2.0), (rows[0].parameters, 1.75)], [(rows[0].parameters, 4.0)]]
    assert [{text.get_text() for text in axes.texts} for axes in pictures[0].axes] == [{"one", "two"}, {"other"}]
