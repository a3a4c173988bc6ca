"""`SessionManager`: what a door may do with sessions: create, step, predict, reset, delete, list, sweep.

Rule: doors differ in bytes, never in behaviour; all of them come through here. It knows no wire format.
"""

import asyncio
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from service.engine import Engine, Engines
from service.errors import InvalidInput, PayloadTooLarge, SessionExists, SessionExpired
from service.metrics import Metrics
from service.slab import Slot
from service.stores import SessionRecord, SessionStore
from service.wire import StepReply, StepRequest

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:-]{0,127}")


class Session:
    """A live session: its record, and its slot in the slab of an engine. `last_used` is monotonic seconds."""

    __slots__ = ("due", "engine", "last_used", "record", "slot")

    def __init__(self, record: SessionRecord, engine: Engine, slot: Slot, now: float) -> None:
        self.record = record
        self.engine = engine
        self.slot = slot
        self.last_used = now
        self.due = 0

    @property
    def step(self) -> int:
        """Steps committed so far."""
        return self.engine.slab.step(self.slot)

    @property
    def is_busy(self) -> bool:
        """Whether requests of it wait or run; a busy session is not idle, however long it takes."""
        return self.engine.batcher.pending(self.slot) > 0


@dataclass(frozen=True)
class IdleLimits:
    """Seconds that a session may be idle: what it gets when it does not ask, and the bounds of what it may ask."""

    default: float
    shortest: float
    longest: float


