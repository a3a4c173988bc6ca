"""The report of a run says what was measured, beside the baselines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from training.config import TrainConfig
from training.data import forecast
from training.data.sequences import DataSet
from training.model import RecurrentModel
from training.report import describe, plot_forecast, write_report
from training.trainer import configure, fit, set_normalisation


def test_scores_stand_beside_the_references(tiny: DataSet, tmp_path: Path) -> None:
    """Each score in a row, each reference in a column; a set that is no forecast has no picture of one."""
    run = fit(tiny, configure(tiny, "gru", hidden=4), TrainConfig(max_epochs=1), tmp_path)
    assert write_report(tmp_path, run, tiny) == [tmp_path / "report.md"]
    report = (tmp_path / "report.md").read_text()
    assert run.result is not None
    valid, test = (metric["value"] for metric in run.result["metrics"])
    assert f"| nll | nats/frame | {valid:.4g} | {test:.4g} | 9.9 |" in report
    assert "| metric | unit | valid | test | always silent, test |" in report
    steps = sum(int(predicted.sum()) for _, _, predicted in tiny.splits["test"].items)
    assert f"test {steps}." in report
    longer = replace(run, result=run.result | {"epochs": 9, "best_epoch": 4})
    assert "best of 9 epochs: 4," in describe(longer, tiny, [])


@pytest.mark.parametrize("note", ["two cells missing"])
def test_notes_about_the_data_are_in_it(tiny: DataSet, tmp_path: Path, note: str) -> None:
    """What was filled or left out is part of the result."""
    data = DataSet(tiny.info, tiny.splits, (), (note,))
    run = fit(data, configure(data, "gru", hidden=4), TrainConfig(max_epochs=1), tmp_path)
    write_report(tmp_path, run, data)
    assert f"\n- {note}\n" in (tmp_path / "report.md").read_text()


def test_the_picture_is_of_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured later, what was forecast of it, and two deviations on either side, where it is asked about."""
    rows = [f"{np.sin(row / 9):.4f},{np.cos(row / 7):.4f}" for row in range(300)]
    (tmp_path / "waves.csv").write_text("\n".join(["a,b", *rows]))
    data = forecast.load(tmp_path / "waves.csv", forecast.Options(("b",), inputs=("b", "a"), window=16, horizon=3))
    model = RecurrentModel(configure(data, "gru", hidden=3)).eval()
    set_normalisation(model, data)
    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda picture, *_, **__: pictures.append(picture))
    plot_forecast(tmp_path / "forecast.png", model, data)
    inputs, targets, predicted = data.splits["test"].items[0]
    with torch.no_grad():
        found = model.predict(model(torch.from_numpy(inputs)[None])[0])
    mean, std = (value[0].numpy()[predicted, 0] for value in found)
    (axes,) = pictures[0].axes
    measured, drawn = axes.lines
    np.testing.assert_array_equal(measured.get_ydata(), targets[predicted, 0])
    np.testing.assert_allclose(drawn.get_ydata(), mean, rtol=1e-5)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx(((mean - 2 * std).min(), (mean + 2 * std).max()), rel=1e-4)
