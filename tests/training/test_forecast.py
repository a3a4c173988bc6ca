"""A forecast from a CSV: nothing looks ahead, gaps are told, baselines are scored on the same rows."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.data import forecast
from training.data.forecast import Options
from training.data.sequences import DataSet
from training.errors import DataError
from training.model import RecurrentModel
from training.trainer import configure, set_normalisation

START = datetime(2026, 1, 1, tzinfo=UTC)
Csv = Callable[..., Path]

RISES = (
    "{0}: rises in every row, so later rows are beyond what was trained on: is it a time (--time {0}), or a count that "
    "--inputs leaves out?"
)


@pytest.fixture
def csv(tmp_path: Path) -> Csv:
    """Writes rows of (a, b) an hour apart; a is the row's number, b its half; `holes` are cells left empty."""

    def write(
        rows: int = 200,
        holes: dict[str, range] | None = None,
        absent: range = range(0),
        apart: timedelta = timedelta(hours=1),
    ) -> Path:
        lines = ["date,a [m],b"]
        for row in range(rows):
            cells = {"a": f"{row}", "b": f"{row / 2}"}
            for column, places in (holes or {}).items():
                if row in places:
                    cells[column] = ""
            if row not in absent:
                lines.append(f"{(START + row * apart):%Y-%m-%d %H:%M},{cells['a']},{cells['b']}")
        path = tmp_path / "made.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def load(path: Path, **options: Any) -> DataSet:
    """With `a` as the target and no season, unless said otherwise."""
    return forecast.load(path, Options(**({"targets": ("a [m]",), "season": 0, "window": 16} | options)))


@pytest.mark.parametrize("horizon", [1, 5])
def test_targets_are_so_many_rows_later_and_splits_follow_time(csv: Csv, horizon: int) -> None:
    """Every target is its input's row plus the horizon; what trains ends before what is scored begins."""
    data = load(csv(), horizon=horizon)
    asked = {}
    for name, split in data.splits.items():
        asked[name] = {int(row) for inputs, _, predicted in split.items for row in inputs[predicted, 0]}
        for inputs, targets, _ in split.items:
            np.testing.assert_array_equal(targets[:, 0], inputs[:, 0] + horizon)
    assert asked == {
        "train": set(range(140 - horizon)),
        "valid": set(range(140, 170 - horizon)),
        "test": set(range(170, 200 - horizon)),
    }
    assert max(targets.max() for _, targets, _ in data.splits["train"].items) == 139


def test_scored_sequences_know_their_past(csv: Csv) -> None:
    """A window of rows before the split comes first, and is not asked about."""
    inputs, _, predicted = load(csv()).splits["test"].items[0]
    assert inputs[0, 0] == 170 - 16
    assert predicted.argmax() == 16


def test_features_are_the_headers(csv: Csv) -> None:
    """Names and units for inputs and targets; the horizon is in the description, as rows and as time."""
    info = load(csv(), horizon=6).info
    assert info.inputs == (("a", "m"), ("b", ""))
    assert info.outputs == (("a", "m"),)
    assert "a 6 rows (6 hours) ahead" in info.description
    assert (info.name, info.source, info.feedback) == ("made", "made.csv", None)


def test_an_output_is_fed_back_only_where_it_is_the_whole_next_input(csv: Csv) -> None:
    """One row ahead and the same columns on both sides."""
    assert load(csv(), targets=("a [m]", "b")).info.feedback == "identity"
    assert load(csv(), targets=("a [m]", "b"), horizon=2).info.feedback is None
    assert load(csv(), inputs=("b", "a [m]")).info.feedback is None


def test_short_gaps_repeat_the_last_value_and_are_never_asked_about(csv: Csv) -> None:
    """Nothing is interpolated: a client could not know the far end either; the note says how many and where."""
    data = load(csv(holes={"a": range(50, 53)}))
    seen: dict[int, float] = {}
    asked = set()
    for inputs, targets, predicted in data.splits["train"].items:
        seen |= {int(2 * b): float(a) for a, b in inputs}
        asked |= {int(2 * b) + 1 for (_, b), known in zip(inputs, predicted, strict=True) if known}
        assert not set(targets[predicted, 0]) & {50, 51, 52}
    assert [seen[row] for row in range(48, 55)] == [48, 49, 49, 49, 49, 53, 54]
    assert {49, 53} <= asked
    assert not asked & {50, 51, 52}
    assert data.notes == (
        RISES.format("b"),
        "a [m]: 3 cells missing (lines 52 to 54): 3 filled with the last value, 0 too many in a row",
    )


