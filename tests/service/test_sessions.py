"""What doors may do with sessions, on a clock that the test moves."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.engine import load_engines
from service.errors import (
    CapacityExceeded,
    InferenceFailed,
    InvalidInput,
    ModelNotFound,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    SnapshotInvalid,
)
from service.metrics import Metrics
from service.registry import load_all
from service.sessions import IdleLimits, SessionManager
from service.snapshot import snapshot
from service.stores.memory import MemoryStore
from service.wire import StepRequest
from tests.service import toys
from tests.service.conftest import OPTIONS

pytestmark = pytest.mark.anyio


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time now."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The time for the whole manager, monotonic and wall."""
    return Clock()


@pytest.fixture
async def manager(repository: Path, metrics: Metrics, clock: Clock) -> AsyncIterator[SessionManager]:
    """A manager of the toys with room for three sessions a model; idle after 60 s, 10 to 100 may be asked for."""
    found = load_all(repository)
    engines = load_engines(found.found, {}, replace(OPTIONS, max_sessions=3), metrics, clock)
    for engine in engines:
        engine.start()
    yield SessionManager(
        engines,
        MemoryStore(max_expired_ids=10),
        idle=IdleLimits(60.0, 10.0, 100.0),
        metrics=metrics,
        wall=clock,
    )
    for engine in engines:
        await engine.close()


def ones(steps: int = 1, first: int | None = None) -> StepRequest:
    """Steps for `toy`."""
    return StepRequest(np.ones((steps, toys.INPUTS), np.float32).tobytes(), steps, ("y",), first)


async def test_a_session_remembers(manager: SessionManager) -> None:
    """The same input again gives another output, because the state moved."""
    session, created = await manager.create("toy")
    assert created
    first, second = await manager.step(session, ones()), await manager.step(session, ones())
    assert (first.step, second.step, session.step) == (1, 2, 2)
    assert first.data != second.data


async def test_creating_again_gives_the_same_session(manager: SessionManager) -> None:
    """PUT is idempotent; another model or version under the same id is refused."""
    session, created = await manager.create("toy", session_id="a", idle_ttl=20)
    await manager.step(session, ones())
    for version in (None, "1"):
        again, created = await manager.create("toy", version, session_id="a")
        assert (again is session, created, again.step) == (True, False, 1)
    with pytest.raises(SessionExists, match="toy/1"):
        await manager.create("counter", session_id="a")


@pytest.mark.parametrize("name", ["", "a b", "../x", "-a", "x" * 129, "é", "a/b", "a\n"])
async def test_a_bad_id_is_refused(manager: SessionManager, name: str) -> None:
    """Ids are safe in addresses, keys and logs."""
    with pytest.raises(InvalidInput, match="session id"):
        await manager.create("toy", session_id=name)


@pytest.mark.parametrize("ttl", [0, 9.9, 100.1, float("inf"), float("nan"), -1])
async def test_an_idle_time_out_of_bounds_is_refused(manager: SessionManager, ttl: float) -> None:
    """The message gives the bounds, and no slot is taken."""
    with pytest.raises(InvalidInput, match="10000 to 100000"):
        await manager.create("toy", idle_ttl=ttl)
    assert len(manager.engines.get("toy").slab) == 0


async def test_an_unknown_model_is_refused(manager: SessionManager) -> None:
    """Before anything is taken."""
    with pytest.raises(ModelNotFound):
        await manager.create("nope")


async def test_capacity_is_bounded_and_a_delete_makes_room(manager: SessionManager) -> None:
    """The fourth session is refused; after a delete it is not."""
    sessions = [(await manager.create("toy"))[0] for _ in range(3)]
    with pytest.raises(CapacityExceeded):
        await manager.create("toy")
    await manager.create("counter")
    await manager.delete(sessions[1].id)
    await manager.create("toy")


