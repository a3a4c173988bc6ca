"""A CSV file as a table of numbers: its columns, its timestamps, its missing cells.

Its one rule: whatever is wrong is told with file, line and column, lines counted as an editor counts them. It must not
know what is forecast.
"""

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.data import files, times
from training.errors import DataError

MISSING = frozenset({"", "-", "?", "na", "n/a", "nan", "null", "none", "#n/a"})
DELIMITERS = (",", ";", "\t")
# That a 32-bit float can hold; a float of Python's own, as comparing with one of numpy's warns of what is larger.
LARGEST = float(np.finfo(np.float32).max)
YES_OR_NO = {"true": 1.0, "false": 0.0}
# 1.207 and 1,207 may be thousands, but not 0.207 or 1207.5.
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}([.,])\d{3}(\1\d{3})*")
UNIT = re.compile(r"(?P<name>.*\S)\s*[\[(](?P<unit>[^\[\]()]+)[\])]$")


@dataclass(frozen=True)
class Table:
    """Number columns side by side: values [rows, columns] with NaN where a cell is missing.

    `seconds` [rows] is the time of each row since 1970 in UTC (a time without a zone counts as UTC), None without a
    time column; `lines` [rows] are the rows' lines in the file; `ignored` are columns and why they are none of these;
    `notes` say what was read otherwise than it stands, and `doubts` by column what keeps it from being read at all.
    `series` are the names of the series that the rows belong to, one after another, and where each begins; one without
    a name where nothing tells them apart.
    """

    path: Path
    sha256: str
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    seconds: NDArray[np.float64] | None
    lines: NDArray[np.int64]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()
    doubts: Mapping[str, str] = field(default_factory=dict)
    series: tuple[tuple[str, int], ...] = (("", 0),)

    def parts(self) -> list["Table"]:
        """A table of each series."""
        ends = [*(begin for _, begin in self.series[1:]), len(self.values)]
        return [
            replace(
                self,
                values=self.values[begin:end],
                seconds=None if self.seconds is None else self.seconds[begin:end],
                lines=self.lines[begin:end],
                series=((name, 0),),
            )
            for (name, begin), end in zip(self.series, ends, strict=True)
        ]

    def take(self, columns: tuple[str, ...]) -> NDArray[np.float64]:
        """The values of some columns [rows, len(columns)]; DataError names the first that is none of the table's, or
        that can be read in two ways.
        """
        for column in columns:
            if column not in self.columns:
                raise DataError(f"{self.path} has no number column {column!r}: it has {', '.join(self.columns)}")
            if column in self.doubts:
                raise DataError(self.doubts[column])
        return self.values[:, [self.columns.index(column) for column in columns]]


class _Cells(NamedTuple):
    """What stands in a file: `header` and `rows`, and the line of each row.

    `unnamed` are names of the header that are ours; `comma` is whether a comma separates nothing.
    """

    header: list[str]
    unnamed: set[str]
    rows: list[list[str]]
    lines: list[int]
    sha256: str
    comma: bool


def name_and_unit(header: str) -> tuple[str, str]:
    """`temperature [degC]` or `temperature (degC)` -> (temperature, degC); anything else is a name without a unit."""
    found = UNIT.fullmatch(header)
    return (found["name"], found["unit"]) if found else (header, "")


