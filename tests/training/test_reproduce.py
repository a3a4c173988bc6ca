"""Experiments: a record for every run, written as it ends; a stopped one goes on; the report says what was not run."""

import json
import os
import subprocess
import sys
import time
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from typer.testing import CliRunner

from training import experiments, findings, reproduce
from training.__main__ import app, main
from training.checkpoint import Run, load_tensors
from training.config import DataInfo, TrainConfig
from training.data import imdb, mnist
from training.data.sequences import DataSet
from training.errors import CheckpointError, ConfigError, DivergedError
from training.experiments import EXPERIMENTS, Arm, Experiment
from training.reproduce import Choice, Record

TRAIN = TrainConfig(rate=0.02, batch_size=4, max_epochs=3)


def small(data: DataSet) -> Experiment:
    """Two units, two seeds, one data set."""
    papers = {"Paper 2014": {"gru": 1.25, "TCN": 1.1}}
    return Experiment(
        "Scales",
        "Nothing.",
        {"scales": Arm("scales", partial(copy, data), "nll", {"gru": 4, "mgu2": 4}, TRAIN, 10, papers, 2)},
    )


def settled(records: list[Record]) -> list[Record]:
    """Without the time that they took."""
    return [replace(record, seconds=0) for record in records]


@pytest.fixture
def whole(tiny: DataSet, tmp_path: Path) -> list[Record]:
    """The records of an experiment that nobody stopped."""
    return reproduce.reproduce("scales", small(tiny), Choice(), tmp_path / "whole.json", tmp_path / "whole")


def test_every_unit_and_seed_is_a_record(whole: list[Record], tiny: DataSet, tmp_path: Path) -> None:
    """First all units with one seed; scores are the run's, the curve has every epoch, and the file holds the same."""
    assert [record.key for record in whole] == [("scales", cell, seed) for seed in (1, 2) for cell in ("gru", "mgu2")]
    for record in whole:
        run = Run.load(tmp_path / "whole" / "scales" / "scales" / f"{record.cell}-{record.seed}")
        scores = {one["split"]: one["value"] for one in (run.result or {})["metrics"]}
        assert (record.valid, record.test) == (scores["valid"], scores["test"])
        assert len(record.curve) == record.epochs == 3
        assert min(record.curve) == record.curve[record.best_epoch - 1] == pytest.approx(record.valid, abs=1e-4)
    assert whole[0].parameters == 3 * (6 * 4 + 16 + 4)
    assert whole[0].weights == whole[0].parameters + 6 * 4 + 6
    assert whole[0].best_epoch == 1 + int(np.argmin(whole[0].curve))
    assert list(reproduce.load(tmp_path / "whole.json").values()) == whole


