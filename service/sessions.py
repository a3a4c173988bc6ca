"""`SessionManager`: what a door may do with sessions: create, step, predict, reset, delete, list, sweep.

Rule: doors differ in bytes, never in behaviour; all of them come through here. It knows no wire format.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from service.batcher import Answer, Outcome, Ticket
from service.engine import Engine, Engines
from service.errors import InvalidInput, LatchError, PayloadTooLarge, SessionExists, SessionExpired
from service.metrics import Metrics
from service.slab import Slot
from service.stores import Saved, SessionStore
from service.wire import StepReply, StepRequest

log = logging.getLogger(__name__)

_NOTHING: Mapping[str, Any] = {}  # one for all sessions without metadata
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:-]{0,127}")


class Session(Slot, eq=False, gc=False, kw_only=True):
    """A live session: a slot in the slab of an engine, and who it is (a `SessionRecord` of the stores)."""

    id: str
    engine: Engine
    created_at: float
    metadata: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The name of its model."""
        return self.engine.key.name

    @property
    def version(self) -> str:
        """The version of its model."""
        return self.engine.key.version

    @property
    def idle_ttl(self) -> float:
        """Seconds that it may be idle."""
        return self.engine.slab.idle_ttl(self)

    @property
    def step(self) -> int:
        """Steps committed so far."""
        return self.engine.slab.step(self)

    @property
    def has_idled_out(self) -> bool:
        """Whether its time is over. A session with requests that wait or run is not idle, however long they take."""
        slab = self.engine.slab
        return slab.is_idle(self) and not self.engine.batcher.is_busy(self)


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
        wall: the clock, in seconds since the epoch. Idle time is measured by the slabs, on a clock that no one sets.
    """

    def __init__(
        self,
        engines: Engines,
        store: SessionStore,
        *,
        idle: IdleLimits,
        metrics: Metrics,
        sweep_interval: float = 1.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.engines = engines
        self._store = store
        self._idle = idle
        self._metrics = metrics
        self._sweep_interval = sweep_interval
        self._wall = wall
        self._live: dict[str, Session] = {}

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
        session = Session(id=session_id, engine=engine, created_at=self._wall(), metadata=metadata or _NOTHING)
        engine.slab.acquire(session, ttl)
        try:
            await self._store.create(session, b"", Saved(0, b""))
        except BaseException:
            engine.batcher.release(session)
            raise
        self._live[session_id] = session
        self._metrics.sessions.labels(*engine.key).inc()
        return session, True

    def resident(self, session_id: str) -> Session | None:
        """The live session of an id, where this process has it at hand and its time is not over."""
        session = self._live.get(session_id)
        return None if session is None or session.has_idled_out else session

    async def find(self, session_id: str) -> Session:
        """The live session of an id.

        Raises:
            SessionExpired: it idled out.
            SessionNotFound: it was never made, or was deleted.
        """
        session = self._live.get(session_id)
        if session is not None and session.has_idled_out:
            await self._expire(session)
            session = None
        if session is None:
            # The memory store has no state to restore from: this raises what became of the session.
            record = await self._store.load(session_id)
            raise RuntimeError(f"session {record.id!r} is in the store but not in memory")
        return session

    def submit(self, session: Session, request: StepRequest, answer: Answer) -> Ticket:
        """Hands a request to the session's engine, behind what it has waiting; `answer` is told what becomes of it.

        Raises:
            Overloaded, Draining, SessionNotFound: at once.
            StepConflict, InferenceFailed, SessionNotFound: as the answer.
        """
        return session.engine.batcher.submit(session, request, answer)

    async def step(self, session: Session, request: StepRequest) -> StepReply:
        """`submit`, and waits for the answer. Cancelling it drops the request if no run has finished it."""
        future: asyncio.Future[StepReply] = asyncio.get_running_loop().create_future()
        ticket = session.engine.batcher.submit(session, request, partial(_end, future))
        try:
            return await future
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    async def turn(self, session: Session) -> int:
        """Waits until everything that the session has queued is applied or has failed; returns its step then."""
        reply = await _answered(partial(session.engine.batcher.at_turn, session, partial(_standing, session)))
        return reply.step

    async def room(self, session: Session) -> None:
        """Waits until another try is worth while for who met `Overloaded` with this session."""
        await session.engine.batcher.room(session)

    async def reset(self, session: Session) -> None:
        """Returns the session to its initial state and to step 0, after what it has waiting."""

        def reset() -> StepReply:
            session.engine.slab.reset(session)
            return _standing(session)

        await _answered(partial(session.engine.batcher.at_turn, session, reset))

    async def delete(self, session_id: str) -> None:
        """Ends a session; whoever waits for it is told. Raises as `find`."""
        session = await self.find(session_id)
        self._forget(session)
        await self._store.delete(session_id)

    async def page(self, model: str | None, after: str, limit: int) -> tuple[list[Session], str | None]:
        """Live sessions in order of id, above `after`; and the id to go on after, if there are more."""
        records = await self._store.page(model, after, limit + 1)
        found = [self._live.get(record.id) for record in records[:limit]]
        live = [session for session in found if session is not None and not session.has_idled_out]
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
        slots = [Slot() for _ in requests]
        try:
            for slot in slots:
                engine.slab.acquire(slot)
            waiting = [
                _answered(partial(engine.batcher.submit, slot, request))
                for slot, request in zip(slots, requests, strict=True)
            ]
            return await asyncio.gather(*waiting)
        finally:
            for slot in slots:
                engine.batcher.release(slot)

    def expires_at(self, session: Session) -> float:
        """Wall-clock seconds at which the session idles out if nothing comes."""
        return self._wall() + session.engine.slab.time_left(session)

    async def sweep(self) -> int:
        """Expires every session that has idled out; returns how many."""
        count = 0
        for engine in self.engines:
            for slot in engine.slab.idle():
                if isinstance(slot, Session) and slot.is_live and slot.has_idled_out:
                    await self._expire(slot)
                    count += 1
                    if count % 256 == 0:  # the doors go first, however many end at once
                        await asyncio.sleep(0)
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
        if existing.model != model or version not in (None, existing.version):
            raise SessionExists(
                f"session {existing.id!r} exists already, on {existing.model}/{existing.version}: "
                "delete it first, or take another id",
                model=existing.model,
                version=existing.version,
            )
        return existing

    async def _expire(self, session: Session) -> None:
        self._forget(session)
        self._metrics.expired.labels(*session.engine.key).inc()
        await self._store.expire({session.id: b""})

    def _forget(self, session: Session) -> None:
        """Takes the session out of this process at once, before anything is awaited."""
        del self._live[session.id]
        session.engine.batcher.release(session)
        self._metrics.sessions.labels(*session.engine.key).dec()


def _standing(session: Session) -> StepReply:
    """Where the session is now."""
    step = session.step
    return StepReply((), b"", step + 1, step)


async def _answered(ask: Callable[[Answer], Ticket]) -> StepReply:
    """Calls `ask` with an answer that ends the wait."""
    future: asyncio.Future[StepReply] = asyncio.get_running_loop().create_future()
    ticket = ask(partial(_end, future))
    try:
        return await future
    finally:
        ticket.cancel()


def _end(future: asyncio.Future[StepReply], outcome: Outcome) -> None:
    if future.done():
        return
    if isinstance(outcome, LatchError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
