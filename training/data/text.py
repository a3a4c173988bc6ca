"""The user's own text, one character a step: and then the next one.

Its one rule: the alphabet is the training part's; a character that it lacks is UNKNOWN, for a client too. It must not
know units or training.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.config import DataInfo
from training.data import files
from training.data.sequences import DataSet, Item, Reference, Split, next_step
from training.data.splits import check_percentages, slices
from training.data.windows import pieces
from training.errors import DataError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
LARGEST_ALPHABET = 1000


@dataclass(frozen=True)
class Options:
    """`split` are percentages of the text for train, valid and test, in its order; sequences are `window` long."""

    split: tuple[int, ...] = (70, 15, 15)
    window: int = 128
    licence: str = "the user's own; not stated"

    def __post_init__(self) -> None:
        check_percentages(self.split)
        if self.window < 2:
            raise DataError(f"window must be at least 2, not {self.window}")


def load(path: Path, options: Options) -> DataSet:
    """The text in `path` as ids of its characters; the alphabet is the features of the output, in the order of ids."""
    content, written = files.read_text(path)
    text = written.replace("\r\n", "\n")
    parts = {name: text[part] for name, part in slices(len(text), options.split).items()}
    for name, part in parts.items():
        if len(part) < 2:
            raise DataError(
                f"{path}: the {name} split holds {len(part)} of {len(text)} characters; at least 2 are needed"
            )
    alphabet = (*sorted(dict(Counter(parts["train"]).most_common(LARGEST_ALPHABET - 1)).keys() - {UNKNOWN}), UNKNOWN)
    ids = {character: index for index, character in enumerate(alphabet)}
    coded = {
        name: np.array([ids.get(character, len(alphabet) - 1) for character in part], dtype=np.int64)
        for name, part in parts.items()
    }
    splits = {name: pieces(name, [next_step(values)], options.window) for name, values in coded.items()}
    unknown = {name: int((values == len(alphabet) - 1).sum()) for name, values in coded.items()}
    info = DataInfo(
        name=path.stem,
        description=f"next of {len(alphabet)} characters; send ids in the order of the output's features",
        task="next_token",
        head="categorical",
        inputs=(("id of a character", ""),),
        outputs=tuple((character, "") for character in alphabet),
        source=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        split=f"by place: the first {options.split[0]}% train, the next {options.split[1]}% valid, the rest test",
        licence=options.licence,
        feedback="sample_categorical",
        vocabulary=len(alphabet),
    )
    notes = [f"{len(text)} characters, {len(alphabet) - 1} different in the training part"]
    notes += [f"{count} characters of {name} are not among them" for name, count in unknown.items() if count]
    made = {name: Split(items) for name, items in splits.items()}
    return DataSet(info, made, baselines(coded["train"], splits["test"], len(alphabet)), tuple(notes))


def baselines(train: NDArray[np.int64], test: list[Item], size: int) -> tuple[Reference, ...]:
    """Unigrams (add one) and bigrams (falling back on them as if seen once): nats and bits of the test characters."""
    single = np.bincount(train, minlength=size) + 1.0
    single /= single.sum()
    pairs = np.zeros((size, size))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    pairs = (pairs + single) / (pairs.sum(axis=1, keepdims=True) + 1)
    found = []
    for name, chances in (("unigrams", np.tile(single, (size, 1))), ("bigrams", pairs)):
        nats = -np.concatenate([np.log(chances[before, after])[asked] for before, after, asked in test]).mean()
        found += [Reference(name, "nll", float(nats)), Reference(name, "bits", float(nats / np.log(2)))]
        found.append(Reference(name, "perplexity", float(np.exp(nats))))
    return tuple(found)