@pytest.mark.parametrize("gap", ["holes", "absent"])
def test_long_gaps_end_a_sequence(csv: Csv, gap: str) -> None:
    """Empty cells or rows that the times say are absent: no sequence reaches over them."""
    places: dict[str, Any] = {"holes": {"holes": {"b": range(50, 70)}}, "absent": {"absent": range(50, 70)}}[gap]
    data = load(csv(**places))
    for inputs, _, _ in data.splits["train"].items:
        assert set(np.diff(inputs[:, 0])) <= {1.0}
        assert not set(inputs[:, 0]) & set(range(50, 70))
    told = {
        "holes": "b: 20 cells missing (lines 52 to 71): 0 filled with the last value, 20 too many in a row",
        "absent": "absent rows: 20 (20 after line 51): up to 6 in a row take the last value, and so a client sends it; "
        "--time '' counts only the rows that are there",
    }
    assert told[gap] in data.notes
    assert "long gaps cut the rows into 2 sequences; the state starts anew in each" in data.notes


def test_absent_rows_keep_the_steps_even(csv: Csv) -> None:
    """Two rows that are not in the file count as two steps, filled."""
    data = load(csv(absent=range(50, 52)))
    assert data.notes[0].startswith("absent rows: 2 (2 after line 51): up to 6 in a row take the last value")
    inputs = next(inputs for inputs, _, _ in data.splits["train"].items if {49.0, 52.0} <= set(inputs[:, 0]))
    first = inputs[:, 0].tolist().index(49)
    assert inputs[first : first + 4, 0].tolist() == [49, 49, 49, 52]


def test_a_missing_target_that_is_no_input_cuts_nothing(csv: Csv) -> None:
    """It is not asked about; the inputs go on."""
    data = load(csv(holes={"a": range(50, 70)}), inputs=("b",))
    assert data.notes == ("a [m]: 20 cells missing (lines 52 to 71): not scored",)
    assert not any(set(t[p, 0]) & set(range(50, 70)) for _, t, p in data.splits["train"].items)


@pytest.mark.parametrize(("horizon", "last", "naive"), [(1, 1, 24), (24, 24, 24), (30, 30, 48)])
def test_baselines_are_the_naive_forecasts(csv: Csv, horizon: int, last: int, naive: int) -> None:
    """Of a straight line the last value errs by the horizon, the season by the whole seasons that it lies back."""
    data = load(csv(400), season=24, horizon=horizon)
    found = {(one.name, one.metric): one.value for one in data.references}
    assert found["last value", "mae a"] == pytest.approx(last)
    assert found["seasonal naive (24 rows)", "mae a"] == pytest.approx(naive)
    train = np.concatenate([targets[predicted] for _, targets, predicted in data.uncut])
    for metric in ("mae", "rmse"):  # every error is the same
        assert found["last value", metric] == pytest.approx(last / train.std(ddof=1), rel=1e-5)
    ahead = "1 row" if horizon == 1 else f"{horizon} rows"
    assert found[f"drift (mean change in {ahead})", "mae a"] == pytest.approx(0)


def test_drift_is_the_mean_change_of_the_rows_that_train(csv: Csv) -> None:
    """Of two columns each by its own, and nothing of what is scored is in it."""
    path = csv(200)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *lines[:140], *(line.rpartition(",")[0] + ",70" for line in lines[140:])]))
    data = load(path, targets=("a [m]", "b"), horizon=4)
    found = {(one.name, one.metric): one.value for one in data.references}
    assert found["drift (mean change in 4 rows)", "mae a"] == pytest.approx(0)
    assert found["drift (mean change in 4 rows)", "mae b"] == pytest.approx(2)
    assert found["last value", "mae b"] == 0


