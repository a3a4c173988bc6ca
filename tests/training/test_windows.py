"""Cutting long sequences: nothing asked about is lost, nothing is scored twice."""

import numpy as np
import pytest

from training.data.sequences import Item
from training.data.windows import PIECE, scoring_pieces, training_windows


def counted(steps: int, asked: slice = slice(None)) -> Item:
    """A sequence of its own step numbers, asked about in `asked`."""
    number = np.arange(steps, dtype=np.float32)[:, None]
    predicted = np.zeros(steps, dtype=np.bool_)
    predicted[asked] = True
    return number, number + 1, predicted


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 12, 13, 100])
def test_windows_cover_every_step(steps: int) -> None:
    """None is longer than asked, the first begins at 0, and each step is in at least one."""
    windows = training_windows(counted(steps), 8)
    assert max(len(inputs) for inputs, _, _ in windows) == min(8, steps)
    assert windows[0][0][0, 0] == 0
    assert {int(step) for inputs, _, _ in windows for step in inputs[:, 0]} == set(range(steps))


def test_windows_begin_at_all_hours() -> None:
    """Windows of eight days do not all begin at the same hour of the day."""
    starts = {int(inputs[0, 0]) % 24 for inputs, _, _ in training_windows(counted(5000), 192)}
    assert starts == set(range(24))


def test_windows_that_nothing_is_asked_of_are_left_out() -> None:
    """They would only cost time."""
    assert len(training_windows(counted(100, slice(95, None)), 8)) < 4
    (piece,) = scoring_pieces(counted(200, slice(60)), 8)  # the next one begins early enough to see some of these
    assert piece[2].sum() == 60


@pytest.mark.parametrize("steps", [1, 64, 65, 200])
def test_pieces_score_every_step_once(steps: int) -> None:
    """Each begins a window early, and only its own part is asked about."""
    pieces = scoring_pieces(counted(steps), 8)
    asked = [int(step) for inputs, _, predicted in pieces for step in inputs[predicted, 0]]
    assert asked == list(range(steps))
    for inputs, _, predicted in pieces[1:]:
        assert predicted.argmax() == 8
        assert len(inputs) <= (PIECE + 1) * 8


def test_what_was_not_asked_about_stays_so() -> None:
    """Pieces do not ask about more than the sequence did."""
    asked = [int(s) for inputs, _, p in scoring_pieces(counted(200, slice(50, 150)), 8) for s in inputs[p, 0]]
    assert asked == list(range(50, 150))