@pytest.mark.parametrize(
    "change",
    [{"train": {"momentum": 1}}, {"train": []}, {"seconds": None}, {"epochs": 0}, {"train": {"optimiser": "x"}}],
)
def test_records_that_were_spoilt_are_told(whole: list[Record], tmp_path: Path, change: dict[str, Any]) -> None:
    """By the file that they are in, and with what to do."""
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps({"experiment": "scales", "records": [asdict(whole[0]) | change]}))
    with pytest.raises(CheckpointError, match=r"spoilt\.json is not a file of records .*: move it away"):
        reproduce.load(path)


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_a_stopped_experiment_ends_with_the_same_records(
    runs: int, whole: list[Record], tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after `runs` whole runs and one epoch of the next; what has a record is not run again."""
    path, told, calls = tmp_path / "stopped.json", [], []
    fit = reproduce.fit

    def stopped(data: DataSet, model: Any, train: TrainConfig, folder: Path, **options: Any) -> Run:
        calls.append(folder.name)
        if len(calls) == runs + 1:
            fit(data, model, replace(train, max_epochs=1), folder, **options)
            raise KeyboardInterrupt
        return fit(data, model, train, folder, **options)

    monkeypatch.setattr(reproduce, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce("scales", small(tiny), Choice(), path, tmp_path / "stopped")
    assert len(reproduce.load(path)) == runs
    again = reproduce.reproduce("scales", small(tiny), Choice(), path, tmp_path / "stopped", tell=told.append)
    assert settled(again) == settled(whole)
    assert calls[runs + 1 :] == ["gru-1", "mgu2-1", "gru-2", "mgu2-2"][runs:]
    assert told[-1].startswith("4/4: scales, mgu2, seed 2: test nll")
    assert all("min left" in line for line in told if line[1:3] == "/4" and line[0] != "4")
    assert reproduce.reproduce("scales", small(tiny), Choice(), path, tmp_path / "stopped") == again
    assert len(calls) == 5


@pytest.mark.slow
def test_several_at_a_time_give_the_same_records(whole: list[Record], tiny: DataSet, tmp_path: Path) -> None:
    """Whichever is done first; a line for each, and a file that has them all."""
    path, told = tmp_path / "several.json", list[str]()
    found = reproduce.reproduce(
        "scales", small(tiny), Choice(), path, tmp_path / "several", jobs=3, progress=True, tell=told.append
    )
    assert sorted(settled(found), key=lambda one: one.key) == sorted(settled(whole), key=lambda one: one.key)
    assert list(reproduce.load(path).values()) == found
    assert [line[:4] for line in told] == ["1/4:", "2/4:", "3/4:", "4/4:"]


@pytest.mark.slow
def test_one_that_fails_ends_the_others(tiny: DataSet, tmp_path: Path) -> None:
    """Its error is told, and what was done is kept: the same call goes on once it is mended."""
    path, experiment = tmp_path / "scales.json", small(tiny)
    bad = replace(TRAIN, rate=1e30, clip=1e30)
    broken = replace(experiment, arms=experiment.arms | {"bad": replace(experiment.arms["scales"], train=bad)})
    with pytest.raises(DivergedError, match="the loss became"):
        reproduce.reproduce("scales", broken, Choice(), path, tmp_path / "runs", jobs=2)
    assert {record.arm for record in reproduce.load(path).values()} <= {"scales"}
    again = reproduce.reproduce("scales", broken, Choice(arms=("scales",)), path, tmp_path / "runs", jobs=2)
    assert sorted(record.key for record in again) == [("scales", c, s) for c in ("gru", "mgu2") for s in (1, 2)]


def test_no_job_at_all_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    """The number is in the message, and nothing is run."""
    with pytest.raises(ConfigError, match="jobs must be at least 1, not 0"):
        reproduce.reproduce("scales", small(tiny), Choice(), tmp_path / "s.json", tmp_path / "runs", jobs=0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """Kill -9 in the middle of a run; the same command ends with the records of one that was not killed."""
    command = [sys.executable, "-m", "training", "reproduce", "small-data", "--arms", "images-75", "--cells", "gru3"]
    command += ["--seeds", "1,2", "--epochs", "8"]

    def options(name: str) -> list[str]:
        return ["--results", str(tmp_path / name), "--runs", str(tmp_path / name / "runs")]

    process = subprocess.Popen([*command, *options("killed")], stdout=subprocess.DEVNULL)
    last = tmp_path / "killed" / "runs" / "small-data" / "images-75" / "gru3-1" / "last.safetensors"
    until = time.monotonic() + 120
    while not (last.is_file() and load_tensors(last)[1]["epoch"] >= 2):
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.wait()
    for name in ("killed", "whole"):
        result = CliRunner().invoke(app, [*command[3:], *options(name)])
        assert result.exit_code == 0, result.output
    killed, untouched = (
        list(reproduce.load(tmp_path / name / "small-data.json").values()) for name in ("killed", "whole")
    )
    assert settled(killed) == settled(untouched)
    assert [record.epochs for record in killed] == [8, 8]
    page = (tmp_path / "killed" / "small-data.md").read_text()
    assert "**Reduced**: at most 8 epochs instead of 100 (gru3)." in page


def test_more_epochs_take_the_runs_further(tiny: DataSet, tmp_path: Path) -> None:
    """A reduced record does not answer for the table's settings; one that has them answers for fewer epochs."""
    path, choice = tmp_path / "scales.json", Choice(cells=("gru",), seeds=(1,))
    short = reproduce.reproduce("scales", small(tiny), replace(choice, epochs=1), path, tmp_path / "runs")
    long = reproduce.reproduce("scales", small(tiny), choice, path, tmp_path / "runs")
    assert ([one.epochs for one in short], [one.epochs for one in long]) == ([1], [3])
    assert long[0].curve[0] == short[0].curve[0]
    assert reproduce.reproduce("scales", small(tiny), replace(choice, epochs=1), path, tmp_path / "runs") == long


def test_a_run_that_patience_ended_is_not_reduced(tiny: DataSet, tmp_path: Path) -> None:
    """Under `--epochs` it stopped as it would have with the table's: its record answers, and nothing is left."""
    arm = replace(small(tiny).arms["scales"], train=replace(TRAIN, max_epochs=10, patience=1), seeds=1)
    experiment = replace(small(tiny), arms={"scales": arm})
    stopped = replace(fixed("gru", 1, 1.0), train=vars(replace(arm.train, max_epochs=8)))
    assert reproduce.answers(stopped, replace(arm.train, seed=1))
    assert not reproduce.answers(replace(stopped, epochs=8), replace(arm.train, seed=1))
    page = findings.describe("scales", experiment, [stopped, replace(stopped, cell="mgu2")], None)
    assert "Reduced" not in page
    assert "left" not in page


def test_a_setting_younger_than_the_record_had_its_default() -> None:
    """A record without it answers for the default and for nothing else."""
    record = fixed("gru", 1, 1.0)
    old = replace(record, train={name: value for name, value in record.train.items() if name != "clip"})
    assert reproduce.answers(old, TRAIN)
    assert not reproduce.answers(old, replace(TRAIN, clip=0.5))


def test_a_damaged_file_is_not_written_over(tiny: DataSet, tmp_path: Path) -> None:
    """Half a file of records is refused by name, before anything is trained."""
    path = tmp_path / "scales.json"
    path.write_text('{"experiment": "scales", "records": [')
    with pytest.raises(CheckpointError, match=r"scales\.json is not a file of records"):
        reproduce.reproduce("scales", small(tiny), Choice(), path, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def fixed(cell: str, seed: int, test: float, parameters: int = 100) -> Record:
    """A record that nobody trained."""
    train = TrainConfig(**(vars(TRAIN) | {"seed": seed}))
    return Record(
        "scales",
        cell,
        seed,
        4,
        parameters,
        130,
        "nll",
        test + 0.5,
        test,
        3,
        2,
        6.0,
        "tiny",
        vars(train),
        {},
        [3, 2, 2.5],
    )


def test_the_report_sets_ours_beside_the_papers(tiny: DataSet, tmp_path: Path) -> None:
    """Mean and deviation over seeds, parts of the parameters, the papers' other models, and what was not run."""
    records = [fixed("gru", 1, 1.0), fixed("gru", 2, 2.0), fixed("mgu2", 1, 1.75, 40)]
    written = findings.write(tmp_path, "scales", small(tiny), records)
    assert [path.name for path in written] == ["scales.md", "scales.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    page = written[0].read_text()
    assert "| `gru` | 4 | 100 | 1.00 | **1.500 ± 0.707** | 2.000 ± 0.707 | 2 | 3 | 2 | 6 | 1.25 |" in page
    assert "| `mgu2` | 4 | 40 | 0.40 | **1.750** | 2.250 | 1 | 3 | 2 | 6 |  |" in page
    assert "| TCN |  |  |  |  |  |  |  |  |  | 1.10 |" in page
    assert "1 runs of the table are left (about 0 min on one core)" in page
    assert "Reduced" not in page


def test_a_curve_of_one_epoch_can_be_seen(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line through one point is none: there is a dot, at the end of every curve."""
    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda picture, *_, **__: pictures.append(picture))
    records = [replace(fixed("gru", 1, 1.0), curve=[2.0]), fixed("mgu2", 1, 1.75)]
    findings.plot(tmp_path / "scales.png", small(tiny), records)
    *_, curves = pictures[0].axes
    assert [(len(line.get_xdata()), line.get_marker(), line.get_markevery()) for line in curves.lines] == [
        (1, ".", [-1]),
        (3, ".", [-1]),
    ]


def points(axes: Axes) -> list[tuple[float, ...]]:
    """Where the means of a panel are."""
    lines = [container.lines[0] for container in axes.containers if isinstance(container, ErrorbarContainer)]
    return [tuple(point) for line in lines for point in np.stack([line.get_xdata(), line.get_ydata()], axis=1).tolist()]


def test_the_pictures_are_of_the_records(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean test scores by unit and over the recurrent layer's parameters, the papers' in the column of their unit,
    curves from the first epoch on; where the arms have places on an axis, each unit's scores along it.
    """
    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda picture, *_, **__: pictures.append(picture))
    records = [fixed("gru", 1, 1.0), fixed("gru", 2, 2.0), fixed("mgu2", 1, 1.75, 40)]
    experiment = small(tiny)
    arm = replace(experiment.arms["scales"], papers={"Paper 2014": {"mgu2": 1.5, "TCN": 1.1}}, at=10.0)
    findings.plot(tmp_path / "one.png", replace(experiment, arms={"scales": arm}), records)
    bars, cloud, curves = pictures[0].axes
    assert points(bars) == [(0, 1.5), (1, 1.75)]
    assert points(cloud) == [(100, 1.5), (40, 1.75)]
    (papers,) = (marks for marks in bars.collections if isinstance(marks, PathCollection))
    assert papers.get_offsets().tolist() == [[1, 1.5]]
    assert [list(line.get_xdata()) for line in curves.lines] == [[1, 2, 3]] * 3
    arms = {"scales": arm, "more": replace(arm, at=100.0)}
    along = replace(experiment, arms=arms, along="size")
    findings.plot(tmp_path / "two.png", along, [*records, replace(records[0], arm="more", test=4.0)])
    assert points(pictures[1].axes[0]) == [(10, 1.5), (100, 4), (10, 1.75)]


def test_what_is_left_is_told_by_what_was_run(tiny: DataSet) -> None:
    """Seconds of an epoch are the unit's, or the arm's, or the table's; epochs those of runs that were not reduced."""
    gru = replace(fixed("gru", 1, 1.0), seconds=300.0, epochs=5)
    mgu = replace(fixed("mgu2", 1, 1.0), seconds=600.0, epochs=2)
    limit = gru.train["max_epochs"]
    reduced = replace(mgu, train=mgu.train | {"max_epochs": 2})
    todo = Choice(cells=("mgu2",), seeds=(2,)).of(small(tiny))

    def left(*records: Record, jobs: int = 1) -> str:
        return reproduce.remaining(small(tiny), todo, {record.key: record for record in records}, jobs)

    assert left(gru) == "; about 5 min left"
    assert left(gru, reduced, jobs=5) == "; about 5 min left"
    assert left(gru, reduced) == "; about 25 min left"
    assert left(reduced) == f"; about {5 * limit} min left"
    assert left() == f"; about {small(tiny).arms['scales'].epoch * limit / 60:.0f} min left"


def test_a_report_of_nothing_says_so(tiny: DataSet, tmp_path: Path) -> None:
    """No picture, no figure of ours, and the command that would make them."""
    (written,) = findings.write(tmp_path, "scales", small(tiny), [])
    page = written.read_text()
    assert "Not run here." in page
    assert (
        "4 runs of the table are left (about 2 min on one core): `latch-train reproduce scales --arms scales`." in page
    )
    (quick,) = findings.write(tmp_path, "scales-quick", small(tiny), [])
    assert "`latch-train reproduce scales --quick --arms scales`" in quick.read_text()
    assert "±" not in page.partition("## ")[2]


def test_a_seed_that_is_named_twice_is_run_once(tiny: DataSet) -> None:
    """Two runs at a time must not have one folder."""
    runs = Choice(cells=("gru",), seeds=(2, 1, 2)).of(small(tiny))
    assert [train.seed for _, _, train in runs] == [2, 1]


def test_no_run_is_longer_than_the_tables(tiny: DataSet) -> None:
    """However many epochs are asked for: its score would not be one of the table."""
    assert [{train.max_epochs for _, _, train in Choice(epochs=few).of(small(tiny))} for few in (2, 500)] == [{2}, {3}]


def test_a_wrong_name_is_refused_with_the_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of experiments, of arms and of units."""
    monkeypatch.setattr(sys, "argv", ["latch-train", "reproduce", "musik"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"unknown experiment 'musik': choose one of {', '.join(EXPERIMENTS)}" in capsys.readouterr().err
    with pytest.raises(
        ConfigError, match="has no arm 'corals': choose among chorales, nottingham, musedata, piano-midi"
    ):
        Choice(arms=("corals",)).of(EXPERIMENTS["music"])
    with pytest.raises(ConfigError, match="has no unit 'gru9': choose among gru, gru1"):
        Choice(cells=("gru9",)).of(EXPERIMENTS["music"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_quick_form_is_small(name: str) -> None:
    """Four units at most, one seed, three epochs, and a report that says that it means nothing."""
    quick = EXPERIMENTS[name].quick()
    runs = Choice().of(quick)
    assert len(runs) <= 4 * len(quick.arms)
    assert {train.max_epochs for _, _, train in runs} == {3}
    assert quick.differs.startswith("QUICK")


def test_a_cut_says_what_is_left() -> None:
    """The first sequences of training, all others as they were, and a description that a run can be told apart by."""
    whole = EXPERIMENTS["small-data"].arms["images-1200"].load()
    part = experiments.cut(lambda: whole, 75)
    assert {name: len(split) for name, split in part.splits.items()} == {"train": 75, "valid": 300, "test": 297}
    assert part.splits["train"].items[0] is whole.splits["train"].items[0]
    assert part.info.split.endswith("of these 75 train, 300 valid, 297 test")


RESULTS = sorted(Path("training/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_reports_are_their_records(path: Path) -> None:
    """Each report is what its records give today, and each record has the table's settings but for its epochs."""
    experiment, records = EXPERIMENTS[path.stem], list(reproduce.load(path).values())
    assert json.loads(path.read_text())["experiment"] == path.stem
    page = findings.describe(path.stem, experiment, records, f"{path.stem}.png")
    assert path.with_suffix(".md").read_text() == page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for record in records:
        arm = experiment.arms[record.arm]
        assert replace(arm.train, seed=record.seed, max_epochs=record.train["max_epochs"]) == TrainConfig(
            **record.train
        )
        assert (record.hidden, record.metric) == (arm.hidden[record.cell], arm.metric)
        assert len(record.curve) == record.epochs


def test_real_sets_are_as_described(latch_data: Path) -> None:
    """Images are one digit each at the last step, reviews end with their words, speech is never its own input."""
    assert os.environ["LATCH_DATA"] == str(latch_data)
    rows = EXPERIMENTS["mnist-rows"].arms["rows-0.001"].load()
    assert {name: len(split) for name, split in rows.splits.items()} == {"train": 55000, "valid": 5000, "test": 10000}
    inputs, targets, predicted = rows.splits["train"].items[0]
    assert (inputs.shape, targets[-1], predicted.nonzero()[0].tolist()) == ((28, 28), 5, [27])
    digits = mnist.read("train-labels-idx1-ubyte")
    assert [y[-1] for _, y, _ in rows.splits["valid"].items] == digits[55_000:].tolist()
    reviews = EXPERIMENTS["imdb"].arms["imdb"].load()
    assert max(len(words) for words, _, _ in reviews.splits["test"].items) == 80
    assert {name: len(split) for name, split in reviews.splits.items()} == {
        "train": 22_500, "valid": 2_500, "test": 25_000
    }  # fmt: skip
    assert {int(answer[-1]) for _, answer, _ in reviews.splits["valid"].items} == {0, 1}
    with np.load(latch_data / "imdb_ids" / imdb.FILE) as file:
        ids, ends = file["test_ids"], file["test_offsets"]
    longest = int(np.diff(ends).argmax())
    assert reviews.splits["test"].items[longest][0].tolist() == ids[: ends[longest + 1]][-80:].tolist()
    speech = EXPERIMENTS["speech"].arms["speech"].load()
    inputs, targets, _ = speech.splits["test"].items[0]
    assert (targets[:-1] == inputs[1:, 10:]).all()
    assert {name: len(split) for name, split in speech.splits.items()} == {"train": 2400, "valid": 300, "test": 300}
    with np.load(latch_data / "fsdd" / "fsdd_8k_int16.npz") as file:
        first = int(file["offsets"][np.flatnonzero(file["index"] == 0)[0]])
        assert (inputs[0] * 32768 == file["samples"][first : first + 20]).all()


@pytest.mark.parametrize(("experiment", "arm", "sizes"), [("speech", "speech", (20, 20)), ("imdb", "imdb", (1, 128))])
def test_an_arms_model_is_the_papers(
    experiment: str, arm: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A mixture of 20 Gaussians for speech, an embedding of 128 for words."""
    asked: list[Any] = []

    def fit(_: DataSet, model: Any, *__: Any, **___: Any) -> Run:
        asked.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "fit", fit)
    whole = EXPERIMENTS[experiment].arms[arm]
    words = experiment == "imdb"
    inputs = tuple((f"x{place}", "") for place in range(1 if words else 20))
    asks = ("classification", "categorical") if words else ("forecast", "gaussian")
    info = DataInfo(arm, "", *asks, inputs, (("y", ""),), "", None, "", "", vocabulary=20_000 if words else None)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_one(arm, replace(whole, load=lambda: DataSet(info, {})), "gru", whole.train, tmp_path)
    assert (asked[0].components, asked[0].input_size, asked[0].hidden) == (*sizes, whole.hidden["gru"])


def test_a_curve_goes_on_after_many_interruptions(tmp_path: Path) -> None:
    """The tenth log comes after the second one."""
    for version, loss in ((2, 3.0), (10, 1.5)):
        (tmp_path / "logs" / f"version_{version}").mkdir(parents=True)
        (tmp_path / "logs" / f"version_{version}" / "metrics.csv").write_text(f"epoch,valid_loss\n0,4.0\n1,{loss}\n")
    assert reproduce.curve(tmp_path) == [4.0, 1.5]


def test_two_commands_may_share_a_file(tiny: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another one has written meanwhile is still there."""
    path, fit, theirs = tmp_path / "scales.json", reproduce.fit, fixed("mgu2", 7, 1.0)

    def meanwhile(*args: Any, **options: Any) -> Run:
        reproduce.save(path, "scales", [theirs])
        return fit(*args, **options)

    monkeypatch.setattr(reproduce, "fit", meanwhile)
    reproduce.reproduce("scales", small(tiny), Choice(cells=("gru",), seeds=(1,)), path, tmp_path / "runs")
    assert [*reproduce.load(path)] == [theirs.key, ("scales", "gru", 1)]
