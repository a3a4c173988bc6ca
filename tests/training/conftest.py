"""What several test files need: a tiny data set that trains in a second, and the real data where it is."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from training.config import DataInfo
from training.data.sequences import DataSet, Item, Reference, Split

torch.set_num_threads(1)


@pytest.fixture
def latch_data() -> Path:
    """The folder of the real data sets."""
    if not os.environ.get("LATCH_DATA"):
        pytest.skip("needs the data sets: set LATCH_DATA to their folder")
    return Path(os.environ["LATCH_DATA"])


@pytest.fixture
def tiny() -> DataSet:
    """Piano rolls of six notes that go up, of different lengths, so that there is padding."""
    rng = np.random.default_rng(0)

    def item() -> Item:
        steps = int(rng.integers(4, 9))
        roll = np.eye(6, dtype=np.uint8)[(np.arange(steps + 1) + rng.integers(6)) % 6]
        return roll[:-1], roll[1:], np.ones(steps, dtype=np.bool_)

    notes = tuple((f"note {note}", "") for note in range(6))
    info = DataInfo(
        name="tiny",
        description="scales",
        task="next_frame",
        head="bernoulli",
        inputs=notes,
        outputs=notes,
        source="made by the tests",
        sha256=None,
        split="10, 4, 4",
        licence="none needed",
        feedback="sample_bernoulli",
    )
    splits = {
        split: Split([item() for _ in range(count)]) for split, count in (("train", 10), ("valid", 4), ("test", 4))
    }
    return DataSet(info, splits, (Reference("always silent", "nll", 9.9),))
