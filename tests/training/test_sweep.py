"""A sweep: the valid split decides, and a stopped one goes on where it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from training import sweep as module
from training.checkpoint import Run, alone, load_tensors
from training.config import TrainConfig
from training.data.sequences import DataSet
from training.errors import CheckpointError, ConfigError, DivergedError
from training.reproduce import curve
from training.sweep import Space, folder_of, sweep
from training.trainer import fit

SPACE = Space(cells=("mgu2", "gru3"), hidden=(2, 4), rate=(0.01, 0.05))
CONFIG = TrainConfig(max_epochs=2, batch_size=4)


def test_the_best_valid_loss_comes_first(tiny: DataSet, tmp_path: Path) -> None:
    """Each trial is a run of its own in the sweep's folder, of a point inside the space."""
    told: list[str] = []
    found = sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=3, tell=told.append)
    assert [line.split(":")[0] for line in told] == ["1/3", "2/3", "3/3"]
    assert "min left" in told[0]
    assert [trial.value for trial in found] == sorted(trial.value or 0 for trial in found)
    for trial in found:
        run = Run.load(folder_of(tmp_path, trial.params))
        assert run.model.cell in SPACE.cells
        assert 2 <= run.model.hidden <= 4
        assert run.train == replace(CONFIG, rate=trial.params["rate"])
        assert load_tensors(folder_of(tmp_path, trial.params) / "best.safetensors")[1]["valid_loss"] == trial.value


def test_a_finished_sweep_goes_on_with_more_trials(tiny: DataSet, tmp_path: Path) -> None:
    """Those that are done count; the same number again runs nothing."""
    first = sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=2)
    told: list[str] = []
    assert {t.number for t in sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=2, tell=told.append)} == {0, 1}
    assert told == []
    more = sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=3)
    assert {trial.number for trial in first} < {trial.number for trial in more}
    assert len({str(trial.params) for trial in more}) == 3


def test_half_a_line_in_the_journal_is_dropped(tiny: DataSet, tmp_path: Path) -> None:
    """A machine that lost its power, or a full disk, left it; the trials before it count."""
    sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=2)
    journal = tmp_path / module.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    assert len(sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=2)) == 2


def test_a_stopped_trial_is_taken_up_first(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second trial: its point is run to the end before any other, once."""
    calls: list[Path] = []

    def interrupted(*args: Any, **options: Any) -> Run:
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=3)
    found = sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=3)
    assert calls[2] == calls[1]
    assert len(found) == len(set(calls)) == 3


def test_a_point_that_diverges_is_given_up(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as tried; a sweep of nothing else says so."""

    def diverge(*_: Any, **__: Any) -> Run:
        raise DivergedError("the loss became nan")

    monkeypatch.setattr(module, "fit", diverge)
    with pytest.raises(ConfigError, match="no trial came to its end"):
        sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=2)


def test_another_sweeps_folder_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """Other data, another space or other settings would not be comparable."""
    sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=1)
    others = [replace(tiny, info=replace(tiny.info, **other)) for other in ({"sha256": "0"}, {"own": {"horizon": 2}})]
    for data, space, config, words in (
        (tiny, replace(SPACE, hidden=(2, 8)), CONFIG, r"--hidden=\[2, 4\], not \[2, 8\]"),
        (tiny, SPACE, replace(CONFIG, max_epochs=3), "--epochs=2, not 3"),
        (others[0], SPACE, CONFIG, "data sha256=None, not '0'"),
        (others[1], SPACE, CONFIG, "--horizon=None, not 2"),
    ):
        with pytest.raises(CheckpointError, match=f"holds a sweep over something else, with {words}: choose"):
            sweep(data, space, {}, config, tmp_path, trials=1)
    moved = replace(tiny, info=replace(tiny.info, own={"path": "/elsewhere"}))
    assert len(sweep(moved, SPACE, {}, CONFIG, tmp_path, trials=1)) == 1


