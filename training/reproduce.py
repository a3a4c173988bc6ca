"""Runs an experiment of the table to its end, one run after another, and keeps what came out in one file.

Its one rule: every (arm, unit, seed) is one record, written in one stroke as soon as its run has ended, so the same
command goes on where it was stopped. It must not know which experiments there are, or how records are shown.
"""

import csv
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from training.checkpoint import Run
from training.checkpoint import replace as write
from training.config import TrainConfig
from training.errors import CheckpointError, ConfigError
from training.experiments import Arm, Experiment
from training.model import RecurrentModel, count
from training.trainer import configure, fit

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Record:
    """What one run gave: its scores in the arm's metric, its sizes, its settings and its valid loss by epoch.

    `parameters` are those of the recurrent layer, `weights` those of the whole model.
    """

    arm: str
    cell: str
    seed: int
    hidden: int
    parameters: int
    weights: int
    metric: str
    valid: float
    test: float
    epochs: int
    best_epoch: int
    seconds: float
    data: str
    train: dict[str, Any]
    libraries: dict[str, str]
    curve: list[float]

    @property
    def key(self) -> Key:
        """What there is one record of."""
        return self.arm, self.cell, self.seed

    @property
    def limit(self) -> float:
        """The most epochs with which it would have been the same run: any number where patience ended it."""
        allowed: int = self.train["max_epochs"]
        return allowed if self.epochs == allowed else math.inf


@dataclass(frozen=True)
class Choice:
    """A part of an experiment; None stands for all of it. `epochs` are at most so many, and every record says so."""

    arms: tuple[str, ...] | None = None
    cells: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None

    def of(self, experiment: Experiment) -> list[tuple[str, str, TrainConfig]]:
        """The runs in their order: all units with the first seed, then with the next; ConfigError for a wrong name."""
        cells = dict.fromkeys(cell for arm in experiment.arms.values() for cell in arm.hidden)
        for what, asked, known in (("arm", self.arms, experiment.arms), ("unit", self.cells, cells)):
            for name in asked or ():
                if name not in known:
                    raise ConfigError(f"the experiment has no {what} {name!r}: choose among {', '.join(known)}")
        runs = []
        for name, arm in experiment.arms.items():
            seeds = dict.fromkeys(self.seeds or range(1, arm.seeds + 1))  # one that is named twice is run once
            epochs = arm.train.max_epochs if self.epochs is None else min(arm.train.max_epochs, self.epochs)
            runs += [
                (name, cell, replace(arm.train, seed=seed, max_epochs=epochs))
                for seed in seeds
                for cell in arm.hidden
                if (self.arms is None or name in self.arms) and (self.cells is None or cell in self.cells)
            ]
        return runs


