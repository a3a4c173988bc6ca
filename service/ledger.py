"""`Ledger`: what runs arrive at, written to the store before anybody is told.

Rule: one group commit at a time; whatever arrives while it is under way goes into the next, so nothing waits for a
window and nothing for more than one commit beside its own. The store is the truth and the slab a copy of it: where it
is in doubt whether a save was done, the copy is dropped, and the next request loads the session again.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from service.errors import Internal, LatchError, SessionCorrupt, SnapshotInvalid, SnapshotMismatch
from service.manifest import Array
from service.metrics import Metrics
from service.slab import Commits, Slot
from service.snapshot import Snapshot, SnapshotCodec
from service.stores import Save, Saved, SessionStore

log = logging.getLogger(__name__)


class StoredSlot(Slot, eq=False, gc=False, kw_only=True):
    """A slot whose session is in the store: under which id, since when, and the token of its last save."""

    id: str
    created_at: float
    token: bytes = b""


class Written(NamedTuple):
    """What became of rows that were to be written: whether each was saved, or why nobody knows; and the seconds."""

    outcome: Sequence[bool] | LatchError
    seconds: float


class _Entry(NamedTuple):
    saves: list[Save]
    done: Callable[[Written], None]
    submitted: float


def packed(snapshots: SnapshotCodec, commits: Commits, state: Sequence[Array]) -> list[Saved]:
    """What is saved of slots that shall stand where `commits` and `state` say."""
    return [*map(Saved, commits.steps, *snapshots.pack(commits, state))]


def unpacked(snapshots: SnapshotCodec, session_id: str, saved: Saved) -> Snapshot:
    """Where a session stood when it was saved. Raises SessionCorrupt where the store gives something else."""
    try:
        return snapshots.unpack(saved.snapshot)
    except (SnapshotInvalid, SnapshotMismatch) as error:
        raise SessionCorrupt(f"session {session_id!r} cannot be read from the store: {error}") from error


class Ledger:
    """Writes the sessions of all models to one store.

    Attributes:
        store: where to.
        on_drop: called with a slot whose copy here is worth nothing any more; it has been released.
    """

    def __init__(self, store: SessionStore, metrics: Metrics) -> None:
        self.store = store
        self.on_drop: Callable[[StoredSlot], None] = lambda _: None
        self._metrics = metrics
        self._writer = secrets.token_bytes(8)
        self._count = 0
        self._waiting: list[_Entry] = []
        self._wake = asyncio.Event()
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts its task on the running loop."""
        self._task = asyncio.create_task(self._serve(), name="ledger")

    async def close(self) -> None:
        """Writes what waits, and ends the task."""
        self._is_closed = True
        self._wake.set()
        if self._task is not None:
            await self._task

    def token(self) -> bytes:
        """16 bytes that no other save, of any process, has."""
        self._count += 1
        return self._writer + self._count.to_bytes(8, "little")

    def write(
        self,
        slots: Sequence[StoredSlot],
        token: bytes,
        saved: Sequence[Saved],
        done: Callable[[Written], None],
        earlier: int | None = None,
    ) -> None:
        """Saves slots under a new token, and calls `done`. Nobody may move them before that.

        Args:
            slots: none twice.
            token: their next one.
            saved: where each shall stand.
            done: called once.
            earlier: see `Save`.
        """
        saves = [Save(slot.id, slot.token, token, each, earlier) for slot, each in zip(slots, saved, strict=True)]
        self._waiting.append(_Entry(saves, done, time.perf_counter()))
        self._wake.set()

    async def _serve(self) -> None:
        while self._waiting or not self._is_closed:
            await self._wake.wait()
            if not self._is_closed:
                self._wake.clear()
            await self._commit()

    async def _commit(self) -> None:
        entries, self._waiting = self._waiting, []
        saves = [save for entry in entries for save in entry.saves]
        if not saves:
            return
        start = time.perf_counter()
        outcome: Sequence[bool] | LatchError
        try:
            outcome = await self.store.save(saves)
        except LatchError as error:
            outcome = error
        except Exception:
            log.exception("%d sessions could not be saved", len(saves))
            outcome = Internal("the service failed to save the session; its log says why")
        now = time.perf_counter()
        self._metrics.observe_save(len(saves), now - start)
        at = 0
        for entry in entries:
            end = at + len(entry.saves)
            part = outcome if isinstance(outcome, LatchError) else outcome[at:end]
            try:
                entry.done(Written(part, now - entry.submitted))
            except Exception:
                log.exception("what was saved could not be answered")
            at = end
