"""How much of a file trains, chooses and is scored.

Its one rule: every kind of file is split by the same words. It must not know what is split.
"""

from collections.abc import Sequence

import numpy as np

from training.errors import DataError

SPLITS = ("train", "valid", "test")


def check_percentages(split: Sequence[int]) -> None:
    """DataError unless `split` are three parts of 100."""
    if len(split) != len(SPLITS) or min(split) < 1 or sum(split) != 100:
        raise DataError(f"split must be three percentages of 100 such as 70/15/15, not {'/'.join(map(str, split))}")


def slices(count: int, split: Sequence[int]) -> dict[str, slice]:
    """Which of `count` things, in their order, each split has."""
    ends = [int(count * percent // 100) for percent in np.cumsum(split)]
    return {name: slice(begin, end) for name, begin, end in zip(SPLITS, [0, *ends[:-1]], ends, strict=True)}
