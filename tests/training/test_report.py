"""The report of a run says what was measured, beside the baselines."""

from pathlib import Path

import pytest

from training.config import TrainConfig
from training.data.sequences import DataSet
from training.report import write_report
from training.trainer import configure, fit


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


@pytest.mark.parametrize("note", ["two cells missing"])
def test_notes_about_the_data_are_in_it(tiny: DataSet, tmp_path: Path, note: str) -> None:
    """What was filled or left out is part of the result."""
    data = DataSet(tiny.info, tiny.splits, (), (note,))
    run = fit(data, configure(data, "gru", hidden=4), TrainConfig(max_epochs=1), tmp_path)
    write_report(tmp_path, run, data)
    assert f"\n- {note}\n" in (tmp_path / "report.md").read_text()
