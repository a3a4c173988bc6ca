"""`SessionManager`: what a door may do with sessions: create, step, predict, move, fork, delete, list, sweep.

Rule: doors differ in bytes, never in behaviour; all of them come through here. It knows no wire format.
Where the store outlives the process, the sessions in here are copies: one that is missing is loaded, one too many is
let go, and one that another process has moved is brought up to date before anything but a step is made of it.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import inf
from typing import Any, TypeGuard
from uuid import uuid4

from service.commits import MadeAnew
from service.engine import Engine, Engines
from service.errors import (
    CapacityExceeded,
    Draining,
    InvalidInput,
    ModelNotFound,
    SessionCorrupt,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    StepNotKept,
    StoreUnavailable,
)
from service.ledger import Ledger, StoredSlot, packed, unpacked
from service.metrics import Metrics
from service.queues import Answer, Ticket, deleted, resolve
from service.slab import Slot
from service.snapshot import Snapshot, origin, snapshot
from service.stores import Saved, SessionStore, Stored
from service.wire import StepReply, StepRequest

log = logging.getLogger(__name__)

_NOTHING: Mapping[str, Any] = {}  # one for all sessions without metadata
_EXPIRED_AT_ONCE = 256
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:-]{0,127}")


class Session(StoredSlot, eq=False, gc=False, kw_only=True):
    """A live session: a slot in the slab of an engine, and who it is (a `SessionRecord` of the stores)."""

    engine: Engine
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
    def time_left(self) -> float:
        """Seconds until it idles out, if nothing comes."""
        return self.engine.slab.time_left(self)

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

    def chosen(self, asked: float | None) -> float:
        """What a session gets that asks for so much. Raises InvalidInput where that is out of bounds."""
        if asked is None:
            return self.default
        if not self.shortest <= asked <= self.longest:
            raise InvalidInput(
                f"idle_ttl_ms {asked * 1000:.0f} is out of bounds: "
                f"{self.shortest * 1000:.0f} to {self.longest * 1000:.0f}",
                path="$.idle_ttl_ms",
            )
        return asked


class SessionManager:
    """All sessions of this process.

    Args:
        engines: the live models.
        store: who exists and who expired; and where they stand, if there is a ledger.
        ledger: what the engines save steps with.
        idle: limits of the idle time.
        metrics: where to count.
        sweep_interval: seconds between two sweeps.
        wall: the clock, in seconds since the epoch. Idle time is measured by the slabs, on a clock that no one sets.

    Attributes:
        is_draining: the service is about to end, and makes no more sessions.
        store_error: why the store could not be asked when that was last tried.
    """

    def __init__(
        self,
        engines: Engines,
        store: SessionStore,
        *,
        ledger: Ledger | None = None,
        idle: IdleLimits,
        metrics: Metrics,
        sweep_interval: float = 1.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.engines = engines
        self._store = store
        self._ledger = ledger
        self._idle = idle
        self._metrics = metrics
        self._sweep_interval = sweep_interval
        self._wall = wall
        self.is_draining = False
        self.store_error: StoreUnavailable | None = None
        self._live: dict[str, Session] = {}
        self._restoring: dict[str, asyncio.Task[Session]] = {}
        self._let_go: dict[str, bytes] = {}  # tokens of those whose last use the store has not heard of
        if ledger is not None:
            ledger.on_drop = self._dropped

    @property
    def is_shared(self) -> bool:
        """Whether other replicas may move, end and make the same sessions."""
        return self._store.is_shared

    async def create(
        self,
        model: str,
        version: str | None = None,
        *,
        session_id: str | None = None,
        idle_ttl: float | None = None,
        metadata: dict[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> tuple[Session, bool]:
        """Makes a session at step 0, with the server's id or the client's own. It begins in `state` (nested lists by
        name), as far as that is given.

        Returns:
            The session, and whether it is new: asking again for the same id and model gives the one that is there.

        Raises:
            ModelNotFound, ModelBroken: no such model.
            ModelDraining: the version is being removed.
            InvalidInput: an id, a state or `idle_ttl` (seconds) out of bounds.
            SessionExists: the id belongs to a session of another model or version.
            CapacityExceeded: the model has all the sessions it may have.
            Draining: the service is stopping.
            StoreUnavailable: the store cannot be asked.
        """
        while True:
            if session_id is not None:  # one that is there needs no room, and no model that takes new ones
                with suppress(SessionNotFound, SessionExpired):
                    return await self._existing(session_id, model, version), False
            engine = self.engines.get(model, version)
            start = engine.snapshots.start(state or _NOTHING)
            with suppress(SessionExists):  # it was made meanwhile
                ttl = self._idle.chosen(idle_ttl)
                return await self._make(engine, start, session_id, ttl, metadata or _NOTHING), True

    async def fork(
        self,
        session_id: str,
        *,
        fork_id: str | None = None,
        idle_ttl: float | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Session:
        """Makes a session that stands where this one does after what it has waiting, and goes its own way from there.
        It has the idle time and the metadata of this one, unless others are given.

        Raises:
            SessionExists: `fork_id` is taken.
            As `find` and `create`.
        """
        async with self._held(session_id) as session:
            standing = snapshot(session.engine.slab, session)
        # That of the session was in bounds where it was made, which may be a service with others.
        ttl = session.idle_ttl if idle_ttl is None else self._idle.chosen(idle_ttl)
        facts = session.metadata if metadata is None else metadata
        return await self._make(session.engine, standing, fork_id, ttl, facts)

    async def state(self, session_id: str) -> bytes:
        """The snapshot of a session, after what it has waiting. Raises as `find`."""
        async with self._held(session_id) as session:
            engine = session.engine
            [body], [header] = engine.snapshots.pack(*snapshot(engine.slab, session).commits(session))
            return header + body

    async def restore(self, session_id: str, data: bytes, idle_ttl: float | None = None) -> tuple[Session, bool]:
        """Has a session stand where a snapshot does; makes it, to be idle for `idle_ttl` seconds at most, if there is
        none of that id.

        Returns:
            The session, and whether it is new.

        Raises:
            SnapshotInvalid: damaged, cut short, or no snapshot.
            SnapshotMismatch: of another model or version than the session's.
            As `find` and `create`.
        """
        (model, version), _ = origin(data)

        async def there(session: Session) -> tuple[Snapshot, int]:
            return session.engine.snapshots.restore(data), 0

        while True:  # it may be made, or end, meanwhile
            if not await self._is_known(session_id):
                engine = self.engines.get(model, version)
                with suppress(SessionExists):
                    start = engine.snapshots.restore(data)
                    ttl = self._idle.chosen(idle_ttl)
                    return await self._make(engine, start, session_id, ttl, _NOTHING), True
            with suppress(SessionNotFound, SessionExpired):
                return await self._move(session_id, there), False

    async def reset(self, session_id: str) -> Session:
        """Returns a session to its model's initial state and to step 0, after what it has waiting. Raises as `find`."""

        async def start(session: Session) -> tuple[Snapshot, int]:
            return session.engine.snapshots.start(_NOTHING), 0

        return await self._move(session_id, start)

    async def rollback(self, session_id: str, step: int) -> Session:
        """Returns a session to a step that it stood at after one of its last requests.

        Raises:
            StepNotKept: there is no snapshot of that step; tells which there are.
            As `find`.
        """

        async def back(session: Session) -> tuple[Snapshot, int] | None:
            earlier = await self._store.earlier(session_id)
            if not session.is_live:  # deleted meanwhile: its row may be another's
                raise deleted()
            if step == session.step:
                return snapshot(session.engine.slab, session), len(earlier)
            steps = [saved.step for saved in earlier]
            if step not in steps:
                if self._store.is_shared and (await self._store.load(session_id)).token != session.token:
                    return None  # what is kept may be what another replica has left: not to be held against this step
                raise self._not_kept(session, step, steps)
            index = len(steps) - 1 - steps[::-1].index(step)
            return unpacked(session.engine.snapshots, session_id, earlier[index]), index

        return await self._move(session_id, back)

    def resident(self, session_id: str) -> Session | None:
        """The live session of an id, where this process has it at hand and its time is not over."""
        session = self._live.get(session_id)
        return None if session is None or session.has_idled_out else session

    async def find(self, session_id: str) -> Session:
        """The live session of an id, loaded from the store where it must be.

        Raises:
            SessionExpired: it idled out.
            SessionNotFound: it was never made, or was deleted.
            SessionCorrupt, StoreUnavailable, ModelNotFound: it cannot be loaded.
            CapacityExceeded: there is no room for it.
        """
        while True:
            session = self._live.get(session_id)
            if session is not None and session.has_idled_out:
                await self._expire([session])
                session = None
            if session is None:
                session = await self._restored(session_id)
            if session.is_live:  # it could be let go while this call was on its way
                return session

    async def is_current(self, session: Session) -> bool:
        """Whether its id is still that of this session, which the store says where other replicas make sessions, too.
        Raises as `find`.
        """
        return await self._current(session.id) is session

    async def _current(self, session_id: str) -> Session:
        """The session of an id; where other replicas move it too, as the store has it, after what it has waiting."""
        if not self._store.is_shared:
            return await self.find(session_id)
        async with self._held(session_id) as session:
            return session

    async def inspect(self, session_id: str) -> Session | Stored:
        """What a session is, and where it stands. Raises SessionExpired, SessionNotFound, StoreUnavailable."""
        return await self._store.load(session_id) if self._store.is_durable else await self.find(session_id)

    def submit(self, session: Session, request: StepRequest, answer: Answer) -> Ticket:
        """Hands a request to the session's engine, behind what it has waiting; `answer` is told what becomes of it.

        Raises:
            Overloaded, Draining, SessionNotFound, PayloadTooLarge: at once.
            StepConflict, InferenceFailed, SessionNotFound: as the answer.
        """
        return session.engine.batcher.submit(session, request, answer)

    async def step(self, session: Session, request: StepRequest) -> StepReply:
        """`submit`, and waits for the answer. Cancelling it drops the request if no run has finished it."""
        future: asyncio.Future[StepReply] = asyncio.get_running_loop().create_future()
        ticket = session.engine.batcher.submit(session, request, partial(resolve, future))
        try:
            return await future
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    async def turn(self, session: Session) -> int:
        """Waits until everything that the session has queued is applied or has failed; returns its step then."""
        async with session.engine.batcher.hold(session):
            return session.step

    async def room(self, session: Session) -> None:
        """Waits until another try is worth while for who met `Overloaded` with this session."""
        await session.engine.batcher.room(session)

    async def delete(self, session_id: str) -> None:
        """Ends a session; whoever waits for it is told. Raises SessionExpired, SessionNotFound, StoreUnavailable."""
        created_at = None
        with suppress(SessionCorrupt):  # what cannot be read can go
            created_at = (await self.inspect(session_id)).created_at
        await self._store.delete(session_id, created_at)  # first: a copy that was loaded meanwhile goes, too
        session = self._live.get(session_id)
        if session is not None and created_at in (None, session.created_at):
            self._forget(session)

    async def page(self, model: str | None, after: str, limit: int) -> tuple[list[Session | Stored], str | None]:
        """Live sessions in order of id, above `after`; and the id to go on after, if there are more."""
        records = await self._store.page(model, after, limit + 1)
        cursor = records[limit - 1].id if len(records) > limit else None
        found = [record if isinstance(record, Stored) else self.resident(record.id) for record in records[:limit]]
        return [record for record in found if record is not None], cursor

    async def predict(self, engine: Engine, requests: Sequence[StepRequest]) -> list[StepReply]:
        """Runs whole sequences from the initial state, without sessions, beside everybody else's steps.

        Raises:
            CapacityExceeded, Overloaded, InferenceFailed: for any sequence; none of them leaves a trace.
            PayloadTooLarge: for all together.
        """
        engine.batcher.check_reply(sum([request.steps for request in requests]), requests[0].outputs)
        replies: list[StepReply] = []
        for start in range(0, len(requests), engine.sequences_at_once):  # all at once would leave nobody room
            replies += await self._predict(engine, requests[start : start + engine.sequences_at_once])
        return replies

    async def _predict(self, engine: Engine, requests: Sequence[StepRequest]) -> list[StepReply]:
        slots = [Slot() for _ in requests]
        try:
            for slot in slots:
                self._acquire(engine, slot)
            return await asyncio.gather(*map(partial(_stepped, engine), slots, requests))
        finally:
            for slot in slots:
                engine.batcher.release(slot)

    def expires_at(self, session: Session | Stored) -> float:
        """Wall-clock seconds at which the session idles out if nothing comes."""
        return self._wall() + session.time_left

    async def sweep(self) -> int:
        """Expires every session that has idled out; returns how many. Of those in use, the store hears before."""
        count = 0
        await self.tell_uses()
        for engine in self.engines:
            idle = [slot for slot in engine.slab.idle() if self._is_here(slot)]
            for start in range(0, len(idle), _EXPIRED_AT_ONCE):  # the doors go first, however many end at once
                count += await self._expire(idle[start : start + _EXPIRED_AT_ONCE])
                await asyncio.sleep(0)
        await self._store.sweep()
        return count

    async def tell_uses(self) -> None:
        """Tells the store of use that it has not heard of by a save. Raises StoreUnavailable; it is told later then."""
        if not self._store.is_durable:
            return
        soon = 2 * self._sweep_interval
        used = [slot for engine in self.engines for slot in engine.batcher.unsaved_uses(soon)]
        told = self._let_go | {slot.id: slot.token for slot in used}
        self._let_go = dict(told)  # until the store has heard of them: who is loaded waits for that
        try:
            if told:
                await self._store.touch(told)
        except BaseException:
            for slot in filter(self._is_here, used):
                slot.engine.batcher.used(slot)
            raise
        self._let_go = {name: token for name, token in self._let_go.items() if told.get(name) != token}

    async def serve(self) -> None:
        """Sweeps, and sees whether the store is there, until cancelled."""
        while True:
            await asyncio.sleep(self._sweep_interval)
            try:
                await self.sweep()
                await self._store.ping()
                if self.store_error is not None:
                    log.warning("the session store is back")
                self.store_error = None
            except StoreUnavailable as error:
                if self.store_error is None:  # said once, and then by readiness
                    log.warning("%s", error)
                self.store_error = error
            except Exception:
                log.exception("a sweep failed; the next one tries again")

    async def _make(
        self,
        engine: Engine,
        start: Snapshot,
        session_id: str | None,
        idle_ttl: float,
        metadata: Mapping[str, Any],
    ) -> Session:
        """Makes a session that stands at `start`. Raises SessionExists where one of that id lives."""
        if self.is_draining:
            raise Draining
        if session_id is None:
            session_id = uuid4().hex
        elif not _ID.fullmatch(session_id):
            raise InvalidInput(
                f"session id {session_id!r}: an id has 1 to 128 of A-Z a-z 0-9 . _ ~ : - and starts with one of the "
                "first three kinds",
                path="$.id",
            )
        if (known := self._live.get(session_id)) is not None and known.has_idled_out:
            await self._expire([known])
        session = Session(id=session_id, engine=engine, created_at=self._wall(), metadata=metadata)
        saved = Saved(start.step, b"")
        if self._ledger is not None:
            session.token = self._ledger.token()
            [saved] = packed(engine.snapshots, *start.commits(session))
        self.engines.check(engine)
        self._acquire(engine, session, idle_ttl)
        try:
            engine.slab.commit(*start.commits(session))
            await self._store.create(session, session.token, saved)
        except BaseException:
            engine.batcher.release(session)
            raise
        if (known := self._live.get(session_id)) is not None:
            if known.created_at == session.created_at:  # itself, loaded while the store's answer was on its way
                engine.batcher.release(session)
                return known
            self._forget(known)  # of one that ended in another process
        self._live[session_id] = session
        engine.sessions += 1
        return session

    def _acquire(self, engine: Engine, slot: Slot, idle_ttl: float = inf) -> None:
        """Gives the slot a row; where sessions can be loaded again, those used least recently make room."""
        try:
            engine.slab.acquire(slot, idle_ttl)
        except CapacityExceeded:
            if not self._store.is_durable:
                raise
            slab, batcher = engine.slab, engine.batcher
            idle = (slot for slot in slab.oldest() if self._is_here(slot) and not batcher.is_busy(slot))
            for other in islice(idle, len(slab) // 16 + 1):
                if batcher.is_used(other):
                    self._let_go[other.id] = other.token
                self._forget(other)
            engine.slab.acquire(slot, idle_ttl)

    def _is_here(self, slot: Slot) -> TypeGuard[Session]:
        """Whether a slot is a session that calls find; one that is being made is none yet."""
        return isinstance(slot, Session) and self._live.get(slot.id) is slot

    async def _is_known(self, session_id: str) -> bool:
        try:
            await self.inspect(session_id)
        except (SessionNotFound, SessionExpired):
            return False
        return True

    async def _move(
        self, session_id: str, where: Callable[[Session], Awaitable[tuple[Snapshot, int] | None]]
    ) -> Session:
        """Has a session stand elsewhere, after what it has waiting: at a snapshot, with so many earlier ones left.

        Where another replica moves it meanwhile, `where` is asked again; it says None where it found that out itself.
        """
        while True:
            with suppress(MadeAnew):
                async with self._held(session_id) as session:
                    place = await where(session)
                    if place is not None and await session.engine.batcher.move(session, *place):
                        return session

    @asynccontextmanager
    async def _held(self, session_id: str) -> AsyncIterator[Session]:
        """The session that has an id now, in its turn; see `Batcher.hold`. Raises as `find`."""
        async with AsyncExitStack() as stack:
            while True:
                session = await self.find(session_id)
                with suppress(MadeAnew):
                    await stack.enter_async_context(session.engine.batcher.hold(session))
                    break
            yield session

    async def _restored(self, session_id: str) -> Session:
        """The session, loaded once for all who ask for it now."""
        if not self._store.is_durable:
            await self._store.load(session_id)  # raises what became of it
        task = self._restoring.get(session_id)
        if task is None or task.done():  # what was loaded may be gone again before its callers wake
            task = self._restoring[session_id] = asyncio.create_task(self._restore(session_id))
            task.add_done_callback(partial(self._restoring_ended, session_id))
        return await asyncio.shield(task)

    def _restoring_ended(self, session_id: str, task: asyncio.Task[Session]) -> None:
        if self._restoring[session_id] is task:
            del self._restoring[session_id]

    async def _restore(self, session_id: str) -> Session:
        if (token := self._let_go.get(session_id)) is not None:
            await self._store.touch({session_id: token})
            self._let_go.pop(session_id, None)
        stored = await self._store.load(session_id)
        if (session := self._live.get(session_id)) is not None:
            return session
        engine = self.engines.serving(stored.model, stored.version)
        standing = unpacked(engine.snapshots, session_id, stored.saved)
        session = Session(
            id=session_id,
            engine=engine,
            created_at=stored.created_at,
            metadata=stored.metadata or _NOTHING,
            token=stored.token,
        )
        self._acquire(engine, session, stored.idle_ttl)
        engine.slab.commit(*standing.commits(session))
        engine.slab.expire_in(session, stored.time_left)
        self._live[session_id] = session
        engine.sessions += 1
        return session

    def _not_kept(self, session: Session, step: int, steps: list[int]) -> StepNotKept:
        kept = f"steps {', '.join(map(str, steps))}" if steps else "none: LATCH_KEEP_STEPS says how many are kept"
        return StepNotKept(
            f"session {session.id!r} is at step {session.step} and cannot go back to {step}; kept before it: {kept}",
            kept_steps=[*steps, session.step],
        )

    async def _existing(self, session_id: str, model: str, version: str | None) -> Session:
        """The session that a repeated create means. Raises as `find`, and SessionExists where it is another."""
        try:
            session = await self._current(session_id)
        except ModelNotFound:  # of what it is on, which may be another than what is asked for
            self._check_same(await self.inspect(session_id), model, version)
            raise
        self._check_same(session, model, version)
        return session

    @staticmethod
    def _check_same(existing: Session | Stored, model: str, version: str | None) -> None:
        """Raises SessionExists for another model or version. Without a version, it keeps the one that it has."""
        if existing.model != model or version not in (None, existing.version):
            raise SessionExists(
                f"session {existing.id!r} exists already, on {existing.model}/{existing.version}: "
                "delete it first, or take another id",
                model=existing.model,
                version=existing.version,
            )

    async def _expire(self, sessions: Sequence[Session]) -> int:
        """Ends sessions that have idled out here; one that another process has moved since lives on."""
        tokens: dict[str, bytes] = {}
        expired = self._metrics.expired.labels(*sessions[0].engine.key)  # before its version can be gone
        for session in sessions:
            if session.is_live and session.has_idled_out:
                self._forget(session)
                tokens[session.id] = session.token
        if self._store.is_shared:  # where a retry is use, too, of which the token says nothing
            used = await asyncio.gather(*map(self._has_time_left, tokens))
            tokens = {name: token for (name, token), is_used in zip(tokens.items(), used, strict=True) if not is_used}
        if not tokens:
            return 0
        count = await self._store.expire(tokens)
        expired.inc(count)
        return count

    async def _has_time_left(self, session_id: str) -> bool:
        """Whether the store, if it counts time, gives the session some."""
        try:
            return 0 < (await self._store.load(session_id)).time_left < inf
        except (SessionNotFound, SessionExpired):
            return False
        except SessionCorrupt:  # it is left as it is, and is no trouble of the others
            return True

    def _forget(self, session: Session) -> None:
        """Takes the session out of this process at once, before anything is awaited."""
        self._dropped(session)
        session.engine.batcher.release(session)

    def _dropped(self, slot: StoredSlot) -> None:
        session = self._live.pop(slot.id)
        session.engine.sessions -= 1


async def _stepped(engine: Engine, slot: Slot, request: StepRequest) -> StepReply:
    """Submits a request, and waits for the answer."""
    future: asyncio.Future[StepReply] = asyncio.get_running_loop().create_future()
    ticket = engine.batcher.submit(slot, request, partial(resolve, future))
    try:
        return await future
    finally:
        ticket.cancel()