def test_a_target_that_begins_late_has_no_last_value_before(csv: Csv, tmp_path: Path) -> None:
    """Nothing that was not measured is in a baseline: neither in the mean change, nor in what is scored."""
    data = load(csv(holes={"a": range(50)}), inputs=("b",), horizon=3)
    found = {(one.name, one.metric): one.value for one in data.references}
    assert (found["last value", "mae a"], found["drift (mean change in 3 rows)", "mae a"]) == pytest.approx((3, 0))
    assert min(targets[asked].min() for _, targets, asked in data.splits["train"].items) == 50
    path = machines(tmp_path / "m.csv", {"left": 200, "right": 200})
    path.write_text(re.sub(r"right,1(0..|1[0-7].)", "right,", path.read_text()))
    for season, first in ((0, 180), (2, 181)):
        late = load(path, targets=("a",), inputs=("b",), by="machine", season=season)
        assert {one.value for one in late.references if one.metric == "mae a"} <= {0, 1, 2}
        _, targets, asked = late.splits["test"].items[-1]
        assert targets[asked].min() == 1000 + first + 1


def test_a_target_that_has_just_begun_has_no_drift(csv: Csv) -> None:
    """No change of it was seen in the rows that train."""
    data = load(csv(holes={"a": range(137)}), inputs=("b",), horizon=5)
    assert {one.name for one in data.references} == {"last value"}


def test_every_gap_of_a_file_is_told(csv: Csv, tmp_path: Path) -> None:
    """However many columns have some, and that sequences end at long ones; of many series, about the first."""
    holes = {f"c{index}": 20 + 5 * index for index in range(12)}
    lines = ["date,a," + ",".join(holes)]
    for row in range(200):
        cells = ["" if start <= row < start + (8 if start == 20 else 2) else f"{row % 7}" for start in holes.values()]
        lines.append(f"{START + row * timedelta(hours=1):%Y-%m-%d %H:%M},{row % 5},{','.join(cells)}")
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(lines))
    notes = load(path, targets=("a",)).notes
    assert sum("missing" in note for note in notes) == 12
    assert "long gaps cut the rows into 2 sequences; the state starts anew in each" in notes
    series = machines(tmp_path / "m.csv", {f"s{index:02}": 100 for index in range(12)})
    series.write_text(re.sub(r",(\d+00)?7,", ",,", series.read_text()))
    notes = load(series, targets=("a",), by="machine").notes
    assert sum("1 cell missing" in note for note in notes) == 8
    assert "and 4 such notes more" in notes


def test_a_step_counts_once_in_what_is_measured_of_the_training_rows(csv: Csv) -> None:
    """Windows overlap, and most rows would count twice: neither scale nor score may depend on how long they are."""
    path = csv(400)
    found = []
    for window in (16, 40, 400):
        data = load(path, window=window, horizon=3)
        model = RecurrentModel(configure(data, "gru", hidden=2))
        set_normalisation(model, data)
        found.append((model.x_mean, model.x_std, model.y_mean, model.y_std, [one.value for one in data.references]))
    rows = torch.arange(400.0)
    torch.testing.assert_close(found[0][3], rows[3:280].std()[None])
    torch.testing.assert_close(found[0][0][:1], rows[:277].mean()[None])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_target_that_is_measured_seldom_is_told_as_the_reason(csv: Csv) -> None:
    """It is an input as long as nobody says else, and ends a sequence wherever it is missing."""
    path = csv(400)
    lines = path.read_text().splitlines()
    lines[1:] = [line if row % 8 == 0 else line.replace(f",{row},", ",,") for row, line in enumerate(lines[1:])]
    path.write_text("\n".join(lines))
    words = r"(?s)1 row later is known: .*larger --max-gap, or leave .* of --inputs\n.*  a \[m\]: 350 cells missing"
    with pytest.raises(DataError, match=words) as caught:
        load(path)
    assert "rows before it" not in str(caught.value)
    assert load(path, max_gap=7).splits["test"].items
    assert load(path, inputs=("b",)).splits["test"].items


def test_months_are_of_no_length(csv: Csv) -> None:
    """Three of them are three rows, and twelve a season: they are even, although February is short."""
    path = csv()
    days = [f"{2000 + row // 12}-{row % 12 + 1:02}-01" for row in range(200)]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(f"{day},{row % 7},{row}" for row, day in enumerate(days))]))
    data = load(path, horizon=3, season=None)
    assert data.info.description == "a 3 rows ahead, with uncertainty"
    assert "seasonal naive (12 rows)" in {one.name for one in data.references}
    assert load(csv(apart=timedelta(days=1)), horizon=3).info.description == "a 3 rows (3 days) ahead, with uncertainty"


