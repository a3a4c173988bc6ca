"""What every data set is: three splits of sequences, what is predicted of each, and what to compare a score with.

Its one rule: a step that is padding, or that a task does not ask about, is False in `predicted` and counts nowhere.
It must not know any particular data set.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from training.config import DataInfo
from training.errors import DataError

Array = NDArray[np.generic]
Item = tuple[Array, Array, NDArray[np.bool_]]
Batch = tuple[Tensor, Tensor, Tensor]


class Split(Dataset[Item]):
    """Sequences of (inputs [T, I] or ids [T], targets [T, O] or ids [T], predicted [T])."""

    def __init__(self, items: Items[Item]) -> None:
        if not items:
            raise DataError("a split has no sequences: check the source file and the split rule")
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


@dataclass(frozen=True)
class Reference:
    """A figure to read a score beside: a paper's, or a baseline computed on the same steps of the test split."""

    name: str
    metric: str
    value: float


@dataclass(frozen=True)
class DataSet:
    """The splits, what the manifest will say about them, the references, and what a person should know of the file.

    `uncut` are the sequences of the train split as they were before they were cut into windows that overlap, where
    they were: what is measured of the training data must not count the same step twice.
    """

    info: DataInfo
    splits: dict[str, Split]
    references: tuple[Reference, ...] = ()
    notes: tuple[str, ...] = ()
    uncut: Items[Item] = ()


def require_told_apart(what: str, values: NDArray[np.floating]) -> None:
    """DataError where 32-bit floats, in which models compute, round away more than a hundredth of a deviation."""
    step = float(np.spacing(np.float32(np.abs(values).max())))
    if np.ptp(values) > 0 and step > values.std() / 100:
        raise DataError(
            f"{what} varies by {values.std():.3g} around {values.mean():.10g}, where 32-bit floats are {step:.3g} "
            f"apart: subtract a constant from it, here and in what clients send, or leave it out"
        )


def next_step(sequence: Array, skip: int = 0) -> Item:
    """The item that predicts step t+1 from steps 1..t, not asking about the first `skip` predictions."""
    if len(sequence) < skip + 2:
        raise DataError(
            f"a sequence of {len(sequence)} steps leaves nothing to predict: at least {skip + 2} are needed"
        )
    return sequence[:-1], sequence[1:], np.arange(len(sequence) - 1) >= skip


def collate(items: list[Item]) -> Batch:
    """Items of different lengths -> (inputs [B, T, ...], targets [B, T, ...], predicted [B, T]), zero-padded."""

    def pad(values: Items[Array]) -> Tensor:
        # Piano rolls are kept as bytes, a quarter of their size; floats are made here. int64 stays: it is an id.
        tensors = [torch.from_numpy(value) for value in values]
        if tensors[0].dtype not in (torch.int64, torch.bool):
            tensors = [tensor.float() for tensor in tensors]
        if len({len(tensor) for tensor in tensors}) == 1:
            return torch.stack(tensors)  # padding takes several times as long
        return pad_sequence(tensors, batch_first=True)

    inputs, targets, predicted = zip(*items, strict=True)
    return pad(inputs), pad(targets), pad(predicted)


def similar_lengths(lengths: Items[int], size: int, rng: torch.Generator) -> list[list[int]]:
    """Indices in batches of `size`, drawn so that the sequences of a batch are nearly of one length: little padding.

    Of every eight batches drawn at random the sequences are sorted by length and cut again; the batches are shuffled.
    """
    drawn = torch.randperm(len(lengths), generator=rng).tolist()
    pools = [drawn[start : start + 8 * size] for start in range(0, len(drawn), 8 * size)]
    rows = [index for pool in pools for index in sorted(pool, key=lambda index: lengths[index])]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=rng).tolist()]
