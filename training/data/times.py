"""A column of times: ISO dates, the usual ways to write a day of the calendar, or a format that was asked for.

Its one rule: a column has one way of writing, in which every cell is later than the one above; where two ways fit, it
asks instead of guessing. It must not know files.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

Reader = Callable[[str], float]

DAYS = ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%y", "%m/%d/%y", "%Y/%m/%d", "%Y-%m")
CLOCKS = ("%H:%M", "%H:%M:%S", "%H.%M.%S", "%I:%M %p", "%I:%M:%S %p")
_NO_SECONDS = 1e11  # in seconds this is the year 5138, in milliseconds 1973


def _utc(moment: datetime) -> float:
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def _iso(cell: str) -> float:
    return _utc(datetime.fromisoformat(cell))


def _formatted(written: str) -> Reader:
    return lambda cell: _utc(datetime.strptime(cell, written))


def _compact(cell: str) -> float:
    """20260131140000, with or without seconds: digits that would pass for a number of milliseconds."""
    written = {12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(cell))
    if written is None or not cell.startswith(("19", "20")):
        raise ValueError(cell)
    return _formatted(written)(cell)


def _since_1970(cell: str) -> float:
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(cell)
    while abs(value) >= _NO_SECONDS:  # milli-, micro- or nanoseconds
        value /= 1000
    return value


DATES = tuple(_formatted(f"{day} {clock}".strip()) for day in DAYS for clock in ("", *CLOCKS))


class NoTime(ValueError):
    """Why a column holds no times; `row` counts from 0."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(why)
        self.row = row


def is_time(cell: str) -> bool:
    """Whether a cell is a date, with or without a time of the day."""
    return bool(_able(cell, (_iso, *DATES)))


def is_clock(cell: str) -> bool:
    """Whether a cell is a time of the day alone."""
    return bool(_able(cell, map(_formatted, CLOCKS)))


def seconds(
    cells: Sequence[str], written: str | None = None, begins: Container[int] = frozenset()
) -> NDArray[np.float64]:
    """Seconds since 1970 of each cell, [rows]; a time without a zone counts as UTC.

    `written` is the format of `datetime.strptime` that they are in; else they are ISO dates, a day of `DAYS` with or
    without a time of `CLOCKS`, or seconds since 1970 themselves, or milli-, micro- or nanoseconds. Raises NoTime at the
    first cell that is no time or not later than the one above, but for the rows at which another series `begins`.
    """
    known = f"in the format {written}" if written else "such as 2026-01-31 14:00"
    furthest = NoTime(0, f"{cells[0]!r} is not a time {known}; --time-format says how times are written")
    for readers in ((_formatted(written),),) if written else ((_iso,), DATES, (_compact,), (_since_1970,)):
        fits = []
        for read in _able(cells[0], readers):
            try:
                fits.append(_rising(cells, read, known, begins))
            except NoTime as error:
                furthest = max(error, furthest, key=lambda one: one.row)
        if any(not np.array_equal(fits[0], other) for other in fits):
            why = "may name the day first or the month; --time-format says which, such as %d/%m/%Y"
            raise NoTime(0, f"{cells[0]!r} {why}")
        if fits:
            return fits[0]
    raise furthest


def _rising(cells: Sequence[str], read: Reader, known: str, begins: Container[int]) -> NDArray[np.float64]:
    times: list[float] = []
    for row, cell in enumerate(cells):
        try:
            times.append(read(cell))
        except ValueError:
            raise NoTime(row, f"{cell!r} is not a time {known}") from None
        if row and row not in begins and times[-1] <= times[-2]:
            word = "repeats" if times[-1] == times[-2] else "is before"
            ways = (
                "sort the rows by time, name another column of times with --time (--time date,hour joins two), or "
                "count each row as one step with --time ''; where a file holds several series, such as machines, say "
                "with --by which column tells them apart"
            )
            raise NoTime(row, f"{cell} {word} the time of the row above: {ways}")
    return np.array(times)


def _able(cell: str, readers: Iterable[Reader]) -> list[Reader]:
    """Those that can read a cell."""
    able = []
    for read in readers:
        with suppress(ValueError):
            read(cell)
            able.append(read)
    return able