@pytest.mark.parametrize("apart", [1, 2, 3, 6, 12])
def test_months_are_not_counted_in_days(apart: int) -> None:
    """Nor are quarters and years; four weeks are."""
    first = [datetime(2001 + month // 12, month % 12 + 1, 1, tzinfo=UTC) for month in range(0, 40 * apart, apart)]
    days = [(later - earlier).days for earlier, later in pairwise(first)]
    for spacing in {*days, float(np.median(days))} - {28}:
        assert forecast.duration(spacing * 86400, 4) == ""
    assert forecast.duration(28 * 86400, 4) == " (16 weeks)"


def test_rows_without_a_season_before_them_are_not_scored(csv: Csv) -> None:
    """After a long gap the baseline has nothing to say, so the model is not asked either."""
    data = load(csv(400, absent=range(345, 365)), season=24)
    asked = {int(row) for inputs, _, predicted in data.splits["test"].items for row in inputs[predicted, 0]}
    assert min(row for row in asked if row > 345) == 365 + 23


@pytest.mark.parametrize(
    ("seconds", "rows", "expected"),
    [
        (3600, 1000, 24), (900, 1000, 96), (1, 100_000, 3600), (1, 5000, 60), (86400, 100, 7), (604800, 600, 52),
        (86400 * 31, 200, 12), (3600, 100, 0), (None, 1000, 0), (7, 10**7, 0),
        (0.1, 7000, 600), (0.2, 7000, 300), (900.004, 2000, 96), (3600, 239, 0), (3600, 240, 24),
    ],
)  # fmt: skip
def test_seasons_are_found_by_the_spacing(seconds: float | None, rows: int, expected: int) -> None:
    """A day if ten of them are there, else an hour or a minute; weeks of days, years of weeks and months."""
    assert forecast.find_season(seconds, rows) == expected


def test_uneven_times_are_told(csv: Csv, tmp_path: Path) -> None:
    """Then a row is a step, and no season is guessed."""
    path = csv()
    lines = path.read_text().splitlines()
    lines[1:] = [line.replace(":00,", f":{17 * row % 60:02},") for row, line in enumerate(lines[1:])]
    path.write_text("\n".join(lines))
    data = load(path, season=None)
    assert data.notes == ("the times are not evenly spaced: every row counts as one step", RISES.format("b"))
    assert {reference.name for reference in data.references} == {"last value", "drift (mean change in 1 row)"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ()}, "needs --targets"),
        ({"targets": ("c",)}, r"made\.csv has no column 'c': its header is date, a \[m\], b"),
        ({"horizon": 0}, "horizon must be at least 1, not 0"),
        ({"season": -1}, "season must be a number of rows, or 0 for none, not -1"),
        ({"split": (80, 10, 20)}, "three percentages of 100"),
        ({"horizon": 60}, r"made\.csv: the valid split \(rows 141 to 170 of 200\) holds no row"),
        ({"season": 10_000}, r"made\.csv: the valid split .* has 9999 rows before it: take a smaller"),
        ({"targets": ("b", "b")}, "column 'b' is there twice in --targets b, b"),
        ({"inputs": ("b", "a", "b")}, "column 'b' is there twice in --inputs b, a"),
        ({"targets": ("date",), "time": "date"}, "column 'date' is the time of a row; it can be no input or target"),
        ({"season": 180}, r"made\.csv: the valid split .* has 179 rows before it: take a smaller"),
    ],
)
def test_what_cannot_be_forecast_is_refused(csv: Csv, options: dict[str, Any], words: str) -> None:
    """By what was asked, and with a way out."""
    with pytest.raises(DataError, match=words):
        load(csv(), **options)


def test_a_file_too_short_to_split_is_refused(csv: Csv) -> None:
    """Three rows leave nothing to choose by."""
    with pytest.raises(DataError, match=r"made\.csv: the valid split \(none of 3\) holds no row .* known: take"):
        load(csv(3))
    with pytest.raises(DataError, match=r"made\.csv: no row trains: it has 1 row, .* 70% would: take a longer"):
        load(csv(1))


