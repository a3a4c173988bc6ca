"""Spoken digits (Free Spoken Digit Dataset, 8 kHz): the next 10 samples from the last 20 (Chung 2014).

Its one rule: a step is 10 samples, so that what is predicted is never among its own inputs. It must not know units or
training.
"""

import numpy as np
from numpy.typing import NDArray

from training.config import DataInfo
from training.data import files
from training.data.sequences import DataSet, Item, Split

FILE, SHA256 = "fsdd_8k_int16.npz", "da0b4b2ad6439094fac60f59887cdea55e76a1e0a8f29e880b8a941b89966af7"
LICENCE = "CC BY-SA 4.0 (Z. Jackson et al., Free Spoken Digit Dataset)"
PAST, NEXT = 20, 10
# By a recording's number of 0 to 49: the official test part, then one of the same size to choose by.
PARTS = {"test": range(5), "valid": range(5, 10), "train": range(10, 50)}


def item(samples: NDArray[np.int16]) -> Item:
    """[T, 20] samples, [T, 10] samples that follow, all asked about; amplitudes within +-1."""
    wave = samples.astype(np.float32) / 32768
    starts = np.arange(0, len(wave) - PAST - NEXT + 1, NEXT)
    inputs = wave[starts[:, None] + np.arange(PAST)]
    targets = wave[starts[:, None] + np.arange(PAST, PAST + NEXT)]
    return inputs, targets, np.ones(len(starts), dtype=np.bool_)


def load(name: str = "speech") -> DataSet:
    """3,000 recordings of 6 speakers, 350 steps on average; read from LATCH_DATA/fsdd."""
    path = files.fetch("fsdd", FILE, SHA256, None)
    with np.load(path, allow_pickle=False) as file:
        samples, offsets, numbers = file["samples"], file["offsets"], file["index"]
    splits = {
        part: Split(
            [item(samples[offsets[row] : offsets[row + 1]]) for row in np.flatnonzero(np.isin(numbers, list(chosen)))]
        )
        for part, chosen in PARTS.items()
    }
    info = DataInfo(
        name=name,
        description=f"the next {NEXT} samples of a spoken digit",
        task="forecast",
        head="gaussian",
        inputs=tuple((f"sample {index - PAST}", "") for index in range(PAST)),
        outputs=tuple((f"sample +{index}", "") for index in range(NEXT)),
        source="github.com/Jakobovski/free-spoken-digit-dataset, repacked",
        sha256=SHA256,
        split="recordings 10 to 49 train, 5 to 9 valid, 0 to 4 test (the official one)",
        licence=LICENCE,
        standardise=True,
    )
    return DataSet(info, splits)
