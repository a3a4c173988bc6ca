"""A column of times: read as it is written, or asked about; what is none is told by its row."""

import pytest

from training.data import times


@pytest.mark.parametrize(
    ("cells", "apart"),
    [
        (("01.03.2026 00:10:00", "01.03.2026 00:20:00"), 600),
        (("3/1/26 23:00", "3/2/26 0:00", "3/13/26 0:00"), 3600),
        (("28/02/2026", "1/03/2026"), 86400),
        (("02/28/2026 11:00 PM", "03/01/2026 1:00 AM"), 7200),
        (("2026-02", "2026-03"), 28 * 86400),
        (("2026/02/28", "2026/03/01"), 86400),
        (("20260228T2300+0100", "20260301T0000+0100"), 3600),
    ],
)
def test_times_are_read_as_people_write_them(cells: tuple[str, ...], apart: int) -> None:
    """Where the day and the month could be either, what is no date or goes back decides."""
    first, second = times.seconds(cells)[:2]
    assert second - first == apart
    assert times.is_time(cells[0])


def test_a_format_that_is_given_is_the_only_one() -> None:
    """Even where the cells would be ISO dates."""
    assert times.seconds(["1970-02-01", "1970-03-01"], "%Y-%d-%m").tolist() == [86400, 2 * 86400]
    with pytest.raises(times.NoTime, match="'1970' is not a time in the format %H:%M"):
        times.seconds(["1970"], "%H:%M")


def test_numbers_are_seconds_since_1970() -> None:
    """If they are not dates; or thousandths of them, as their size tells; those without end are none."""
    assert times.seconds(["10", "20.5"]).tolist() == [10, 20.5]
    for zeros in ("", "000", "000000", "000000000"):
        assert times.seconds([f"1700000000{zeros}", f"1700000060{zeros}"]).tolist() == [1700000000, 1700000060]
    assert times.seconds(["-200000060000", "-200000000000"]).tolist() == [-2e8 - 60, -2e8]  # before 1970
    assert times.seconds(["19700102"]).tolist() == [86400]
    assert times.seconds(["197001020059", "197001020100"]).tolist() == [86400 + 59 * 60, 86400 + 3600]
    assert times.seconds(["19700102005959", "19700102010000"]).tolist() == [86400 + 3599, 86400 + 3600]
    assert times.seconds(["200000000000", "200000060000"]).tolist() == [2e8, 2e8 + 60]  # month 00: milliseconds
    with pytest.raises(times.NoTime, match="'inf' is not a time such as"):
        times.seconds(["inf"])


@pytest.mark.parametrize(
    ("cells", "row", "words"),
    [
        (["2026-01-01", "2026-01-02", "soon"], 2, "'soon' is not a time such as 2026-01-31 14:00"),
        (["31/12/2026", "31/12/2026"], 1, "31/12/2026 repeats the time of the row above: .* with --time ''"),
        (["12.12.2026", "11.12.2026"], 1, "is before the time of the row above: sort the rows by time"),
        (["02-03-2026", "03-04-2026"], 0, "'02-03-2026' may name the day first or the month; --time-format says which"),
        (["01/02/26", "02/03/26"], 0, "'01/02/26' may name the day first or the month; --time-format says which"),
        (["01/02/2026", "02/03/2026"], 0, "'01/02/2026' may name the day first or the month; --time-format says which"),
        (["Tuesday"], 0, "'Tuesday' is not a time such as .*; --time-format says how times are written"),
    ],
)
def test_what_is_no_time_is_told_by_its_row(cells: list[str], row: int, words: str) -> None:
    """Of the ways to read a column, the one that gets furthest tells."""
    with pytest.raises(times.NoTime, match=words) as refused:
        times.seconds(cells)
    assert refused.value.row == row


def test_a_time_of_the_day_is_no_date() -> None:
    """And a number is neither."""
    assert [times.is_clock(cell) for cell in ("18:30", "18.30.00", "6:30 PM", "18.3", "2026-01-01")] == [True] * 3 + [
        False
    ] * 2
    assert not any(map(times.is_time, ("18:30", "18.3", "open", "")))


def test_a_zone_that_is_given_counts() -> None:
    """In the night in which summer time begins, too."""
    cells = ["2026-03-29T01:00+01:00", "2026-03-29T03:00+02:00", "2026-03-29T02:00Z", "2026-03-29 03:00"]
    assert times.seconds(cells).tolist() == [1774742400 + 3600 * hour for hour in range(4)]