def test_series_of_a_row_each_are_refused(csv: Csv) -> None:
    """Who named a column of times has as many series as rows; it is not the columns that are wrong."""
    with pytest.raises(DataError, match=r"no row trains: the longest of 200 series has 1 row, .* --by"):
        load(csv(), by="date", time="")


def test_a_column_that_never_changes_is_left_out(csv: Csv) -> None:
    """Its deviation is no unit to measure in; where it was asked for, that is said."""
    path = csv()
    path.write_text("a,b,c\n" + "".join(f"{row},{row / 2},{row // 150}\n" for row in range(200)))
    data = load(path, targets=("a",))
    assert data.info.inputs == (("a", ""), ("b", ""))
    assert "c: never changes in the rows that train: left out" in data.notes
    with pytest.raises(DataError, match=r"column 'c' never changes in the first 70% .* leave it out with --inputs"):
        load(path, targets=("a",), inputs=("a", "c"))
    with pytest.raises(DataError, match=r"column 'c' never changes .* take another target, or another --split"):
        load(path, targets=("c",))
    path.write_text("a,c\n" + "".join(f"{row},{'' if row < 5 else 7}\n" for row in range(200)))
    with pytest.raises(DataError, match=r"column 'c' never changes .* take another target"):  # and no 0 came before
        load(path, targets=("c",), inputs=("a",))


def test_an_input_that_rises_in_every_row_is_told(csv: Csv) -> None:
    """A time among the numbers is hardly meant; not where it was asked for, is forecast, or falls once."""
    path = csv()
    path.write_text(
        "ts,a,b\n" + "".join(f"{1700000 + 60 * row},{row % 9},{row - 2 * (row == 9)}\n" for row in range(200))
    )
    assert [note for note in load(path, targets=("a",)).notes if "rises" in note] == [RISES.format("ts")]
    for asked in ({"targets": ("ts",)}, {"targets": ("a",), "inputs": ("a", "ts")}, {"targets": ("a",), "time": "ts"}):
        assert not any("rises" in note for note in load(path, **asked).notes)


@pytest.mark.parametrize(("base", "unit"), [(1e9, 5), (0, 1e-8)])
def test_scores_are_those_of_the_values_in_the_file(csv: Csv, base: float, unit: float) -> None:
    """What 32-bit floats would round away is refused; what is only small is kept, and measured like all else."""
    path, wave = csv(), np.sin(np.arange(200) / 5)
    path.write_text("a,b\n" + "".join(f"{base + unit * value:.12g},{value}\n" for value in wave))
    if base:
        for asked in ({"targets": ("a",)}, {"targets": ("b",)}):
            with pytest.raises(
                DataError, match=r"column 'a' varies by 3\.\d+ around 1000000000.* are 64 apart: subtract"
            ):
                load(path, **asked)
        assert load(path, targets=("b",), inputs=("b",)).info.inputs == (("b", ""),)
        return
    small, plain = load(path, targets=("a",)), load(path, targets=("b",))
    for one, other in zip(small.references, plain.references, strict=True):
        in_its_unit = one.metric.startswith("mae ")
        assert one.value == pytest.approx(other.value * (unit if in_its_unit else 1), rel=1e-3)
    model = RecurrentModel(configure(small, "gru"))
    set_normalisation(model, small)
    inputs = np.concatenate([inputs for inputs, _, _ in small.uncut])
    assert model.encode(torch.from_numpy(inputs)).std(0).tolist() == pytest.approx([1, 1], rel=1e-3)
    assert model.y_std.item() == pytest.approx(unit * plain_deviation(plain), rel=1e-3)


def plain_deviation(data: DataSet) -> float:
    """Of the targets that are asked about in training."""
    return float(np.concatenate([y[asked] for _, y, asked in data.uncut]).std(ddof=1))


def test_inputs_that_are_never_there_together_are_refused(csv: Csv) -> None:
    """The message names the column that is missing most."""
    with pytest.raises(DataError, match="no row has all of its inputs; 'b' is missing most"):
        load(csv(holes={"a": range(90), "b": range(5, 200)}), max_gap=0)


@pytest.mark.data
def test_etth1_has_its_known_baselines(latch_data: Path) -> None:
    """17420 hourly rows without a gap, a season of a day; what lies a day back is the last value at 24 rows."""
    data = forecast.load(latch_data / "etth" / "ETTh1.csv", Options(("OT",), horizon=24))
    assert data.notes == ()
    assert len(data.info.inputs) == 7
    found = {(one.name, one.metric): one.value for one in data.references}
    assert found["last value", "mae"] == found["seasonal naive (24 rows)", "mae"] == pytest.approx(0.204, abs=0.001)