def load(path: Path) -> dict[Key, Record]:
    """The records of a file, none where there is none; CheckpointError when it is something else."""
    if not path.is_file():
        return {}
    try:
        found = [Record(**record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]
        for record in found:
            TrainConfig(**record.train)
            if not (record.epochs >= 1 and record.seconds >= 0):
                raise ValueError(f"{record.epochs} epochs in {record.seconds} s")
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is not a file of records ({error}): move it away to start over") from error
    return {record.key: record for record in found}


def save(path: Path, name: str, records: Sequence[Record]) -> None:
    """All records, a line each, in one stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    write(path, f'{{"experiment": {json.dumps(name)}, "records": [\n{lines}\n]}}\n')


def answers(record: Record | None, train: TrainConfig) -> bool:
    """Whether a record is of a run with these settings, trained at least as long as they allow."""
    if record is None:
        return False
    found = TrainConfig(**record.train)  # a setting that is younger than the record had its default
    limits = {name: getattr(train, name) for name in train.limits}
    reached = {"max_epochs": record.limit, "patience": found.patience}
    return replace(found, **limits) == train and all(reached[name] >= value for name, value in limits.items())


def curve(folder: Path) -> list[float]:
    """The valid loss of every epoch, from the run's logs; a repeated epoch is there as it was last."""
    found: dict[int, float] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with path.open(encoding="utf-8", newline="") as file:
            found |= {int(row["epoch"]): float(row["valid_loss"]) for row in csv.DictReader(file) if row["valid_loss"]}
    return [round(found[epoch], 5) for epoch in sorted(found)]


def record_of(arm: str, metric: str, run: Run, folder: Path) -> Record:
    """The record of a finished run."""
    result = run.result or {}
    scores = {one["split"]: one["value"] for one in result["metrics"] if one["name"] == metric}
    model = RecurrentModel(run.model)
    return Record(
        arm=arm,
        cell=run.model.cell,
        seed=run.train.seed,
        hidden=run.model.hidden,
        parameters=count(model.cells),
        weights=count(model),
        metric=metric,
        valid=scores["valid"],
        test=scores["test"],
        epochs=result["epochs"],
        best_epoch=result["best_epoch"],
        seconds=result["seconds"],
        data=f"{run.data.name}: {run.data.split}",
        train=asdict(run.train),
        libraries=run.libraries,
        curve=curve(folder),
    )


def run_one(name: str, arm: Arm, cell: str, train: TrainConfig, folder: Path, **options: Any) -> Record:
    """Fit (or take up, or find finished) one run of the arm called `name`."""
    data = arm.load()
    model = configure(data, cell, hidden=arm.hidden[cell], components=arm.components)
    if arm.embedding is not None:
        model = replace(model, input_size=arm.embedding)
    return record_of(name, arm.metric, fit(data, model, train, folder, **options), folder)


def results(calls: Sequence[Callable[[], Record]], jobs: int) -> Iterator[Record]:
    """What the calls return, as soon as they do; up to `jobs` of them at a time, in processes of their own.

    Where one fails or nobody asks any more, the others are ended as by a kill, which their runs survive.
    """
    if min(jobs, len(calls)) < 2:
        yield from (call() for call in calls)
        return
    # Each with a fresh interpreter: torch's threads do not survive a fork. Ctrl-C is the parent's to hear.
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with get_context("spawn").Pool(min(jobs, len(calls)), ignore) as pool:
        yield from pool.imap_unordered(_called, calls)


def _called(call: Callable[[], Record]) -> Record:
    try:
        return call()
    except KeyboardInterrupt:  # `fit` says so of any end that it is asked for
        raise SystemExit from None


def reproduce(
    name: str,
    experiment: Experiment,
    choice: Choice,
    path: Path,
    runs: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """Run what `choice` asks for and `path` has no record of, up to `jobs` runs at a time; returns all records of the
    file. With one at a time, `progress` shows its epochs.

    KeyboardInterrupt on Ctrl-C: the same call goes on with the runs that were going, from their last whole epoch.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}")
    plan = choice.of(experiment)
    records = load(path)
    todo = [one for one in plan if not answers(records.get((one[0], one[1], one[2].seed)), one[2])]
    if todo and len(todo) < len(plan):
        tell(f"{len(plan) - len(todo)} of {len(plan)} runs are in {path} already")
    calls = [
        partial(
            run_one,
            arm,
            experiment.arms[arm],
            cell,
            train,
            runs / name / arm / f"{cell}-{train.seed}",
            threads=threads,
            progress=progress and jobs == 1,
        )
        for arm, cell, train in todo
    ]
    left = {(arm, cell, train.seed): (arm, cell, train) for arm, cell, train in todo}
    for record in results(calls, jobs):
        del left[record.key]
        records = load(path) | {record.key: record}
        save(path, name, list(records.values()))
        tell(
            f"{len(plan) - len(left)}/{len(plan)}: {experiment.arms[record.arm].title}, {record.cell}, "
            f"seed {record.seed}: test {record.metric} {record.test:.4g}, {record.epochs} epochs, "
            f"{record.seconds:.0f} s" + remaining(experiment, [*left.values()], records, jobs)
        )
    return list(records.values())


def remaining(
    experiment: Experiment,
    todo: Sequence[tuple[str, str, TrainConfig]],
    records: dict[Key, Record],
    jobs: int = 1,
) -> str:
    """How long the rest may take, `jobs` runs at a time: `; about 12 min left`, or nothing.

    An epoch takes as long as in the records of the unit, or of its arm, or of the table; and a run has as many as the
    records of its arm that were not reduced, or as it may have.
    """
    seconds = 0.0
    for name, cell, train in todo:
        arm = [one for one in records.values() if one.arm == name]
        alike = [one for one in arm if one.cell == cell] or arm
        epoch = mean(one.seconds / one.epochs for one in alike) if alike else experiment.arms[name].epoch
        whole = [one.epochs for one in arm if one.limit >= train.max_epochs]
        seconds += epoch * (mean(whole) if whole else train.max_epochs)
    if not todo:
        return ""
    seconds /= jobs
    return f"; about {seconds / 60:.0f} min left" if seconds < 6000 else f"; about {seconds / 3600:.0f} h left"
