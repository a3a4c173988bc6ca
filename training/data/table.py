"""A CSV file as a table of numbers: its columns, its timestamps, its missing cells.

Its one rule: whatever is wrong is told with file, line and column, lines counted as an editor counts them. It must not
know what is forecast.
"""

import csv
import hashlib
import io
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

MISSING = frozenset({"", "-", "?", "na", "n/a", "nan", "null", "none", "#n/a"})
DELIMITERS = (",", ";", "\t")
# That a 32-bit float can hold; a float of Python's own, as comparing with one of numpy's warns of what is larger.
LARGEST = float(np.finfo(np.float32).max)
UNIT = re.compile(r"(?P<name>.*\S)\s*[\[(](?P<unit>[^\[\]()]+)[\])]$")


@dataclass(frozen=True)
class Table:
    """Number columns side by side: values [rows, columns] with NaN where a cell is missing.

    `seconds` [rows] is the time of each row since 1970 in UTC (a time without a zone counts as UTC), None without a
    time column; `lines` [rows] are the rows' lines in the file; `ignored` are columns and why they are none of these.
    """

    path: Path
    sha256: str
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    seconds: NDArray[np.float64] | None
    lines: NDArray[np.int64]
    ignored: tuple[str, ...]

    def take(self, columns: tuple[str, ...]) -> NDArray[np.float64]:
        """The values of some columns [rows, len(columns)]; DataError names the first that is none of the table's."""
        for column in columns:
            if column not in self.columns:
                raise DataError(f"{self.path} has no number column {column!r}: it has {', '.join(self.columns)}")
        return self.values[:, [self.columns.index(column) for column in columns]]


def name_and_unit(header: str) -> tuple[str, str]:
    """`temperature [degC]` or `temperature (degC)` -> (temperature, degC); anything else is a name without a unit."""
    found = UNIT.fullmatch(header)
    return (found["name"], found["unit"]) if found else (header, "")


def read(path: Path, *, time: str | None = None, wanted: tuple[str, ...] = ()) -> Table:
    """The table in `path`: a header, then rows; separated by comma, semicolon or tab.

    A column is one of numbers where most of its cells are, or where it is `wanted`; text in it is then an error. The
    timestamps are the first column of ISO dates, or `time`, which may also be seconds since 1970. Raises DataError.
    """
    header, rows, lines, sha256 = _cells(path)
    for name in (*wanted, *([time] if time is not None else [])):
        if name not in header:
            raise DataError(f"{path} has no column {name!r}: its header is {', '.join(header)}")
    ignored, columns, values = [], [], []
    seconds: NDArray[np.float64] | None = None
    for index, name in enumerate(header):
        cells = [row[index].strip() for row in rows]
        if name == time:
            seconds = _times(path, name, cells, lines)
            continue
        numbers = [_number(cell) for cell in cells]
        known = sum(value is not None and not math.isnan(value) for value in numbers)
        texts = numbers.count(None)
        if name in wanted or known > texts:
            columns.append(name)
            values.append(_checked(path, name, cells, numbers, lines))
        elif texts == 0:
            ignored.append(f"{name} (empty)")
        elif time is None and seconds is None and _time(cells[0]) is not None:
            seconds = _times(path, name, cells, lines)
        else:
            ignored.append(f"{name} (text)")
    if not columns:
        raise DataError(f"{path} has no column of numbers under its header {', '.join(header)}")
    return Table(path, sha256, tuple(columns), np.stack(values, axis=1), seconds, np.array(lines), tuple(ignored))


def _cells(path: Path) -> tuple[list[str], list[list[str]], list[int], str]:
    """Header, rows, the line of each row, and the file's sha256."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=first.count), strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}"
                )
            else:
                rows.append(cells)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows: a header and then a row for each step is needed")
    if all(_number(name) is not None for name in header):
        raise DataError(f"{path}, line 1: {', '.join(header[:4])} are no names; the first line must name the columns")
    for name in header:
        if not name or header.count(name) > 1:
            raise DataError(f"{path}, line 1: column {header.index(name) + 1} is called {name!r}; name each, and once")
    return header, rows, lines, hashlib.sha256(content).hexdigest()


def _number(cell: str) -> float | None:
    """NaN for a missing cell, None for text."""
    if cell.lower() in MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _checked(
    path: Path, name: str, cells: list[str], numbers: list[float | None], lines: list[int]
) -> NDArray[np.float64]:
    """A column of numbers; DataError at the first cell that is none, or that a 32-bit float cannot hold."""
    for cell, value, line in zip(cells, numbers, lines, strict=True):
        if value is None or abs(value) > LARGEST:
            what = "not a number" if value is None else "too large"
            raise DataError(
                f"{path}, line {line}, column {name!r}: {cell!r} is {what}; correct it, leave the cell empty, or "
                f"leave the column out with --inputs"
            )
    return np.array(numbers, dtype=np.float64)


def _time(cell: str) -> float | None:
    """Seconds since 1970 of an ISO date, or of a number that says so itself; None for anything else."""
    try:
        moment = datetime.fromisoformat(cell)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except ValueError:
        value = _number(cell)
        return value if value is not None and math.isfinite(value) else None


def _times(path: Path, name: str, cells: list[str], lines: list[int]) -> NDArray[np.float64]:
    """A column of times, which must go up; DataError at the first that does not, or is none."""
    times: list[float] = []
    for cell, line in zip(cells, lines, strict=True):
        value = _time(cell)
        if value is None:
            raise DataError(f"{path}, line {line}, column {name!r}: {cell!r} is not a time such as 2026-01-31 14:00")
        if times and value <= times[-1]:
            word = "repeats" if value == times[-1] else "is before"
            raise DataError(
                f"{path}, line {line}, column {name!r}: {cell} {word} the time of the row above; sort the rows by time"
            )
        times.append(value)
    return np.array(times)
