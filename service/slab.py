"""`StateSlab`: the hidden states of all sessions of one model, one row each.

Rule: `commit` is the only function that moves a state, and it moves state, step number and kept reply together.
It knows neither sessions nor the runtime. What it keeps of a row beside the state is columns of numbers, not objects:
a million idle sessions cost little more than their states, and a run moves its rows with a few array operations.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.errors import CapacityExceeded
from service.manifest import Array, StatePair, initial_state

_FIRST_ROWS = 64
_FEW = 3  # rows, up to which they are written one by one: numpy's way takes as long for one as for four
_DIGEST = np.dtype("V16")


class Slot(msgspec.Struct, eq=False, gc=False):
    """A row of the slab and the right to it. `row` is -1 from the release on: whatever still carries the slot is stale,
    and can never be taken for the next owner of the same row.

    The garbage collector does not look at slots: there may be millions, and a release cuts every tie to them.
    """

    row: int = -1

    @property
    def is_live(self) -> bool:
        """Whether the row is still this owner's."""
        return self.row >= 0


class Kept(NamedTuple):
    """The last committed request of a slot: what a duplicate of it is answered with.

    `reply` (packed rows) is None where it was larger than the keep limit.
    """

    first_step: int
    digest: bytes
    reply: bytes | None


class Commits(NamedTuple):
    """What finished requests do to their slots, one entry a slot: the step it arrives at, and what to keep of it."""

    slots: list[Slot]
    steps: list[int]
    first_steps: list[int]
    digests: list[bytes]
    replies: list[bytes | None]

    def pick(self, rows: Sequence[int]) -> "Commits":
        """Some of the entries."""
        return Commits._make([column[b] for b in rows] for column in self)