class SessionManager:
    """All sessions of this process.

    Args:
        engines: the live models.
        store: who exists and who expired.
        idle: limits of the idle time.
        metrics: where to count.
        sweep_interval: seconds between two sweeps.
        monotonic, wall: the clocks, in seconds; idle time is measured on the first, which no one sets.
    """

    def __init__(
        self,
        engines: Engines,
        store: SessionStore,
        *,
        idle: IdleLimits,
        metrics: Metrics,
        sweep_interval: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.engines = engines
        self._store = store
        self._idle = idle
        self._metrics = metrics
        self._sweep_interval = sweep_interval
        self._monotonic = monotonic
        self._wall = wall
        self._live: dict[str, Session] = {}
        # Sessions by the sweep at which they may have idled out: a sweep looks at nobody else.
        self._due: defaultdict[int, set[Session]] = defaultdict(set)
        self._swept = self._tick(monotonic())

    async def create(
        self,
        model: str,
        version: str | None = None,
        *,
        session_id: str | None = None,
        idle_ttl: float | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> tuple[Session, bool]:
        """Makes a session at step 0, with the server's id or the client's own.

        Returns:
            The session, and whether it is new: asking again for the same id and model gives the one that is there.

        Raises:
            ModelNotFound, ModelBroken: no such model.
            InvalidInput: an id or `idle_ttl` (seconds) out of bounds.
            SessionExists: the id belongs to a session of another model or version.
            CapacityExceeded: the model has all the sessions it may have.
        """
        engine = self.engines.get(model, version)
        ttl = self._idle.default if idle_ttl is None else idle_ttl
        if not self._idle.shortest <= ttl <= self._idle.longest:
            raise InvalidInput(
                f"idle_ttl_ms {ttl * 1000:.0f} is out of bounds: "
                f"{self._idle.shortest * 1000:.0f} to {self._idle.longest * 1000:.0f}",
                path="$.idle_ttl_ms",
            )
        if session_id is None:
            session_id = uuid4().hex
        elif not _ID.fullmatch(session_id):
            raise InvalidInput(
                f"session id {session_id!r}: an id has 1 to 128 of A-Z a-z 0-9 . _ ~ : - and starts with one of the "
                "first three kinds",
                path="$.id",
            )
        else:
            existing = await self._existing(session_id)
            if existing is not None:
                return self._same(existing, engine.key.name, version), False
        slot = engine.slab.acquire()
        record = SessionRecord(session_id, *engine.key, ttl, self._wall(), metadata or {})
        try:
            await self._store.create(record)
        except BaseException:
            engine.batcher.release(slot)
            raise
        session = Session(record, engine, slot, self._monotonic())
        self._live[session_id] = session
        self._schedule(session)
        self._metrics.sessions.labels(*engine.key).inc()
        return session, True

    async def find(self, session_id: str) -> Session:
        """The live session of an id.

        Raises:
            SessionExpired: it idled out.
            SessionNotFound: it was never made, or was deleted.
        """
        session = self._live.get(session_id)
        if session is not None and self._idles_out(session):
            await self._expire(session)
            session = None
        if session is None:
            # The memory store has no state to restore from: this raises what became of the session.
            record = await self._store.load(session_id)
            raise RuntimeError(f"session {record.id!r} is in the store but not in memory")
        return session

    def step(self, session: Session, request: StepRequest) -> asyncio.Future[StepReply]:
        """Hands a request to the session's engine, behind what it has waiting; the reply comes with the future.

        Raises:
            Overloaded, Draining: at once.
            StepConflict, InferenceFailed, SessionNotFound: through the future.
        """
        future = session.engine.batcher.submit(session.slot, request)
        future.add_done_callback(lambda _: self._touch(session))
        return future

    async def turn(self, session: Session) -> int:
        """Waits until everything that the session has queued is applied or has failed; returns its step then."""
        return (await session.engine.batcher.turn(session.slot)).step

    async def reset(self, session: Session) -> None:
        """Returns the session to its initial state and to step 0, after what it has waiting."""
        await session.engine.batcher.reset(session.slot)
        self._touch(session)

    async def delete(self, session_id: str) -> None:
        """Ends a session; whoever waits for it is told. Raises as `find`."""
        session = await self.find(session_id)
        self._forget(session)
        await self._store.delete(session_id)

    async def page(self, model: str | None, after: str, limit: int) -> tuple[list[Session], str | None]:
        """Live sessions in order of id, above `after`; and the id to go on after, if there are more."""
        records = await self._store.page(model, after, limit + 1)
        found = [self._live.get(record.id) for record in records[:limit]]
        live = [session for session in found if session is not None and not self._idles_out(session)]
        return live, records[limit - 1].id if len(records) > limit else None

    async def predict(self, engine: Engine, requests: Sequence[StepRequest]) -> list[StepReply]:
        """Runs whole sequences from the initial state, without sessions, beside everybody else's steps.

        Raises:
            PayloadTooLarge: more sequences than could ever run at once.
            CapacityExceeded, Overloaded, InferenceFailed: for any sequence; none of them leaves a trace.
        """
        if len(requests) > engine.max_sequences:
            raise PayloadTooLarge(
                f"{len(requests)} sequences: this model takes {engine.max_sequences} at once; send them in parts",
                limit=engine.max_sequences,
            )
        slots: list[Slot] = []
        waiting: list[asyncio.Future[StepReply]] = []
        try:
            for request in requests:
                slots.append(engine.slab.acquire())
                waiting.append(engine.batcher.submit(slots[-1], request))
            return await asyncio.gather(*waiting)
        finally:
            for future in waiting:
                future.cancel()
            for slot in slots:
                engine.batcher.release(slot)

    def expires_at(self, session: Session) -> float:
        """Wall-clock seconds at which the session idles out if nothing comes."""
        return self._wall() + max(0.0, session.last_used + session.record.idle_ttl - self._monotonic())

    async def sweep(self) -> int:
        """Expires every session that has idled out; returns how many."""
        now = self._tick(self._monotonic())
        count = 0
        for tick in range(self._swept, now):
            for session in list(self._due.get(tick, ())):
                if self._idles_out(session):
                    await self._expire(session)
                    count += 1
                elif self._live.get(session.record.id) is session:
                    self._schedule(session)
            self._due.pop(tick, None)
        self._swept = now
        return count

    async def serve(self) -> None:
        """Sweeps until cancelled."""
        while True:
            await asyncio.sleep(self._sweep_interval)
            try:
                await self.sweep()
            except Exception:
                log.exception("a sweep failed; the next one tries again")

    async def _existing(self, session_id: str) -> Session | None:
        if session_id not in self._live:
            return None
        try:
            return await self.find(session_id)
        except SessionExpired:
            return None

    @staticmethod
    def _same(existing: Session, model: str, version: str | None) -> Session:
        """The session that a repeated create means. Without a version, it keeps the one that it has."""
        record = existing.record
        if record.model != model or version not in (None, record.version):
            raise SessionExists(
                f"session {record.id!r} exists already, on {record.model}/{record.version}: "
                "delete it first, or take another id",
                model=record.model,
                version=record.version,
            )
        return existing

    def _touch(self, session: Session) -> None:
        session.last_used = self._monotonic()

    def _idles_out(self, session: Session) -> bool:
        if self._live.get(session.record.id) is not session or session.is_busy:
            return False
        return self._monotonic() - session.last_used >= session.record.idle_ttl

    async def _expire(self, session: Session) -> None:
        self._forget(session)
        self._metrics.expired.labels(*session.engine.key).inc()
        await self._store.expire(session.record.id)

    def _forget(self, session: Session) -> None:
        """Takes the session out of this process at once, before anything is awaited."""
        del self._live[session.record.id]
        if (due := self._due.get(session.due)) is not None:
            due.discard(session)
        session.engine.batcher.release(session.slot)
        self._metrics.sessions.labels(*session.engine.key).dec()

    def _tick(self, now: float) -> int:
        return int(now / self._sweep_interval)

    def _schedule(self, session: Session) -> None:
        """The sweep after the earliest moment at which the session can have idled out."""
        deadline = max(session.last_used + session.record.idle_ttl, self._monotonic())
        session.due = self._tick(deadline)
        self._due[session.due].add(session)
