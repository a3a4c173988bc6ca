"""Every data set: shapes, what is asked about, checks of the files, baselines."""

import gzip
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from scipy.io import savemat

from training import data
from training.data import adding, files, mnist, polymusic, sensors
from training.data.sequences import Split, collate, next_step, similar_lengths
from training.errors import DataError
from training.experiments import EXPERIMENTS


@pytest.fixture
def music(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in the layout of JSB_Chorales.mat, under LATCH_DATA, with its sha256 expected."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, lengths in {"train": [5, 9, 7], "valid": [6], "test": [4, 8]}.items():
        cells = np.empty((1, len(lengths)), dtype=object)
        for column, length in enumerate(lengths):
            cells[0, column] = (rng.random((length, 88)) < 0.05).astype(np.uint8)
        arrays[f"{split}data"] = cells
    path = tmp_path / "polymusic" / "JSB_Chorales.mat"
    path.parent.mkdir()
    savemat(path, arrays)
    monkeypatch.setenv("LATCH_DATA", str(tmp_path))
    expect(path, monkeypatch)
    return path


def expect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `path`'s present content the right one."""
    rolls = polymusic.SETS["chorales"]
    known = type(rolls)(rolls.file, pooch.file_hash(str(path)), rolls.title, rolls.licence, rolls.papers)
    monkeypatch.setitem(polymusic.SETS, "chorales", known)


def test_a_set_of_music_has_the_papers_figures_of_its_table(music: Path) -> None:
    """Those that `reproduce` shows are those that `evaluate` shows."""
    shown = {(one.name, one.value) for one in data.load("chorales").references}
    arm = EXPERIMENTS["music"].arms["chorales"]
    assert {("Bai 2018 rnn", 8.91), ("RRU 2021 RRU", 7.72), ("independent notes", 11.09)} <= shown
    assert {value for _, value in shown} == {value for models in arm.papers.values() for value in models.values()}


def test_transposed_music_is_the_same_music(music: Path) -> None:
    """Every sequence keeps its intervals, moves by at most so many semitones, and stays in the range of the split."""
    split = data.load("chorales").splits["train"]
    used = np.flatnonzero(np.concatenate([inputs for inputs, _, _ in split.items]).any(0))
    shifts = set()
    for seed in range(20):
        moved = polymusic.transposed(split, 3, torch.Generator().manual_seed(seed))
        for (inputs, targets, predicted), before in zip(moved.items, split.items, strict=True):
            (shift,) = [by for by in range(-3, 4) if np.array_equal(np.roll(before[0], by, axis=1), inputs)]
            np.testing.assert_array_equal(np.roll(before[1], shift, axis=1), targets)
            np.testing.assert_array_equal(before[2], predicted)
            assert {*np.flatnonzero(inputs.any(0))} <= {*range(used[0], used[-1] + 1)}
            shifts.add(shift)
    assert len(shifts) > 1


def test_music_moves_as_far_down_as_up() -> None:
    """Every distance that was allowed is drawn, both ends too."""
    wide, narrow = np.zeros((4, 88), dtype=np.uint8), np.zeros((4, 88), dtype=np.uint8)
    wide[:, [0, 87]], narrow[:, 40] = 1, 1
    split, seen = Split([next_step(wide), next_step(narrow)]), set()
    for seed in range(60):
        still, moved = polymusic.transposed(split, 2, torch.Generator().manual_seed(seed)).items
        np.testing.assert_array_equal(still[0], wide[:-1])
        seen.add(int(np.flatnonzero(moved[0][0])[0]) - 40)
    assert seen == {-2, -1, 0, 1, 2}


def test_transposed_music_leaves_no_note_out() -> None:
    """What would leave the range that the split uses moves as far as it can, and nothing at either end wraps around."""
    low, high = np.zeros((4, 88), dtype=np.uint8), np.zeros((4, 88), dtype=np.uint8)
    low[:, [0, 5]], high[:, [80, 87]] = 1, 1
    split = Split([next_step(low), next_step(high)])
    for seed in range(20):
        (first, *_), (second, *_) = polymusic.transposed(split, 40, torch.Generator().manual_seed(seed)).items
        notes, above = np.flatnonzero(first[0]), np.flatnonzero(second[0])
        assert notes[1] - notes[0] == 5
        assert above[1] - above[0] == 7


def test_batches_of_similar_lengths_hold_everything_once() -> None:
    """Every sequence is in one batch, with far less padding than in batches drawn at random; seeds differ."""
    lengths = np.random.default_rng(1).integers(10, 500, size=101).tolist()
    batches = similar_lengths(lengths, 4, torch.Generator().manual_seed(1))
    assert sorted(index for batch in batches for index in batch) == list(range(101))
    assert sorted({len(batch) for batch in batches}) == [1, 4]
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    drawn = torch.randperm(101, generator=torch.Generator().manual_seed(1)).split(4)
    assert padded < 0.8 * sum(len(batch) * max(lengths[index] for index in batch.tolist()) for batch in drawn)
    assert batches != similar_lengths(lengths, 4, torch.Generator().manual_seed(2))


def test_music_predicts_frames_two_to_the_last(music: Path) -> None:
    """T frames give T-1 predictions, each of the frame that follows."""
    found = data.load("chorales")
    assert [len(inputs) for inputs, _, _ in found.splits["train"].items] == [4, 8, 6]
    for inputs, targets, predicted in found.splits["test"].items:
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert predicted.all()
    assert found.info.inputs[60 - polymusic.LOWEST_MIDI_NOTE] == ("C4", "")


def test_a_changed_music_file_is_refused(music: Path) -> None:
    """One byte more: the message names the file, both checksums and where to get it."""
    music.write_bytes(music.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"JSB_Chorales\.mat has sha256 .* replace it with https"):
        data.load("chorales")


def test_a_truncated_music_file_is_refused(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its checksum was expected, half a .mat is an error with a name, not a traceback of scipy's."""
    music.write_bytes(music.read_bytes()[:200])
    expect(music, monkeypatch)
    with pytest.raises(DataError, match=r"JSB_Chorales\.mat is not a readable"):
        data.load("chorales")


def test_a_music_file_of_another_shape_is_refused(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """87 notes: the message names the split and the sequence."""
    cells = np.empty((1, 1), dtype=object)
    cells[0, 0] = np.zeros((5, 87))
    savemat(music, {f"{split}data": cells for split in ("train", "valid", "test")})
    expect(music, monkeypatch)
    with pytest.raises(DataError, match="sequence 0 of train"):
        data.load("chorales")


def test_a_music_file_of_loudness_is_refused(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note sounds or does not: 2 is neither."""
    cells = np.empty((1, 1), dtype=object)
    cells[0, 0] = np.full((5, 88), 2)
    savemat(music, {f"{split}data": cells for split in ("train", "valid", "test")})
    expect(music, monkeypatch)
    with pytest.raises(DataError, match=r"sequence 0 of train is not \[T, 88\] of 0 and 1"):
        data.load("chorales")


def test_a_missing_music_file_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LATCH_DATA without the file."""
    monkeypatch.setenv("LATCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Nottingham\.mat does not exist: put"):
        data.load("nottingham")


@pytest.mark.parametrize("root", [None, ""])
def test_no_network_is_said_plainly(root: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing download names LATCH_DATA as the way out, also where LATCH_DATA is there but empty."""
    monkeypatch.delenv("LATCH_DATA", raising=False)
    if root is not None:
        monkeypatch.setenv("LATCH_DATA", root)

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(DataError, match=r"check the network, or put the file .* LATCH_DATA"):
        data.load("chorales")


def test_what_nobody_publishes_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the folder that it belongs into; nothing is downloaded."""
    monkeypatch.delenv("LATCH_DATA", raising=False)
    with pytest.raises(DataError, match=r"own\.npz has no public address: put it into a folder mine/, set LATCH_DATA"):
        files.fetch("mine", "own.npz", None, None)


def test_a_download_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched is checked; here from a file instead of the network."""
    (tmp_path / "JSB_Chorales.mat").write_bytes(b"<html>moved</html>")

    def download(_: str, output_file: str, __: object) -> None:
        Path(output_file).write_bytes((tmp_path / "JSB_Chorales.mat").read_bytes())

    monkeypatch.delenv("LATCH_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: download)
    with pytest.raises(DataError, match=r"sent as JSB_Chorales\.mat has not sha256 ac0e6085"):
        data.load("chorales")


def test_an_unknown_name_lists_the_known_ones() -> None:
    """The message is the list."""
    with pytest.raises(DataError, match="unknown data set 'corals': choose one of chorales, "):
        data.load("corals")


def test_sensors_repeat_and_stay_in_range() -> None:
    """The same seed gives the same numbers; another seed others; magnitudes stay below 100."""
    first, again, other = sensors.load(), sensors.load(), sensors.load(seed=21)
    values = np.concatenate([inputs for inputs, _, _ in first.splits["train"].items])
    np.testing.assert_array_equal(values, np.concatenate([inputs for inputs, _, _ in again.splits["train"].items]))
    assert not np.array_equal(first.splits["test"].items[0][0], other.splits["test"].items[0][0])
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 100


def test_sensors_have_their_faults() -> None:
    """Stuck-at, dropout and spike all occur in a hundred clean series."""
    rng = np.random.default_rng(1)
    clean = np.tile(10 + np.sin(np.arange(400))[:, None], (1, 5))
    changed = [sensors.faults(rng, clean) for _ in range(100)]
    assert any((np.diff(series, axis=0)[:-1] == 0).any() for series in changed)
    assert any((series == 0).any() for series in changed)
    assert any((series > 11.01).any() for series in changed)


def test_sensor_baselines_are_the_naive_forecasts() -> None:
    """On a clean daily cycle yesterday's value is exact and the last value is not."""
    day = np.sin(np.arange(5 * sensors.DAY) / sensors.DAY * 2 * np.pi).astype(np.float32)
    split = Split([next_step(np.tile(day[:, None], (1, 5)), skip=sensors.DAY - 1)])
    found = {name: np.abs(np.concatenate(errors)).mean() for name, errors in sensors.naive(split).items()}
    assert found["seasonal naive (yesterday)"] == pytest.approx(0, abs=1e-5)
    steps = np.abs(np.diff(day))[sensors.DAY - 1 :]
    assert found["last value"] == pytest.approx(steps.mean(), rel=1e-5)


def test_adding_asks_once_for_the_marked_sum() -> None:
    """One mark in each half; only the last step is asked about."""
    for inputs, targets, predicted in adding.load(steps=20).splits["test"].items:
        marks = np.flatnonzero(inputs[:, 1])
        assert len(marks) == 2
        assert marks[0] < 10 <= marks[1]
        assert targets[-1, 0] == pytest.approx(inputs[marks, 0].sum())
        assert predicted.tolist() == [False] * 19 + [True]
    (always,) = adding.load(steps=20).references
    assert always.value == pytest.approx(1, abs=0.05), "in deviations, as the scores are"


def test_digits_are_rows_with_one_answer() -> None:
    """1797 images of 8 rows, answered at the eighth; every digit is in every split."""
    found = data.load("digits")
    assert sum(len(split) for split in found.splits.values()) == 1797
    for split in found.splits.values():
        assert {int(targets[-1]) for _, targets, _ in split.items} == set(range(10))
        assert {float(inputs.min()) for inputs, _, _ in split.items} == {0}
        assert max(float(inputs.max()) for inputs, _, _ in split.items) == 1
        assert all(inputs.shape == (8, 8) and predicted.sum() == 1 for inputs, _, predicted in split.items)


def test_padding_is_never_predicted() -> None:
    """Collating pads with zeros and marks the padding as not asked about."""
    short, long = np.ones((3, 2), dtype=np.uint8), np.ones((6, 2), dtype=np.uint8)
    inputs, targets, predicted = collate([next_step(short), next_step(long)])
    assert inputs.shape == targets.shape == (2, 5, 2)
    assert inputs.dtype == torch.float32
    assert predicted.tolist() == [[True, True, False, False, False], [True] * 5]
    assert not inputs[0, 2:].any()


def test_ids_stay_integers_when_collated() -> None:
    """int64 sequences are padded, not converted."""
    inputs, _, _ = collate([next_step(np.arange(4)), next_step(np.arange(6))])
    assert inputs.dtype == torch.int64


def test_a_sequence_of_one_step_is_refused() -> None:
    """There is nothing to predict in it."""
    with pytest.raises(DataError, match="1 steps leaves nothing"):
        next_step(np.zeros((1, 88)))


def test_an_empty_split_is_refused() -> None:
    """A split without sequences has no mean."""
    with pytest.raises(DataError, match="no sequences"):
        Split([])


@pytest.mark.data
@pytest.mark.parametrize(("name", "steps"), [("chorales", (13807, 4602, 4725)), ("nottingham", (176561, 45513, 44463))])
def test_the_real_files_have_their_known_sizes(name: str, steps: tuple[int, ...], latch_data: Path) -> None:
    """Frames per split are those of the data's README, one less a sequence."""
    for split, count in zip(data.load(name).splits.values(), steps, strict=True):
        assert sum(len(inputs) for inputs, _, _ in split.items) == count - len(split)


def test_another_mnist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is in it: files are compressed anew here and there."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(10_008)))
    monkeypatch.setenv("LATCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"t10k-labels.* holds something with md5 .*, not 27ae3e4e"):
        mnist.read("t10k-labels-idx1-ubyte")
