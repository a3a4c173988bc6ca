"""IMDB reviews (Maas et al. 2011) as ids of 20,000 words, 80 a review: whether it praises.

Its one rule: only the last step is asked about. It must not know units or training.
"""

import numpy as np

from training.config import DataInfo
from training.data import files
from training.data.sequences import DataSet, Item, Reference, Split

FILE, SHA256 = "imdb_ids_v20000.npz", "4e5d73ef0d15f0287fd7801d5163118faff6ee78a4ca7b78c62ead83548f5ce1"
LICENCE = "none stated; for research: weights trained on it are not shipped"
WORDS, STEPS, VALID = 20_000, 80, 2_500


def load(name: str = "imdb") -> DataSet:
    """The last 80 words of each of 50,000 reviews; 2,500 of the training part, drawn, choose.

    The reviews are coded by a vocabulary of their own (ids by frequency, 0 padding, 2 out of vocabulary), so scores
    compare only loosely with those of another coding. The file is read from LATCH_DATA/imdb_ids.
    """
    path = files.fetch("imdb_ids", FILE, SHA256, None)
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}

    def items(part: str) -> list[Item]:
        ids, ends, labels = (arrays[f"{part}_{key}"] for key in ("ids", "offsets", "label"))
        found: list[Item] = []
        for start, end, label in zip(ends[:-1], ends[1:], labels, strict=True):
            words = ids[max(start, end - STEPS) : end].astype(np.int64)
            answer = np.full(len(words), label, dtype=np.int64)
            found.append((words, answer, np.arange(len(words)) == len(words) - 1))
        return found

    train = items("train")
    order = np.random.default_rng(1).permutation(len(train))
    splits = {"valid": order[:VALID], "train": order[VALID:]}
    info = DataInfo(
        name=name,
        description=f"praise or not, after the last {STEPS} words",
        task="classification",
        head="categorical",
        inputs=(("id of a word", ""),),
        outputs=(("negative", ""), ("positive", "")),
        source=f"{FILE}, made of aclImdb (Maas et al. 2011)",
        sha256=SHA256,
        split="22500 train, 2500 of the training part valid, 25000 test",
        licence=LICENCE,
        vocabulary=WORDS,
    )
    made = {part: Split([train[index] for index in rows]) for part, rows in splits.items()}
    return DataSet(info, made | {"test": Split(items("test"))}, (Reference("chance", "accuracy", 0.5),))
