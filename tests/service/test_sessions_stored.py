"""Sessions that a store has: what a process lets go, loads again, and finds out from the others."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest
from starlette.types import Message

from service.errors import (
    CapacityExceeded,
    Internal,
    InvalidInput,
    ModelNotFound,
    SessionCorrupt,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    StepConflict,
    StepNotKept,
    StoreUnavailable,
)
from service.routers.sockets import Shared
from service.routers.steps import Answer, StepDoor
from service.routers.stream import StreamDoor
from service.sessions import IdleLimits, SessionManager
from service.snapshot import snapshot
from service.stores import Save, Saved, Stored, open_store
from service.wire import StepRequest, frames
from service.wire.frames import Kind
from tests.service import toys
from tests.service.replicas import Replica, SharedStore
from tests.service.wires import Client

pytestmark = pytest.mark.anyio


@pytest.fixture
async def replicas(repository: Path) -> AsyncIterator[list[Replica]]:
    """Two processes with room for four sessions each."""
    store = SharedStore(keep_steps=2)
    both = [Replica(repository, store, max_sessions=4) for _ in range(2)]
    for replica in both:
        await replica.start()
    yield both
    for replica in both:
        await replica.close()


def store(replicas: list[Replica]) -> SharedStore:
    """What they share."""
    found = replicas[0].ledger.store
    assert isinstance(found, SharedStore)
    return found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store counts time, as those do that replicas share: five seconds are left of every session."""
    load = SharedStore.load

    async def timed(self: SharedStore, name: str) -> Stored:
        return msgspec.structs.replace(await load(self, name), time_left=5.0)

    monkeypatch.setattr(SharedStore, "load", timed)


def sockets(replica: Replica) -> StreamDoor:
    """Its door for WebSockets."""
    limits = {"max_waiting": 8, "max_waiting_many": 20, "max_unsent_bytes": 10**6, "max_steps": 100}
    return StreamDoor(Shared(replica.manager, replica.metrics, **limits, slow_reader=60))


def ones(steps: int = 1, first: int | None = None) -> StepRequest:
    """Steps for `toy`."""
    return StepRequest(np.ones((steps, toys.INPUTS), np.float32).tobytes(), steps, ("y",), first)


async def answer(door: StepDoor, body: bytes) -> bytes:
    """What session `a` is answered over HTTP."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"headers": [(b"content-type", b"application/json")], "query_string": b""}
    return (await door.answer("a", scope, receive)).body


async def test_a_run_is_one_save(replicas: list[Replica]) -> None:
    """What runs together is written together."""
    manager = replicas[0].manager
    sessions = [(await manager.create("toy"))[0] for _ in range(4)]
    await asyncio.gather(*(manager.step(session, ones()) for session in sessions))
    assert store(replicas).saves == [4]
    assert replicas[0].metrics.registry.get_sample_value("latch_store_rows_sum") == 4


async def test_busy_sessions_and_sequences_do_not_make_room(replicas: list[Replica]) -> None:
    """The one used least recently goes, if nobody needs it now; when all are needed, there is no room."""
    manager = replicas[0].manager
    engine = replicas[0].engines.get("toy")
    sessions = [(await manager.create("toy", session_id=f"s{i}"))[0] for i in range(4)]
    async with engine.batcher.hold(sessions[0]):
        await manager.create("toy", session_id="s4")
        assert [session.is_live for session in sessions] == [True, False, True, True]
        [reply] = await manager.predict(engine, [ones(3)])
        assert reply.step == 3
        async with (
            engine.batcher.hold(await manager.find("s1")),
            engine.batcher.hold(await manager.find("s2")),
            engine.batcher.hold(await manager.find("s3")),
        ):
            with pytest.raises(CapacityExceeded):
                await manager.create("toy", session_id="s5")
    assert (await manager.find("s4")).step == 0
    assert len(engine.slab) == 4
    labels = {"model": "toy", "version": "1"}
    assert replicas[0].metrics.registry.get_sample_value("latch_sessions", labels) == 4


async def test_another_replica_is_believed_about_the_end(replicas: list[Replica]) -> None:
    """Deleted there, it is gone here: for a step, a look and a delete; and its id is free."""
    here, there = (replica.manager for replica in replicas)
    for call in (here.inspect, here.delete, here.turn, here.step):
        session, _ = await here.create("toy", session_id="a")
        await there.delete("a")
        with pytest.raises(SessionNotFound):
            await (call(session, ones()) if call == here.step else call(session if call == here.turn else "a"))
    await here.create("toy", session_id="a")
    await there.delete("a")
    _, created = await here.create("counter", session_id="a")
    assert created
    assert (await there.find("a")).model == "counter"


async def test_an_id_made_anew_is_another_session(replicas: list[Replica]) -> None:
    """Who still has the old one does not step the new one."""
    here, there = (replica.manager for replica in replicas)
    old, _ = await here.create("toy", session_id="a")
    await there.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.create("toy", session_id="a")
    with pytest.raises(SessionNotFound, match="made anew"):
        await here.step(old, ones())
    assert (await here.find("a")).step == 0


async def test_a_call_by_id_means_the_session_that_is_there(replicas: list[Replica]) -> None:
    """Over HTTP nobody holds on to the old one: the step goes to the session that has the id now."""
    here, there = replicas
    door = StepDoor(here.manager, here.metrics, max_body_bytes=10**6, max_steps=100)
    await here.manager.create("counter", session_id="a")
    await there.manager.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.manager.create("counter", session_id="a")
    assert b'"step":1' in await answer(door, b'{"inputs": [2], "step": 1}')
    assert (await there.manager.inspect("a")).step == 1


class Call:
    """A step that came past ASGI (`Plain`)."""

    session_id, kind, query = "a", "application/json", b""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.tasks: list[asyncio.Task[None]] = []

    def reply(self, answer: Answer) -> None:
        """See `Plain`."""
        self.answer.set_result(answer)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """See `Plain`."""
        self.tasks.append(asyncio.create_task(work))


@pytest.mark.parametrize(("model", "row"), [("counter", b"2"), ("toy", b"[1, 2, 3]")])
async def test_a_call_past_asgi_means_the_session_that_is_there(
    replicas: list[Replica], model: str, row: bytes
) -> None:
    """Whatever model the copy here is of: the step is the new session's."""
    here, there = replicas
    door = StepDoor(here.manager, here.metrics, max_body_bytes=10**6, max_steps=100)
    await here.manager.create("counter", session_id="a")
    await there.manager.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.manager.create(model, session_id="a")
    call = Call()
    door.take(call, b'{"inputs": [' + row + b'], "step": 1}')
    answered = await asyncio.wait_for(call.answer, 5)
    assert (answered.status, len(call.tasks)) == (200, 1)
    assert (await there.manager.inspect("a")).step == 1


