"""The user's own CSV as a forecast: the values of some columns so many rows ahead.

Its one rule: nothing that a row is given, in training or in a score, comes from a later row. So missing cells are
filled with the last value, as a client must do who has no other, and never by looking ahead. It must not know units
or training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.config import DataInfo
from training.data.sequences import DataSet, Item, Reference, Split, require_told_apart
from training.data.splits import SPLITS, check_percentages, slices
from training.data.table import Table, find, names_and_units, read
from training.data.windows import pieces
from training.errors import DataError

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]

_NOTES = 8  # series, of which more than their number is told: there may be a thousand
SPACINGS = {60: "minute", 3600: "hour", 86400: "day", 604800: "week"}
# Seasons to look for, longest first: a day, an hour, a minute; for daily rows a week, weekly a year, monthly a year.
PERIODS = (86400, 3600, 60)
MONTH = 30.4 * 86400
CALENDAR = ((86400, 7), (604800, 52), (MONTH, 12))


@dataclass(frozen=True)
class Options:
    """What a forecast is made of: `inputs` () are all number columns, `season` None is found by the timestamps.

    `split` are the percentages of rows for train, valid and test, in this order of time. A gap of up to `max_gap` rows
    is filled, a longer one ends the sequence. Training sequences are `window` rows long. The column `by` names the
    series that a row belongs to.
    """

    targets: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    horizon: int = 1
    season: int | None = None
    split: tuple[int, ...] = (70, 15, 15)
    max_gap: int = 6
    window: int = 192
    time: str | None = None
    time_format: str | None = None
    by: str | None = None
    licence: str = "the user's own; not stated"

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("max_gap", 0), ("window", 8)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.season is not None and self.season < 0:
            raise DataError(f"season must be a number of rows, or 0 for none, not {self.season}")
        if not self.targets:
            raise DataError("a forecast needs --targets: the columns to forecast, separated by commas")
        check_percentages(self.split)


@dataclass
class Grid:
    """The rows in even steps of time: what was measured, what a client would have sent, and where it breaks off.

    `known` [rows, columns] tells measured cells; `values` holds the last one where a cell is not known; `start`
    [rows] is the first row of the sequence that a row belongs to, -1 where a row belongs to none.
    """

    values: Values
    known: Flags
    start: NDArray[np.int64]
    notes: list[str] = field(default_factory=list)


@dataclass
class Series:
    """One series of the file: `rows` of its table (-1 for an absent one) in even steps, which of them its splits have,
    the spacing in seconds if it is known; and, once it is filled, its grid.
    """

    table: Table
    rows: NDArray[np.int64]
    splits: dict[str, slice]
    spacing: float | None
    notes: list[str]
    grid: Grid = field(init=False)

    @property
    def name(self) -> str:
        """What the file calls it."""
        return self.table.series[0][0]

    @property
    def trains(self) -> Values:
        """[rows, columns of the table]: those that train."""
        rows = self.rows[self.splits["train"]]
        return self.table.values[rows[rows >= 0]]

    def measured(self, column: int) -> Values:
        """The values of a column of the grid that train and were measured."""
        grid, train = self.grid, self.splits["train"]
        return grid.values[train, column][grid.known[train, column] & (grid.start[train] >= 0)]


def load(path: Path, options: Options) -> DataSet:
    """The forecast of `options.targets`, `options.horizon` rows after each row of `path`."""
    table = read(
        path,
        time=options.time,
        written=options.time_format,
        wanted=(*options.targets, *options.inputs),
        by=options.by,
    )
    targets = tuple(find(path, table.columns, name) for name in options.targets)
    inputs = tuple(find(path, table.columns, name) for name in options.inputs)
    for what, found in (("targets", targets), ("inputs", inputs)):
        if len(set(found)) < len(found):
            twice = next(name for name in found if found.count(name) > 1)
            raise DataError(f"column {twice!r} is there twice in --{what} {', '.join(found)}")
    series = [lay_out(part, options) for part in table.parts()]
    notes = [f"{len(series)} series by {options.by}: {_some([one.name for one in series])}"] if options.by else []
    if table.seconds is None:
        notes.append("no column of times: every row counts as one step")
    notes += _told([(one.name, note) for one in series for note in one.notes])
    if not any(len(one.trains) for one in series):
        what, way = (f"the longest of {len(series)} series", "another --by") if options.by else ("it", "a longer file")
        raise DataError(
            f"{path}: no row trains: {what} has {_rows(max(len(one.rows) for one in series))}, of which the first "
            f"{options.split[0]}% would: take {way}"
        )
    if not inputs:
        inputs, told = free_inputs(table.columns, targets, series)
        notes += told
    columns = tuple(dict.fromkeys((*inputs, *targets)))
    for one in series:
        one.grid = fill(one.table, columns, inputs, one.rows, options.max_gap)
    notes += _told([(one.name, note) for one in series for note in one.grid.notes])
    check(path, series, columns, inputs, targets, options.split[0])
    x, y = [columns.index(name) for name in inputs], [columns.index(name) for name in targets]
    spacing, count = common_spacing(series), max(len(one.rows) for one in series)
    season = find_season(spacing, count) if options.season is None else options.season
    back = {"last value": 0}  # of each baseline, how many rows before the step its forecast was measured
    if season:
        back[f"seasonal naive ({season} rows)"] = season * -(-options.horizon // season) - options.horizon
    parts: dict[str, list[Item]] = {name: [] for name in SPLITS}
    uncut: list[Item] = []
    changes: list[Values] = []
    errors: dict[str, list[Values]] = {name: [] for name in back}
    for one in series:
        for name, part in one.splits.items():
            whole, missed = cut(one.grid, x, y, part, options, back, scored=name != "train")
            parts[name] += pieces(name, whole, options.window)
            if name == "train":
                uncut += whole
                changes += missed["last value"]
            if name == "test":
                errors = {baseline: errors[baseline] + missed[baseline] for baseline in back}
    for name, items in parts.items():
        if not items:
            reach = max(back.values()) if name != "train" else 0
            before = f" and that has {_rows(reach)} before it" if reach else ""
            ways = f"a smaller --horizon{' or --season' if before else ''}, another --split, or a larger --max-gap"
            if len(inputs) > 1:
                ways += ", or leave what is measured too seldom out of --inputs"
            hint = " (--time '' counts only the rows that are there)" if any(-1 in one.rows for one in series) else ""
            raise DataError(
                f"{path}: the {name} split ({_rows_of(name, series)}) holds no row whose target "
                f"{_rows(options.horizon)} later is known{before}: take {ways}{hint}"
                + "".join(f"\n  {note}" for note in notes)
            )
    features = names_and_units(columns)
    ahead = _rows(options.horizon) + duration(spacing, options.horizon)
    info = DataInfo(
        name=path.stem,
        description=f"{', '.join(features[name][0] for name in targets)} {ahead} ahead, with uncertainty",
        task="forecast",
        head="gaussian",
        inputs=tuple(features[name] for name in inputs),
        outputs=tuple(features[name] for name in targets),
        source=path.name,
        sha256=table.sha256,
        split=f"by time{', each series by itself' if options.by else ''}: the first {options.split[0]}% train, the "
        f"next {options.split[1]}% valid, the rest test",
        licence=options.licence,
        feedback="identity" if options.horizon == 1 and inputs == targets else None,
        standardise=True,
    )
    asked = np.concatenate([targets[predicted] for _, targets, predicted in uncut]).astype(np.float64)
    if still := _still(targets, asked):
        raise DataError(
            f"{path}, column {min(still)!r} never changes in what is forecast of the first {options.split[0]}% of the "
            "rows, which train: take another target, a smaller --horizon, or another --split"
        )
    moved = np.concatenate(changes)
    if len(moved):  # else every value that trains is the first of its target, or within a horizon of it
        mean = moved.mean(axis=0)
        errors[f"drift (mean change in {_rows(options.horizon)})"] = [error - mean for error in errors["last value"]]
    references = baselines(errors, asked.std(axis=0, ddof=1), info.outputs)
    splits = {name: Split(items) for name, items in parts.items()}
    ignored = [f"ignored columns: {', '.join(table.ignored)}"] if table.ignored else []
    return DataSet(info, splits, references, (*ignored, *table.notes, *notes), uncut)


def lay_out(table: Table, options: Options) -> Series:
    """A series in even steps of time, and where its splits end."""
    rows, spacing, notes = even_rows(table, options.max_gap)
    return Series(table, rows, slices(len(rows), options.split), spacing, notes)


def free_inputs(
    columns: tuple[str, ...], targets: tuple[str, ...], series: Sequence[Series]
) -> tuple[tuple[str, ...], list[str]]:
    """The columns that a client sends where nobody says which: all that change; and what is to be said of them."""
    still = _still(columns, np.concatenate([one.trains for one in series])) - set(targets)
    inputs = tuple(name for name in columns if name not in still)
    notes = [f"{name}: never changes in the rows that train: left out" for name in columns if name in still]
    notes += [
        f"{name}: rises in every row, so later rows are beyond what was trained on: is it a time (--time {name}), "
        "or a count that --inputs leaves out?"
        for name in inputs
        if name not in targets and all(_rises(one.table.take((name,))[:, 0]) for one in series)
    ]
    return inputs, notes


def check(
    path: Path,
    series: Sequence[Series],
    columns: tuple[str, ...],
    inputs: tuple[str, ...],
    targets: tuple[str, ...],
    percent: int,
) -> None:
    """DataError where no row is whole, or a column says nothing in the first `percent` of the rows, which train."""
    if not any((one.grid.start >= 0).any() for one in series):
        known = np.sum([one.grid.known.sum(axis=0) for one in series], axis=0)
        worst = min(inputs, key=lambda name: int(known[columns.index(name)]))
        raise DataError(f"{path}: no row has all of its inputs; {worst!r} is missing most: leave it out of --inputs")
    for index, name in enumerate(columns):
        trains = np.concatenate([one.measured(index) for one in series])
        if len(np.unique(trains)) < 2:
            way = "take another target, or another --split" if name in targets else "leave it out with --inputs"
            raise DataError(
                f"{path}, column {name!r} never changes in the first {percent}% of the rows, which train: {way}"
            )
        require_told_apart(
            f"{path}, column {name!r}"
            + (f" (a time? then --time {name})" if all(_rises(one.measured(index)) for one in series) else ""),
            trains,
        )


def common_spacing(series: Sequence[Series]) -> float | None:
    """The spacing of all series whose times tell one; None where they differ."""
    found = {one.spacing for one in series if one.spacing is not None}
    return found.pop() if len(found) == 1 else None


def _told(notes: list[tuple[str, str]]) -> list[str]:
    """Notes about series by name; where there are many series, about the first."""
    first = list(dict.fromkeys(name for name, _ in notes))[:_NOTES]
    said = [f"{name}: {note}" if name else note for name, note in notes if name in first]
    return said + ([f"and {len(notes) - len(said)} such notes more"] if len(said) < len(notes) else [])


def _rows_of(split: str, series: Sequence[Series]) -> str:
    """Which rows a split has."""
    if len(series) > 1:
        return f"of {len(series)} series"
    (one,) = series
    part = one.splits[split]
    rows = f"rows {part.start + 1} to {part.stop}" if part.stop > part.start else "none"
    return f"{rows} of {len(one.rows)}"


def _still(columns: tuple[str, ...], values: Values) -> set[str]:
    """Those of `columns` that have no two values in [rows, columns]."""
    varied = [np.unique(column[~np.isnan(column)]).size > 1 for column in values.T]
    return {name for name, varies in zip(columns, varied, strict=True) if not varies}


def _rises(values: Values) -> bool:
    """Whether every value of a column [rows] that is not missing is above the one before."""
    return bool((np.diff(values[~np.isnan(values)]) > 0).all())


def cut(
    grid: Grid,
    x: list[int],
    y: list[int],
    part: slice,
    options: Options,
    back: dict[str, int],
    *,
    scored: bool,
) -> tuple[list[Item], dict[str, list[Values]]]:
    """The items of the rows of a split, and what each baseline errs on their predicted steps [steps, O].

    A scored sequence is joined in the middle, as a session that goes on: the rows before the split are its past and
    are not scored, nor are rows that a baseline says nothing about. Before a target was first measured none does.
    """
    items: list[Item] = []
    errors: dict[str, list[Values]] = {name: [] for name in back}
    reach = max(back.values())
    seen: Flags = np.logical_and.reduce(np.logical_or.accumulate(grid.known[:, y], axis=0), axis=1)
    for first, last in sequences(grid.start, part.start, part.stop):
        begin = int(grid.start[first])
        at = np.arange(max(begin, first - max(options.window, reach)) if scored else first, last - options.horizon)
        targets = grid.values[at + options.horizon][:, y]
        predicted: Flags = np.logical_and.reduce(grid.known[at + options.horizon][:, y], axis=1)
        if scored:
            predicted &= (at >= first) & (at - reach >= begin) & seen[np.maximum(at - reach, 0)]
        item = (grid.values[at][:, x].astype(np.float32), targets.astype(np.float32), predicted)
        items.append(item)
        for name, rows in back.items():
            before = grid.values[np.maximum(at - rows, 0)][:, y]  # where there is none, nothing is predicted either
            errors[name].append((before - targets)[predicted & seen[at]])
    return items, errors


def even_rows(table: Table, max_gap: int) -> tuple[NDArray[np.int64], float | None, list[str]]:
    """Which row of the table each row of the grid is (-1 for one that is absent), the spacing in seconds, and notes.

    A row that the timestamps say is absent takes its place, so that a step is always as long; of an absence that is
    too long to be filled only as much is kept as shows that it is.
    """
    count = len(table.values)
    if table.seconds is None:  # which is said of the whole file
        return np.arange(count), None, []
    if count < 3:
        return np.arange(count), None, ["too few rows to tell how far apart they are: each counts as one step"]
    apart = np.diff(table.seconds)
    spacing = float(np.median(apart))
    ratio = apart / spacing
    steps = np.maximum(1, np.rint(ratio)).astype(np.int64)
    if (np.abs(ratio - steps) > 0.11).mean() > 0.01:  # a month is 28 to 31 days, and summer time comes and goes
        return np.arange(count), None, ["the times are not evenly spaced: every row counts as one step"]
    absent = np.flatnonzero(steps > 1)
    at = np.concatenate([[0], np.cumsum(np.minimum(steps, max_gap + 2))])
    rows = np.full(at[-1] + 1, -1)
    rows[at] = np.arange(count)
    where = [f"{steps[gap] - 1} after line {table.lines[gap]}" for gap in absent]
    total = int((steps[absent] - 1).sum())
    told = (
        f"absent rows: {total} ({_some(where)}): up to {max_gap} in a row take the last value, and so a client sends it"
    )
    return rows, spacing, [f"{told}; --time '' counts only the rows that are there"] if total else []


def fill(
    table: Table, columns: tuple[str, ...], inputs: tuple[str, ...], rows: NDArray[np.int64], max_gap: int
) -> Grid:
    """The grid of `columns`: short gaps filled with the last value, sequences that end at long ones of an input."""
    raw = np.where((rows < 0)[:, None], np.nan, table.take(columns)[rows])
    known = ~np.isnan(raw)
    count = np.arange(len(raw))
    usable = np.ones(len(raw), dtype=np.bool_)
    values, notes = np.empty_like(raw), []
    for index, name in enumerate(columns):
        last = np.maximum.accumulate(np.where(known[:, index], count, -1))
        values[:, index] = np.where(last >= 0, raw[last, index], np.nan)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], ~known[:, index], [False]])))
        runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        long = [(a, b) for a, b in runs if b - a > max_gap or a == 0]
        if name in inputs:
            for a, b in long:
                usable[a:b] = False
        missing = int((~known[rows >= 0, index]).sum())
        if missing:
            filled = missing - sum(int((rows[a:b] >= 0).sum()) for a, b in long)
            present = [[row for row in range(a, b) if rows[row] >= 0] for a, b in runs]
            where = [
                f"line{'s' if len(gap) > 1 else ''} {table.lines[rows[gap[0]]]}"
                + (f" to {table.lines[rows[gap[-1]]]}" if len(gap) > 1 else "")
                for gap in present
                if gap
            ]
            fate = "not scored"
            if name in inputs:
                fate = f"{filled} filled with the last value, {missing - filled} too many in a row"
            cells = "cell" if missing == 1 else "cells"
            notes.append(f"{name}: {missing} {cells} missing ({_some(where)}): {fate}")
    begins = usable & ~np.concatenate([[False], usable[:-1]])
    start = np.where(usable, np.maximum.accumulate(np.where(begins, count, -1)), -1)
    if begins.sum() > 1:
        notes.append(f"long gaps cut the rows into {int(begins.sum())} sequences; the state starts anew in each")
    return Grid(np.nan_to_num(values), known, start, notes)


def sequences(start: NDArray[np.int64], begin: int, end: int) -> list[tuple[int, int]]:
    """[first, last) of every stretch of rows within [begin, end) that is part of one sequence."""
    part = start[begin:end]
    edges = np.flatnonzero(np.diff(part)) + 1
    bounds = [0, *edges.tolist(), len(part)]
    return [
        (begin + a, begin + b) for a, b in pairwise(bounds) if b > a and part[a] >= 0
    ]  # fmt: skip


def baselines(
    errors: dict[str, list[Values]], deviations: NDArray[np.floating], outputs: tuple[tuple[str, str], ...]
) -> tuple[Reference, ...]:
    """MAE and RMSE in training deviations, and each target's MAE in its own unit, as `scores` gives them."""
    found = []
    for name, parts in errors.items():
        error = np.concatenate(parts)
        standard = error / deviations
        found.append(Reference(name, "mae", float(np.abs(standard).mean())))
        found.append(Reference(name, "rmse", float(np.sqrt(np.square(standard).mean()))))
        for (feature, _), value in zip(outputs, np.abs(error).mean(axis=0), strict=True):
            found.append(Reference(name, f"mae {feature}", float(value)))
    return tuple(found)