def machines(path: Path, rows: dict[str, int], *, apart: int = 0) -> Path:
    """A CSV of machines whose readings come in turns: `a` counts the rows of each from 1000 times its number."""
    lines = ["date,machine,a,b"]
    for row in range(max(rows.values())):
        for number, (name, count) in enumerate(rows.items()):
            if row < count:
                time = START + timedelta(hours=row, minutes=apart * number * row)
                lines.append(f"{time:%Y-%m-%d %H:%M},{name},{1000 * number + row},{np.sin(row):.6f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_each_series_of_a_file_is_by_itself(tmp_path: Path) -> None:
    """Its own splits and past; no sequence, target or baseline reaches from one into another."""
    path = machines(tmp_path / "m.csv", {"left": 200, "right": 100})
    data = load(path, targets=("a",), by="machine", horizon=2, inputs=("a", "b"))
    for split in data.splits.values():
        owners = {int(inputs[0, 0]) // 1000 for inputs, _, _ in split.items}
        assert owners == {0, 1}
        for inputs, targets, _ in split.items:
            assert {*np.diff(inputs[:, 0])} <= {1.0}
            np.testing.assert_array_equal(targets[:, 0], inputs[:, 0] + 2)
    scored = [inputs[asked, 0] for inputs, _, asked in data.splits["test"].items]
    assert sorted(np.concatenate(scored)) == [*range(170, 198), *range(1085, 1098)]
    assert "2 series by machine: left, right" in data.notes
    assert data.info.split.startswith("by time, each series by itself: the first 70%")
    assert data.info.description.endswith("a 2 rows (2 hours) ahead, with uncertainty")
    last = next(one.value for one in data.references if (one.name, one.metric) == ("last value", "mae a"))
    assert last == 2
    assert not any("machine" in note and "text" in note for note in data.notes)


def test_a_series_shorter_than_a_season_trains_with_the_others(tmp_path: Path) -> None:
    """A machine that is new; its rows are too few to be scored beside the season."""
    path = machines(tmp_path / "m.csv", {"old": 300, "new": 10})
    data = load(path, targets=("a",), by="machine", inputs=("a", "b"), season=None)
    assert any("24 rows" in reference.name for reference in data.references)
    assert {int(inputs[0, 0]) // 1000 for inputs, _, _ in data.splits["train"].items} == {0, 1}
    assert {int(inputs[0, 0]) // 1000 for inputs, _, _ in data.splits["test"].items} == {0}


def test_a_target_that_only_changes_before_what_is_asked_is_refused(tmp_path: Path) -> None:
    """There would be no deviation to score by."""
    path = tmp_path / "made.csv"
    path.write_text("a,b\n" + "".join(f"{int(row < 2)},{row % 7}\n" for row in range(100)))
    with pytest.raises(DataError, match="'a' never changes in what is forecast of the first 70% of the rows"):
        load(path, targets=("a",), horizon=2)


@pytest.mark.parametrize("scale", [1e20, 1e-27])
def test_baselines_of_any_unit_are_right(tmp_path: Path, scale: float) -> None:
    """Their squares have no room in 32 bits."""
    scores = []
    for unit in (1.0, scale):
        path = tmp_path / "made.csv"
        path.write_text("a\n" + "".join(f"{unit * (2 + np.sin(row / 3)):.9e}\n" for row in range(200)))
        data = load(path, targets=("a",))
        scores.append([one.value for one in data.references if one.metric in ("mae", "rmse")])
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_what_goes_wrong_in_one_series_is_told_of_it(tmp_path: Path) -> None:
    """By its name; a series that is too short for a split is in the others."""
    path = machines(tmp_path / "m.csv", {"left": 200, "short": 3})
    text = path.read_text().replace(",left,7,", ",left,,")
    path.write_text(text)
    data = load(path, targets=("a",), by="machine")
    assert any(note.startswith("left: a: 1 cell missing (line 12)") for note in data.notes)
    assert data.splits["test"].items
    with pytest.raises(DataError, match=r"line 3, column 'date'.* repeats the time .* several series.*--by"):
        load(path, targets=("a",))
    path.write_text(text.replace(",short,", ",,", 1))
    with pytest.raises(DataError, match=r"line 3, column 'machine': no name of a series"):
        load(path, targets=("a",), by="machine")
    path.write_text(text.replace("2026-01-01 02:00,left", "2026-01-01 00:30,left"))
    with pytest.raises(DataError, match=r"line 6, column 'date': 2026-01-01 00:30 is before the time of the row above"):
        load(path, targets=("a",), by="machine")
    with pytest.raises(DataError, match="has no column 'motor': its header is date, machine, a, b"):
        load(path, targets=("a",), by="motor")
    with pytest.raises(DataError, match="column 'machine' says which series a row belongs to; it can be no input"):
        load(path, targets=("a",), inputs=("a", "machine"), by="machine")
    machines(path, {"left": 200, "short": 2})
    assert (
        "short: too few rows to tell how far apart they are: each counts as one step"
        in load(path, targets=("a",), by="machine").notes
    )
    untimed = load(path, targets=("a",), by="machine", time="").notes
    assert [note for note in untimed if "one step" in note] == ["no column of times: every row counts as one step"]


def test_a_day_may_be_a_series(tmp_path: Path) -> None:
    """The column that names the series is part of the time, too."""
    path = tmp_path / "days.csv"
    rows = [f"2026-01-{day:02},{hour:02}:00,{day + hour % 5}" for day in range(1, 9) for hour in range(24)]
    path.write_text("Date,Time,a\n" + "\n".join(rows) + "\n")
    data = load(path, targets=("a",), by="Date", time="Date,Time")
    assert data.notes[0].startswith("8 series by Date: 2026-01-01, 2026-01-02")
    assert "(1 hour)" in data.info.description
    uneven = load(machines(tmp_path / "m.csv", {"left": 99, "right": 99}, apart=30), targets=("a",), by="machine")
    assert uneven.info.description == "a 1 row ahead, with uncertainty"


@pytest.mark.parametrize("gap", [3, 20])
def test_what_is_missing_from_the_first_row_on_is_no_zero(csv: Csv, gap: int) -> None:
    """There is no last value yet: sequences begin where there is one, however short the gap."""
    data = load(csv(holes={"b": range(gap)}))
    assert min(inputs[:, 0].min() for inputs, _, _ in data.splits["train"].items) == gap
    assert (
        f"b: {gap} cells missing (lines 2 to {gap + 1}): 0 filled with the last value, {gap} too many in a row"
        in data.notes
    )


def test_absent_rows_are_rows_of_their_split(csv: Csv) -> None:
    """Else the last ones of the file would be in none."""
    asked = {
        int(row) for inputs, _, predicted in load(csv(absent=range(50, 53))).splits["test"].items
        for row in inputs[predicted, 0]
    }  # fmt: skip
    assert asked == set(range(170, 199))


@pytest.mark.parametrize("late", [10, 25])
def test_a_few_odd_steps_among_even_ones_are_no_grid(csv: Csv, late: int) -> None:
    """One time in fifty that lies between two steps is too many to count rows by."""
    path = csv()
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(line.replace(":00,", f":{late},") if row % 50 == 25 else line for row, line in enumerate(lines))
    )
    assert load(path).notes[0] == "the times are not evenly spaced: every row counts as one step"


def test_a_row_is_asked_about_where_every_target_was_measured(csv: Csv) -> None:
    """One of two that is missing leaves nothing true to score by; the other one's cell alone is no answer."""
    data = load(csv(holes={"b": range(180, 183)}), targets=("a [m]", "b"), inputs=("a [m]",))
    asked = {int(row) for inputs, _, predicted in data.splits["test"].items for row in inputs[predicted, 0]}
    assert asked == set(range(170, 199)) - {179, 180, 181}


def test_targets_of_unlike_units_count_alike(csv: Csv) -> None:
    """A baseline's score is over all targets, each in its own deviation."""
    path = csv()
    waves = [f"{START + row * timedelta(hours=1):%Y-%m-%d %H:%M},{row},{1e4 * np.sin(row)}" for row in range(200)]
    path.write_text("\n".join(["date,a [m],b", *waves]))
    data = load(path, targets=("a [m]", "b"), horizon=2)
    train = np.concatenate([targets[predicted] for _, targets, predicted in data.uncut]).astype(np.float64)
    error = np.concatenate([(inputs - targets)[predicted] for inputs, targets, predicted in data.splits["test"].items])
    standard = error / train.std(axis=0, ddof=1)
    found = {one.metric: one.value for one in data.references if one.name == "last value"}
    assert found["mae"] == pytest.approx(np.abs(standard).mean(), rel=1e-4)
    assert found["rmse"] == pytest.approx(np.sqrt(np.square(standard).mean()), rel=1e-4)


def test_baselines_are_scored_on_the_test_split(csv: Csv) -> None:
    """Neither on the one that chooses, nor with the one that trains: there the steps are of one, here of three."""
    path = csv()
    header, *lines = path.read_text().splitlines()
    steep = [re.sub(r",(\d+),", lambda found: f",{170 + 3 * (int(found[1]) - 170)},", line) for line in lines[170:]]
    path.write_text("\n".join([header, *lines[:170], *steep]))
    found = {(one.name, one.metric): one.value for one in load(path).references}
    assert found["last value", "mae a"] == pytest.approx(3)
    assert found["drift (mean change in 1 row)", "mae a"] == pytest.approx(2)


def test_what_was_filled_is_in_no_deviation(csv: Csv) -> None:
    """Scores are in deviations of what was measured and asked about, however long one value was repeated."""
    data = load(csv(holes={"a": range(20, 100)}), inputs=("b",))
    rows = [*range(1, 20), *range(100, 140)]
    found = {one.metric: one.value for one in data.references if one.name == "last value"}
    assert found["mae"] == pytest.approx(1 / np.std(rows, ddof=1), rel=1e-5)


def test_what_differs_only_from_series_to_series_is_an_input(tmp_path: Path) -> None:
    """The size of a machine says much, although it never changes in any of them."""
    path = machines(tmp_path / "m.csv", {"left": 100, "right": 100})
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},size", *(f"{line},{1 + ('right' in line)}" for line in lines)]))
    data = load(path, targets=("a",), by="machine")
    assert ("size", "") in data.info.inputs
    assert not any("never changes" in note for note in data.notes)


def test_an_absent_row_says_nothing_about_a_column(csv: Csv) -> None:
    """What changes only in the last row of the file never changes in those that train."""
    path = csv(absent=range(50, 53))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rpartition(",")[0] + (",1" if line == lines[-1] else ",0") for line in lines[1:]))
    path.write_text(f"{lines[0]}\n{path.read_text()}")
    assert "b: never changes in the rows that train: left out" in load(path).notes