async def test_a_session_lives_where_it_was_used_last(replicas: list[Replica]) -> None:
    """A copy that idled out ends nothing if another replica has used the session since."""
    here, there = (replica.manager for replica in replicas)
    session, _ = await here.create("toy", session_id="a", idle_ttl=0.05)
    moved = await there.find("a")
    await there.step(moved, ones())
    session.engine.slab.expire_in(session, 0)
    assert await here.sweep() == 0
    assert not session.is_live
    assert (await here.find("a")).step == 1
    again = await here.find("a")
    for each, manager in ((again, here), (moved, there)):
        each.engine.slab.expire_in(each, 0)
        await manager.sweep()
    with pytest.raises(SessionExpired):
        await here.find("a")


async def test_a_replica_without_its_store_refuses(replicas: list[Replica]) -> None:
    """Steps, looks and new sessions alike; what was acknowledged is there when the store is."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.step(session, ones(first=1))
    store(replicas).faults.extend(["before"] * 4)
    for call in (
        lambda: manager.step(session, ones(first=2)),
        lambda: manager.find("a"),
        lambda: manager.create("toy"),
        lambda: manager.inspect("a"),
    ):
        with pytest.raises(StoreUnavailable):
            await call()
    reply = await manager.step(await manager.find("a"), ones(first=2))
    assert (reply.step, reply.replayed) == (2, False)


async def test_everybody_behind_a_failed_save_is_told(replicas: list[Replica]) -> None:
    """Pipelined steps fail together; sent again, they are applied once, in order."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    store(replicas).faults.append("after")
    failed = await asyncio.gather(
        *(manager.step(session, ones(first=number)) for number in (1, 2, 3)), return_exceptions=True
    )
    assert [type(error) for error in failed] == [StoreUnavailable] * 3
    replies = [await manager.step(await manager.find("a"), ones(first=number)) for number in (1, 2, 3)]
    assert [(reply.step, reply.replayed) for reply in replies] == [(1, True), (2, False), (3, False)]


async def test_a_refusal_comes_from_what_the_store_says(replicas: list[Replica]) -> None:
    """A copy that is behind refuses no step that is next in truth, and names the step that is expected in truth."""
    here, there = (replica.manager for replica in replicas)
    session, _ = await here.create("toy", session_id="a")
    moved = await there.find("a")
    for number in (1, 2, 3):
        await there.step(moved, ones(first=number))
    assert (await here.step(session, ones(first=4))).step == 4
    with pytest.raises(StepConflict) as caught:
        await there.step(moved, ones(first=9))
    assert caught.value.extras["expected_step"] == 5


async def test_a_stored_state_that_cannot_be_read_is_left_alone(replicas: list[Replica]) -> None:
    """The session says so, and what is in the store stays for somebody to look at."""
    here, there = (replica.manager for replica in replicas)
    session, _ = await here.create("toy", session_id="a")
    broken = Saved(7, b"not a snapshot")
    assert await store(replicas).save([Save("a", session.token, b"t" * 16, broken)]) == [True]
    for call in (lambda: here.step(session, ones()), lambda: there.find("a"), lambda: here.reset("a")):
        with pytest.raises(SessionCorrupt, match="session 'a' cannot be read"):
            await call()
    assert (await store(replicas).load("a")).saved == broken
    await here.delete("a")


async def test_two_that_make_the_same_session_get_the_same(replicas: list[Replica]) -> None:
    """At two replicas at once: it is made once; of another model, it is taken."""
    here, there = (replica.manager for replica in replicas)
    made = await asyncio.gather(*(manager.create("toy", session_id="a") for manager in (here, there, here)))
    assert sorted(created for _, created in made) == [False, False, True]
    assert len({session.created_at for session, _ in made}) == 1
    with pytest.raises(SessionExists):
        await there.create("counter", session_id="a")


