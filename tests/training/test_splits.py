"""Percentages and where they end."""

import pytest

from training.data.splits import check_percentages, slices
from training.errors import DataError


def test_every_thing_is_in_one_split() -> None:
    """The last ends at the end, whatever the rounding."""
    assert [part.stop for part in slices(200, (70, 15, 15)).values()] == [140, 170, 200]
    assert slices(7, (70, 15, 15)) == {"train": slice(0, 4), "valid": slice(4, 5), "test": slice(5, 7)}


@pytest.mark.parametrize("split", [(70, 30), (70, 30, 0), (50, 25, 24), (110, -5, -5)])
def test_other_percentages_are_refused(split: tuple[int, ...]) -> None:
    """Two of them, an empty one, a sum that is not 100, a negative one."""
    with pytest.raises(DataError, match="three percentages of 100 such as 70/15/15, not"):
        check_percentages(split)