def names_and_units(columns: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Of each column; where several would have one name, their names are their whole headers."""
    found = {column: name_and_unit(column) for column in columns}
    names = [name for name, _ in found.values()]
    return {column: (column, "") if names.count(one[0]) > 1 else one for column, one in found.items()}


def find(path: Path, columns: Sequence[str], name: str) -> str:
    """The column called `name`, with or without its unit; DataError where there is none, or several."""
    if name in columns:
        return name
    named = [column for column in columns if name_and_unit(column)[0] == name]
    if len(named) > 1:
        raise DataError(f"{path} has several columns {name!r}: say which with its unit, {' or '.join(named)}")
    if not named:
        quoted = [f'"{column}"' if "," in column else column for column in columns]
        how = "; a name with a comma is given in double quotes" if quoted != [*columns] else ""
        raise DataError(f"{path} has no column {name!r}: its header is {', '.join(quoted)}{how}")
    return named[0]


def read(
    path: Path,
    *,
    time: str | None = None,
    written: str | None = None,
    wanted: tuple[str, ...] = (),
    by: str | None = None,
) -> Table:
    """The table in `path`: a header, then rows; separated by comma, semicolon or tab.

    A column is one of numbers where most of its cells are, or where it is `wanted`; text in it is then an error. The
    timestamps are in `time`, columns separated by commas and joined (`Date,Time`), or else in the first column of
    dates, with that of the times of the day beside it; "" is none. `written` is their format, see `times.seconds`.
    The column `by` names the series that a row belongs to; their rows are put together, in the order of the file.
    Raises DataError.
    """
    header, unnamed, rows, lines, sha256, comma = _cells(path)
    named = {find(path, header, name) for name in wanted}
    clock = tuple(find(path, header, name.strip()) for name in time.split(",")) if time else ()
    if wrong := named & {*clock}:
        raise DataError(f"{path}: column {min(wrong)!r} is the time of a row; it can be no input or target too")
    key = find(path, header, by) if by else None
    if key in named:
        raise DataError(f"{path}: column {key!r} says which series a row belongs to; it can be no input or target too")
    order, series = _together(
        path, key, [row[header.index(key)].strip() for row in rows] if key else [""] * len(rows), lines
    )
    texts: dict[str, list[str]] = {}
    ignored: dict[str, str] = {}
    commas, dotted = False, dict[str, tuple[int, str]]()
    columns, values, notes, doubts = [], [], list[str](), dict[str, str]()
    for index, name in enumerate(header):
        cells = [row[index].strip() for row in rows]
        numbers = [_number(cell, comma=comma) for cell in cells]
        known = sum(value is not None and not math.isnan(value) for value in numbers)
        if name in clock:
            texts[name] = cells
        elif name == key:
            continue
        elif name in unnamed and _is_count(numbers):
            ignored[name] = "counts the rows"
        elif name in named or known > numbers.count(None):
            columns.append(name)
            values.append(_checked(path, name, cells, numbers, lines))
            if (row := _thousands(cells, numbers)) is not None:
                doubts[name] = _doubt(path, name, lines[row], cells[row])
            commas = commas or any("," in cell for cell in cells)
            dots = {row: cell for row, cell in enumerate(cells) if "." in cell}
            if dots and all(map(THOUSANDS.fullmatch, dots.values())):
                dotted[name] = (lines[next(iter(dots))], next(iter(dots.values())))
            if YES_OR_NO.keys() & {cell.lower() for cell in cells}:
                notes.append(f"{name}: true is 1, false is 0")
        elif numbers.count(None) == 0:
            ignored[name] = "empty"
        else:
            texts[name] = cells
    if commas:
        notes.insert(0, "a comma in a number is its decimal point")
        doubts |= {name: _doubt(path, name, line, cell) for name, (line, cell) in dotted.items()}
    if not columns:
        raise DataError(f"{path} has no column of numbers under its header {', '.join(header)}")
    if time is None:
        clock = _clock(texts)
    ignored |= {name: "text" for name in texts if name not in clock}
    said = tuple(f"{name} ({ignored[name]})" for name in header if name in ignored)
    lines = [lines[row] for row in order]
    begins = [begin for _, begin in series]
    seconds = _seconds(path, {name: [texts[name][row] for row in order] for name in clock}, written, lines, begins)
    table = np.stack(values, axis=1)[order]
    return Table(path, sha256, tuple(columns), table, seconds, np.array(lines), said, tuple(notes), doubts, series)


def _doubt(path: Path, name: str, line: int, cell: str) -> str:
    return (
        f"{path}, line {line}, column {name!r}: {cell!r} may be a decimal or have a separator of thousands: write such "
        f"numbers without it (1207, not 1.207 or 1,207)"
    )


def _together(
    path: Path, column: str | None, cells: list[str], lines: list[int]
) -> tuple[list[int], tuple[tuple[str, int], ...]]:
    """The rows, those of one name together, and each name with the place of its first."""
    rows: dict[str, list[int]] = {}
    for row, cell in enumerate(cells):
        if not cell and column is not None:
            raise DataError(
                f"{path}, line {lines[row]}, column {column!r}: no name of a series; fill it, or drop the row"
            )
        rows.setdefault(cell, []).append(row)
    begins = np.cumsum([0, *map(len, rows.values())])[:-1]
    return [row for each in rows.values() for row in each], tuple(zip(rows, begins.tolist(), strict=True))


def _cells(path: Path) -> _Cells:
    """The file, taken apart."""
    content, text = files.read_text(path)
    start = text.lstrip()
    said = re.match(r"sep=(.)\s*\n", start)  # Excel's own way to say it
    head = re.sub(r'"[^"]*"', "", start).partition("\n")[0]  # what is quoted separates nothing
    delimiter = said[1] if said else max(DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                if said and cells[0].startswith("sep="):
                    continue
                header = [cell.strip() for cell in cells]
            elif len(cells) == 1 < len(header) and _is_blank(cells):
                continue
            elif len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}"
                )
            else:
                rows.append(cells)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    while rows and _is_blank(rows[-1]):  # what a spreadsheet leaves behind the last row
        rows.pop(), lines.pop()
    if not rows:
        raise DataError(f"{path} has no rows: a header and then a row for each step is needed")
    if all(_number(name) is not None for name in header):
        raise DataError(f"{path}, line 1: {', '.join(header[:4])} are no names; the first line must name the columns")
    unnamed = {f"column {index + 1}" for index, name in enumerate(header) if not name}  # such as an index of pandas
    header = [name or f"column {index + 1}" for index, name in enumerate(header)]
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path}, line 1: column {header.index(name) + 1} is called {name!r}; name each, and once")
    return _Cells(header, unnamed, rows, lines, hashlib.sha256(content).hexdigest(), delimiter != ",")


def _is_blank(cells: list[str]) -> bool:
    """Whether nothing stands there but spaces, or the end of a file as DOS wrote it."""
    return not any(cell.strip(" \t\x1a") for cell in cells)


def _number(cell: str, *, comma: bool = False) -> float | None:
    """NaN for a missing cell, None for text; where cells are not separated by it, a comma is a decimal point."""
    if cell.lower() in MISSING:
        return math.nan
    if "_" in cell:  # which Python lets stand between digits
        return None
    if cell.lower() in YES_OR_NO:
        return YES_OR_NO[cell.lower()]
    if comma and "." not in cell:
        cell = cell.replace(",", ".")
    try:
        return float(cell)
    except ValueError:
        return None


def _thousands(cells: list[str], numbers: list[float | None]) -> int | None:
    """The row of a cell that may have a separator of thousands: where every mark in the column may be one, and every
    number without a mark is below 1000, some not far; None where marks can only be decimal points.
    """
    marked = {row: cell for row, cell in enumerate(cells) if "." in cell or "," in cell}
    if not all(map(THOUSANDS.fullmatch, marked.values())):
        return None
    whole = (abs(number) for row, number in enumerate(numbers) if number is not None and row not in marked)
    largest = max((number for number in whole if not math.isnan(number)), default=0)
    return next(iter(marked), None) if 100 <= largest < 1000 else None


def _is_count(numbers: list[float | None]) -> bool:
    """Whether they only count the rows."""
    first = numbers[0]
    return first is not None and numbers == [first + row for row in range(len(numbers))]


def _checked(
    path: Path, name: str, cells: list[str], numbers: list[float | None], lines: list[int]
) -> NDArray[np.float64]:
    """A column of numbers; DataError at the first cell that is none, or that a 32-bit float cannot hold."""
    for cell, value, line in zip(cells, numbers, lines, strict=True):
        if value is None or abs(value) > LARGEST:
            what = "not a number" if value is None else "too large"
            raise DataError(
                f"{path}, line {line}, column {name!r}: {cell!r} is {what}; correct it, leave the cell empty, or "
                f"name other columns with --targets and --inputs"
            )
    return np.array(numbers, dtype=np.float64)


def _clock(texts: dict[str, list[str]]) -> tuple[str, ...]:
    """The column of dates among those of text, and the one of the times of the day where the dates have none."""
    first = {name: next(filter(_is_there, cells), "") for name, cells in texts.items()}
    day = next((name for name, cell in first.items() if times.is_time(cell)), None)
    if day is None:
        return ()
    clock = next((name for name, cell in first.items() if times.is_clock(cell)), None)
    if clock is None or not times.is_time(f"{first[day]} {first[clock]}"):
        return (day,)
    return day, clock


def _is_there(cell: str) -> bool:
    return cell.lower() not in MISSING


def _seconds(
    path: Path, columns: dict[str, list[str]], written: str | None, lines: list[int], begins: list[int]
) -> NDArray[np.float64] | None:
    """The time of each row, whose parts stand in `columns`, if there are any; DataError at the first that is none, or
    not later.
    """
    if not columns:
        return None
    cells = [" ".join(parts) for parts in zip(*columns.values(), strict=True)]
    try:
        return times.seconds(cells, written, frozenset(begins))
    except times.NoTime as error:
        where = f"{path}, line {lines[error.row]}, column {','.join(columns)!r}"
        raise DataError(f"{where}: {error}") from error
