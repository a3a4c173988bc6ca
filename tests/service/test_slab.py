"""Rows, generations and the one function that moves a state."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import CapacityExceeded
from service.manifest import StatePair
from service.slab import Commit, Kept, Slot, StateSlab

PAIRS = [
    StatePair(name="h", input="h", output="h2", dtype="float32", shape=(3,), batch_axis=0),
    StatePair(name="n", input="n", output="n2", dtype="int64", shape=(), batch_axis=0, initial=(7,)),
]


def rows(*values: float) -> list[np.ndarray]:
    """A state for each value: h filled with it, n its whole part."""
    return [np.array([[v] * 3 for v in values], np.float32), np.array([int(v) for v in values])]


def test_a_new_slot_has_the_initial_state() -> None:
    """Zeros, or what the manifest gives, at step 0 with nothing kept."""
    slab = StateSlab(PAIRS, 10)
    slot = slab.acquire()
    h, n = slab.gather([slot])
    assert h.tolist() == [[0.0, 0.0, 0.0]]
    assert n.tolist() == [7]
    assert (slab.step(slot), slab.kept(slot)) == (0, None)


def test_commit_moves_state_step_and_reply_together() -> None:
    """After a commit all three are the new ones; the neighbour's are the old ones."""
    slab = StateSlab(PAIRS, 10)
    mine, other = slab.acquire(), slab.acquire()
    kept = Kept(1, b"d", {})
    assert slab.commit([Commit(mine, 5, kept)], rows(2.5)) == [True]
    assert slab.gather([mine])[0].tolist() == [[2.5] * 3]
    assert (slab.step(mine), slab.kept(mine)) == (5, kept)
    assert slab.gather([other])[0].tolist() == [[0.0] * 3]
    assert (slab.step(other), slab.kept(other)) == (0, None)


def test_a_released_slot_never_leaks_into_its_next_owner() -> None:
    """A commit with the old generation is refused, even when the row has a new owner."""
    slab = StateSlab(PAIRS, 1)
    old = slab.acquire()
    slab.release(old)
    new = slab.acquire()
    assert new.row == old.row
    assert slab.commit([Commit(old, 9, Kept(1, b"", {}))], rows(4.0)) == [False]
    assert slab.gather([new])[0].tolist() == [[0.0] * 3]
    assert (slab.step(new), slab.kept(new)) == (0, None)


def test_a_stale_row_does_not_shift_its_batch_mates() -> None:
    """With one dead slot in the middle of a batch, the live ones get their own rows."""
    slab = StateSlab(PAIRS, 3)
    a, b, c = (slab.acquire() for _ in range(3))
    slab.release(b)
    commits = [Commit(slot, i, None) for i, slot in enumerate([a, b, c], start=1)]
    assert slab.commit(commits, rows(1.0, 2.0, 3.0)) == [True, False, True]
    assert slab.gather([a, c])[0][:, 0].tolist() == [1.0, 3.0]
    assert (slab.step(a), slab.step(c)) == (1, 3)


def test_releasing_twice_frees_one_row_once() -> None:
    """Two clients never share a row because of a double release."""
    slab = StateSlab(PAIRS, 2)
    slot = slab.acquire()
    slab.release(slot)
    slab.release(slot)
    assert slab.acquire().row != slab.acquire().row


def test_capacity_is_bounded_and_comes_back() -> None:
    """One more than the capacity is refused with the limit; a release makes room."""
    slab = StateSlab(PAIRS, 100)
    slots = [slab.acquire() for _ in range(100)]
    with pytest.raises(CapacityExceeded) as caught:
        slab.acquire()
    assert caught.value.extras["limit"] == 100
    slab.release(slots[42])
    assert slab.acquire().row == slots[42].row


def test_growing_keeps_what_is_there() -> None:
    """States survive the moves to larger arrays."""
    slab = StateSlab(PAIRS, 1000)
    slots = []
    for i in range(1000):
        slots.append(slab.acquire())
        slab.commit([Commit(slots[-1], i, None)], rows(float(i)))
    assert slab.gather(slots)[0][:, 0].tolist() == list(range(1000))
    assert [slab.step(slot) for slot in slots] == list(range(1000))
    assert len(slab) == 1000


class SlabMachine(RuleBasedStateMachine):
    """Any order of acquire, commit and release, compared with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = StateSlab(PAIRS, 70)
        self.model: dict[Slot, tuple[float, int]] = {}
        self.dead: list[Slot] = []

    @precondition(lambda self: len(self.model) < 70)
    @rule()
    def acquire(self) -> None:
        """A fresh slot is nobody else's."""
        slot = self.slab.acquire()
        assert slot not in self.model
        assert slot not in self.dead
        self.model[slot] = (0.0, 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), value=st.integers(0, 1000))
    def commit(self, data: st.DataObject, value: int) -> None:
        """A commit to live and dead slots at once moves the live ones."""
        live = data.draw(st.sampled_from(list(self.model)))
        slots = [live, *self.dead[-1:]]
        step = self.model[live][1] + 1
        assert self.slab.commit([Commit(s, step, None) for s in slots], rows(*[float(value)] * len(slots)))[0]
        self.model[live] = (float(value), step)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A released slot is dead for ever."""
        slot = data.draw(st.sampled_from(list(self.model)))
        self.slab.release(slot)
        del self.model[slot]
        self.dead.append(slot)

    @invariant()
    def states_are_the_models(self) -> None:
        """Every live slot holds what was last committed to it."""
        assert len(self.slab) == len(self.model)
        for slot, (value, step) in self.model.items():
            assert self.slab.is_live(slot)
            assert self.slab.step(slot) == step
            assert self.slab.gather([slot])[0][0, 0] == value
        assert not any(self.slab.is_live(slot) for slot in self.dead)


SlabMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestSlabMachine = SlabMachine.TestCase
