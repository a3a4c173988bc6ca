"""Rows, their owners and the one function that moves a state."""

import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import CapacityExceeded
from service.manifest import StatePair
from service.slab import Commits, Kept, Slot, StateSlab

PAIRS = [
    StatePair(name="h", input="h", output="h2", dtype="float32", shape=(3,), batch_axis=0),
    StatePair(name="n", input="n", output="n2", dtype="int64", shape=(), batch_axis=0, initial=(7,)),
]


def make_slab(capacity: int) -> StateSlab:
    """A slab whose time is the wall's."""
    return StateSlab(PAIRS, capacity, time.monotonic)


def take(slab: StateSlab) -> Slot:
    """A new slot with a row."""
    slot = Slot()
    slab.acquire(slot)
    return slot


def at(step: int, *slots: Slot) -> Commits:
    """Commits that arrive at `step`, the next slot one later, and keep each a request of one step."""
    steps = [step + i for i in range(len(slots))]
    return Commits(list(slots), steps, steps, [b"d" * 16] * len(slots), [b"reply"] * len(slots))


def rows(*values: float) -> list[np.ndarray]:
    """A state for each value: h filled with it, n its whole part."""
    return [np.array([[v] * 3 for v in values], np.float32), np.array([int(v) for v in values])]


def test_a_new_slot_has_the_initial_state() -> None:
    """Zeros, or what the manifest gives, at step 0 with nothing kept."""
    slab = make_slab(10)
    slot = take(slab)
    h, n = slab.gather([slot])
    assert h.tolist() == [[0.0, 0.0, 0.0]]
    assert n.tolist() == [7]
    assert (slab.step(slot), slab.kept(slot)) == (0, None)


def test_commit_moves_state_step_and_reply_together() -> None:
    """After a commit all three are the new ones; the neighbour's are the old ones."""
    slab = make_slab(10)
    mine, other = take(slab), take(slab)
    kept = Kept(5, b"d" * 16, b"reply")
    assert slab.commit(at(5, mine), rows(2.5)) == [True]
    assert slab.gather([mine])[0].tolist() == [[2.5] * 3]
    assert (slab.step(mine), slab.kept(mine)) == (5, kept)
    assert slab.gather([other])[0].tolist() == [[0.0] * 3]
    assert (slab.step(other), slab.kept(other)) == (0, None)


def test_a_released_slot_never_leaks_into_its_next_owner() -> None:
    """A commit with the old slot is refused, even when the row has a new owner."""
    slab = make_slab(1)
    old = take(slab)
    row = old.row
    slab.release(old)
    new = take(slab)
    assert new.row == row
    assert not old.is_live
    assert slab.commit(at(9, old), rows(4.0)) == [False]
    assert slab.gather([new])[0].tolist() == [[0.0] * 3]
    assert (slab.step(new), slab.kept(new)) == (0, None)


def test_a_stale_row_does_not_shift_its_batch_mates() -> None:
    """With one dead slot in the middle of a batch, the live ones get their own rows."""
    slab = make_slab(3)
    a, b, c = (take(slab) for _ in range(3))
    slab.release(b)
    assert slab.commit(at(1, a, b, c), rows(1.0, 2.0, 3.0)) == [True, False, True]
    assert slab.gather([a, c])[0][:, 0].tolist() == [1.0, 3.0]
    assert (slab.step(a), slab.step(c)) == (1, 3)


def test_releasing_twice_frees_one_row_once() -> None:
    """Two clients never share a row because of a double release."""
    slab = make_slab(2)
    slot = take(slab)
    slab.release(slot)
    slab.release(slot)
    assert take(slab).row != take(slab).row


def test_capacity_is_bounded_and_comes_back() -> None:
    """One more than the capacity is refused with the limit; a release makes room."""
    slab = make_slab(100)
    slots = [take(slab) for _ in range(100)]
    with pytest.raises(CapacityExceeded) as caught:
        take(slab)
    assert caught.value.extras["limit"] == 100
    row = slots[42].row
    slab.release(slots[42])
    assert take(slab).row == row


def test_growing_keeps_what_is_there() -> None:
    """States survive the moves to larger arrays."""
    slab = make_slab(1000)
    slots = []
    for i in range(1000):
        slots.append(take(slab))
        slab.commit(at(i, slots[-1]), rows(float(i)))
    assert slab.gather(slots)[0][:, 0].tolist() == list(range(1000))
    assert [slab.step(slot) for slot in slots] == list(range(1000))
    assert len(slab) == 1000