async def test_callers_who_leave_leave_nothing_behind(replicas: list[Replica]) -> None:
    """Cancelled at any moment, a step is applied once or not at all, and the session goes on."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    for turns in range(12):
        store(replicas).faults.append("slow")
        before = (await store(replicas).load("a")).step
        for call in (manager.step(session, ones()), manager.reset("a"), manager.turn(session)):
            task = asyncio.create_task(call)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        session = await manager.find("a")
        await manager.turn(session)
        assert session.step == (await store(replicas).load("a")).step <= before + 1
        await manager.step(session, ones())
    assert not session.engine.batcher.is_busy(session)


async def test_what_is_gone_before_its_caller_wakes_is_looked_for_again(replicas: list[Replica]) -> None:
    """A session that was just loaded is deleted, and everybody who was about to get it is told."""
    here, there = (replica.manager for replica in replicas)
    await there.create("toy", session_id="a")
    first = asyncio.create_task(here.find("a"))
    while here.resident("a") is None:  # noqa: ASYNC110 - it is the turn that counts
        await asyncio.sleep(0)
    await here.delete("a")
    for found in (here.find("a"), first):
        with pytest.raises(SessionNotFound):
            await found


async def test_a_copy_that_was_loaded_during_a_delete_goes_too(replicas: list[Replica]) -> None:
    """Whoever asks while the store deletes has an old copy at most until that is done."""
    here, there = (replica.manager for replica in replicas)
    await there.create("toy", session_id="a")
    deletion = here._store.delete

    async def delete(session: str, created_at: float | None = None) -> None:
        await here.find("a")
        await deletion(session, created_at)

    here._store.delete = delete  # type: ignore[method-assign]
    try:
        await here.delete("a")
    finally:
        here._store.delete = deletion  # type: ignore[method-assign]
    assert here.resident("a") is None


async def test_calls_by_id_mean_the_session_that_has_it_now(replicas: list[Replica]) -> None:
    """Where the copy here is of one that was deleted elsewhere, and made anew, the new one is looked at and moved."""
    here, there = (replica.manager for replica in replicas)
    for call in (here.state, here.fork, here.reset):
        old, _ = await here.create("toy", session_id="a")
        await here.step(old, ones(3))
        await there.delete("a")
        await asyncio.sleep(0.001)  # the clock of creation has moved on
        new, _ = await there.create("toy", session_id="a")
        await there.step(new, ones())
        got = await call("a")
        step = old.engine.snapshots.unpack(got).step if isinstance(got, bytes) else got.step
        assert step == (0 if call == here.reset else 1)
        await here.delete("a")


async def test_a_copy_that_cannot_be_brought_up_to_date_is_given_up(replicas: list[Replica]) -> None:
    """Whatever the reason: the caller is told, and the step is not tried for ever."""
    here, there = (replica.manager for replica in replicas)
    old, _ = await here.create("toy", session_id="a")
    await there.step(await there.find("a"), ones())

    async def load(_session: str) -> Stored:
        raise ValueError("nobody thought of this")

    store(replicas).load = load  # type: ignore[method-assign]
    with pytest.raises(Internal):
        await asyncio.wait_for(here.step(old, ones()), 5)
    assert not old.is_live
    assert not old.engine.batcher.is_busy(old)


async def test_a_rollback_is_refused_by_one_moment(replicas: list[Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another replica rolls the session back to this step in between: it was kept before, and is where it is now."""
    here, there = (replica.manager for replica in replicas)
    session, _ = await here.create("toy", session_id="a")
    for number in (1, 2, 3):
        await here.step(session, ones(first=number))
    earlier = store(replicas).earlier

    async def overtaken(name: str) -> object:
        monkeypatch.undo()
        await there.rollback(name, 1)
        return await earlier(name)

    monkeypatch.setattr(store(replicas), "earlier", overtaken)
    assert (await here.rollback("a", 1)).step == 1
    with pytest.raises(StepNotKept) as caught:
        await here.rollback("a", 2)
    assert caught.value.extras["kept_steps"] == [1]


async def test_who_asks_for_a_session_again_is_told_where_it_is(replicas: list[Replica]) -> None:
    """Not where a copy of it was left; and if it was made anew, of another model, it is that one."""
    here, there = (replica.manager for replica in replicas)
    await here.create("toy", session_id="a")
    moved = await there.find("a")
    for number in (1, 2, 3):
        await there.step(moved, ones(first=number))
    session, created = await here.create("toy", session_id="a")
    assert (session.step, created) == (3, False)
    await there.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.create("counter", session_id="a")
    session, created = await here.create("counter", session_id="a")
    assert (session.model, created) == ("counter", False)
    with pytest.raises(SessionExists):
        await here.create("toy", session_id="a")


async def test_a_row_is_for_the_model_that_the_session_has_now(replicas: list[Replica]) -> None:
    """Its copy here may be of another; what fits neither is refused as ever."""
    here, there = replicas
    door = StepDoor(here.manager, here.metrics, max_body_bytes=10**6, max_steps=100)
    await here.manager.create("toy", session_id="a")
    await there.manager.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.manager.create("counter", session_id="a")
    assert b'"step":1' in await answer(door, b'{"inputs": [2], "step": 1}')
    with pytest.raises(InvalidInput, match=r"\$.inputs\[0\]"):
        await answer(door, b'{"inputs": [[1, 2, 3]], "step": 2}')
    assert (await there.manager.inspect("a")).step == 1


