"""Many runs over units, sizes and rates, chosen by Optuna, one after another in one folder.

Its one rule: the valid split decides, and the folder is all there is: the same command goes on where it was stopped.
It must not know what the data are.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import optuna
from lightning.pytorch.callbacks import Callback
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from training.cells import UNITS
from training.checkpoint import alone, changes, load_tensors, named
from training.config import TrainConfig
from training.data.sequences import DataSet
from training.errors import CheckpointError, ConfigError, DivergedError
from training.trainer import configure, fit

JOURNAL, RUNS = "trials.journal", "runs"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Space:
    """What is tried: units by name, and [lowest, highest] of hidden units (log), layers and learning rate (log)."""

    cells: Sequence[str] = ("gru", "gru1", "gru2", "gru3", "mgu", "mgu2", "lstm")
    hidden: tuple[int, int] = (16, 128)
    layers: tuple[int, int] = (1, 1)
    rate: tuple[float, float] = (5e-4, 2e-2)

    def __post_init__(self) -> None:
        if not self.cells:
            raise ConfigError(f"a sweep needs units to try: choose among {', '.join(UNITS)}")
        for cell in self.cells:
            if cell not in UNITS:
                raise ConfigError(f"unknown unit {cell!r}: choose among {', '.join(UNITS)}")
        for name in ("hidden", "layers", "rate"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ConfigError(f"--{name} must go from more than 0 up to a finite number, not from {low} to {high}")

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """A point of the space."""
        return {
            "cell": trial.suggest_categorical("cell", list(self.cells)),
            "hidden": trial.suggest_int("hidden", *self.hidden, log=True),
            "layers": trial.suggest_int("layers", *self.layers),
            "rate": trial.suggest_float("rate", *self.rate, log=True),
        }


class Pruning(Callback):
    """Tells Optuna every epoch's valid loss, and stops a trial that is worse than most were at that epoch."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """After validation, before the epoch is kept."""
        self.trial.report(trainer.callback_metrics["valid_loss"].item(), trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def folder_of(folder: Path, params: dict[str, Any]) -> Path:
    """Where the run of a point lies: named by the point, so that the point taken up again finds its run."""
    return folder / RUNS / f"{params['cell']}-{params['layers']}x{params['hidden']}-{params['rate']:.6g}"


def sweep(
    data: DataSet,
    space: Space,
    settings: dict[str, Any],
    config: TrainConfig,
    folder: Path,
    *,
    trials: int,
    threads: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> list[FrozenTrial]:
    """Run until `trials` points are done in all, those of earlier calls included; returns them, best first.

    `settings` are the model's beyond the space. Raises CheckpointError when `folder` holds another sweep or
    another process is at work in it, and ConfigError when no trial could be finished.
    """
    if trials < 1:
        raise ConfigError(f"trials must be at least 1, not {trials}")
    with alone(folder):
        study = _study(data, space, settings, config, folder)

        def run(trial: optuna.Trial) -> float:
            params = space.draw(trial)
            model = configure(data, **(settings | {key: params[key] for key in ("cell", "hidden", "layers")}))
            where = folder_of(folder, params)
            try:
                fit(
                    data,
                    model,
                    replace(config, rate=params["rate"]),
                    where,
                    threads=threads,
                    callbacks=(Pruning(trial),),
                )
            except DivergedError as error:
                raise optuna.TrialPruned(str(error)) from error
            return float(load_tensors(where / "best.safetensors")[1]["valid_loss"])

        before = done = len(study.get_trials(states=DONE))
        started = time.monotonic()

        def told(study: optuna.Study, trial: FrozenTrial) -> None:
            tell(_line(study, trial, done + 1, trials, (time.monotonic() - started) / (done + 1 - before)))

        while done < trials:
            study.optimize(run, n_trials=1, callbacks=[told])
            done = len(study.get_trials(states=DONE))
        finished = study.get_trials(states=(TrialState.COMPLETE,))
        if not finished:
            raise ConfigError("no trial came to its end: all diverged; lower the rates")
        return sorted(finished, key=lambda trial: trial.value if trial.value is not None else float("inf"))


def _study(data: DataSet, space: Space, settings: dict[str, Any], config: TrainConfig, folder: Path) -> optuna.Study:
    """The sweep of a folder, begun or taken up; CheckpointError where it is another one."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # else Ctrl-C is a page of its own
    journal = str(folder / JOURNAL)
    drop_torn_line(folder / JOURNAL)
    # Optuna's default lock is a symbolic link, which Windows and some file systems do not let a user make.
    study = optuna.create_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=4),
        load_if_exists=True,
    )
    question = asdict(replace(data.info, own={key: value for key, value in data.info.own.items() if key != "path"}))
    asked = json.loads(json.dumps([asdict(space), settings, asdict(config), question]))
    if (told := _difference(study.user_attrs.setdefault("asked", asked), asked)) is not None:
        raise CheckpointError(
            f"{folder} holds a sweep over something else{told}: choose another --run, or delete the folder"
        )
    study.set_user_attr("asked", asked)
    # Else a sweep taken up again would draw its first points once more.
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    take_up(study)
    return study


def drop_torn_line(journal: Path) -> None:
    """Takes off what a crash or a full disk left of the last line: Optuna would read no journal with it."""
    content = journal.read_bytes() if journal.is_file() else b""
    if content and not content.endswith(b"\n"):
        journal.write_bytes(content[: content.rfind(b"\n") + 1])


def _difference(before: list[Any], asked: list[Any]) -> str | None:
    """In what two sweeps differ first, as far as it can be told; None where in nothing."""
    if len(before) != len(asked):  # an older version has noted other things of the data
        return ""
    for name, then, now in changes(*(named(data, *rest) for *rest, data in (before, asked))):
        return f", with {name}={then!r}, not {now!r}"
    return None


def take_up(study: optuna.Study) -> None:
    """Puts the points of trials that were stopped in the middle first in the queue, each once."""
    known = [trial.params for trial in study.get_trials(states=DONE)]
    known += [trial.system_attrs.get("fixed_params", {}) for trial in study.get_trials(states=(TrialState.WAITING,))]
    for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        if trial.params and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)


def _line(study: optuna.Study, last: FrozenTrial, done: int, trials: int, seconds: float) -> str:
    """What the last trial was worth, and how long the others may take."""
    value = f"{last.value:.4g}" if last.state == TrialState.COMPLETE else "given up early"
    best = f", best {study.best_value:.4g}" if study.get_trials(states=(TrialState.COMPLETE,)) else ""
    left = f", about {(trials - done) * seconds / 60:.0f} min left" if done < trials else ""
    what = f"{last.params['cell']}, {last.params['layers']} x {last.params['hidden']}, rate {last.params['rate']:.2g}"
    return f"{done}/{trials}: {what}: valid {value}{best}{left}"