def test_idle_slots_are_found_by_their_own_time() -> None:
    """Each has its own limit, counted from its last use; a released one is never found."""
    now = [100.0]
    slab = StateSlab(PAIRS, 10, lambda: now[0])
    short, long, gone, never = (Slot() for _ in range(4))
    for slot, ttl in ((short, 5.0), (long, 50.0), (gone, 1.0), (never, np.inf)):
        slab.acquire(slot, ttl)
    slab.release(gone)
    now[0] += 5
    assert slab.idle() == [short]
    assert [slab.is_idle(slot) for slot in (short, long, gone, never)] == [True, False, True, False]
    slab.touch(short)
    assert (slab.idle(), slab.time_left(short), slab.time_left(gone)) == ([], 5.0, 0.0)
    now[0] += 4
    slab.commit(at(1, short), rows(1.0))
    assert slab.time_left(short) == 5.0
    now[0] += 46
    assert slab.idle() == [short, long]


def test_who_was_acquired_last_is_the_last_to_go() -> None:
    """However little time it has left: it was loaded for somebody who is about to use it."""
    now = 0.0
    slab = StateSlab(PAIRS, 4, lambda: now)
    slots = [Slot() for _ in range(3)]
    for slot in slots:
        now += 1
        slab.acquire(slot, 60.0)
    slab.expire_in(slots[2], 5.0)
    now += 1
    slab.touch(slots[0])
    assert list(slab.oldest()) == [slots[1], slots[2], slots[0]]
    slab.commit(at(1, slots[1]), rows(1.0))
    assert next(slab.oldest()) is slots[2]


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_a_commit_is_use_of_all_its_slots(count: int) -> None:
    """However many there are: none of them is idle, and none the next to go."""
    now = 100.0
    slab = StateSlab(PAIRS, 20, lambda: now)
    used, other = [Slot() for _ in range(count)], Slot()
    for slot in (*used, other):
        slab.acquire(slot, 5.0)
    now += 4
    slab.commit(at(1, *used), rows(*range(count)))
    assert {slab.time_left(slot) for slot in used} == {5.0}
    assert next(slab.oldest()) is other
    now += 2
    assert slab.idle() == [other]


class SlabMachine(RuleBasedStateMachine):
    """Any order of acquire, commit and release, compared with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = make_slab(70)
        self.model: dict[Slot, tuple[float, int, Kept | None]] = {}
        self.dead: list[Slot] = []

    @precondition(lambda self: len(self.model) < 70)
    @rule()
    def acquire(self) -> None:
        """A fresh slot is nobody else's."""
        slot = take(self.slab)
        assert slot not in self.model
        assert slot not in self.dead
        self.model[slot] = (0.0, 0, None)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), value=st.integers(0, 1000))
    def commit(self, data: st.DataObject, value: int) -> None:
        """A commit to some live slots, and a dead one between them, moves the live ones, be they few or many."""
        live = data.draw(st.lists(st.sampled_from(list(self.model)), unique=True, min_size=1, max_size=8))
        slots = [*live[:1], *self.dead[-1:], *live[1:]]
        values = [float(value + b) for b in range(len(slots))]
        firsts = [self.model[slot][1] + 1 if slot in self.model else 1 for slot in slots]
        kept = [Kept(first, bytes([b]) * 16, bytes([b])) for b, first in enumerate(firsts)]
        commits = Commits(
            slots, [first + 2 for first in firsts], firsts, [one.digest for one in kept], [one.reply for one in kept]
        )
        assert self.slab.commit(commits, rows(*values)) == [slot in self.model for slot in slots]
        for slot, now, first, one in zip(slots, values, firsts, kept, strict=True):
            if slot in self.model:
                self.model[slot] = (now, first + 2, one)

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
        for slot, (value, step, kept) in self.model.items():
            assert slot.is_live
            assert (self.slab.step(slot), self.slab.kept(slot)) == (step, kept)
            assert self.slab.gather([slot])[0].tolist() == [[value] * 3]
        if self.model:
            assert self.slab.gather(list(self.model))[0][:, 0].tolist() == [
                value for value, _, _ in self.model.values()
            ]
        assert not any(slot.is_live for slot in self.dead)


SlabMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestSlabMachine = SlabMachine.TestCase
