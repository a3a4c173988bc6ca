"""A CSV becomes a table of numbers, or an error that names file, line and column."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from training.data.table import find, name_and_unit, names_and_units, read
from training.errors import DataError


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    """A file of that text."""
    path = folder / "plant.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_columns_are_told_apart(tmp_path: Path) -> None:
    """Dates become seconds in UTC, most numbers a column, missing cells NaN; text and empty columns are named."""
    text = "when,flow [l/min],note,unused,load\n2026-01-01 00:00,1.5,ok,,3\n2026-01-01T01:00Z,NA,,,4e2\n"
    table = read(written(tmp_path, text))
    assert table.columns == ("flow [l/min]", "load")
    np.testing.assert_array_equal(table.values, [[1.5, 3], [np.nan, 400]])
    assert table.seconds is not None
    assert table.seconds.tolist() == [1767225600, 1767229200]
    assert table.lines.tolist() == [2, 3]
    assert table.ignored == ("note (text)", "unused (empty)")
    np.testing.assert_array_equal(table.take(("load",)), [[3], [400]])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_byte_order_marks_are_found(tmp_path: Path, separator: str) -> None:
    """Comma, semicolon and tab, with the mark that spreadsheets write, and quoted cells of several lines."""
    text = 'a,b,c\r\n1,2,"two\r\nlines"\r\n\r\n3,4,x\r\n'.replace(",", separator)
    path = written(tmp_path, text, "utf-8-sig")
    table = read(path)
    np.testing.assert_array_equal(table.values, [[1, 2], [3, 4]])
    assert table.lines.tolist() == [3, 5]
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()  # of the file, with all of that in it


def test_times_may_be_seconds_if_one_says_so(tmp_path: Path) -> None:
    """A column of numbers is a column of times only when it is named as such."""
    path = written(tmp_path, "t,a\n10,1\n20,2\n")
    assert read(path).columns == ("t", "a")
    table = read(path, time="t")
    assert table.columns == ("a",)
    assert table.seconds is not None
    assert table.seconds.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3,x\n5,6\n", "line 3, column 'b': 'x' is not a number; correct it, .* --targets and --inputs"),
        ('a,b\n1,2\n3,"3,5"\n5,6\n', "line 3, column 'b': '3,5' is not a number"),
        ("a,b\n1,2\n3,inf\n", "line 3, column 'b': 'inf' is too large"),
        ("a,b\n1,2\n3,1e39\n", "line 3, column 'b': '1e39' is too large"),
        ("a,b\n1,2\n3,-1e39\n", "line 3, column 'b': '-1e39' is too large"),
        ("a,b\n1,2\n3\n", "line 3: 1 cells where the header has 2"),
        ("a,b\n1,2\n3,4\n5,1_000\n", "line 4, column 'b': '1_000' is not a number"),
        ('a,b\n1,"2\n3,4\n', "line 3: unexpected end of data"),
        ("a,b\n", "has no rows"),
        ("", "has no rows"),
        ("1,2\n3,4\n", "line 1: 1, 2 are no names"),
        ("a,a\n3,4\n", "line 1: column 1 is called 'a'; name each, and once"),
        (",\n3,4\n", "line 1: ,  are no names"),
        ("a,,column 2\n3,4,5\n", "line 1: column 2 is called 'column 2'; name each, and once"),
        ("a,b\nx,y\n", "has no column of numbers under its header a, b"),
        ("d,a\n2026-01-02,1\n2026-01-01,2\n", "line 3, column 'd': 2026-01-01 is before the time of the row above"),
        ("d,a\n2026-01-02,1\n2026-01-02,2\n", "line 3, column 'd': 2026-01-02 repeats the time"),
        ("d,a\n2026-01-02,1\nlater,2\n", "line 3, column 'd': 'later' is not a time such as"),
        ("d,a\n01.12.2026,1\n31.11.2026,2\n", r"line 3, column 'd': '31\.11\.2026' is not a time such as"),
        ("d,a\n01/02/2026,1\n02/03/2026,2\n", "line 2, column 'd': '01/02/2026' may name the day first or the month"),
    ],
)
def test_what_is_wrong_is_told_by_line_and_column(tmp_path: Path, text: str, words: str) -> None:
    """So that it can be found in an editor."""
    with pytest.raises(DataError, match=rf"plant\.csv.*{words}"):
        read(written(tmp_path, text))


def test_a_day_and_a_time_of_the_day_may_stand_apart(tmp_path: Path) -> None:
    """They are found, or named; a format says what nobody could guess; and one may want no times at all."""
    path = written(tmp_path, "Date;Time;hour;a\n30/04/2026;18.30.00;18;1\n30/04/2026;19.30.00;19;2\n")
    found = read(path)
    assert (found.columns, found.ignored) == (("hour", "a"), ())
    named = read(path, time="Date,hour", written="%d/%m/%Y %H")
    assert (named.columns, named.ignored) == (("a",), ("Time (text)",))
    for table, first in ((found, 1777573800), (named, 1777572000)):
        assert table.seconds is not None
        assert table.seconds.tolist() == [first, first + 3600]
    none = read(path, time="")
    assert (none.seconds, none.ignored) == (None, ("Date (text)", "Time (text)"))
    with pytest.raises(DataError, match=r"line 3, column 'Date': 30/04/2026 repeats .* one step with --time ''"):
        read(path, time="Date")
    with pytest.raises(DataError, match="line 2, column 'Date': '30/04/2026' is not a time in the format %m"):
        read(path, time="Date", written="%m")


def test_commas_are_decimal_points_where_they_separate_nothing(tmp_path: Path) -> None:
    """As spreadsheets write them in half of Europe; it is said, since it could be a thousand."""
    table = read(written(tmp_path, "a;b\n1,5;2\n-0,25;3e1\n"))
    np.testing.assert_array_equal(table.values, [[1.5, 2], [-0.25, 30]])
    assert table.notes == ("a comma in a number is its decimal point",)
    with pytest.raises(DataError, match=r"line 2, column 'a': '1\.234,5' is not a number"):
        read(written(tmp_path, "a;b\n1.234,5;2\n"), wanted=("a",))


def test_dots_beside_decimal_commas_are_asked_about(tmp_path: Path) -> None:
    """Where one column has decimal commas, the dots of another may be its thousands, however large all of them are."""
    path = written(tmp_path, "a;b;c\n3.140;3,00;2.5\n2.871;2,50;1.207\n")
    table = read(path)
    with pytest.raises(DataError, match=r"line 2, column 'a': '3\.140' may be a decimal or have a separator"):
        table.take(("a",))
    np.testing.assert_array_equal(table.take(("b", "c")), [[3, 2.5], [2.5, 1.207]])


def test_a_line_of_spaces_is_an_empty_line(tmp_path: Path) -> None:
    """Wherever it stands, and as DOS ends a file."""
    table = read(written(tmp_path, "a,b\n1,2\n   \n3,4\n\x1a"))
    np.testing.assert_array_equal(table.values, [[1, 2], [3, 4]])
    assert table.lines.tolist() == [2, 4]


def test_a_date_may_be_missing_in_the_first_row(tmp_path: Path) -> None:
    """It is an error of that row, and no column of text."""
    with pytest.raises(DataError, match="line 2, column 'd': '' is not a time such as"):
        read(written(tmp_path, "d,a\n,1\n2026-01-02,2\n"))


@pytest.mark.parametrize(
    ("cells", "doubt"),
    [
        (["837", "764", "1.207"], "'1.207'"),
        (["1,243", "902", "1,068"], "'1,243'"),
        (["-837", "-1.207"], "'-1.207'"),
        (["37", "1.207"], None),
        (["1.243", "0.902", "1.068"], None),
        (["1200", "1.207"], None),
        (["100", "99.875", "101.1"], None),
        (["1,068", "1,243"], None),
    ],
)
def test_what_may_be_thousands_is_asked_about(tmp_path: Path, cells: list[str], doubt: str | None) -> None:
    """Where a column mixes numbers below 1000 with ones of three digits behind every mark; if the column is used."""
    path = written(tmp_path, "a;b\n" + "".join(f"{cell};1\n" for cell in cells))
    if doubt is None:
        assert read(path, wanted=("a",)).take(("a",))[0, 0] > 1
        return
    with pytest.raises(DataError, match=rf"line \d, column 'a': .*{doubt}"):
        read(path, wanted=("a",)).take(("a",))
    assert read(path).take(("b",))[0, 0] == 1


def test_what_spreadsheets_put_around_a_table(tmp_path: Path) -> None:
    """The separator said in a line of its own, blank lines before, rows without a cell behind; a comma in quotes."""
    for text in ("sep=;\na;b\n1,5;2\n;\n3;4\n", "\n\na;b\n1,5;2\n;\n3;4\n;\n;\n", 'a;"b"\n1,5;2\n;\n3;4\n'):
        table = read(written(tmp_path, text))
        assert table.columns == ("a", "b")
        np.testing.assert_array_equal(table.values, [[1.5, 2], [np.nan, np.nan], [3, 4]])
    assert read(written(tmp_path, '"Temp; in;\n degC",v\n1,2\n')).columns == ("Temp; in;\n degC", "v")
    table = read(written(tmp_path, '"x, y [m]";"p, q, r";c\n1,5;2;3\n'))
    assert (table.columns, table.values.tolist()) == (("x, y [m]", "p, q, r", "c"), [[1.5, 2, 3]])


def test_true_and_false_are_numbers(tmp_path: Path) -> None:
    """Said, since a client has to send them so."""
    table = read(written(tmp_path, "on,b\nTrue,1\nFALSE,2\n,3\n"))
    np.testing.assert_array_equal(table.values, [[1, 1], [0, 2], [np.nan, 3]])
    assert table.notes == ("on: true is 1, false is 0",)


def test_columns_may_lack_a_name(tmp_path: Path) -> None:
    """An index that only counts the rows is no input; other columns are called by their place."""
    table = read(written(tmp_path, ",a,,\n0,7,4,\n1,8,6,\n"))
    assert table.columns == ("a", "column 3")
    assert table.ignored == ("column 1 (counts the rows)", "column 4 (empty)")


def test_a_column_is_found_without_its_unit(tmp_path: Path) -> None:
    """As long as it is the only one."""
    path = written(tmp_path, "flow [l],flow [m3],heat [K]\n1,2,3\n")
    header = read(path, wanted=("heat",)).columns
    assert [find(path, header, name) for name in ("heat", "flow [l]")] == ["heat [K]", "flow [l]"]
    with pytest.raises(
        DataError, match=r"has several columns 'flow': say which with its unit, flow \[l\] or flow \[m3\]"
    ):
        find(path, header, "flow")
    assert names_and_units(header) == {
        "flow [l]": ("flow [l]", ""), "flow [m3]": ("flow [m3]", ""), "heat [K]": ("heat", "K")
    }  # fmt: skip


def test_a_row_without_values_is_a_row(tmp_path: Path) -> None:
    """Its cells are missing; only a line without separators is no row."""
    table = read(written(tmp_path, "a,b\n1,2\n,\n\n3,4\n"))
    np.testing.assert_array_equal(table.values, [[1, 2], [np.nan, np.nan], [3, 4]])


def test_a_wanted_column_must_be_there_and_hold_numbers(tmp_path: Path) -> None:
    """An unknown name is answered with the header; a text column that was asked for is an error at its first cell."""
    path = written(tmp_path, "a,b\nx,1\ny,2\n")
    with pytest.raises(DataError, match="no column 'c': its header is a, b"):
        read(path, wanted=("c",))
    with pytest.raises(DataError, match="line 2, column 'a': 'x' is not a number"):
        read(path, wanted=("a",))
    with pytest.raises(DataError, match="no number column 'a': it has b"):
        read(path).take(("a",))


def test_a_name_with_a_comma_is_shown_in_quotes(tmp_path: Path) -> None:
    """As it must be given where several are separated by commas."""
    path = written(tmp_path, 'day,"price, EUR"\n1,2\n')
    with pytest.raises(DataError, match="no column 'price': its header is day, \"price, EUR\"; a name with a comma"):
        read(path, wanted=("price",))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """An absent one, and one in another encoding, with the line where that shows."""
    with pytest.raises(DataError, match=r"absent\.csv cannot be read: No such file"):
        read(tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"plant\.csv, line 2: not UTF-8"):
        read(written(tmp_path, "a,b\n1,é\n", "latin-1"))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("flow [l/min]", ("flow", "l/min")),
        ("heat (degC)", ("heat", "degC")),
        ("plain", ("plain", "")),
        ("(odd)", ("(odd)", "")),
    ],
)
def test_units_are_read_from_headers(header: str, expected: tuple[str, str]) -> None:
    """Brackets at the end hold the unit."""
    assert name_and_unit(header) == expected


@pytest.mark.parametrize("cell", ["", "-", "?", "NA", "n/a", "NaN", "null", "None", "#N/A", " "])
def test_a_missing_cell_has_many_names(tmp_path: Path, cell: str) -> None:
    """Those of spreadsheets, databases and statisticians."""
    table = read(written(tmp_path, f"a,b\n1,2\n{cell},3\n4,5\n"), wanted=("a",))
    np.testing.assert_array_equal(table.values, [[1, 2], [np.nan, 3], [4, 5]])


def test_a_time_of_the_day_beside_whole_dates_is_text(tmp_path: Path) -> None:
    """Only a date without one takes it."""
    table = read(written(tmp_path, "when,until,a\n2026-01-01 00:00,18:30,1\n2026-01-01 01:00,18:30,2\n"))
    assert table.seconds is not None
    assert table.seconds.tolist() == [1767225600, 1767229200]
    assert table.ignored == ("until (text)",)


def test_a_column_that_is_half_text_is_text(tmp_path: Path) -> None:
    """Unless somebody wants it; one word more or less does not make it numbers."""
    assert read(written(tmp_path, "a,b\n1,1\nx,2\n")).ignored == ("a (text)",)
