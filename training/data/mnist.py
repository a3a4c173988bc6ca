"""MNIST (LeCun, Cortes, Burges), an image a sequence: 28 rows of 28, or 784 pixels of one (Dey & Salem 2017).

Its one rule: only the last step is asked about. It must not know units or training.
"""

import gzip
import hashlib
import zlib

import numpy as np
from numpy.typing import NDArray

from training.config import DataInfo
from training.data import files
from training.data.sequences import DataSet, Reference, Split
from training.errors import DataError

LICENCE = "commonly listed as CC BY-SA 3.0; the original files state none"
SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# Of the content: the files are compressed anew here and there.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# The steps of a sequence, by the name of the set; an image of 784 pixels is as many rows.
STEPS = {"mnist-rows": 28, "mnist-pixels": 784}
TRAIN = 55_000  # the remaining 5,000 images of the training file choose


def read(name: str) -> NDArray[np.uint8]:
    """The bytes of one IDX file, [N, 784] or [N]; DataError where its content is not the published one."""
    path = files.fetch("mnist", f"{name}.gz", None, SOURCE)
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable .gz file ({error}): fetch it again") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MD5[name]:
        raise DataError(f"{path} holds something with md5 {found}, not {MD5[name]}: replace it with {SOURCE}{name}.gz")
    header = 16 if "images" in name else 8
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    return values.reshape(-1, 784) if "images" in name else values


def load(name: str) -> DataSet:
    """The 70,000 images [28, 28] or [784, 1], ink from 0 to 1, each with its digit at the last step."""
    steps = STEPS[name]
    asked = np.arange(steps) == steps - 1

    def split(images: NDArray[np.uint8], digits: NDArray[np.uint8]) -> Split:
        inputs = (images.astype(np.float32) / 255).reshape(len(images), steps, -1)
        targets = np.repeat(digits.astype(np.int64)[:, None], steps, axis=1)
        return Split([(x, y, asked) for x, y in zip(inputs, targets, strict=True)])

    images, digits = read("train-images-idx3-ubyte"), read("train-labels-idx1-ubyte")
    columns = 784 // steps
    info = DataInfo(
        name=name,
        description=f"digit of {steps} steps of {columns}, answered at the last one",
        task="classification",
        head="categorical",
        inputs=tuple((f"column {column}", "ink, 0 to 1") for column in range(columns)),
        outputs=tuple((str(digit), "") for digit in range(10)),
        source=f"{SOURCE}, md5 of train-images-idx3-ubyte {MD5['train-images-idx3-ubyte']}",
        sha256=hashlib.sha256(images.tobytes()).hexdigest(),
        split="55000 train, the last 5000 of the training file valid, 10000 test",
        licence=LICENCE,
    )
    splits = {"train": split(images[:TRAIN], digits[:TRAIN]), "valid": split(images[TRAIN:], digits[TRAIN:])}
    splits["test"] = split(read("t10k-images-idx3-ubyte"), read("t10k-labels-idx1-ubyte"))
    return DataSet(info, splits, (Reference("chance", "accuracy", 0.1),))
