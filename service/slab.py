"""`StateSlab`: the hidden states of all sessions of one model, one row each.

Rule: `commit` is the only function that moves a state, and it moves state, step number and kept reply together.
It knows neither sessions nor the runtime.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from service.errors import CapacityExceeded
from service.manifest import Array, StatePair, initial_state

_FIRST_ROWS = 64


class Slot(NamedTuple):
    """A row, and the generation that tells this owner from the next one of the same row."""

    row: int
    generation: int


class Kept(NamedTuple):
    """The last committed request of a slot: what a duplicate of it is answered with.

    `outputs` (name -> [T, *shape]) is None where it was larger than the keep limit.
    """

    first_step: int
    digest: bytes
    outputs: dict[str, Array] | None


class Commit(NamedTuple):
    """What one finished request does to its slot: the step it arrives at, and what to keep of it."""

    slot: Slot
    step: int
    kept: Kept | None


class StateSlab:
    """Rows for up to `capacity` sessions; memory grows with the sessions there are.

    Args:
        pairs: the state tensors of the model.
        capacity: most sessions at a time.
    """

    def __init__(self, pairs: Sequence[StatePair], capacity: int) -> None:
        self._capacity = capacity
        self._pairs = pairs
        rows = min(capacity, _FIRST_ROWS)
        self._state = [np.zeros((rows, *pair.shape), pair.dtype) for pair in pairs]
        self._step = [0] * rows
        self._kept: list[Kept | None] = [None] * rows
        self._generation = [0] * rows
        self._free = list(range(rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._step) - len(self._free)

    def acquire(self) -> Slot:
        """Takes a free row and puts the initial state into it.

        Raises:
            CapacityExceeded: all `capacity` rows are taken.
        """
        if not self._free:
            self._grow()
        index = self._free.pop()
        for rows, initial in zip(self._state, self.initial(1), strict=True):
            rows[index] = initial[0]
        return Slot(index, self._generation[index])

    def release(self, slot: Slot) -> None:
        """Gives the row back; whatever still carries this slot is stale from here on. A second release is a no-op."""
        if self.is_live(slot):
            self._generation[slot.row] += 1
            self._step[slot.row] = 0
            self._kept[slot.row] = None
            self._free.append(slot.row)

    def is_live(self, slot: Slot) -> bool:
        """Whether the row still belongs to the one who acquired `slot`."""
        return self._generation[slot.row] == slot.generation

    def step(self, slot: Slot) -> int:
        """Steps committed so far; the next one is this plus 1."""
        return self._step[slot.row]

    def kept(self, slot: Slot) -> Kept | None:
        """The last committed request, if there was one."""
        return self._kept[slot.row]

    def initial(self, count: int) -> list[Array]:
        """The state of `count` sessions that have seen nothing, one [count, *shape] a pair."""
        return initial_state(self._pairs, count)

    def gather(self, slots: Sequence[Slot]) -> list[Array]:
        """Copies of the rows, one [B, *shape] a state pair."""
        index = [slot.row for slot in slots]
        return [rows[index] for rows in self._state]

    def commit(self, commits: Sequence[Commit], state: Sequence[Array]) -> list[bool]:
        """Moves every slot of `commits` to its new state, step and kept reply, or leaves it wholly untouched.

        Args:
            commits: one a slot.
            state: one [B, *shape] a state pair; row b belongs to `commits[b]`.

        Returns:
            For each slot whether it was live; a released one is left to its next owner.
        """
        live = [self.is_live(commit.slot) for commit in commits]
        rows = [b for b, is_live in enumerate(live) if is_live]
        index = [commits[b].slot.row for b in rows]
        for mine, new in zip(self._state, state, strict=True):
            mine[index] = new[rows]
        for b in rows:
            slot, step, kept = commits[b]
            self._step[slot.row] = step
            self._kept[slot.row] = kept
        return live

    def _grow(self) -> None:
        rows = len(self._step)
        more = min(rows, self._capacity - rows)
        if more <= 0:
            raise CapacityExceeded(
                f"all {self._capacity} sessions of this model are taken: end some, or raise LATCH_MAX_SESSIONS",
                limit=self._capacity,
                retry_after_ms=1000,
            )
        self._state = [np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]) for old in self._state]
        self._step += [0] * more
        self._kept += [None] * more
        self._generation += [0] * more
        self._free = list(range(rows + more - 1, rows - 1, -1))