def test_a_sweep_of_an_older_version_is_refused_in_fewer_words() -> None:
    """It noted other things of its data, which have no names any more."""
    assert module._difference([{}, {}, {}, "tiny", None], [{}, {}, {}, {"own": {}}]) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cells": ("gru", "grru")}, "unknown unit 'grru'"),
        ({"rate": (0.1, 0.01)}, "--rate must go from more than 0 up to a finite number, not from 0.1 to 0.01"),
        ({"rate": (0.1, float("inf"))}, "--rate must go from more than 0 up to a finite number, not from 0.1 to inf"),
        ({"hidden": (0, 8)}, "--hidden must go from more than 0 up"),
    ],
)
def test_impossible_spaces_are_refused(settings: dict[str, Any], words: str) -> None:
    """By name."""
    with pytest.raises(ConfigError, match=words):
        Space(**settings)


def test_a_sweep_of_nothing_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """Before a folder is made."""
    with pytest.raises(ConfigError, match="trials must be at least 1, not 0"):
        sweep(tiny, SPACE, {}, CONFIG, tmp_path / "sweep", trials=0)
    assert not (tmp_path / "sweep").exists()


def test_a_trial_that_is_worse_than_most_is_given_up(
    tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the epoch that showed it; it counts as tried, and is not among what was found."""
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
    told: list[str] = []
    found = sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=3, tell=told.append)
    assert {trial.number for trial in found} == {0, 2}
    assert "given up early" in told[1]


def test_layers_are_tried_too(tiny: DataSet, tmp_path: Path) -> None:
    """The run has as many as its point."""
    (trial,) = sweep(tiny, replace(SPACE, layers=(2, 2)), {}, CONFIG, tmp_path, trials=1)
    assert Run.load(folder_of(tmp_path, trial.params)).model.layers == 2


def test_every_epoch_is_told_to_the_pruner(tiny: DataSet, tmp_path: Path) -> None:
    """Its valid loss by its number: else no trial would ever be worse than most."""
    for trial in sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=2):
        told = sorted(trial.intermediate_values.items())
        assert [epoch for epoch, _ in told] == [0, 1]
        assert [loss for _, loss in told] == pytest.approx(curve(folder_of(tmp_path, trial.params)), abs=1e-4)


def test_two_sweeps_do_not_share_a_folder(tiny: DataSet, tmp_path: Path) -> None:
    """They would train the same points into the same files; a run of the sweep has a lock of its own."""
    with alone(tmp_path), pytest.raises(CheckpointError, match="another latch-train is at work in"):
        sweep(tiny, SPACE, {}, CONFIG, tmp_path, trials=1)
    assert not list(tmp_path.iterdir())


def test_a_stopped_point_waits_once() -> None:
    """However often it was stopped, and whether or not it waits already; one that is done does not wait at all."""
    study, space = optuna.create_study(), {"rate": optuna.distributions.FloatDistribution(0, 1)}
    for rate in (0.25, 0.5, 0.5, 0.75):
        study.enqueue_trial({"rate": rate})
        trial = study.ask(space)
        if rate == 0.25:
            study.tell(trial, 1.0)
    for _ in range(2):
        module.take_up(study)
        waiting = study.get_trials(states=(optuna.trial.TrialState.WAITING,))
        assert [trial.system_attrs["fixed_params"] for trial in waiting] == [{"rate": 0.5}, {"rate": 0.75}]


def test_what_is_beyond_the_space_is_every_trials(tiny: DataSet, tmp_path: Path) -> None:
    """And sizes and rates are drawn by their logarithms, so that small ones are tried as often as large ones."""
    (trial,) = sweep(tiny, SPACE, {"skip": True}, CONFIG, tmp_path, trials=1)
    assert Run.load(folder_of(tmp_path, trial.params)).model.skip
    assert {name for name, drawn in trial.distributions.items() if getattr(drawn, "log", False)} == {"hidden", "rate"}
