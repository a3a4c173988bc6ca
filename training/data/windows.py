"""How a long sequence is cut for training and for scoring.

Its one rule: every step that may be asked about is asked about at least once. It must not know what the values are.
"""

import numpy as np

from training.data.sequences import Item

# A scored piece is so many windows long, after one window in which the state settles.
PIECE = 8


def pieces(split: str, items: list[Item], window: int) -> list[Item]:
    """The sequences of the train split in windows, those of the others in pieces to score."""
    cut = training_windows if split == "train" else scoring_pieces
    return [piece for item in items for piece in cut(item, window)]


def training_windows(item: Item, window: int) -> list[Item]:
    """Overlapping windows of `window` steps, so that the state starts from zero in many places.

    They begin at odd distances: windows as long as a season would all begin at the same hour, and a model could count
    its steps instead of reading its inputs.
    """
    steps, apart = len(item[0]), window // 2 + 1
    starts = range(0, max(1, steps - window + apart), apart)
    return [_cut(item, start, min(start + window, steps)) for start in starts if item[2][start : start + window].any()]


def scoring_pieces(item: Item, window: int) -> list[Item]:
    """Long pieces side by side, each begun up to `window` steps earlier, where nothing is asked about yet."""
    pieces = []
    for start in range(0, len(item[0]), PIECE * window):
        early, end = max(0, start - window), min(start + PIECE * window, len(item[0]))
        inputs, targets, predicted = _cut(item, early, end)
        if predicted[start - early :].any():
            pieces.append((inputs, targets, predicted & (np.arange(early, end) >= start)))
    return pieces


def _cut(item: Item, start: int, end: int) -> Item:
    inputs, targets, predicted = item
    return inputs[start:end], targets[start:end], predicted[start:end]
