"""The user's own recordings in folders named by their labels: which label, after every 10 ms.

Its one rule: a frame is made of samples that came before its end, so a client can make it as they come. It must not
know units or training.

A client sends, every 10 ms, the row that `log_mel` makes of the last 25 ms: the logarithms of 40 mel energies.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile

from training.config import DataInfo
from training.data.arrays import class_baselines
from training.data.sequences import DataSet, Item, Split
from training.data.splits import SPLITS, check_percentages, slices
from training.data.windows import pieces
from training.errors import DataError

FRAME_SECONDS, HOP_SECONDS, BANDS = 0.025, 0.010, 40
FLOOR = 1e-6  # energy that stands for silence: samples are within [-1, 1]
# Of samples that are floats: mixing and resampling take sound over 1, by less than 6 dB; another scale by far more.
LOUDEST = 2.0
_AT_ONCE = 4096  # frames: those of an hour are gigabytes, as samples and as tones

Frames = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """`split` are percentages of each label's recordings, drawn by `draw`; training sequences are `window` frames."""

    split: tuple[int, ...] = (70, 15, 15)
    window: int = 200
    draw: int = 1
    licence: str = "the user's own; not stated"

    def __post_init__(self) -> None:
        check_percentages(self.split)
        if self.window < 1:
            raise DataError(f"window must be at least 1, not {self.window}")


def band_edges(rate: int) -> NDArray[np.float64]:
    """Corners of the mel bands in Hz [BANDS + 2], from 0 to half of `rate`, evenly spaced in mel (O'Shaughnessy)."""
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges: NDArray[np.float64] = 700 * (10 ** (np.linspace(0, highest, BANDS + 2) / 2595) - 1)
    return edges


def log_mel(samples: NDArray[np.floating], rate: int) -> Frames:
    """Samples [N] within [-1, 1] -> frames [1 + (N - 25 ms) // 10 ms, BANDS], each of the 25 ms before its end."""
    size, hop = round(FRAME_SECONDS * rate), round(HOP_SECONDS * rate)
    edges, tones = band_edges(rate), np.fft.rfftfreq(size, 1 / rate)
    # At low tones a band may lie between two bins: no triangle is narrower than a bin.
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rise = (tones - low) / np.maximum(middle - low, rate / size)
    fall = (high - tones) / np.maximum(high - middle, rate / size)
    bands, window = np.maximum(0, np.minimum(rise, fall)), np.hanning(size)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    made = np.empty((len(frames), BANDS), np.float32)
    for start in range(0, len(frames), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        energy = np.square(np.abs(np.fft.rfft(frames[part] * window, axis=1))) / size
        made[part] = np.log(energy @ bands.T + FLOOR)
    return made


def load(path: Path, options: Options) -> DataSet:
    """The recordings `path`/<label>/*.wav; DataError names the file that is not right."""
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() == ".wav" and file.is_file())
    labels = sorted({file.parent.name for file in files})
    if len(labels) < 2:
        raise DataError(
            f"{path} must hold a folder of .wav files for each of two labels or more; found {labels or 'none'}"
        )
    digest = hashlib.sha256()
    rates: dict[int, Path] = {}
    made: list[Item] = []
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path)}\0{len(content)}\0".encode() + content)
        rate, samples = decode(file, content)
        rates.setdefault(rate, file)
        if len(rates) > 1:
            (first, one), (other, another) = rates.items()
            raise DataError(f"{another} has {other} samples a second, but {one} has {first}: convert them to one rate")
        if round(HOP_SECONDS * rate) < 1:
            raise DataError(f"{file} has {rate} samples a second; a frame begins every {1000 * HOP_SECONDS:.0f} ms")
        if len(samples) < round(FRAME_SECONDS * rate):
            raise DataError(
                f"{file} lasts {1000 * len(samples) / rate:.0f} ms; a frame needs {1000 * FRAME_SECONDS:.0f}"
            )
        frames = log_mel(samples, rate)
        label = np.full(len(frames), labels.index(file.parent.name), dtype=np.int64)
        made.append((frames, label, np.ones(len(frames), dtype=np.bool_)))
    parts = split(path, [labels.index(file.parent.name) for file in files], labels, options)
    whole = {name: [made[index] for index in part] for name, part in parts.items()}
    (rate,) = rates
    info = DataInfo(
        name=path.name,
        description=f"label of a recording after every 10 ms; send log-mel frames of sound at {rate} Hz "
        "(training/data/wav.py, log_mel)",
        task="classification",
        head="categorical",
        inputs=tuple((f"mel band at {middle:.0f} Hz", "log energy") for middle in band_edges(rate)[1:-1]),
        outputs=tuple((label, "") for label in labels),
        source=path.name,
        sha256=digest.hexdigest(),
        split=f"{'/'.join(map(str, options.split))}% of each label's recordings, drawn",
        licence=options.licence,
        standardise=True,
    )
    notes = (
        f"{len(files)} recordings at {rate} Hz, {sum(len(item[0]) for item in made) / 100:.0f} s, {len(labels)} labels",
    )
    return DataSet(
        info,
        {name: Split(pieces(name, items, options.window)) for name, items in whole.items()},
        class_baselines(whole, len(labels), " of whole recordings, each once"),
        notes,
        whole["train"],
    )


def decode(file: Path, content: bytes) -> tuple[int, NDArray[np.float64]]:
    """Samples a second, and the samples [N] within [-1, 1], channels averaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", wavfile.WavFileWarning
            )  # chunks that hold no sound, sizes that are not kept
            found: tuple[int, NDArray[Any]] = wavfile.read(io.BytesIO(content))
    except Exception as error:  # scipy raises what its parsing meets: ValueError, struct.error, IndexError, ...
        raise DataError(f"{file} is not a readable .wav file ({error})") from error
    rate, samples = found
    if (missing := _missing(content)) > 0:
        raise DataError(f"{file} is not whole: {missing} bytes of its sound are not there")
    if samples.dtype == np.uint8:
        values = (samples.astype(np.float64) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        values = samples / -float(np.iinfo(samples.dtype).min)
    else:
        values = samples.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{file} holds samples that are not finite")
    if (peak := float(np.abs(values).max(initial=0))) > LOUDEST:
        raise DataError(f"{file} has samples up to {peak:.6g}: scale them, and those of all files alike, to [-1, 1]")
    return rate, values if values.ndim == 1 else values.mean(axis=1)


def _missing(content: bytes) -> int:
    """How many bytes of sound a .wav file says that it has, and has not; none where it does not say."""
    start = 12
    while content[:4] == b"RIFF" and start + 8 <= len(content):
        size = int.from_bytes(content[start + 4 : start + 8], "little")
        if content[start : start + 4] == b"data":
            return start + 8 + size - len(content) if size < 2**32 - 1 else 0
        start += 8 + size + size % 2
    return 0


def split(path: Path, labelled: list[int], labels: list[str], options: Options) -> dict[str, list[int]]:
    """Which recordings are in which split: so many of every label in each."""
    rng, parts = np.random.default_rng(options.draw), {name: list[int]() for name in SPLITS}
    for index, label in enumerate(labels):
        mine = rng.permutation(np.flatnonzero(np.array(labelled) == index))
        for name, part in slices(len(mine), options.split).items():
            if not len(mine[part]):
                raise DataError(f"{path / label}: {len(mine)} recordings leave the {name} split without one")
            parts[name] += mine[part].tolist()
    return parts
