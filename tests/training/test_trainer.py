"""Fitting: it learns, resumes exactly, survives interruption and kill, and refuses what it cannot do."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError
from torch.nn.utils import parameters_to_vector

from training.checkpoint import Run, alone, load_tensors, save_tensors
from training.checkpoint import replace as write
from training.config import ModelConfig, TrainConfig
from training.data import adding
from training.data.sequences import DataSet, Split, collate
from training.errors import CheckpointError, ConfigError, DataError, DivergedError
from training.model import RecurrentModel
from training.progress import short
from training.trainer import configure, deviation, fit, set_normalisation

CONFIG = TrainConfig(seed=5, rate=0.02, batch_size=4, max_epochs=6, patience=3)


def model_for(data: DataSet, **settings: Any) -> ModelConfig:
    """Small, and with dropout, so that random numbers matter."""
    return configure(data, "gru", **({"hidden": 6, "layers": 2, "dropout": 0.3} | settings))


class StopAt(Callback):
    """Raises `error` in the middle of an epoch (counted from 1)."""

    def __init__(self, epoch: int, error: BaseException) -> None:
        self.epoch, self.error = epoch, error

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """After the first batch."""
        if trainer.current_epoch + 1 == self.epoch:
            raise self.error


def assert_same_run(first: Path, second: Path) -> None:
    """Best and last checkpoints hold the same bits, whatever time they took."""
    for name in ("best.safetensors", "last.safetensors"):
        (mine, my_meta), (theirs, their_meta) = load_tensors(first / name), load_tensors(second / name)
        assert my_meta | {"seconds": 0} == their_meta | {"seconds": 0}
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_fitting_learns_the_scale(tiny: DataSet, tmp_path: Path) -> None:
    """A deterministic rule of six notes is learned to well below the score of guessing."""
    run = fit(tiny, configure(tiny, "mgu", hidden=12), replace(CONFIG, max_epochs=40, patience=40), tmp_path)
    assert run.result is not None
    score = next(metric for metric in run.result["metrics"] if metric["split"] == "test")
    assert score["name"] == "nll"
    assert score["value"] < 1.0
    assert (tmp_path / "logs" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize("optimiser", ["adam", "rmsprop"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the power went")])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: DataSet, tmp_path: Path, optimiser: str, error: BaseException
) -> None:
    """Interrupted in the middle of epoch 4, three epochs are kept; resumed, the end is the same to the last bit."""
    config = replace(CONFIG, optimiser=optimiser)
    whole = fit(tiny, model_for(tiny), config, tmp_path / "whole")
    with pytest.raises(type(error)):
        fit(tiny, model_for(tiny), config, tmp_path / "cut", callbacks=(StopAt(4, error),))
    assert load_tensors(tmp_path / "cut" / "last.safetensors")[1]["epoch"] == 3
    resumed = fit(tiny, model_for(tiny), config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert whole.result is not None
    assert resumed.result is not None
    assert resumed.result["metrics"] == whole.result["metrics"]


def test_a_runs_seconds_are_those_of_all_its_parts(tiny: DataSet, tmp_path: Path) -> None:
    """Not those since it was last taken up."""
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, model_for(tiny), CONFIG, tmp_path, callbacks=(StopAt(4, KeyboardInterrupt()),))
    last = tmp_path / "last.safetensors"
    tensors, meta = load_tensors(last)
    assert 0 < meta["seconds"] < 1000
    save_tensors(last, tensors, meta | {"seconds": 1000 + meta["seconds"]})
    resumed = fit(tiny, model_for(tiny), CONFIG, tmp_path)
    assert resumed.result is not None
    assert resumed.result["seconds"] > 1000 + meta["seconds"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


ALL = {"schedule": "cosine", "average": 0.9, "similar_lengths": True}


def test_a_run_with_all_that_helps_is_resumed_exactly(tiny: DataSet, tmp_path: Path) -> None:
    """Schedule, average, batches and what is dropped go on where they were, to the last bit."""
    config = replace(CONFIG, **ALL)
    model = model_for(tiny, input_dropout=0.2, head_dropout=0.3, recurrent_dropout=0.3, skip=True)
    fit(tiny, model, config, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(tiny, model, config, tmp_path / "cut", callbacks=(StopAt(4, RuntimeError("the power went")),))
    fit(tiny, model, config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


class Watch(Callback):
    """Keeps every step's weights and every epoch's rate."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """A copy of the head's weights."""
        self.weights.append(pl_module.state_dict()["model.head.weight"].clone())

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Of the only group."""
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_average_is_what_is_kept(tiny: DataSet, tmp_path: Path) -> None:
    """`best` holds the moving average of every step's weights, from the first on; the weights went the same way."""
    watch, plain = Watch(), Watch()
    config = replace(CONFIG, max_epochs=1)
    fit(tiny, model_for(tiny), replace(config, average=0.9), tmp_path / "a", callbacks=(watch,))
    fit(tiny, model_for(tiny), config, tmp_path / "b", callbacks=(plain,))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(watch.weights, plain.weights, strict=True))
    expected = watch.weights[0]
    for weights in watch.weights[1:]:
        expected = 0.9 * expected + 0.1 * weights
    torch.testing.assert_close(load_tensors(tmp_path / "a" / "best.safetensors")[0]["head.weight"], expected)