async def test_creating_again_needs_no_room_and_fits_whatever_it_says(manager: SessionManager) -> None:
    """What exists is not made: neither a full model nor a state or an idle time of no use keep a client from it."""
    session, _, _ = [(await manager.create("toy", session_id=name))[0] for name in "abc"]
    for options in ({}, {"state": {"h": "nonsense"}}, {"idle_ttl": 1e9}):
        assert await manager.create("toy", session_id="a", **options) == (session, False)  # type: ignore[arg-type]
    with pytest.raises(SessionExists):
        await manager.create("nope", session_id="a")


async def test_an_idle_session_expires_and_says_so(manager: SessionManager, clock: Clock) -> None:
    """At its idle_ttl it is gone, before any sweep; the id answers expired, not unknown; its slot is free."""
    session, _ = await manager.create("toy", session_id="a", idle_ttl=20)
    clock.now += 19.9
    assert await manager.find("a") is session
    clock.now += 0.1
    with pytest.raises(SessionExpired):
        await manager.find("a")
    with pytest.raises(SessionNotFound):
        await manager.find("b")
    assert len(manager.engines.get("toy").slab) == 0
    again, created = await manager.create("toy", session_id="a")
    assert (created, again.step) == (True, 0)


async def test_a_step_keeps_a_session_alive(manager: SessionManager, clock: Clock) -> None:
    """Idle time counts from the last step, and looking does not count as use."""
    session, _ = await manager.create("toy", session_id="a", idle_ttl=20)
    for _ in range(3):
        clock.now += 15
        await manager.step(session, ones())
        assert manager.expires_at(session) == clock.now + 20
    clock.now += 15
    await manager.find("a")
    clock.now += 15
    with pytest.raises(SessionExpired):
        await manager.find("a")


async def test_a_sweep_expires_who_is_idle_and_nobody_else(manager: SessionManager, clock: Clock) -> None:
    """Sessions are found by a sweep without anybody asking; those in use stay."""
    await manager.create("toy", session_id="short", idle_ttl=10)
    used, _ = await manager.create("toy", session_id="used", idle_ttl=10)
    await manager.create("toy", session_id="long", idle_ttl=100)
    assert await manager.sweep() == 0
    clock.now += 9
    await manager.step(used, ones())
    clock.now += 2
    assert await manager.sweep() == 1
    assert [s.id for s in (await manager.page(None, "", 10))[0]] == ["long", "used"]
    clock.now += 95
    assert await manager.sweep() == 2
    assert len(manager.engines.get("toy").slab) == 0


async def test_an_expired_session_is_not_listed(manager: SessionManager, clock: Clock) -> None:
    """Past its time it is gone from the list, even before the sweep."""
    await manager.create("toy", idle_ttl=10)
    clock.now += 11
    assert (await manager.page(None, "", 10))[0] == []