def find_season(spacing: float | None, rows: int) -> int:
    """Rows of the longest period (a day, a week, a year) that the spacing suggests and the rows hold ten times."""
    if spacing is None:
        return 0
    found = [period / spacing for period in PERIODS if _divides(spacing, period)]
    found += [length for apart, length in CALENDAR if abs(spacing / apart - 1) < 0.05]
    return next((round(length) for length in found if 2 <= length <= rows / 10), 0)


def _divides(spacing: float, period: float) -> bool:
    """But for what clocks and floats are off by: times of 15 minutes and some milliseconds, ten times a second."""
    ratio = period / spacing
    return abs(ratio - round(ratio)) < 0.01 and round(ratio) > 0


def duration(spacing: float | None, rows: int) -> str:
    """` (6 hours)` for 6 rows that are an hour apart; nothing where the spacing is not known or odd, or whole months,
    quarters or years, which are not of one length.
    """
    if spacing is None or (spacing > 28 * 86400 and abs(spacing - round(spacing / MONTH) * MONTH) < 2 * 86400):
        return ""
    for unit in sorted(SPACINGS, reverse=True):
        if _divides(unit, rows * spacing):
            count = round(rows * spacing / unit)
            return f" ({count} {SPACINGS[unit]}{'s' if count > 1 else ''})"
    return ""


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _some(places: list[str], most: int = 3) -> str:
    """The first places of a long list."""
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")
