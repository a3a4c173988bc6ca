"""Sequences in a .npz: a class or values for the whole or for each step, and errors that name the array."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.config import TrainConfig
from training.data import arrays, own
from training.data.arrays import Options
from training.data.sequences import DataSet
from training.errors import DataError
from training.trainer import configure, fit

LENGTHS = np.array([3, 1, 5, 4] * 10)
STEPS = int(LENGTHS.sum())
X = np.random.default_rng(0).normal(size=(STEPS, 2))


def load(folder: Path, **content: Any) -> DataSet:
    """The data set of a file with these arrays."""
    np.savez(folder / "made.npz", **content)
    return arrays.load(folder / "made.npz", Options())


def test_a_class_for_a_whole_sequence_is_asked_at_its_last_step(tmp_path: Path) -> None:
    """Sequences lie end to end and stay whole, one of a single step too; splits are drawn and repeat."""
    data = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 3, classes=["a", "b", "c"], features=["u", "v"])
    assert data.info.task == "classification"
    assert data.info.inputs == (("u", ""), ("v", ""))
    assert data.info.outputs == (("a", ""), ("b", ""), ("c", ""))
    assert [len(split) for split in data.splits.values()] == [28, 6, 6]
    everything = [item for split in data.splits.values() for item in split.items]
    for inputs, targets, predicted in everything:
        assert predicted.tolist() == [False] * (len(inputs) - 1) + [True]
        row = next(int(np.flatnonzero((np.float32(X) == first).all(axis=1))[0]) for first in inputs[:1])
        assert targets[-1] == np.searchsorted(np.cumsum(LENGTHS), row, side="right") % 3
    again = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 3)
    for mine, theirs in zip(data.splits["test"].items, again.splits["test"].items, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])


def test_values_for_whole_sequences(tmp_path: Path) -> None:
    """Floats are regression; a padded x is cut to its lengths."""
    x, lengths = np.zeros((20, 7, 3)), np.arange(20) % 7 + 1
    x[:, :, 0] = np.arange(20)[:, None]
    data = load(tmp_path, x=x, lengths=lengths, y=np.arange(20.0), targets=["load"])
    assert (data.info.task, data.info.head, data.info.outputs) == ("regression", "regression", (("load", ""),))
    for inputs, targets, predicted in data.splits["train"].items:
        assert len(inputs) == inputs[0, 0] % 7 + 1
        assert targets[-1].tolist() == [inputs[0, 0]]
        assert predicted.sum() == 1


@pytest.mark.parametrize("y", [np.arange(STEPS) % 4, np.arange(STEPS * 2.0).reshape(STEPS, 2)])
def test_an_answer_for_every_step(tmp_path: Path, y: np.ndarray) -> None:
    """As many as x has steps: every step is asked about."""
    data = load(tmp_path, x=X, lengths=LENGTHS, y=y)
    assert all(predicted.all() for _, _, predicted in data.splits["train"].items)
    assert {len(split) for split in data.splits.values()} == {28, 6}


def test_yes_and_no_are_classes(tmp_path: Path) -> None:
    """Bools are 0 and 1."""
    data = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 2 == 0)
    assert (data.info.task, len(data.info.outputs)) == ("classification", 2)


def test_words_may_be_bytes(tmp_path: Path) -> None:
    """As some tools write them: they mean the same as text, if it is UTF-8."""
    split = np.array([b"train"] * 20 + [b"valid"] * 10 + [b"test"] * 10)
    classes = np.char.encode(["ä", "b"], "utf-8")
    data = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 2, split=split, classes=classes)
    assert [len(data.splits[name]) for name in ("train", "valid", "test")] == [20, 10, 10]
    assert data.info.outputs == (("ä", ""), ("b", ""))
    with pytest.raises(DataError, match=r"made\.npz: classes holds bytes that are no UTF-8 .*: write it as text"):
        load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 2, classes=np.char.encode(["ä", "b"], "latin-1"))


def test_splits_may_be_named(tmp_path: Path) -> None:
    """Train and test as given; where no valid part is, some of train becomes it."""
    named = np.array(["train"] * 30 + ["test"] * 10)
    data = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 2, split=named)
    assert [len(data.splits[name]) for name in ("train", "valid", "test")] == [24, 6, 10]
    np.testing.assert_array_equal(data.splits["test"][0][0], np.float32(X[LENGTHS[:30].sum() :][: LENGTHS[30]]))


def test_baselines_know_no_order(tmp_path: Path) -> None:
    """Classes that differ in their mean input are told by it, beside the class that is most frequent."""
    y = np.arange(40) % 2
    data = load(tmp_path, x=np.repeat(y, LENGTHS)[:, None] + 0.01 * X, lengths=LENGTHS, y=y)
    found = {one.name: one.value for one in data.references}
    assert found["class with the nearest mean input"] == 1
    assert found["most frequent class"] <= 0.5
    values = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40.0))
    assert {one.metric for one in values.references} == {"mae", "rmse"}


GOOD = {"x": X, "lengths": LENGTHS, "y": np.arange(40) % 3}
BROKEN = X.copy()
BROKEN[4, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": None}, "no array 'y': it holds x, lengths"),
        ({"x": BROKEN}, "x of sequence 2 is not finite at step 0"),
        ({"x": np.where(np.arange(130)[:, None] == 3, 1e39, X)}, r"x of sequence 1 is beyond 3\.4e\+38 at step 0"),
        ({"y": np.full(40, -1e39)}, r"y has values beyond 3\.4e\+38, which a 32-bit float cannot hold"),
        ({"y": np.full(40, 1e39)}, r"y has values beyond 3\.4e\+38, which a 32-bit float cannot hold"),
        ({"x": X.astype(str)}, r"x is <U\d+ \[130, 2\], not numbers"),
        ({"lengths": None}, r"x is \[130, 2\]: give lengths \[N\]"),
        ({"lengths": LENGTHS[:-1]}, "lengths add up to 126, but x has 130 steps"),
        ({"lengths": np.append(LENGTHS, 0)}, "sequence 40 has 0 steps"),
        ({"lengths": LENGTHS * 1.0}, "lengths is float64"),
        ({"x": np.zeros((40, 4, 2))}, "lengths do not fit x .* at most 4"),
        ({"y": np.arange(39)}, r"y is int64 \[39\]: it must have an entry for each of 40 sequences"),
        ({"y": np.zeros((40, 2, 2))}, r"y is \[40, 2, 2\]: an answer is one class, or a row of values"),
        ({"y": np.arange(40) - 1}, "y holds class -1; classes count from 0"),
        ({"y": np.zeros(40, np.int64)}, "y holds class 0 alone"),
        ({"y": np.arange(40) * 1j}, "y is complex128, not numbers"),
        ({"x": X.astype("timedelta64[s]")}, r"x is timedelta64\[s\] .*, not numbers"),
        ({"y": np.arange(40) % 3, "classes": ["a", "b", "a"]}, "classes names 'a' twice"),
        ({"y": np.arange(40) * 10**12}, "y holds class 39000000000000 among 40 answers"),
        ({"y": np.array(3)}, "y is the single value 3, not an array"),
        ({"lengths": np.append(LENGTHS[:-2], [12, -3])}, "sequence 39 has -3 steps"),
        ({"y": np.full(40, np.inf)}, r"y is not finite at \[0\]"),
        ({"y": np.array(["a"] * 40)}, "y is <U1, not numbers: number the classes from 0, and name them in `classes`"),
        ({"x": X + 1e9}, r"x \[..., 0\] varies by .* where 32-bit floats are 64 apart: subtract a constant"),
        (
            {"x": np.add(X, [0, 1e9])},
            r"x \[..., 1\] varies by .* where 32-bit floats are 64 apart: subtract a constant",
        ),
        ({"y": 1e9 + np.arange(40.0)}, r"y \[..., 0\] varies by 11.5 around 1000000020, where 32-bit"),
        ({"classes": ["a"]}, "classes names 1, but there are 3"),
        ({"features": ["a"]}, "features names 1, but there are 2"),
        ({"split": ["train"] * 39 + ["tests"]}, "split of sequence 39 is 'tests': say train, valid or test"),
        ({"split": ["train"] * 39}, r"split is \[39\]: it must name train, valid or test for each of 40"),
        ({"split": ["train"] * 40}, "the test split has none of the 40 sequences"),
        ({"x": np.zeros((0, 2)), "lengths": np.zeros(0, int), "y": np.zeros(0, int)}, "there are no sequences"),
    ],
)
def test_what_is_wrong_is_told_by_array_and_sequence(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """So that whoever made the file finds it."""
    content = {name: value for name, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "made.npz", **content)
    with pytest.raises(DataError, match=rf"made\.npz.*{words}"):
        arrays.load(tmp_path / "made.npz", Options())


def test_a_damaged_archive_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    """Compressed, it fails in many ways; none of them is a traceback."""
    path = tmp_path / "made.npz"
    np.savez_compressed(path, **GOOD)
    good, refused = path.read_bytes(), 0
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            arrays.load(path, Options())
        except DataError:
            refused += 1
    assert refused > len(good) / 20


@pytest.mark.parametrize("filler", [-100, np.nan])
def test_what_lies_beyond_the_lengths_is_no_answer(tmp_path: Path, filler: float) -> None:
    """As y is often filled up with what stands for nothing."""
    lengths = np.arange(40) % 5 + 2
    x, y = np.random.default_rng(0).normal(size=(40, 6, 2)), np.full((40, 6), filler)
    for row, length in enumerate(lengths):
        y[row, :length] = np.arange(length) % 2
    data = load(tmp_path, x=x, lengths=lengths, y=y if np.isnan(filler) else y.astype(np.int64))
    assert {int(value) for _, values, _ in data.splits["train"].items for value in np.unique(values)} == {0, 1}


def test_baselines_of_large_values_are_no_zeros(tmp_path: Path) -> None:
    """Their squares have no room in 32 bits."""
    values = np.random.default_rng(0).normal(size=40) * 1e20
    data = load(tmp_path, x=X, lengths=LENGTHS, y=values)
    assert all(0.3 < one.value < 2 for one in data.references)


def test_padding_tells_nothing_about_values(tmp_path: Path) -> None:
    """What lies behind a sequence's end neither hides that its values are rounded away, nor is it held against them."""
    lengths, x = np.full(40, 3), np.random.default_rng(1).normal(size=(40, 5, 2))
    y = np.zeros((40, 5))
    y[:, :3] = 1e9 + x[:, :3, 0]
    np.savez(tmp_path / "made.npz", x=x, y=y, lengths=lengths)
    with pytest.raises(DataError, match=r"y \[..., 0\] varies by .* where 32-bit floats are 64 apart"):
        arrays.load(tmp_path / "made.npz", Options())
    np.savez(tmp_path / "made.npz", x=x, y=np.where(np.arange(5) < 3, x[:, :, 0], 1e9), lengths=lengths)
    assert arrays.load(tmp_path / "made.npz", Options()).info.task == "regression"


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    """Absent, something else, cut short, or with objects in it, which could run code when they are read."""
    path = tmp_path / "made.npz"
    with pytest.raises(DataError, match=r"made\.npz cannot be read: No such file"):
        arrays.load(path, Options())
    path.write_bytes(b"x,y\n1,2\n")
    with pytest.raises(DataError, match=r"made\.npz is not a readable \.npz"):
        arrays.load(path, Options())
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"made\.npz is not a readable \.npz"):
        arrays.load(path, Options())
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.txt", "1, 2")
    with pytest.raises(DataError, match=r"'x.txt' in it is no array; np.savez writes such files"):
        arrays.load(path, Options())
    np.savez(path, allow_pickle=True, x=np.array([X, X[:3]], dtype=object), y=[0, 1])
    with pytest.raises(DataError, match="end to end, with `lengths`"):
        arrays.load(path, Options())


