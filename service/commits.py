"""`Committer`: from what a run arrived at to the slab, by way of the store where sessions are stored.

Rule: a slot moves after its save and never before, and a caller is told after both. Who saved from an old copy, because
another replica was faster, loads the session again and goes by the step table once more.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from service.errors import Internal, LatchError, SessionNotFound
from service.ledger import Ledger, StoredSlot, Written, packed, unpacked
from service.manifest import Array
from service.queues import Queues, deleted, resolve
from service.slab import Commits, Slot, StateSlab
from service.snapshot import Snapshot, SnapshotCodec

log = logging.getLogger(__name__)


class MadeAnew(SessionNotFound):
    """There is a session of that id, but it is another one than the copy here was of."""

    def __init__(self) -> None:
        super().__init__("the session was deleted, and made anew: open it again")


class Arrival(Protocol):
    """Requests that were run and are not applied yet, one a slot."""

    @property
    def commits(self) -> Commits:
        """Where the slots shall stand."""

    @property
    def state(self) -> list[Array]:
        """One [B, *shape] a state pair."""

    def settle(self, rows: Sequence[int], live: Sequence[bool], store_seconds: float) -> None:
        """Answers some: those that are live are applied, the sessions of the others are gone."""

    def refuse(self, error: LatchError) -> None:
        """Answers all: nobody knows whether they are applied."""

    def again(self, row: int) -> None:
        """One was overtaken: it comes first when its slot resumes."""


class Committer:
    """Commits for one model.

    Args:
        slab: has the slots.
        queues: where slots stand in line.
        snapshots: packs what is stored.
        ledger: None where sessions live in the slab alone.
    """

    def __init__(self, slab: StateSlab, queues: Queues[Any], snapshots: SnapshotCodec, ledger: Ledger | None) -> None:
        self._slab = slab
        self._queues = queues
        self._snapshots = snapshots
        self._ledger = ledger
        self._writing: set[Slot] = set()
        self._used: set[StoredSlot] = set()  # since their last save; see `used`
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, slot: object) -> bool:
        """Whether the slot is on its way through the store; it gets back in line from here."""
        return slot in self._writing

    def commit(self, arrival: Arrival) -> bool:
        """Applies and answers, now or when it is saved. What is not stored must not come with what is.

        Returns:
            Whether it is to be saved first: then the slots get back in line from here, maybe soon.
        """
        commits, state = arrival.commits, arrival.state
        slots = commits.slots
        if self._ledger is None or not isinstance(slots[0], StoredSlot):
            arrival.settle(range(len(slots)), self._slab.commit(commits, state), 0.0)
            return False
        token = self._ledger.token()
        saved = packed(self._snapshots, commits, state)
        self._ledger.write(_stored(slots), token, saved, partial(self._written, arrival, token))
        self._writing.update(slots)
        return True

    def _written(self, arrival: Arrival, token: bytes, written: Written) -> None:
        slots, outcome = _stored(arrival.commits.slots), written.outcome
        if isinstance(outcome, LatchError):
            arrival.refuse(outcome)
            for slot in slots:
                self.drop(slot, outcome)
            self._resume(slots)
            return
        commits, state = arrival.commits, arrival.state
        rows: Sequence[int] = range(len(slots))
        overtaken: list[int] = []
        if not all(outcome):
            overtaken = [b for b in rows if not outcome[b] and slots[b].is_live]
            rows = [b for b in rows if b not in overtaken]
            commits, state = commits.pick(rows), [values[rows] for values in state]
        applied = _stored(commits.slots)
        for slot in applied:
            slot.token = token
        arrival.settle(rows, self._slab.commit(commits, state), written.seconds)
        self._resume(applied)
        for b in overtaken:
            arrival.again(b)
            self.refresh_later(slots[b])

    async def move(self, slot: Slot, snapshot: Snapshot, earlier: int = 0) -> bool:
        """Has a slot that is held stand elsewhere, and leaves it so many earlier saves.

        Returns:
            False where another replica was faster: the slot is up to date now, and has not moved.

        Raises:
            LatchError: it could not be saved, or the session is gone; the copy is dropped.
        """
        if not slot.is_live:  # what is known of where it stands is somebody else's
            raise deleted()
        commits, state = snapshot.commits(slot)
        if self._ledger is not None and isinstance(slot, StoredSlot):
            token, future = self._ledger.token(), asyncio.get_running_loop().create_future()
            saved = packed(self._snapshots, commits, state)
            self._ledger.write([slot], token, saved, partial(resolve, future), earlier)
            try:
                outcome = (await future).outcome
            except asyncio.CancelledError:
                self.drop(slot, SessionNotFound("the session is being loaded again: send this once more"))
                raise
            if isinstance(outcome, LatchError):
                self.drop(slot, outcome)
                raise outcome
            if not outcome[0]:
                await self.refresh(slot)
                return False
            slot.token = token
        if self._slab.commit(commits, state) != [True]:
            raise deleted()
        return True

    def used(self, slot: Slot) -> None:
        """Notes a use that is not saved, such as a retry: a store that counts time hears of it before it is next asked
        for the session, or from whoever calls `take_used`.
        """
        if self._ledger is not None and self._ledger.store.is_durable and isinstance(slot, StoredSlot):
            self._used.add(slot)

    def is_used(self, slot: StoredSlot) -> bool:
        """Whether the slot had such a use since `take_used` was last called."""
        return slot in self._used

    def take_used(self) -> set[StoredSlot]:
        """The slots with such a use since this was last asked."""
        used, self._used = self._used, set()
        return used

    async def refresh(self, slot: StoredSlot) -> None:
        """Brings a slot that is out of line up to date with the store.

        Raises:
            LatchError: the store cannot be asked, or the session is gone; the copy is dropped.
        """
        assert self._ledger is not None  # noqa: S101 - who has stored slots has a ledger
        try:
            if slot in self._used:
                self._used.discard(slot)
                await self._ledger.store.touch({slot.id: slot.token})
            stored = await self._ledger.store.load(slot.id)
            if stored.created_at != slot.created_at:
                raise MadeAnew
            if stored.token != slot.token:
                self._slab.commit(*unpacked(self._snapshots, slot.id, stored.saved).commits(slot))
                slot.token = stored.token
        except LatchError as error:
            self.drop(slot, error)
            raise
        except Exception as error:
            log.exception("session %r could not be loaded", slot.id)
            failed = Internal("the service failed to load the session; its log says why")
            self.drop(slot, failed)
            raise failed from error

    def refresh_later(self, slot: StoredSlot) -> None:
        """Refreshes a slot that is out of line, and puts it back; whoever waits is told where that fails."""

        async def refresh() -> None:
            try:
                await self.refresh(slot)
            except LatchError:
                pass  # everybody was told
            finally:
                self._resume([slot])

        self._writing.add(slot)
        task = asyncio.create_task(refresh())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def drop(self, slot: Slot, error: LatchError) -> None:
        """Gives up the copy of a session that the store has, or has no more."""
        if slot.is_live and self._ledger is not None and isinstance(slot, StoredSlot):
            self._ledger.on_drop(slot)
        self.release(slot, error)

    def release(self, slot: Slot, error: LatchError) -> None:
        """Gives the row back; everybody who still waits for it is told."""
        self._used.discard(slot)  # one that is not stored is not there
        self._slab.release(slot)
        for ticket in self._queues.waiting(slot):
            ticket.settle(error)

    def _resume(self, slots: Sequence[Slot]) -> None:
        self._writing.difference_update(slots)
        self._queues.resume(slots)


def _stored(slots: Sequence[Slot]) -> list[StoredSlot]:
    return slots  # type: ignore[return-value]  # `commit` looked at the first one, and they come sorted