async def test_a_sweep_that_fails_is_made_up_for(
    manager: SessionManager, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the store fails in the middle of a sweep, the next one expires the rest."""
    for _ in range(3):
        await manager.create("toy", idle_ttl=10)
    clock.now += 12

    async def fail(session: str) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as broken:
        broken.setattr(manager._store, "expire", fail)
        with pytest.raises(OSError, match="away"):
            await manager.sweep()
    await manager.sweep()
    assert len(manager.engines.get("toy").slab) == 0


async def test_a_reset_counts_as_use(manager: SessionManager, clock: Clock) -> None:
    """The idle time starts again."""
    session, _ = await manager.create("toy", session_id="a", idle_ttl=10)
    clock.now += 9
    await manager.reset(session.id)
    clock.now += 9
    assert await manager.find("a") is session


async def test_a_session_with_work_is_not_idle(manager: SessionManager, clock: Clock) -> None:
    """However long its request takes, it does not expire under it; its idle time starts when it is answered."""
    session, _ = await manager.create("toy", session_id="a", idle_ttl=10)
    waiting = asyncio.create_task(manager.step(session, ones(50)))
    await asyncio.sleep(0)
    clock.now += 1000
    assert await manager.sweep() == 0
    assert (await waiting).step == 50
    await asyncio.sleep(0)
    clock.now += 9
    assert await manager.find("a") is session
    clock.now += 2
    assert await manager.sweep() == 1


async def test_ten_thousand_sessions_leave_nothing_behind(manager: SessionManager, clock: Clock) -> None:
    """Opened and deleted, or opened and expired, they leave no slot and no entry."""
    for i in range(5000):
        session, _ = await manager.create("toy")
        await manager.delete(session.id)
        await manager.create("counter", session_id=f"s{i}", idle_ttl=10)
        clock.now += 11
        await manager.sweep()
    clock.now += 200
    await manager.sweep()
    assert manager._live == {}
    assert [len(engine.slab) for engine in manager.engines] == [0, 0, 0]


async def test_reset_returns_to_the_start(manager: SessionManager) -> None:
    """After a reset the session gives the bits of a new one, from step 1."""
    session, _ = await manager.create("toy")
    first = await manager.step(session, ones(3, first=1))
    await manager.reset(session.id)
    assert session.step == 0
    again = await manager.step(session, ones(3, first=1))
    assert not again.replayed
    assert first.data == again.data


async def test_predict_equals_a_session_and_leaves_no_trace(manager: SessionManager) -> None:
    """Whole sequences of different lengths have the bits of a session's steps, and take no slot in the end."""
    session, _ = await manager.create("toy")
    steps = [await manager.step(session, ones()) for _ in range(4)]
    engine = manager.engines.get("toy")
    short, long = await manager.predict(engine, [ones(2), ones(4)])
    for reply, count in ((short, 2), (long, 4)):
        assert reply.data == b"".join(step.data or b"" for step in steps[:count])
    assert len(engine.slab) == 1


async def test_predict_without_room_takes_nothing(manager: SessionManager) -> None:
    """Without a slot for one it is refused, and all slots come back; with slots for some, the others wait."""
    engine = manager.engines.get("toy")
    assert len(await manager.predict(engine, [ones()] * 10)) == 10
    session, _ = await manager.create("toy")
    with pytest.raises(CapacityExceeded):
        await manager.predict(engine, [ones()] * 3)
    assert len(engine.slab) == 1
    await manager.delete(session.id)
    assert len(await manager.predict(engine, [ones()] * 3)) == 3


async def test_many_sequences_leave_room_for_steps(manager: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session steps beside a call of thousands, and is not refused."""
    engine = manager.engines.get("toy")
    monkeypatch.setattr(engine, "sequences_at_once", 2)
    session, _ = await manager.create("toy")
    predicting = asyncio.create_task(manager.predict(engine, [ones(i % 3 + 1) for i in range(500)]))
    while not predicting.done():
        await manager.step(session, ones())
    assert session.step > 100
    alone, _ = await manager.create("toy")
    expected = (await manager.step(alone, ones(3))).data
    assert predicting.result()[-3].data == expected  # the 498th: three rows


async def test_predict_that_fails_leaves_no_trace(manager: SessionManager) -> None:
    """One bad sequence fails the call with its typed error; the slots come back."""
    engine = manager.engines.get("counter")
    good, bad = (StepRequest(np.array([1, i]).tobytes(), 2, ("y",)) for i in (2, 99))
    with pytest.raises(InferenceFailed):
        await manager.predict(engine, [good, bad])
    assert len(engine.slab) == 0


async def test_who_is_deleted_in_its_turn_shows_nobody_elses_state(manager: SessionManager) -> None:
    """Whenever the delete comes, a copy is of the session itself, or there is none."""
    engine = manager.engines.get("toy")
    for other in [(await manager.create("toy"))[0] for _ in range(2)]:
        await manager.step(other, ones(3))
    fates: set[int | str] = set()
    for turns in range(8):
        session, _ = await manager.create("toy", session_id="a")
        await manager.step(session, ones())
        copy = asyncio.create_task(manager.state("a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        await manager.delete("a")
        try:
            fates.add(engine.snapshots.unpack(await copy).step)
        except SessionNotFound:
            fates.add("gone")
    assert fates == {"gone", 1}


async def test_a_fork_may_have_no_metadata(manager: SessionManager) -> None:
    """None given are those of the session; given as none, there are none."""
    session, _ = await manager.create("toy", metadata={"who": "me"})
    assert (await manager.fork(session.id)).metadata == {"who": "me"}
    assert (await manager.fork(session.id, metadata={})).metadata == {}


async def test_a_fork_idles_as_long_as_the_session(manager: SessionManager) -> None:
    """None given is that of the session, and not that of sessions that ask for none."""
    session, _ = await manager.create("toy", idle_ttl=20)
    assert (await manager.fork(session.id)).idle_ttl == 20
    assert (await manager.fork(session.id, idle_ttl=30)).idle_ttl == 30


async def test_a_fork_may_have_an_id_whose_time_is_over(manager: SessionManager, clock: Clock) -> None:
    """Before any sweep, as a create may."""
    await manager.create("toy", session_id="short", idle_ttl=10)
    session, _ = await manager.create("toy", session_id="long", idle_ttl=100)
    await manager.step(session, ones(2))
    clock.now += 11
    assert (await manager.fork("long", fork_id="short")).step == 2
    assert (await manager.find("short")).step == 2


async def test_the_last_page_leads_nowhere(manager: SessionManager) -> None:
    """Also where it is full."""
    for name in ("a", "b"):
        await manager.create("toy", session_id=name)
    assert [(await manager.page(None, "", limit))[1] for limit in (1, 2, 3)] == ["a", None, None]


async def test_a_step_whose_caller_has_gone_before_its_run_is_not_applied(manager: SessionManager) -> None:
    """And keeps nobody from the step after it."""
    session, _ = await manager.create("toy")
    async with session.engine.batcher.hold(session):
        leaving = asyncio.create_task(manager.step(session, ones(3)))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
    assert (await manager.step(session, ones())).step == 1
    assert leaving.cancelled()


async def test_who_leaves_before_its_turn_keeps_nobody_waiting(manager: SessionManager) -> None:
    """The session goes on with whoever is behind."""
    session, _ = await manager.create("toy")
    async with session.engine.batcher.hold(session):
        leaving = asyncio.create_task(manager.turn(session))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
    assert (await asyncio.wait_for(manager.step(session, ones()), 5)).step == 1


async def test_a_prediction_is_none_too_many_for_a_short_queue(repository: Path, metrics: Metrics) -> None:
    """It takes the sequences of a call in as many parts as there is room for."""
    engines = load_engines(load_all(repository).found, {}, replace(OPTIONS, max_queue=4), metrics)
    engine = engines.get("toy")
    engine.start()
    limits = IdleLimits(60.0, 10.0, 100.0)
    manager = SessionManager(engines, MemoryStore(max_expired_ids=10), idle=limits, metrics=metrics)
    assert len(await manager.predict(engine, [ones()] * 10)) == 10
    await engine.close()


async def test_no_session_goes_to_a_step_that_is_beyond_all_use(manager: SessionManager) -> None:
    """A snapshot of one is refused, whether the session is there or is to be made; what is there stays."""
    session, _ = await manager.create("toy", session_id="a")
    codec = session.engine.snapshots
    beyond = snapshot(session.engine.slab, session)._replace(step=2**53 + 1)
    [body], [header] = codec.pack(*beyond.commits(session))
    for name in ("a", "b"):
        with pytest.raises(SnapshotInvalid, match="at most"):
            await manager.restore(name, header + body)
    assert (await manager.find("a")).step == 0
    with pytest.raises(SessionNotFound):
        await manager.find("b")