class StateSlab:
    """Rows for up to `capacity` sessions; memory grows with the sessions there are.

    Args:
        pairs: the state tensors of the model.
        capacity: most sessions at a time.
        clock: monotonic seconds.
    """

    def __init__(self, pairs: Sequence[StatePair], capacity: int, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._clock = clock
        self._initial = initial_state(pairs, 1)
        rows = min(capacity, _FIRST_ROWS)
        self._state = [np.zeros((rows, *pair.shape), pair.dtype) for pair in pairs]
        self._step = np.zeros(rows, np.int64)
        self._kept_first = np.zeros(rows, np.int64)  # 0: nothing is kept
        self._kept_digest = np.zeros(rows, _DIGEST)
        self._idle_ttl = np.zeros(rows)
        self._deadline = np.full(rows, np.inf)
        self._used = np.zeros(rows)
        self._kept_reply: list[bytes | None] = [None] * rows
        self._owners: list[Slot | None] = [None] * rows
        self._view()
        self._free: list[int] = []  # rows that were released; those from `_fresh` on were never used
        self._fresh = 0

    def __len__(self) -> int:
        return self._fresh - len(self._free)

    def acquire(self, slot: Slot, idle_ttl: float = np.inf) -> None:
        """Gives the slot a free row in the initial state, to be idle for `idle_ttl` seconds at most.

        Raises:
            CapacityExceeded: all `capacity` rows are taken.
        """
        if self._free:
            row = self._free.pop()
        else:
            if self._fresh == len(self._owners):
                self._grow()
            row = self._fresh
            self._fresh += 1
        for rows, initial in zip(self._state, self._initial, strict=True):
            rows[row] = initial[0]
        self._idle_ttl[row] = idle_ttl
        self._owners[row] = slot
        slot.row = row
        self.touch(slot)

    def release(self, slot: Slot) -> None:
        """Gives the row back. A second release is a no-op."""
        row = slot.row
        if row >= 0:
            slot.row = -1
            self._step[row] = self._kept_first[row] = 0
            self._deadline[row] = np.inf
            self._kept_reply[row] = self._owners[row] = None
            self._free.append(row)

    def step(self, slot: Slot) -> int:
        """Steps committed so far; the next one is this plus 1. A released slot has none."""
        return self._step_of[slot.row] if slot.row >= 0 else 0

    def kept(self, slot: Slot) -> Kept | None:
        """The last committed request, if there was one."""
        first = int(self._kept_first[slot.row])
        return Kept(first, self._kept_digest[slot.row].tobytes(), self._kept_reply[slot.row]) if first else None

    def touch(self, slot: Slot) -> None:
        """The slot was used just now."""
        self._used[slot.row] = now = self._clock()
        self._deadline[slot.row] = now + self._idle_ttl[slot.row]

    def idle_ttl(self, slot: Slot) -> float:
        """Seconds that the slot may be idle."""
        return float(self._idle_ttl[slot.row])

    def time_left(self, slot: Slot) -> float:
        """Seconds until the slot has been idle for too long; a released one has."""
        return max(0.0, float(self._deadline[slot.row]) - self._clock()) if slot.row >= 0 else 0.0

    def is_idle(self, slot: Slot) -> bool:
        """Whether the slot has been idle for too long; a released one has."""
        return slot.row < 0 or self._deadline_of[slot.row] <= self._clock()

    def idle(self) -> list[Slot]:
        """The slots that have been idle for too long."""
        found = np.flatnonzero(self._deadline <= self._clock())
        return [slot for row in found.tolist() if (slot := self._owners[row]) is not None]

    def expire_in(self, slot: Slot, seconds: float) -> None:
        """Has the slot idle out after `seconds`, if nobody uses it before."""
        self._deadline[slot.row] = self._clock() + seconds

    def oldest(self) -> Iterator[Slot]:
        """The slots, those first that were not used here for longest; one that was just acquired was used."""
        for row in np.argsort(self._used[: self._fresh], kind="stable").tolist():
            if (slot := self._owners[row]) is not None:
                yield slot

    def are_in_use(self, slots: Sequence[Slot]) -> bool:
        """Whether all slots are live, and none has been idle for too long."""
        rows = _rows(slots)
        return bool(rows.min() >= 0 and (self._deadline[rows] > self._clock()).all())

    def begin(self, slots: Sequence[Slot], first_steps: Array) -> tuple[list[int], list[Array]] | None:
        """Steps committed so far, and what `gather` gives; None where a slot is released, or its next step is not the
        one named (0: any).
        """
        rows = _rows(slots)
        steps = self._step[rows]
        if rows.min() < 0 or ((first_steps != 0) & (first_steps != steps + 1)).any():
            return None
        return steps.tolist(), [state.take(rows, 0) for state in self._state]

    def gather(self, slots: Sequence[Slot]) -> list[Array]:
        """Copies of the rows, one [B, *shape] a state pair."""
        if len(slots) == 1:
            row = slots[0].row
            return [state[row : row + 1].copy() for state in self._state]
        rows = _rows(slots)
        return [state.take(rows, 0) for state in self._state]  # a third of the time of an index

    def commit(self, commits: Commits, state: Sequence[Array]) -> list[bool]:
        """Moves every slot of `commits` to its new state, step and kept reply, or leaves it wholly untouched.

        Args:
            commits: one entry a slot.
            state: one [B, *shape] a state pair; row b belongs to `commits.slots[b]`.

        Returns:
            For each slot whether it was live; a released one is left alone, and so is the next owner of its row.
        """
        live = [slot.row >= 0 for slot in commits.slots]
        if not all(live):
            picked = [b for b, is_live in enumerate(live) if is_live]
            commits, state = commits.pick(picked), [new[picked] for new in state]
        if len(commits.slots) > _FEW:
            self._commit_many(commits, state)
        else:
            self._commit_few(commits, state)
        return live

    def _commit_few(self, commits: Commits, state: Sequence[Array]) -> None:
        now = self._clock()
        for b, (slot, step, first_step, digest, reply) in enumerate(zip(*commits, strict=True)):
            row = slot.row
            for mine, new in zip(self._state, state, strict=True):
                mine[row] = new[b]
            self._step_of[row], self._kept_first_of[row] = step, first_step
            self._kept_digest_of[row * len(digest) : (row + 1) * len(digest)] = digest
            self._used_of[row], self._deadline_of[row] = now, now + self._idle_ttl_of[row]
            self._kept_reply[row] = reply

    def _commit_many(self, commits: Commits, state: Sequence[Array]) -> None:
        rows = _rows(commits.slots)
        for mine, new in zip(self._state, state, strict=True):
            mine[rows] = new
        self._step[rows] = commits.steps
        self._kept_first[rows] = commits.first_steps
        self._kept_digest[rows] = np.frombuffer(b"".join(commits.digests), _DIGEST)
        self._used[rows] = now = self._clock()
        self._deadline[rows] = now + self._idle_ttl[rows]
        for slot, reply in zip(commits.slots, commits.replies, strict=True):
            self._kept_reply[slot.row] = reply

    def _grow(self) -> None:
        rows = len(self._owners)
        more = min(rows, self._capacity - rows)
        if more <= 0:
            raise CapacityExceeded(
                f"all {self._capacity} sessions of this model are taken: end some, or raise LATCH_MAX_SESSIONS",
                limit=self._capacity,
                retry_after_ms=1000,
            )
        self._state = [_longer(column, more) for column in self._state]
        self._step, self._kept_first = _longer(self._step, more), _longer(self._kept_first, more)
        self._kept_digest, self._idle_ttl = _longer(self._kept_digest, more), _longer(self._idle_ttl, more)
        self._deadline, self._used = _longer(self._deadline, more), _longer(self._used, more)
        self._deadline[rows:] = np.inf
        self._kept_reply += [None] * more
        self._owners += [None] * more
        self._view()

    def _view(self) -> None:
        """One value of a column is read and written through a view: numpy takes three times as long for it."""
        self._step_of, self._kept_first_of = self._step.data, self._kept_first.data
        self._kept_digest_of = self._kept_digest.view(np.uint8).data
        self._used_of, self._deadline_of, self._idle_ttl_of = (
            column.view(np.uint8).data.cast("d") for column in (self._used, self._deadline, self._idle_ttl)
        )


def _rows(slots: Sequence[Slot]) -> NDArray[np.intp]:
    return np.array([slot.row for slot in slots], np.intp)


def _longer(column: Array, more: int) -> Array:
    """A copy with room for `more` rows, of which the system gives memory to those that are used only."""
    longer = np.zeros((len(column) + more, *column.shape[1:]), column.dtype)
    longer[: len(column)] = column
    return longer
