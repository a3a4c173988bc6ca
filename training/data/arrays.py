"""The user's own sequences as arrays in a .npz: a class or values for each whole sequence, or for each step.

Its one rule: sequences are never cut, so a split is of whole ones. It must not know units or training.

    x        [sum of lengths, I] with `lengths`, or [N, T, I] (then `lengths`, if given, says how many steps count)
    y        [N] integers or bools: a class for each sequence; [N] or [N, O] floats: values; both at its last step;
             the same with one entry a step ([sum of lengths], [N, T], ... as x is laid out): asked at every step
    lengths  [N], optional for [N, T, I]
    split    [N] of train, valid, test, optional; without it sequences are drawn by chance, and so is a valid part
    classes, features, targets: names, optional
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.config import DataInfo
from training.data.sequences import DataSet, Item, Reference, Split, require_told_apart
from training.data.splits import SPLITS, check_percentages, slices
from training.data.table import LARGEST
from training.errors import DataError

Array = NDArray[Any]

NUMBERS = "fiu"  # kinds of dtypes


@dataclass(frozen=True)
class Options:
    """`split` are percentages of the sequences where the file names no splits, drawn by `draw`."""

    split: tuple[int, ...] = (70, 15, 15)
    draw: int = 1
    licence: str = "the user's own; not stated"

    def __post_init__(self) -> None:
        check_percentages(self.split)


def load(path: Path, options: Options) -> DataSet:
    """The sequences in `path`; DataError names the array and the sequence that is not right."""
    content, arrays = _open(path)
    for name in ("x", "y"):
        if name not in arrays:
            raise DataError(f"{path} has no array {name!r}: it holds {', '.join(arrays)}")
    xs, laid_out = sequences(path, arrays)
    ys, whole = answers(path, arrays, xs, laid_out)
    classes = np.issubdtype(arrays["y"].dtype, np.integer)
    features = _laid_end_to_end(arrays["x"], laid_out).astype(np.float64)
    given = arrays["y"] if whole else _laid_end_to_end(arrays["y"], laid_out)
    values = np.zeros((1, 0)) if classes else given.reshape(-1, ys[0].shape[1]).astype(np.float64)
    for name, columns in (("x", features), ("y", values)):
        for index, column in enumerate(columns.T):
            require_told_apart(f"{path}: {name} [..., {index}]", column)
    items = []
    for x, y in zip(xs, ys, strict=True):
        asked = np.ones(len(x), dtype=np.bool_) if not whole else np.arange(len(x)) == len(x) - 1
        items.append((x, y, asked))
    parts = split(path, arrays, items, options)
    splits = {name: [items[index] for index in parts[name]] for name in SPLITS}
    if classes:
        highest = max(int(y.max()) for y in ys)
        if not highest:
            raise DataError(f"{path}: y holds class 0 alone: there is nothing to tell apart")
        outputs = _names(path, arrays, "classes", highest + 1, "class")
        references = class_baselines(splits, len(outputs)) if whole else (most_frequent(splits, len(outputs)),)
    else:
        outputs = _names(path, arrays, "targets", ys[0].shape[1], "value")
        references = (mean_baseline(splits, "mae"), mean_baseline(splits, "rmse"))
    what = "class" if classes else ", ".join(name for name, _ in outputs)
    when = "of the whole sequence, asked at its last step" if whole else "of each step"
    info = DataInfo(
        name=path.stem,
        description=f"{what} {when}",
        task="classification" if classes else "regression",
        head="categorical" if classes else "regression",
        inputs=_names(path, arrays, "features", xs[0].shape[1], "input"),
        outputs=outputs,
        source=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        split="as in the file"
        if "split" in arrays
        else f"{'/'.join(map(str, options.split))}% of the sequences, drawn",
        licence=options.licence,
        standardise=True,
    )
    lengths = [len(x) for x in xs]
    notes = [f"{len(xs)} sequences of {min(lengths)} to {max(lengths)} steps; y is {what} {when}"]
    notes += [f"{name}: {len(part)} sequences" for name, part in splits.items()]
    return DataSet(info, {name: Split(part) for name, part in splits.items()}, references, tuple(notes))


def _open(path: Path) -> tuple[bytes, dict[str, Array]]:
    try:
        content = path.read_bytes()
        if not content.startswith(b"PK"):
            raise ValueError("it is no archive; np.savez writes one")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if strange := [name for name, value in found.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{strange[0]!r} in it is no array; np.savez writes such files")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what is damaged fails in more ways than anybody lists
        hint = "; lists of arrays of different lengths go end to end, with `lengths`" if "pickle" in str(error) else ""
        raise DataError(f"{path} is not a readable .npz of plain arrays: {error}{hint}") from error
    for name, value in found.items():
        if value.dtype == np.bool_:  # yes and no are two classes
            found[name] = value.astype(np.int64)
        elif value.dtype.kind == "S":
            try:
                found[name] = np.char.decode(value, "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: {name} holds bytes that are no UTF-8 ({error}): write it as text") from error
    return content, found


def sequences(path: Path, arrays: dict[str, Array]) -> tuple[list[Array], list[slice] | list[tuple[int, slice]]]:
    """Each sequence [T, I] as float32, and where in `x` it lies."""
    x, lengths = arrays["x"], arrays.get("lengths")
    if x.dtype.kind not in NUMBERS or x.ndim not in (2, 3):
        raise DataError(f"{path}: x is {x.dtype} {list(x.shape)}, not numbers [N, T, I], or [steps, I] with lengths")
    if lengths is not None and (lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer)):
        raise DataError(f"{path}: lengths is {lengths.dtype} {list(lengths.shape)}, not whole numbers [N]")
    places: Any
    if x.ndim == 3:
        sizes = np.full(len(x), x.shape[1]) if lengths is None else lengths
        if len(sizes) != len(x) or sizes.max(initial=0) > x.shape[1]:
            raise DataError(
                f"{path}: lengths do not fit x {list(x.shape)}: one for each sequence, at most {x.shape[1]}"
            )
        places = [(row, slice(0, int(size))) for row, size in enumerate(sizes)]
    elif lengths is None:
        raise DataError(f"{path}: x is {list(x.shape)}: give lengths [N] to say where each sequence ends")
    else:
        if lengths.sum() != len(x):
            raise DataError(f"{path}: lengths add up to {lengths.sum()}, but x has {len(x)} steps")
        sizes, ends = lengths, np.cumsum(lengths)
        places = [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
    if short := np.flatnonzero(sizes < 1).tolist():
        raise DataError(f"{path}: sequence {short[0]} has {sizes[short[0]]} steps; leave it out")
    with np.errstate(over="ignore"):  # told below
        found = [np.asarray(x[place], dtype=np.float32) for place in places]
    for row, values in enumerate(found):
        if not np.isfinite(values).all():
            step = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            what = (
                "not finite" if not np.isfinite(x[places[row]][step]).all() else f"beyond {LARGEST:.2g}"
            )  # of a 32-bit float
            raise DataError(f"{path}: x of sequence {row} is {what} at step {step}; fill it, or leave it out")
    if not found:
        raise DataError(f"{path}: x is {list(x.shape)}: there are no sequences")
    return found, places


def answers(path: Path, arrays: dict[str, Array], xs: list[Array], places: Any) -> tuple[list[Array], bool]:
    """What is asked of each step: ids [T] or values [T, O]; and whether it is one answer for the whole sequence."""
    x, y = arrays["x"], arrays["y"]
    if y.ndim == 0:
        raise DataError(f"{path}: y is the single value {y}, not an array")
    classes = np.issubdtype(y.dtype, np.integer)
    steps = x.shape[:-1]
    whole = len(y) == len(xs) and (y.shape[: len(steps)] != steps or y.ndim < len(steps))
    if y.dtype.kind not in NUMBERS:
        raise DataError(f"{path}: y is {y.dtype}, not numbers: number the classes from 0, and name them in `classes`")
    if not (whole or y.shape[: len(steps)] == steps):
        raise DataError(
            f"{path}: y is {y.dtype} {list(y.shape)}: it must have an entry for each of {len(xs)} sequences, or for "
            f"each step of x {list(steps)}"
        )
    if y.ndim - (1 if whole else len(steps)) > (0 if classes else 1):
        raise DataError(f"{path}: y is {list(y.shape)}: an answer is one class, or a row of values")
    given = y if whole else _laid_end_to_end(y, places)  # what lies beyond `lengths` is no answer
    if classes and given.min() < 0:
        raise DataError(f"{path}: y holds class {given.min()}; classes count from 0")
    if classes and given.max() >= given.size:
        raise DataError(
            f"{path}: y holds class {given.max()} among {given.size} answers; number the classes from 0, without gaps"
        )
    if not np.isfinite(given).all():
        place = "" if given.shape != y.shape else f" at {np.argwhere(~np.isfinite(y))[0].tolist()}"
        raise DataError(f"{path}: y is not finite{place}")
    if not classes and np.abs(given).max() > LARGEST:
        raise DataError(f"{path}: y has values beyond {LARGEST:.2g}, which a 32-bit float cannot hold")
    found = []
    for row, (values, place) in enumerate(zip(xs, places, strict=True)):
        answer = np.repeat(y[row : row + 1], len(values), axis=0) if whole else y[place]
        found.append(answer.astype(np.int64) if classes else answer.reshape(len(values), -1).astype(np.float32))
    return found, whole


def split(path: Path, arrays: dict[str, Array], items: list[Item], options: Options) -> dict[str, list[int]]:
    """Which sequences are in which split: as the file says, the rest by chance."""
    order = np.random.default_rng(options.draw).permutation(len(items))
    if "split" not in arrays:
        parts = {name: order[part] for name, part in slices(len(items), options.split).items()}
    else:
        named = arrays["split"]
        if named.shape != (len(items),):
            raise DataError(
                f"{path}: split is {list(named.shape)}: it must name train, valid or test for each of {len(items)} "
                f"sequences"
            )
        if wrong := [row for row, word in enumerate(named.tolist()) if word not in SPLITS]:
            word = named.tolist()[wrong[0]]
            raise DataError(f"{path}: split of sequence {wrong[0]} is {word!r}: say train, valid or test")
        parts = {name: order[named[order] == name] for name in SPLITS}
        if not len(parts["valid"]):
            kept = len(parts["train"]) * options.split[0] // (options.split[0] + options.split[1])
            parts["train"], parts["valid"] = parts["train"][:kept], parts["train"][kept:]
    for name, part in parts.items():
        if not len(part):
            raise DataError(f"{path}: the {name} split has none of the {len(items)} sequences")
    return {name: sorted(part.tolist()) for name, part in parts.items()}


def _names(path: Path, arrays: dict[str, Array], key: str, count: int, word: str) -> tuple[tuple[str, str], ...]:
    """The names in `key`, or numbers; DataError when they are too few or too many."""
    if key not in arrays:
        return tuple((f"{word} {index}", "") for index in range(count))
    names = tuple((str(name), "") for name in arrays[key].ravel())
    if len(names) != count if key != "classes" else len(names) < count:
        raise DataError(f"{path}: {key} names {len(names)}, but there are {count}")
    if twice := sorted({name for name, _ in names if names.count((name, "")) > 1}):
        raise DataError(f"{path}: {key} names {twice[0]!r} twice")
    return names


def _laid_end_to_end(values: Array, places: Any) -> Array:
    """The steps of all sequences, without what only fills an array up."""
    return np.concatenate([values[place] for place in places])


def most_frequent(splits: dict[str, list[Item]], classes: int) -> Reference:
    """Accuracy of always saying the class that the training part has most."""
    train, test = (np.concatenate([y[asked] for _, y, asked in splits[name]]) for name in ("train", "test"))
    most = np.bincount(train, minlength=classes).argmax()
    return Reference("most frequent class", "accuracy", float((test == most).mean()))


def class_baselines(splits: dict[str, list[Item]], classes: int, of: str = "") -> tuple[Reference, ...]:
    """The most frequent class, and the one whose sequences have the nearest mean input, which knows no order. `of` says
    what a sequence is, where it is not what the model answers for.
    """
    means = {name: np.stack([x.mean(axis=0, dtype=np.float64) for x, _, _ in items]) for name, items in splits.items()}
    labels = {name: np.array([y[-1] for _, y, _ in items]) for name, items in splits.items()}
    scale = means["train"].std(axis=0) + 1e-9
    present = np.unique(labels["train"])
    centres = np.stack([means["train"][labels["train"] == label].mean(axis=0) for label in present])
    apart = np.square((means["test"][:, None] - centres) / scale).sum(axis=-1)
    right = float((present[apart.argmin(axis=1)] == labels["test"]).mean())
    return most_frequent(splits, classes), Reference(f"class with the nearest mean input{of}", "accuracy", right)


def mean_baseline(splits: dict[str, list[Item]], metric: str) -> Reference:
    """The error of always saying the training part's mean, in its deviations."""
    train, test = (
        np.concatenate([y[asked] for _, y, asked in splits[name]]).astype(np.float64) for name in ("train", "test")
    )
    deviation = train.std(axis=0, ddof=1)
    error = (test - train.mean(axis=0)) / np.where(deviation > 1e-6 * np.abs(train).max(axis=0), deviation, 1)
    value = np.abs(error).mean() if metric == "mae" else np.sqrt(np.square(error).mean())
    return Reference("mean", metric, float(value))