def test_the_cosine_falls_from_the_rate_to_nothing(tiny: DataSet, tmp_path: Path) -> None:
    """One rate an epoch; the number of epochs belongs to it and may not change, the patience may."""
    watch, config = Watch(), replace(CONFIG, schedule="cosine", max_epochs=4, patience=9)
    fit(tiny, model_for(tiny), config, tmp_path, callbacks=(watch,))
    expected = [CONFIG.rate * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    np.testing.assert_allclose(watch.rates, expected)
    with pytest.raises(CheckpointError, match="a run with --epochs=4, not 5"):
        fit(tiny, model_for(tiny), replace(config, max_epochs=5), tmp_path)
    assert fit(tiny, model_for(tiny), replace(config, patience=10), tmp_path).train.patience == 9


def test_only_piano_rolls_are_transposed(tiny: DataSet, tmp_path: Path) -> None:
    """Six notes are none."""
    with pytest.raises(DataError, match="only piano rolls of 88 notes can be transposed: leave out --transpose"):
        fit(tiny, model_for(tiny), replace(CONFIG, transpose=2), tmp_path)


def test_the_last_epochs_are_not_transposed(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which these are depends on how many there are, so that may not change."""
    asked = []

    def transposed(split: Split, semitones: int, _: torch.Generator) -> Split:
        asked.append(semitones)
        return split

    monkeypatch.setattr("training.trainer.transposed", transposed)
    config = replace(CONFIG, transpose=3, settle=3, max_epochs=5, patience=9)
    fit(tiny, model_for(tiny), config, tmp_path)
    assert asked == [3, 3]
    with pytest.raises(CheckpointError, match="--epochs=5, not 6"):
        fit(tiny, model_for(tiny), replace(config, max_epochs=6), tmp_path)


def test_early_stopping_survives_interruption(tiny: DataSet, tmp_path: Path) -> None:
    """Patience counted before the interruption counts after it."""
    config = replace(CONFIG, rate=3.0, clip=1e9, max_epochs=60, patience=4)
    whole = fit(tiny, model_for(tiny), config, tmp_path / "whole")
    assert whole.result is not None
    assert whole.result["epochs"] == whole.result["best_epoch"] + 4
    stop = StopAt(whole.result["epochs"] - 1, RuntimeError("the power went"))
    with pytest.raises(RuntimeError):
        fit(tiny, model_for(tiny), config, tmp_path / "cut", callbacks=(stop,))
    fit(tiny, model_for(tiny), config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("first", "settings"), [({"max_epochs": 3}, {}), ({"patience": 1}, {"rate": 3.0, "clip": 1e9, "max_epochs": 60})]
)
def test_a_finished_run_goes_on_with_new_limits(
    first: dict[str, Any], settings: dict[str, Any], tiny: DataSet, tmp_path: Path
) -> None:
    """Stopped by epochs or by patience, then given more of them, it ends as one that had them from the start."""
    config = replace(CONFIG, **settings)
    whole = fit(tiny, model_for(tiny), config, tmp_path / "whole")
    short = fit(tiny, model_for(tiny), replace(config, **first), tmp_path / "more")
    more = fit(tiny, model_for(tiny), config, tmp_path / "more")
    assert_same_run(tmp_path / "whole", tmp_path / "more")
    assert short.result is not None
    assert more.result is not None
    assert whole.result is not None
    assert short.result["epochs"] < more.result["epochs"]
    assert more == Run.load(tmp_path / "more")
    assert replace(more, result=None) == replace(whole, result=None)
    assert more.result["metrics"] == whole.result["metrics"]


def test_limits_without_room_change_nothing(tiny: DataSet, tmp_path: Path) -> None:
    """More epochs for a run that patience ended: the stored run comes back and no file is written."""
    config = replace(CONFIG, rate=3.0, clip=1e9, max_epochs=60, patience=2)
    run = fit(tiny, model_for(tiny), config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert fit(tiny, model_for(tiny), replace(config, max_epochs=90), tmp_path) == run
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_fewer_epochs_than_there_are_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """Else run.json would promise weights that no such run has."""
    run = fit(tiny, model_for(tiny), CONFIG, tmp_path)
    with pytest.raises(ConfigError, match=r"--epochs is 4, but the run in .* has 6 epochs already"):
        fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=4), tmp_path)
    assert Run.load(tmp_path) == run


def test_a_kill_after_the_last_epoch_only_repeats_the_scores(tiny: DataSet, tmp_path: Path) -> None:
    """Without its result but with a finished checkpoint, a run trains no further."""
    run = fit(tiny, model_for(tiny), CONFIG, tmp_path)
    before = (tmp_path / "last.safetensors").read_bytes()
    replace(run, result=None).save(tmp_path)
    again = fit(tiny, model_for(tiny), CONFIG, tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert again.result is not None
    assert run.result is not None
    assert again.result["metrics"] == run.result["metrics"]


def test_a_finished_run_is_found_not_repeated(tiny: DataSet, tmp_path: Path) -> None:
    """The same call returns the stored result, seconds included."""
    assert fit(tiny, model_for(tiny), CONFIG, tmp_path) == fit(tiny, model_for(tiny), CONFIG, tmp_path)


@pytest.mark.slow
def test_a_killed_process_loses_at_most_one_epoch(tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment: what was kept is readable, and resuming ends like an unkilled run."""
    command = [sys.executable, "-W", "ignore", "-m", "training", "fit", "digits", "--hidden", "8", "--epochs", "6"]
    command += ["--batch-size", "64", "--run"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    last = tmp_path / "cut" / "last.safetensors"
    with subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not (last.is_file() and load_tensors(last)[1]["epoch"] >= 2):
                time.sleep(0.01)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert load_tensors(last)[1]["epoch"] >= 2
    assert Run.load(tmp_path / "cut").result is None
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_padding_is_never_counted(tiny: DataSet, tmp_path: Path) -> None:
    """The logged losses are means over the true steps of sequences scored one at a time (weights hardly move here)."""
    run = fit(tiny, model_for(tiny, layers=1, dropout=0.0), replace(CONFIG, max_epochs=1, rate=1e-12), tmp_path)
    model, _ = run.best_model(tmp_path)
    assert not model.training  # else it would drop out units where its forecasts are drawn
    logged = np.genfromtxt(tmp_path / "logs" / "version_0" / "metrics.csv", delimiter=",", names=True)
    for split in ("train", "valid"):
        losses = []
        for inputs, targets, _ in tiny.splits[split].items:
            raw, _ = model(torch.from_numpy(inputs)[None].float())
            losses.append(model.loss(raw, torch.from_numpy(targets)[None].float())[0])
        expected = torch.cat(losses).mean().item()
        assert len({len(loss) for loss in losses}) > 1
        assert logged[f"{split}_loss"] == pytest.approx(expected, rel=1e-6)
    assert load_tensors(tmp_path / "best.safetensors")[1]["valid_loss"] == pytest.approx(expected, rel=1e-6)
    assert run.result is not None
    assert run.result["metrics"][0]["value"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("split", "what"), [("train", "loss"), ("valid", "valid loss")])
def test_a_loss_that_is_not_a_number_stops_the_run(split: str, what: str, tiny: DataSet, tmp_path: Path) -> None:
    """The message gives the epoch, the step and the rate, and no checkpoint is overwritten."""
    roll = np.full((5, 6), np.nan, dtype=np.float32)
    broken = Split([*tiny.splits[split].items, (roll, roll, np.ones(5, dtype=np.bool_))])
    data = replace(tiny, splits=tiny.splits | {split: broken})
    with pytest.raises(
        DivergedError, match=rf"the {what} became nan in epoch 1, step \d+, at rate 0.02.*; no epoch was"
    ):
        fit(data, model_for(data), CONFIG, tmp_path)
    assert not (tmp_path / "last.safetensors").exists()


class Overflow(Callback):
    """Spoils the gradients of the first batches of a run, and notes the weights after every batch."""

    def __init__(self, batches: int, value: float = math.inf) -> None:
        self.batches, self.value = batches, value
        self.weights: list[torch.Tensor] = []

    def on_after_backward(self, _: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """One number is enough: all gradients are clipped by the norm of them all."""
        if len(self.weights) < self.batches:
            next(pl_module.parameters()).grad.view(-1)[0] = self.value  # type: ignore[union-attr]

    def on_train_batch_end(self, _: lightning.Trainer, pl_module: lightning.LightningModule, *__: Any) -> None:
        """All of them."""
        self.weights.append(parameters_to_vector(pl_module.parameters()).detach().clone())


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
def test_a_gradient_that_overflowed_moves_nothing(
    value: float, tiny: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does one whose norm does; the batches after it count again, and the run says so."""
    overflow = Overflow(2, value)
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=1), tmp_path, callbacks=(overflow,))
    assert f"epoch 1: the gradients of 2 of {len(overflow.weights)} batches overflowed" in caplog.text
    first, second, third = overflow.weights[:3]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.isfinite().all()


def test_a_run_whose_every_gradient_overflows_stops(tiny: DataSet, tmp_path: Path) -> None:
    """No checkpoint is written of an epoch in which nothing moved."""
    with pytest.raises(DivergedError, match="the gradient of every batch became inf in epoch 1, step 4, at rate"):
        fit(tiny, model_for(tiny), CONFIG, tmp_path, callbacks=(Overflow(10_000),))
    assert not (tmp_path / "last.safetensors").exists()


def test_a_folder_in_which_nothing_was_trained_is_nobodys(tiny: DataSet, tmp_path: Path) -> None:
    """After a refusal or a loss that was no number, what the message advises works in the same folder."""
    roll = np.full((5, 6), np.nan, dtype=np.float32)
    broken = Split([*tiny.splits["train"].items, (roll, roll, np.ones(5, dtype=np.bool_))])
    data = replace(tiny, splits=tiny.splits | {"train": broken})
    with pytest.raises(DivergedError):
        fit(data, model_for(data), replace(CONFIG, rate=0.05), tmp_path)
    assert fit(tiny, model_for(tiny), CONFIG, tmp_path).train == CONFIG


def test_to_settle_limits_only_what_is_transposed() -> None:
    """Where nothing is, the number of epochs decides on nothing."""
    assert replace(CONFIG, settle=2).limits == ("max_epochs", "patience")
    assert replace(CONFIG, settle=2, transpose=3).limits == ("patience",)


def test_another_runs_folder_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """The message names the setting that differs."""
    fit(tiny, model_for(tiny), CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match="--hidden=6, not 7"):
        fit(tiny, model_for(tiny, hidden=7), CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match="--seed=5, not 6"):
        fit(tiny, model_for(tiny), replace(CONFIG, seed=6), tmp_path)
    for name, value, words in (
        ("sha256", "f" * 64, "data sha256=None, not 'fff"),
        ("split", "9, 5, 4", "data split='10, 4, 4', not '9, 5, 4'"),
        ("own", {"kind": "csv", "horizon": 2}, "--horizon=None, not 2"),
        ("own", {"kind": "csv", "path": "/b.csv", "horizon": 2}, "--csv=None, not '/b.csv'"),
    ):
        with pytest.raises(CheckpointError, match=f"the folder holds a run with {words}"):
            fit(replace(tiny, info=replace(tiny.info, **{name: value})), model_for(tiny), CONFIG, tmp_path)  # type: ignore[arg-type]


def test_two_at_work_in_one_folder_are_one_too_many(
    tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second would write over the first: it is refused until the other has ended; where nothing can be locked,
    neither is.
    """
    with (
        alone(tmp_path / "run"),
        pytest.raises(CheckpointError, match=r"another latch-train is at work in .*run: wait .* another --run"),
    ):
        fit(tiny, model_for(tiny), CONFIG, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=1), tmp_path / "run").result is not None

    def cannot(*_: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", cannot)
    with alone(tmp_path / "run"), alone(tmp_path / "run"):
        pass


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file that could not be written; what was there stays, and no part of the new one does."""
    path = tmp_path / "best.safetensors"
    save_tensors(path, {"x": torch.ones(2)}, {"epoch": 1})

    def full(_: object, partial: Path, __: object) -> None:
        partial.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"best\.safetensors cannot be written \(No space left on device\): make"):
        save_tensors(path, {"x": torch.zeros(2)}, {"epoch": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert load_tensors(path)[1] == {"epoch": 1}


def test_a_truncated_checkpoint_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """Resuming from half a file is an error that names it."""
    with pytest.raises(RuntimeError):
        fit(tiny, model_for(tiny), CONFIG, tmp_path, callbacks=(StopAt(3, RuntimeError("the power went")),))
    last = tmp_path / "last.safetensors"
    last.write_bytes(last.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"last\.safetensors is not a readable checkpoint"):
        fit(tiny, model_for(tiny), CONFIG, tmp_path)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The third time that a file of that name is written there is no room."""
    real, written = os.replace, []

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(name):
            written.append(target)
            if len(written) == 3:
                raise OSError("no space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)


def test_a_failing_write_leaves_the_previous_checkpoint(
    tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while epoch 3 is written leaves epoch 2 whole."""
    fill_the_disk(monkeypatch, "last.safetensors")
    with pytest.raises(CheckpointError, match=r"last\.safetensors cannot be written \(.*no space"):
        fit(tiny, model_for(tiny), CONFIG, tmp_path)
    assert load_tensors(tmp_path / "last.safetensors")[1]["epoch"] == 2


def test_seeds_decide_everything(tiny: DataSet, tmp_path: Path) -> None:
    """Two runs of one seed are equal bit by bit; another seed differs."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(tiny, model_for(tiny), replace(CONFIG, seed=seed, max_epochs=2), tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    first, other = (
        load_tensors(tmp_path / "a" / "best.safetensors")[0],
        load_tensors(tmp_path / "c" / "best.safetensors")[0],
    )
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_logs_may_be_tensorboards(tiny: DataSet, tmp_path: Path) -> None:
    """The event file is there; an unknown kind is refused by name."""
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=1), tmp_path, logs="tensorboard")
    assert list(tmp_path.glob("logs/version_0/events.out.tfevents.*"))
    with pytest.raises(ConfigError, match="unknown logs 'wandb'"):
        fit(tiny, model_for(tiny), CONFIG, tmp_path / "other", logs="wandb")


def test_nothing_is_printed(tiny: DataSet, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a progress bar a run is silent on stdout."""
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=1), tmp_path)
    assert capfd.readouterr().out == ""


def test_progress_is_one_line_of_80_columns(
    tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epochs count from 1; the losses of the last epoch and the best one stand beside them; nothing else comes up."""
    monkeypatch.setenv("COLUMNS", "80")
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=2), tmp_path, progress=True)
    drawn = capsys.readouterr().out
    lines = drawn.rstrip("\n").split("\r")
    assert "\n" not in "".join(lines)
    assert max(len(line) for line in lines) <= 80
    assert {line.split(":")[0] for line in lines if "Epoch" in line} == {"Epoch 1/2", "Epoch 2/2"}
    logged = np.genfromtxt(tmp_path / "logs" / "version_0" / "metrics.csv", delimiter=",", names=True)
    train, valid = (logged[name][~np.isnan(logged[name])] for name in ("train_loss", "valid_loss"))
    assert lines[-1].endswith(f"3/3, train={train[-1]:.4g}, valid={valid[-1]:.4g}, best={valid.min():.4g}")


def test_progress_tells_how_long_it_may_take(
    tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second epoch on, between patience's first chance to stop and the last epoch; not at the end."""
    monkeypatch.setenv("COLUMNS", "80")
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=3), tmp_path, progress=True)
    lines = [line for line in capsys.readouterr().out.split("\r") if "train=" in line]
    told = {line.split(":")[0] for line in lines if re.search(r", left=\d+s-\d+s, train=", line)}
    assert "Epoch 2/3" in told
    assert "Epoch 1/3" not in told
    assert "left=" not in lines[-1]


@pytest.mark.parametrize(("seconds", "words"), [(44.6, "45s"), (119, "2m"), (5900, "98m"), (7200 * 2, "4h")])
def test_durations_are_short(seconds: float, words: str) -> None:
    """Two digits are enough for an estimate."""
    assert short(seconds) == words


@pytest.mark.parametrize("threads", [0, -2])
def test_impossible_threads_are_refused(threads: int, tiny: DataSet, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=f"threads must be at least 1, not {threads}"):
        fit(tiny, model_for(tiny), CONFIG, tmp_path / "run", threads=threads)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 0}, "--rate must be more than 0"),
        ({"max_epochs": 0}, "--epochs must be more than 0, not 0"),
        ({"seed": 2**32}, "seed must be below 4294967296, not 4294967296"),
        ({"optimiser": "sgd"}, "unknown optimiser 'sgd'"),
        ({"transpose": 5, "settle": 9, "max_epochs": 9}, "settle must be less than 9 epochs"),
    ],
)
def test_impossible_training_is_refused(settings: dict[str, Any], words: str) -> None:
    """The message names the bad value."""
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """And so is one whose run.json is something else."""
    with pytest.raises(CheckpointError, match=r"run\.json does not exist"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text('{"data": 1}')
    with pytest.raises(CheckpointError, match=r"run\.json is not a run's description"):
        Run.load(tmp_path)


@pytest.mark.slow
def test_two_devices_are_one_with_twice_the_batch(tiny: DataSet, tmp_path: Path) -> None:
    """Two processes with batches of five end with the weights of one with batches of ten, the odd sequence included.

    And interrupted between two epochs they end with their own weights to the last bit.
    """
    extra = tiny.splits["train"].items[0]
    data = replace(tiny, splits=tiny.splits | {"train": Split([*tiny.splits["train"].items, extra])})
    plain = model_for(data, dropout=0.0)
    config = replace(CONFIG, batch_size=10, average=0.9, similar_lengths=True)
    two = replace(config, batch_size=5, devices=2)
    one = fit(data, plain, config, tmp_path / "one")
    both = fit(data, plain, two, tmp_path / "two")
    for name in ("best.safetensors", "last.safetensors"):
        (mine, my_meta), (theirs, their_meta) = (load_tensors(tmp_path / run / name) for run in ("one", "two"))
        assert my_meta["epoch"] == their_meta["epoch"]
        for key in (key for key in mine if not key.endswith("random")):
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-5)
    assert one.result is not None
    assert both.result is not None
    assert [metric["name"] for metric in one.result["metrics"]] == [metric["name"] for metric in both.result["metrics"]]

    dropping = model_for(data)
    for run, epochs in (("whole", 2), ("cut", 1), ("cut", 2)):
        fit(data, dropping, replace(two, max_epochs=epochs), tmp_path / run)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    fit(tiny, dropping, replace(two, max_epochs=1), tmp_path / "even")
    mine, theirs = load_tensors(tmp_path / "even" / "last.safetensors")[0]["random"]
    assert not torch.equal(mine, theirs)  # as many draws, and each drops out other units


