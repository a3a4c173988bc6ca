"""scikit-learn's bundled handwritten digits, one row of 8 pixels a step: and then the answer.

Its one rule: only the last row is asked about. It must not know units or training.
"""

import hashlib

import numpy as np
from sklearn.datasets import load_digits

from training.config import DataInfo
from training.data.sequences import DataSet, Item, Reference, Split

SPLITS = {"train": slice(0, 1200), "valid": slice(1200, 1500), "test": slice(1500, None)}


def load(name: str = "digits") -> DataSet:
    """The 1,797 images [8, 8] of UCI's optical digits test set, in the file's own order."""
    bundle = load_digits()
    images = (bundle.images / 16).astype(np.float32)

    def item(index: int) -> Item:
        return images[index], np.full(8, bundle.target[index], dtype=np.int64), np.arange(8) == 7

    rows = np.arange(len(images))
    splits = {split: Split([item(index) for index in rows[part]]) for split, part in SPLITS.items()}
    info = DataInfo(
        name=name,
        description="digit read row by row, answered at the eighth row",
        task="classification",
        head="categorical",
        inputs=tuple((f"column {column}", "ink, 0 to 1") for column in range(8)),
        outputs=tuple((str(digit), "") for digit in range(10)),
        source="scikit-learn's load_digits (UCI optical recognition of handwritten digits)",
        sha256=hashlib.sha256(bundle.data.tobytes()).hexdigest(),
        split="by order in the file: 1200 train, 300 valid, 297 test",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
    )
    return DataSet(info, splits, (Reference("chance", "accuracy", 0.1),))