@pytest.mark.data
def test_japanese_vowels_are_told_apart(latch_data: Path, tmp_path: Path) -> None:
    """Nine speakers by one utterance each: better than by the mean of its frames, in a few epochs."""
    xs, y = [], np.repeat(np.tile(np.arange(9), 2), [30] * 9 + [31, 35, 88, 44, 29, 24, 40, 50, 29])
    for name in ("ae.train", "ae.test"):
        rows = np.loadtxt(latch_data / "japanese_vowels" / name)
        ends = np.flatnonzero((rows == 1).all(axis=1))  # a row of ones ends an utterance
        xs += [rows[a:b] for a, b in zip([0, *ends[:-1] + 1], ends, strict=True)]
    split = ["train"] * 270 + ["test"] * 370
    np.savez(tmp_path / "vowels.npz", x=np.concatenate(xs), lengths=[len(x) for x in xs], y=y, split=split)
    data = own.load("npz", tmp_path / "vowels.npz")
    run = fit(data, configure(data, "gru", hidden=46), TrainConfig(max_epochs=12), tmp_path / "run")
    assert run.result is not None
    accuracy = next(m["value"] for m in run.result["metrics"] if (m["name"], m["split"]) == ("accuracy", "test"))
    assert accuracy > max(one.value for one in data.references) > 0.89