@pytest.mark.slow
def test_a_refusal_of_a_device_is_that_of_the_run(tiny: DataSet, tmp_path: Path) -> None:
    """A loss that is not a number in the rows of one of two processes is a DivergedError here, and both have ended."""
    roll = np.full((5, 6), np.nan, dtype=np.float32)
    broken = Split([*tiny.splits["train"].items, (roll, roll, np.ones(5, dtype=np.bool_))])
    data = replace(tiny, splits=tiny.splits | {"train": broken})
    with pytest.raises(DivergedError, match=r"^the loss became nan in epoch 1, step \d+, at rate 0.02"):
        fit(data, model_for(data), replace(CONFIG, devices=2), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there_are_refused(tiny: DataSet, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match="devices is 1, but there are 0 GPUs here"):
        fit(tiny, model_for(tiny), replace(CONFIG, accelerator="gpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"optimiser": "rmsprop"}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "clip": 0.01}]
)
def test_a_step_is_what_the_settings_say(settings: dict[str, Any], tiny: DataSet, tmp_path: Path) -> None:
    """From the weights of the seed: the mean loss's gradient, its norm cut, the L2 penalty, the optimiser's rate."""
    config = replace(CONFIG, batch_size=10, max_epochs=1, **settings)
    asked = model_for(tiny, layers=1, dropout=0.0)
    fit(tiny, asked, config, tmp_path)
    found = load_tensors(tmp_path / "best.safetensors")[0]
    lightning.seed_everything(config.seed, verbose=False)
    model = RecurrentModel(asked)
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[config.optimiser]
    optimiser = kind(model.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    inputs, targets, predicted = collate(tiny.splits["train"].items)
    model.loss(model(inputs, predicted=predicted)[0], targets[predicted]).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)


class Batches(Callback):
    """Keeps the batches of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """A new list."""
        self.epochs.append([])

    def on_train_batch_start(self, _: lightning.Trainer, __: lightning.LightningModule, batch: Any, ___: int) -> None:
        """As they come."""
        inputs, _, predicted = batch
        self.epochs[-1].append((inputs, predicted))


def test_seed_and_epoch_order_the_batches(tiny: DataSet, tmp_path: Path) -> None:
    """No epoch's order is another's, nor that of the file, nor another seed's."""
    orders = {str([inputs.tolist() for inputs, _, _ in tiny.splits["train"].items])}
    for seed in (1, 2):
        seen = Batches()
        config = replace(CONFIG, seed=seed, batch_size=1, max_epochs=3)
        fit(tiny, model_for(tiny), config, tmp_path / str(seed), callbacks=(seen,))
        for epoch in seen.epochs:
            orders.add(str([rolls[0].int().tolist() for rolls, _ in epoch]))
    assert len(orders) == 7


def test_similar_lengths_are_those_of_the_sequences(tiny: DataSet, tmp_path: Path) -> None:
    """In batches of two hardly a step is padding."""
    padding = []
    for similar in (False, True):
        seen = Batches()
        config = replace(CONFIG, batch_size=2, max_epochs=3, similar_lengths=similar)
        fit(tiny, model_for(tiny), config, tmp_path / str(similar), callbacks=(seen,))
        padding.append(sum(int((~asked).sum()) for epoch in seen.epochs for _, asked in epoch))
    assert padding[1] < 0.5 * padding[0]


class Losses(Callback):
    """Adds up the losses of every epoch's steps."""

    def __init__(self) -> None:
        self.sums: list[list[float]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """A new sum."""
        self.sums.append([0.0, 0])

    def on_train_batch_end(
        self, _: lightning.Trainer, __: lightning.LightningModule, outputs: Any, batch: Any, ___: int
    ) -> None:
        """A mean, times its steps."""
        count = int(batch[2].sum())
        self.sums[-1][0] += outputs["loss"].item() * count
        self.sums[-1][1] += count


def test_an_epochs_training_loss_is_its_own(tiny: DataSet, tmp_path: Path) -> None:
    """Not that of all epochs so far."""
    losses = Losses()
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=3), tmp_path, callbacks=(losses,))
    logged = np.genfromtxt(tmp_path / "logs" / "version_0" / "metrics.csv", delimiter=",", names=True)["train_loss"]
    np.testing.assert_allclose(logged[~np.isnan(logged)], [total / steps for total, steps in losses.sums], rtol=1e-5)


class OverflowOften(Callback):
    """Spoils the gradient of the first batch of every epoch."""

    def on_train_batch_start(self, _: lightning.Trainer, __: lightning.LightningModule, ___: Any, index: int) -> None:
        """Which batch it is."""
        self.first = index == 0

    def on_after_backward(self, _: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """One number is enough."""
        if self.first:
            next(pl_module.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]


def test_overflows_are_counted_by_the_epoch(tiny: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One batch of three in every epoch does not add up to an epoch in which nothing moved."""
    fit(tiny, model_for(tiny), replace(CONFIG, max_epochs=4), tmp_path, callbacks=(OverflowOften(),))
    assert caplog.text.count("the gradients of 1 of 3 batches overflowed") == 4


def test_what_last_calls_the_best_is_in_best(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the best weights of an epoch could not be written: that epoch is run again."""
    fill_the_disk(monkeypatch, "best.safetensors")
    with pytest.raises(CheckpointError, match="no space"):
        fit(tiny, model_for(tiny), CONFIG, tmp_path)
    best, last = (load_tensors(tmp_path / f"{name}.safetensors")[1] for name in ("best", "last"))
    assert last["early_stopping"]["best_score"] == best["valid_loss"]


def test_a_description_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up leaves the old one."""
    path = tmp_path / "run.json"
    write(path, "old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(path, "new")
    assert path.read_text() == "old"


def test_targets_are_measured_where_they_are_asked_about() -> None:
    """Of the adding problem the last step alone has an answer; the zeros before it are none."""
    data = adding.load(steps=10)
    model = RecurrentModel(configure(data, "gru", hidden=2))
    set_normalisation(model, data)
    sums = np.array([targets[-1, 0] for _, targets, _ in data.splits["train"].items])
    assert (model.y_mean.item(), model.y_std.item()) == pytest.approx((sums.mean(), sums.std(ddof=1)), rel=1e-4)


def test_what_changes_by_rounding_alone_is_not_blown_up() -> None:
    """Its deviation counts as 1; a small one beside it is one."""
    values = torch.tensor([[1000.0, 0.001], [1000.0001, 0.003], [1000.0, 0.002]])
    assert values[0, 0] != values[1, 0]
    torch.testing.assert_close(deviation(values), torch.tensor([1.0, 0.001]))


def test_the_best_model_drops_nothing(tiny: DataSet, tmp_path: Path) -> None:
    """Whatever it was trained with: scores of the same weights are the same."""
    run = fit(tiny, model_for(tiny, head_dropout=0.5), replace(CONFIG, max_epochs=1), tmp_path)
    model, epoch = run.best_model(tmp_path)
    assert (epoch, model.training, any(module.training for module in model.modules())) == (1, False, False)
