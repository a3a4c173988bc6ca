"""Recordings in folders: frames of the past alone, splits of every label, errors that name the file."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from training.data import wav
from training.data.wav import Options, band_edges, log_mel
from training.errors import DataError

RATE = 8000


def tone(hertz: float, seconds: float = 0.2, seed: int = 0) -> np.ndarray:
    """A tone in a little noise, 16 bits."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(time)) * 0.01
    return (20000 * (0.5 * np.sin(2 * np.pi * hertz * time) + noise)).astype(np.int16)


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """Ten low tones and ten high ones."""
    for label, hertz in (("low", 300.0), ("high", 2000.0)):
        (tmp_path / "tones" / label).mkdir(parents=True)
        for take in range(10):
            wavfile.write(tmp_path / "tones" / label / f"{take}.wav", RATE, tone(hertz, 0.1 + take / 50, take))
    return tmp_path / "tones"


def test_every_frame_of_a_recording_has_its_label(tones: Path) -> None:
    """Labels are folders in order of name; each is in every split; the notes count them."""
    data = wav.load(tones, Options())
    assert [name for name, _ in data.info.outputs] == ["high", "low"]
    assert len(data.info.inputs) == wav.BANDS
    for split in data.splits.values():
        assert {int(label) for _, labels, _ in split.items for label in np.unique(labels)} == {0, 1}
        assert all(len(set(labels.tolist())) == 1 and predicted.all() for _, labels, predicted in split.items)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 14, "valid": 2, "test": 4}
    assert data.notes[0].startswith("20 recordings at 8000 Hz")
    assert {one.name: one.value for one in data.references}[
        "class with the nearest mean input of whole recordings, each once"
    ] == 1


def test_a_frame_is_made_of_what_came_before_its_end() -> None:
    """Frames of a beginning are the first frames of the whole."""
    samples = tone(440) / 32768
    whole = log_mel(samples, RATE)
    assert whole.shape == (1 + (1600 - 200) // 80, wav.BANDS)
    np.testing.assert_array_equal(log_mel(samples[: 200 + 5 * 80], RATE), whole[:6])


def test_a_frame_is_the_energy_of_its_samples_in_triangles() -> None:
    """By the sum that defines a Fourier transform, of samples under a Hann window; where triangles have some width."""
    samples, n = tone(440)[:200] / 32768, np.arange(200)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 199)
    energy = [abs(np.sum(samples * window * np.exp(-2j * np.pi * k * n / 200))) ** 2 / 200 for k in range(101)]
    edges = band_edges(RATE)
    for band in range(10, wav.BANDS):
        corners = edges[band : band + 3]
        sums = np.interp(40.0 * np.arange(101), corners, [0, 1, 0]) @ energy
        assert log_mel(samples, RATE)[0, band] == pytest.approx(np.log(sums + wav.FLOOR), rel=1e-5)


def test_a_long_recording_has_the_frames_of_its_parts() -> None:
    """It is not taken at once: for an hour that would be gigabytes."""
    hop, frames = RATE // 100, 10_000
    samples = np.random.default_rng(0).normal(size=200 + (frames - 1) * hop) / 10
    whole = log_mel(samples, RATE)
    assert whole.shape == (frames, wav.BANDS)
    for start in range(0, frames, 500):
        part = samples[start * hop : 200 + (start + 499) * hop]
        np.testing.assert_allclose(whole[start : start + 500], log_mel(part, RATE), rtol=1e-6)


@pytest.mark.parametrize("hertz", [150.0, 700.0, 2000.0, 3500.0])
def test_the_loudest_band_is_the_tones(hertz: float) -> None:
    """To a band's width; silence is the floor in all of them."""
    loudest = int(log_mel(tone(hertz) / 32768, RATE).mean(axis=0).argmax())
    edges = band_edges(RATE)
    assert edges[loudest] - 20 <= hertz <= edges[loudest + 2] + 20
    np.testing.assert_allclose(log_mel(np.zeros(400), RATE), np.log(wav.FLOOR))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_kinds_of_samples_mean_the_same(tmp_path: Path, kind: type[np.generic]) -> None:
    """8, 16 and 32 bits and floats, and two channels, within what 8 bits can say."""
    sound = tone(440) / 32768
    coded = {
        np.uint8: (sound * 128 + 128).round(), np.int16: sound * 2**15, np.int32: sound * 2**31, np.float32: sound,
    }[kind].astype(kind)  # fmt: skip
    wavfile.write(tmp_path / "a.wav", RATE, np.stack((coded, coded), axis=1))
    rate, samples = wav.decode(tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes())
    assert rate == RATE
    np.testing.assert_allclose(samples, sound, atol=1 / 100)