@pytest.mark.parametrize("named", [{}, {"split": np.array(["train"] * 30 + ["test"] * 10)}])
def test_no_sequence_is_in_two_splits(named: dict[str, Any], tmp_path: Path) -> None:
    """Nor is one in none; what chooses did not train. They are drawn, not cut off at the end of the file."""
    data = load(tmp_path, x=X, lengths=LENGTHS, y=np.arange(40) % 2, **named)
    places = np.cumsum([0, *LENGTHS[:-1]])
    drawn = {
        name: [int(np.flatnonzero((np.float32(X)[places] == x[0]).all(axis=1))[0]) for x, _, _ in split.items]
        for name, split in data.splits.items()
    }
    assert sorted(row for rows in drawn.values() for row in rows) == list(range(40))
    assert drawn["valid"] != sorted(range(min(drawn["valid"]), min(drawn["valid"]) + len(drawn["valid"])))


def test_baselines_are_learned_from_the_training_part(tmp_path: Path) -> None:
    """The mean of values, its deviation, and the classes' mean inputs; the test part only scores them."""
    split = np.array(["train"] * 20 + ["valid"] * 10 + ["test"] * 10)
    y = np.arange(40.0) ** 2
    train, test = y[:20], y[30:]
    data = load(tmp_path, x=X, lengths=LENGTHS, y=y, split=split)
    error = (test - train.mean()) / train.std(ddof=1)
    found = {one.metric: one.value for one in data.references}
    assert found == pytest.approx({"mae": np.abs(error).mean(), "rmse": np.sqrt(np.square(error).mean())}, rel=1e-5)
    y, turned = np.arange(40) % 2, np.where(np.arange(40) < 30, 1, -1)
    x = np.repeat((2 * y - 1) * turned, LENGTHS)[:, None] + 0.01 * X
    data = load(tmp_path, x=x, lengths=LENGTHS, y=y, split=split)
    assert {one.name: one.value for one in data.references}["class with the nearest mean input"] == 0