async def test_sessions_that_are_being_made_make_no_room(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there is room for, at once: some are made, the others are told that there is none."""
    create = SharedStore.create

    async def slowly(*args: Any) -> None:
        await asyncio.sleep(0.01)
        await create(*args)

    monkeypatch.setattr(SharedStore, "create", slowly)
    manager = replicas[0].manager
    calls = (manager.create("toy", session_id=f"s{i}") for i in range(12))
    made = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(one) for one in made} == {tuple, CapacityExceeded}
    assert sum(isinstance(one, tuple) for one in made) == 4
    assert await manager.sweep() == 0
    assert (await manager.create("toy"))[1]


async def test_who_is_deleted_during_a_rollback_is_gone(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at step 0, and not where the next owner of its row is."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    for number in (1, 2):
        await manager.step(session, ones(first=number))
    earlier = SharedStore.earlier

    async def meanwhile(self: SharedStore, name: str) -> Any:
        found = await earlier(self, name)
        await manager.delete("a")
        return found

    monkeypatch.setattr(SharedStore, "earlier", meanwhile)
    monkeypatch.setattr(SharedStore, "is_shared", False)  # else the store is asked once more, and knows
    with pytest.raises(SessionNotFound):
        await manager.rollback("a", 2)


async def test_two_that_restore_the_same_session_get_the_same(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One makes it, the other has it stand there."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.step(session, ones())
    data = await manager.state("a")
    create = SharedStore.create

    async def slowly(*args: Any) -> None:
        await asyncio.sleep(0.01)
        await create(*args)

    monkeypatch.setattr(SharedStore, "create", slowly)
    found = await asyncio.gather(*(manager.restore("b", data) for _ in range(3)))
    assert sorted(created for _, created in found) == [False, False, True]
    assert (await manager.find("b")).step == 1


async def test_the_store_hears_of_use_that_saves_nothing(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of who was answered again, once; and of who has requests for longer than it may be idle, at every sweep."""
    touched: list[dict[str, bytes]] = []

    async def touch(_: SharedStore, tokens: dict[str, bytes]) -> None:
        touched.append(tokens)

    monkeypatch.setattr(SharedStore, "touch", touch)
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.create("toy", session_id="b")
    for _ in range(2):
        assert (await manager.step(session, ones(first=1))).step == 1
    await manager.sweep()
    await manager.sweep()
    assert touched == [{"a": session.token}]
    async with session.engine.batcher.hold(session):
        session.engine.slab.expire_in(session, 0)
        for _ in range(2):
            assert await manager.sweep() == 0
    assert touched == [{"a": session.token}] * 3


async def test_use_that_the_store_could_not_hear_of_is_told_again(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was away for one sweep; the answer has told a later end."""
    touched: list[list[str]] = []

    async def touch(_: SharedStore, tokens: dict[str, bytes]) -> None:
        touched.append([*tokens])
        if len(touched) == 1:
            raise StoreUnavailable("the wire is cut")

    monkeypatch.setattr(SharedStore, "touch", touch)
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    for _ in range(2):
        await manager.step(session, ones(first=1))
    with pytest.raises(StoreUnavailable):
        await manager.sweep()
    await manager.sweep()
    await manager.sweep()
    assert touched == [["a"], ["a"]]


async def test_one_that_cannot_be_read_keeps_no_other_from_ending(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left as it is; the others that idled out end in the store, too, and are counted."""
    manager, load = replicas[0].manager, SharedStore.load
    for name in "abc":
        session, _ = await manager.create("toy", session_id=name)
        session.engine.slab.expire_in(session, 0)

    async def spoilt(store: SharedStore, name: str) -> Stored:
        if name == "b":
            raise SessionCorrupt("session 'b' cannot be read")
        return msgspec.structs.replace(await load(store, name), time_left=0.0)

    monkeypatch.setattr(SharedStore, "load", spoilt)
    assert await manager.sweep() == 2
    assert store(replicas)._find("b") is not None
    assert store(replicas)._find("a") is store(replicas)._find("c") is None


async def test_in_a_file_who_is_in_use_does_not_expire(repository: Path, tmp_path: Path) -> None:
    """Retries and long requests count there as they do in memory."""
    store = open_store(f"sqlite:///{tmp_path}/s.db", keep_steps=0, max_expired_ids=10)
    replica = Replica(repository, store, max_sessions=4)
    await replica.start()
    manager = replica.manager
    session, _ = await manager.create("toy", session_id="a", idle_ttl=0.4)
    other, _ = await manager.create("toy", session_id="b", idle_ttl=0.4)
    await manager.step(session, ones(first=1))
    async with other.engine.batcher.hold(other):
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert (await manager.step(session, ones(first=1))).replayed
            await manager.sweep()
    assert (await manager.step(session, ones(first=2))).step == 2
    assert (await manager.step(other, ones(first=1))).step == 1
    await replica.close()
    await store.close()


async def test_a_create_finds_who_was_used_since_the_last_save(repository: Path, tmp_path: Path) -> None:
    """A retry has moved its end, of which a file hears at the next sweep: its old end makes no room for a new one."""
    store = open_store(f"sqlite:///{tmp_path}/s.db", keep_steps=0, max_expired_ids=10)
    replica = Replica(repository, store, max_sessions=4)
    await replica.start()
    manager = replica.manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.step(session, ones(first=1))
    store._db.execute("UPDATE sessions SET expires_at = 0")  # type: ignore[attr-defined]  # as if it were long ago
    assert (await manager.step(session, ones(first=1))).replayed
    assert (await store.page(None, "", 9), await manager.create("toy", session_id="a")) == ([], (session, False))
    assert (await manager.step(session, ones(first=2))).step == 2
    await replica.close()
    await store.close()


async def test_who_makes_room_keeps_the_time_that_was_promised(repository: Path, tmp_path: Path) -> None:
    """A retry was told a later end than the file knows of, and it holds when the session is loaded again."""
    store = open_store(f"sqlite:///{tmp_path}/s.db", keep_steps=0, max_expired_ids=10)
    replica = Replica(repository, store, max_sessions=1)
    await replica.start()
    manager = replica.manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.step(session, ones(first=1))
    store._db.execute("UPDATE sessions SET expires_at = 0")  # type: ignore[attr-defined]  # as if it were long ago
    assert (await manager.step(session, ones(first=1))).replayed
    await manager.create("toy", session_id="b")
    assert manager.resident("a") is None
    assert (await manager.step(await manager.find("a"), ones(first=2))).step == 2
    await replica.close()
    await store.close()


async def test_what_the_store_has_not_heard_of_is_told_again_where_it_failed(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sessions that are here, and of those that made room."""
    told: list[list[str]] = []

    async def touch(_: SharedStore, tokens: dict[str, bytes]) -> None:
        told.append(sorted(tokens))
        if len(told) == 1:
            raise StoreUnavailable("away")

    manager = replicas[0].manager
    for name in ("here", "gone", "c", "d"):
        session, _ = await manager.create("toy", session_id=name)
        await manager.step(session, ones(first=1))
    for name in ("gone", "here"):
        manager._live[name].engine.batcher.used(manager._live[name])
    manager._live["here"].engine.slab.touch(manager._live["here"])
    manager._live["c"].engine.slab.touch(manager._live["c"])
    manager._live["d"].engine.slab.touch(manager._live["d"])
    await manager.create("toy", session_id="e")
    monkeypatch.setattr(SharedStore, "touch", touch)
    with pytest.raises(StoreUnavailable):
        await manager.tell_uses()
    await manager.tell_uses()
    await manager.tell_uses()
    assert told == [["gone", "here"], ["gone", "here"]]


async def test_a_use_is_told_before_the_session_is_loaded_again(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a sweep tells it: of one that is let go meanwhile, and where that fails."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    told: list[list[str]] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def touch(_: SharedStore, tokens: dict[str, bytes]) -> None:
        told.append([*tokens])
        if len(told) == 1:
            begun.set()
            await go.wait()
            raise StoreUnavailable("away")

    monkeypatch.setattr(SharedStore, "touch", touch)
    session.engine.batcher.used(session)
    telling = asyncio.create_task(manager.tell_uses())
    await begun.wait()
    manager._forget(session)  # as who makes room; nothing is noted of it any more
    assert (await manager.find("a")).step == 0
    assert told == [["a"], ["a"]]
    manager._forget(await manager.find("a"))
    go.set()
    with pytest.raises(StoreUnavailable):
        await telling
    await manager.tell_uses()
    await manager.tell_uses()
    assert told[2:] in ([["a"]], [])


async def test_a_fork_has_the_time_of_its_session_wherever_that_was_made(repository: Path) -> None:
    """Its bounds were those of another service; who asks for a time himself keeps to those of this one."""
    store = SharedStore()
    there, here = Replica(repository, store), Replica(repository, store)
    here.manager._idle = IdleLimits(5.0, 1.0, 10.0)
    await there.start()
    await here.start()
    await there.manager.create("toy", session_id="a", idle_ttl=50.0)
    assert (await here.manager.fork("a")).idle_ttl == 50.0
    with pytest.raises(InvalidInput, match="idle_ttl_ms 50000 is out of bounds: 1000 to 10000"):
        await here.manager.fork("a", idle_ttl=50.0)
    await there.close()
    await here.close()


@pytest.mark.usefixtures("timed")
async def test_outputs_are_those_of_the_session_that_has_the_id_now(replicas: list[Replica]) -> None:
    """Where the copy here is of one of another model; what that session does not have either is refused."""
    here, there = (replica.manager for replica in replicas)
    await here.create("counter", session_id="a")
    await there.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.create("toy", session_id="a")
    door = sockets(replicas[0])
    client = Client(door, "/v1/stream", "latch.binary")
    for outputs in (["y", "z"], ["nothing"]):
        client.send(frames.notice(Kind.OPEN, 3, {"session": "a", "outputs": outputs}))
        await client.until(lambda: client.wire.received)
        (answer,) = frames.read_answers(client.wire.received.pop(), lambda _: None)
        facts = json.loads(answer.payload)
        assert facts.get("model", facts.get("path")) == ("toy" if "z" in outputs else "$.outputs[0]")
    client.leave()
    await client.task


async def test_where_replicas_share_it_the_store_hears_of_use_before_it_is_asked(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that counts time would else say that a session is over which its last retry has kept."""
    calls: list[str] = []
    load = SharedStore.load

    async def touch(_: SharedStore, tokens: dict[str, bytes]) -> None:
        calls.append(f"touch {' '.join(tokens)}")

    async def loaded(self: SharedStore, name: str) -> Stored:
        calls.append("load")
        return await load(self, name)

    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    for _ in range(2):
        await manager.step(session, ones(first=1))
    monkeypatch.setattr(SharedStore, "touch", touch)
    monkeypatch.setattr(SharedStore, "load", loaded)
    assert await manager.create("toy", session_id="a") == (session, False)
    await manager.fork("a")
    assert calls == ["touch a", "load", "load"]


async def test_a_kept_request_that_ends_elsewhere_is_not_repeated(replicas: list[Replica]) -> None:
    """A snapshot of somebody's own making may say that one row led over ten steps: its duplicate is stale."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.step(session, ones(first=1))
    commits, state = snapshot(session.engine.slab, session).commits(session)
    [body], [header] = session.engine.snapshots.pack(commits._replace(steps=[10]), state)
    made, _ = await manager.restore("b", header + body)
    with pytest.raises(StepConflict, match="the next is 11"):
        await manager.step(made, ones(first=1))


async def test_what_cannot_be_read_can_be_deleted(replicas: list[Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy here goes, too, and its id is free."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    load = SharedStore.load

    async def spoilt(self: SharedStore, name: str) -> Stored:
        await load(self, name)
        raise SessionCorrupt("spoilt")

    monkeypatch.setattr(SharedStore, "load", spoilt)
    await manager.delete("a")
    assert not session.is_live
    assert (await manager.create("toy", session_id="a"))[1]


async def test_a_session_that_was_found_before_its_creation_was_known_is_the_one(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's answer was late: a second call has found it, and it has moved; it is not taken for an older one."""
    manager = replicas[0].manager
    create, came, go = SharedStore.create, asyncio.Event(), asyncio.Event()

    async def late(*args: Any) -> None:
        await create(*args)
        came.set()
        await go.wait()

    monkeypatch.setattr(SharedStore, "create", late)
    first = asyncio.create_task(manager.create("toy", session_id="a"))
    await came.wait()
    session = await manager.find("a")
    assert (await manager.step(session, ones(first=1))).step == 1
    go.set()
    assert await first == (session, True)
    assert (session.is_live, len(session.engine.slab), session.engine.sessions) == (True, 1, 1)
    assert (await manager.step(session, ones(first=2))).step == 2


async def test_an_id_of_a_model_that_is_gone_is_taken_all_the_same(replicas: list[Replica]) -> None:
    """Who asks for another model with it is told what it is, and not of a model that he did not name."""
    manager = replicas[0].manager
    await manager.create("toy", session_id="a")
    manager._forget(manager._live["a"])
    engine = replicas[0].engines.get("toy")
    replicas[0].engines.drain(engine)
    replicas[0].engines.remove(engine)
    with pytest.raises(SessionExists, match="toy/1"):
        await manager.create("counter", session_id="a")
    with pytest.raises(ModelNotFound):
        await manager.create("toy", session_id="a")
    replicas[0].engines.add(engine)


async def test_a_version_that_goes_while_its_last_session_expires_leaves_no_metrics(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is asked whether it was used elsewhere; meanwhile the version, without a session now, is removed."""
    here = replicas[0]
    session, _ = await here.manager.create("toy", session_id="a", idle_ttl=0.001)
    await asyncio.sleep(0.005)
    load = SharedStore.load

    async def meanwhile(self: SharedStore, name: str) -> Stored:
        here.metrics.forget("toy", "1")
        return await load(self, name)

    monkeypatch.setattr(SharedStore, "load", meanwhile)
    assert await here.manager.sweep() == 1
    assert not session.is_live
    assert b'expired_total{model="toy"' not in generate_latest(here.metrics.registry)


async def test_a_reset_of_who_is_deleted_meanwhile_is_no_success(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, and then gone before it was applied here: the caller is told of the end."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    save = SharedStore.save

    async def meanwhile(self: SharedStore, saves: Any) -> Any:
        done = await save(self, saves)
        await manager.delete("a")
        return done

    monkeypatch.setattr(SharedStore, "save", meanwhile)
    with pytest.raises(SessionNotFound):
        await manager.reset("a")
    assert not session.is_live


async def test_a_kept_reply_that_is_none_is_not_repeated(replicas: list[Replica]) -> None:
    """A snapshot may be of anybody's making: its checksum is right, and its reply has not the size of one."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    assert (await manager.step(session, ones(first=1))).data
    engine = session.engine
    commits, state = snapshot(engine.slab, session).commits(session)
    [body], [header] = engine.snapshots.pack(commits._replace(replies=[b"abc"]), state)
    made, _ = await manager.restore("b", header + body)
    reply = await manager.step(made, ones(first=1))
    assert (reply.replayed, reply.data) == (True, None)
    assert (await manager.step(made, ones(first=2))).step == 2


async def test_a_copy_elsewhere_ends_no_session_that_is_in_use(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store counts the time, it is asked: a retry moves that on, and not the token."""
    here, there = (replica.manager for replica in replicas)
    await here.create("toy", session_id="a")
    copy = await there.find("a")
    load, left = SharedStore.load, 5.0

    async def timed(self: SharedStore, name: str) -> Stored:
        stored = await load(self, name)
        if left <= 0:
            raise SessionExpired("its time is over")
        return msgspec.structs.replace(stored, time_left=left)

    monkeypatch.setattr(SharedStore, "load", timed)
    copy.engine.slab.expire_in(copy, 0)
    assert (await there.sweep(), copy.is_live) == (0, False)
    again = await there.find("a")
    left = 0.0
    again.engine.slab.expire_in(again, 0)
    assert await there.sweep() == 1


async def test_a_restore_of_what_ends_meanwhile_makes_it(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a create does."""
    manager = replicas[0].manager
    await manager.create("toy", session_id="a")
    data = await manager.state("a")
    known = SessionManager._is_known

    async def then_deleted(self: SessionManager, name: str) -> bool:
        found = await known(self, name)
        if found:
            await self.delete(name)
        return found

    monkeypatch.setattr(SessionManager, "_is_known", then_deleted)
    assert (await manager.restore("a", data))[1]


async def test_a_session_that_is_made_while_another_of_its_id_is_deleted_stays(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made when the store had deleted the old one, and before that was known here."""
    manager = replicas[0].manager
    await manager.create("toy", session_id="a")
    deletion = SharedStore.delete

    async def then_made(self: SharedStore, name: str, created_at: float | None = None) -> None:
        assert created_at == manager._live[name].created_at
        await deletion(self, name, created_at)
        manager._forget(manager._live[name])  # as its steps find out
        await asyncio.sleep(0.001)  # the clock of creation has moved on
        await manager.create("toy", session_id=name)

    monkeypatch.setattr(SharedStore, "delete", then_made)
    await manager.delete("a")
    made = manager.resident("a")
    assert made is not None
    assert (await manager.step(made, ones(first=1))).step == 1


async def test_a_sweep_is_one_of_the_store_too(repository: Path, tmp_path: Path) -> None:
    """A file is rid of sessions that nobody has asked for since the start."""
    store = open_store(f"sqlite:///{tmp_path}/s.db", keep_steps=0, max_expired_ids=10)
    replica = Replica(repository, store, max_sessions=4)
    await replica.start()
    session, _ = await replica.manager.create("toy", session_id="a", idle_ttl=0.001)
    replica.manager._forget(session)  # as a restart does
    await asyncio.sleep(0.01)
    await replica.manager.sweep()
    rows = store._db.execute("SELECT count(*) FROM sessions").fetchone()  # type: ignore[attr-defined]
    assert rows == (0,)
    with pytest.raises(SessionExpired):
        await replica.manager.find("a")
    await replica.close()
    await store.close()


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_a_create_that_fails_takes_no_room(replicas: list[Replica], fault: str) -> None:
    """Of the four that there is; nor does one whose caller has gone."""
    manager, slab = replicas[0].manager, replicas[0].engines.get("toy").slab
    for _ in range(9):
        store(replicas).faults.append(fault)
        with pytest.raises(StoreUnavailable):
            await manager.create("toy")
    assert len(slab) == 0
    store(replicas).faults.append("slow")
    leaving = asyncio.create_task(manager.create("toy"))
    await asyncio.sleep(0)
    assert len(slab) == 1
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert len(slab) == 0


async def test_a_copy_of_what_ended_elsewhere_gives_its_row_back(replicas: list[Replica]) -> None:
    """When its id is made anew here, of a snapshot or a fork, which do not look at the copy before."""
    here, there = (replica.manager for replica in replicas)
    engine = replicas[0].engines.get("toy")
    other, _ = await here.create("toy", session_id="other")
    data = await here.state(other.id)
    for make in (lambda: here.restore("a", data), lambda: here.fork(other.id, fork_id="a")):
        copy, _ = await here.create("toy", session_id="a")
        await there.delete("a")
        await asyncio.sleep(0.001)  # the clock of creation has moved on
        await make()
        assert (copy.is_live, len(engine.slab), engine.sessions) == (False, 2, 2)
        await here.delete("a")


async def test_who_leaves_while_a_session_is_loaded_leaves_it_to_the_others(replicas: list[Replica]) -> None:
    """It is loaded once for all, and not for the first one."""
    here, there = (replica.manager for replica in replicas)
    await there.create("toy", session_id="a")
    store(replicas).faults.append("slow")
    first, second = asyncio.create_task(here.find("a")), asyncio.create_task(here.find("a"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).id == "a"
    assert first.cancelled()


async def test_a_session_whose_creation_was_known_before_it_was_loaded_is_the_one(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for it after the store had it, and before its maker heard of that, makes no second copy."""
    manager, engine = replicas[0].manager, replicas[0].engines.get("toy")
    create, load = SharedStore.create, SharedStore.load
    stored, loaded = asyncio.Event(), asyncio.Event()

    async def created(self: SharedStore, *what: Any) -> None:
        await create(self, *what)
        stored.set()
        await loaded.wait()

    async def found(self: SharedStore, name: str) -> Stored:
        record = await load(self, name)
        loaded.set()
        while manager.resident(name) is None:  # noqa: ASYNC110 - it is the turn that counts
            await asyncio.sleep(0)
        return record

    monkeypatch.setattr(SharedStore, "create", created)
    monkeypatch.setattr(SharedStore, "load", found)
    making = asyncio.create_task(manager.create("toy", session_id="a"))
    await stored.wait()
    session = await manager.find("a")
    assert (await making) == (session, True)
    assert (len(engine.slab), engine.sessions) == (1, 1)


@pytest.mark.usefixtures("timed")
async def test_a_session_that_is_loaded_has_the_time_that_it_had(replicas: list[Replica]) -> None:
    """Loading is no use: what is told of its end is what the store will have it be."""
    here, there = (replica.manager for replica in replicas)
    await there.create("toy", session_id="a")
    session = await here.find("a")
    assert 0 < session.time_left <= 5
    assert session.idle_ttl == 60
    await here.step(session, ones())
    assert session.time_left > 50


async def test_a_fork_that_takes_the_row_of_its_session_stands_where_that_stood(replicas: list[Replica]) -> None:
    """A full process lets go of whom nobody has used for longest, which may be the one that is forked."""
    manager = replicas[0].manager
    session, _ = await manager.create("toy", session_id="a")
    await manager.step(session, ones(3))
    row, stood = session.row, await manager.state("a")
    for _ in range(3):
        await manager.create("toy")
    fork = await manager.fork("a", fork_id="b")
    assert (session.is_live, fork.row) == (False, row)
    codec = fork.engine.snapshots
    there, here = codec.unpack(stood), codec.unpack(await manager.state("b"))
    assert (here.step, here.kept) == (there.step, there.kept)
    assert [values.tobytes() for values in here.state] == [values.tobytes() for values in there.state]


@pytest.mark.usefixtures("timed")
async def test_a_hello_is_of_the_session_that_has_the_id_now(replicas: list[Replica]) -> None:
    """And not of the copy that is here of one that was deleted elsewhere."""
    here, there = (replica.manager for replica in replicas)
    old, _ = await here.create("toy", session_id="a")
    await here.step(old, ones(3))
    await there.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    new, _ = await there.create("toy", session_id="a")
    await there.step(new, ones())
    door = sockets(replicas[0])
    client = Client(door, "/v1/sessions/a/stream", "latch.json")
    await client.until(lambda: client.wire.received)
    hello = json.loads(client.wire.received[0])
    assert (hello["type"], hello.get("step")) == ("hello", 1)
    client.leave()
    await client.task


@pytest.mark.usefixtures("timed")
async def test_a_channel_steps_no_session_that_was_made_anew_under_it(replicas: list[Replica]) -> None:
    """Where this process has found that out already, too: an unnumbered step was meant for the old one."""
    here, there = (replica.manager for replica in replicas)
    old, _ = await here.create("toy", session_id="a")
    door = sockets(replicas[0])
    client = Client(door, "/v1/stream", "latch.binary")
    client.send(frames.notice(Kind.OPEN, 3, {"session": "a"}))
    await client.until(lambda: client.wire.received)
    client.wire.received.clear()
    await there.delete("a")
    with pytest.raises(SessionNotFound):
        await here.turn(old)
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    await there.create("toy", session_id="a")
    assert (await here.find("a")) is not old
    client.send(frames.step(3, ones().data, 1, 0))
    await client.until(lambda: client.wire.received)
    (answer,) = frames.read_answers(client.wire.received.pop(), lambda _: 16)
    assert answer.kind == Kind.ERROR
    assert json.loads(answer.payload)["code"] == "session_not_found"
    assert (await store(replicas).load("a")).step == 0
    client.leave()
    await client.task


async def test_a_reset_that_was_overtaken_by_a_new_session_is_one_of_that(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was deleted elsewhere, and made anew, between the look at the store and the save."""
    here, there = (replica.manager for replica in replicas)
    old, _ = await here.create("toy", session_id="a")
    await here.step(old, ones(3))
    save = SharedStore.save

    async def overtaken(self: SharedStore, saves: list[Save]) -> Any:
        monkeypatch.undo()
        await there.delete("a")
        await asyncio.sleep(0.001)  # the clock of creation has moved on
        new, _ = await there.create("toy", session_id="a", metadata={"who": "new"})
        await there.step(new, ones(2))
        return await save(self, saves)

    monkeypatch.setattr(SharedStore, "save", overtaken)
    moved = await here.reset("a")
    assert (moved.step, moved.metadata, (await store(replicas).load("a")).step) == (0, {"who": "new"}, 0)


async def test_a_fork_of_a_session_that_was_loaded_has_its_metadata(replicas: list[Replica]) -> None:
    """As one of a session that was made here has."""
    here, there = (replica.manager for replica in replicas)
    await here.create("toy", session_id="a", metadata={"who": "me"}, idle_ttl=20)
    fork = await there.fork("a")
    assert (fork.metadata, fork.idle_ttl) == ({"who": "me"}, 20)


async def test_what_is_found_out_of_an_old_copy_is_nothing_of_the_new_session(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was deleted and made anew here, while the store was asked about a step of the old one."""
    here = replicas[0].manager
    old, _ = await here.create("toy", session_id="a")
    load, asked, answered = SharedStore.load, asyncio.Event(), asyncio.Event()

    async def slow(self: SharedStore, name: str) -> Stored:
        monkeypatch.undo()
        asked.set()
        await answered.wait()
        return await load(self, name)

    monkeypatch.setattr(SharedStore, "load", slow)
    step = asyncio.create_task(here.step(old, ones(first=7)))
    await asked.wait()
    await here.delete("a")
    await asyncio.sleep(0.001)  # the clock of creation has moved on
    new, _ = await here.create("toy", session_id="a")
    answered.set()
    with pytest.raises(SessionNotFound):
        await step
    for _ in range(9):
        await asyncio.sleep(0)
    assert (here.resident("a"), new.engine.sessions, len(new.engine.slab)) == (new, 1, 1)