def test_a_column_must_change_where_sequences_are(csv: Csv) -> None:
    """Rows that another input's long gap takes out of training teach nothing about it."""
    path = csv(holes={"a": range(100)})
    lines = path.read_text().splitlines()
    lines[101:] = [line.rpartition(",")[0] + ",7" for line in lines[101:]]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="column 'b' never changes in the first 70% of the rows, which train"):
        load(path)


def test_a_season_of_none_is_none(csv: Csv) -> None:
    """Although the times would tell one."""
    path = csv(400)
    assert "seasonal naive (24 rows)" in {one.name for one in load(path, season=None).references}
    assert not any("seasonal" in one.name for one in load(path, season=0).references)


def test_a_cell_is_told_by_its_line_in_the_file(tmp_path: Path) -> None:
    """Of the second series, too, whose rows stand between those of the first."""
    path = machines(tmp_path / "m.csv", {"left": 100, "right": 100})
    path.write_text(path.read_text().replace(",right,1007,", ",right,,"))
    notes = load(path, targets=("a",), by="machine").notes
    assert any(note.startswith("right: a: 1 cell missing (line 17)") for note in notes)


def test_what_rises_in_one_series_alone_is_no_time(tmp_path: Path) -> None:
    """A wear that only one machine shows is an input like any other."""
    path = machines(tmp_path / "m.csv", {"left": 100, "right": 100})
    header, *lines = path.read_text().splitlines()
    worn = [f"{line},{row if 'left' in line else row % 5}" for row, line in enumerate(lines)]
    path.write_text("\n".join([f"{header},wear", *worn]))
    assert not any(note.startswith("wear: rises") for note in load(path, targets=("a",), by="machine").notes)