def test_inputs_of_unlike_units_count_alike(tmp_path: Path) -> None:
    """The class of the nearest mean input is found in deviations: a large one that says nothing hides no small one."""
    y = np.arange(40) % 2
    x = np.stack([np.repeat(y, LENGTHS) + 0.01 * X[:, 0], 1e4 * X[:, 1]], axis=1)
    data = load(tmp_path, x=x, lengths=LENGTHS, y=y)
    assert {one.name: one.value for one in data.references}["class with the nearest mean input"] == 1


def test_the_most_frequent_class_is_that_of_most_training_answers(tmp_path: Path) -> None:
    """A long sequence is one answer, and what the test part has most says nothing."""
    split = np.array(["train"] * 20 + ["valid"] * 10 + ["test"] * 10)
    y = np.zeros(40, np.int64)
    y[:20:4] = y[2:20:4] = 1  # nine of the twenty that train, with most of the steps
    y[0], y[30:38] = 0, 1
    found = {one.name: one.value for one in load(tmp_path, x=X, lengths=LENGTHS, y=y, split=split).references}
    assert found["most frequent class"] == 0.2


def test_values_of_unlike_units_count_alike(tmp_path: Path) -> None:
    """The mean and the deviation that it is scored in are each value's own."""
    split = np.array(["train"] * 20 + ["valid"] * 10 + ["test"] * 10)
    y = np.stack([np.arange(40.0) ** 2, 1e4 + 1e3 * np.sin(np.arange(40))], axis=1)
    error = (y[30:] - y[:20].mean(axis=0)) / y[:20].std(axis=0, ddof=1)
    data = load(tmp_path, x=X, lengths=LENGTHS, y=y, split=split)
    found = {one.metric: one.value for one in data.references}
    assert found == pytest.approx({"mae": np.abs(error).mean(), "rmse": np.sqrt(np.square(error).mean())}, rel=1e-4)


def test_another_draw_is_another_split(tmp_path: Path) -> None:
    """Of the same sequences."""
    np.savez(tmp_path / "made.npz", **GOOD)
    one, other = (arrays.load(tmp_path / "made.npz", Options(draw=draw)).splits["test"].items for draw in (1, 2))
    assert [x.tolist() for x, _, _ in one] != [x.tolist() for x, _, _ in other]


def test_classes_may_have_names_that_no_answer_has(tmp_path: Path) -> None:
    """A file may lack a rare one; the model has it all the same."""
    data = load(tmp_path, **GOOD, classes=["a", "b", "c", "rare"])
    assert data.info.outputs[-1] == ("rare", "")