@pytest.mark.parametrize(("kind", "peak"), [(np.float32, 1e20), (np.float64, 1e200), (np.float32, 20000)])
def test_samples_of_another_scale_are_refused(tmp_path: Path, kind: type[np.floating], peak: float) -> None:
    """Silence would be another one, and a client has but one scale; a little over 1 is sound that was mixed."""
    for loudest in (1.9, peak):
        wavfile.write(tmp_path / "a.wav", RATE, np.array([0.5, -loudest, 0], kind))
        content = (tmp_path / "a.wav").read_bytes()
        if loudest < 2:
            assert wav.decode(tmp_path / "a.wav", content)[1].min() == pytest.approx(-1.9)
    with pytest.raises(
        DataError, match=rf"a\.wav has samples up to {re.escape(f'{peak:.6g}')}: scale them, .* \[-1, 1\]"
    ):
        wav.decode(tmp_path / "a.wav", content)


def test_what_is_wrong_is_told_by_file(tones: Path) -> None:
    """Another rate, too short a sound, half a file, too few of a label, no labels."""
    path = tones / "low" / "x.wav"
    wavfile.write(path, 16000, tone(300))
    with pytest.raises(DataError, match=r"x\.wav has 16000 samples a second, but .*0\.wav has 8000"):
        wav.load(tones, Options())
    wavfile.write(path, RATE, tone(300)[:100])
    with pytest.raises(DataError, match=r"x\.wav lasts 12 ms; a frame needs 25"):
        wav.load(tones, Options())
    path.write_bytes((tones / "low" / "0.wav").read_bytes()[:30])
    with pytest.raises(DataError, match=r"x\.wav is not a readable \.wav file"):
        wav.load(tones, Options())
    path.write_bytes((tones / "low" / "0.wav").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"x\.wav is not whole: \d+ bytes of its sound"):
        wav.load(tones, Options())
    whole = (tones / "low" / "0.wav").read_bytes()
    for size in (2**32 - 1, len(whole)):  # of a writer that could not go back, or did not count right
        path.write_bytes(whole[:4] + size.to_bytes(4, "little") + whole[8:])
        np.testing.assert_array_equal(
            wav.decode(path, path.read_bytes())[1], wav.decode(tones / "low" / "0.wav", whole)[1]
        )
    path.unlink()
    for take in range(2, 10):
        (tones / "low" / f"{take}.wav").unlink()
    with pytest.raises(DataError, match="low: 2 recordings leave the valid split without one"):
        wav.load(tones, Options())
    with pytest.raises(DataError, match=r"a folder of \.wav files for each of two labels or more; found none"):
        wav.load(tones / "low", Options())
    for each in tones.glob("*/*.wav"):
        wavfile.write(each, 40, tone(300))
    with pytest.raises(DataError, match=r"0\.wav has 40 samples a second; a frame begins every 10 ms"):
        wav.load(tones, Options())


def test_long_recordings_are_cut_for_training_and_scored_once(tones: Path) -> None:
    """Windows overlap, pieces do not, and what is measured of the training part is measured of whole recordings."""
    whole, cut = wav.load(tones, Options()), wav.load(tones, Options(window=5))
    count = {
        name: [sum(int(asked.sum()) for _, _, asked in data.splits[name].items) for data in (whole, cut)]
        for name in ("train", "valid", "test")
    }
    assert count["valid"][0] == count["valid"][1]
    assert count["test"][0] == count["test"][1]
    assert count["train"][0] == sum(len(frames) for frames, _, _ in cut.uncut) <= count["train"][1]
    assert max(len(frames) for frames, _, _ in cut.splits["train"].items) == 5


def test_recordings_are_drawn(tones: Path) -> None:
    """Not taken in the order of their names, which may be that of speakers; the same ones every time."""
    parts = wav.split(tones, [0] * 10 + [1] * 10, ["high", "low"], Options())
    assert sorted(row for rows in parts.values() for row in rows) == list(range(20))
    assert [sorted(row for row in parts["train"] if row < 10)] != [list(range(7))]
    assert parts == wav.split(tones, [0] * 10 + [1] * 10, ["high", "low"], Options())
