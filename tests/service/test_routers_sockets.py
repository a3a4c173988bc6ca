"""How sockets are read and written, on wires whose every move the test decides: floods, slow readers, ends, leaks."""

import asyncio
import gc
import itertools
import json
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from service.engine import load_engines
from service.errors import SessionNotFound, SlowReader
from service.metrics import Metrics
from service.registry import load_all
from service.routers import sockets, stream
from service.routers.binary_socket import BinarySocket
from service.routers.json_socket import JsonSocket
from service.routers.sockets import BINARY, JSON, Shared, Socket
from service.routers.stream import StreamDoor
from service.sessions import IdleLimits, SessionManager
from service.stores.memory import MemoryStore
from service.wire import Block
from service.work import BlockReply
from tests.service import peer
from tests.service.conftest import OPTIONS
from tests.service.peer import ERROR, GOING_AWAY, HELLO, STEPPED
from tests.service.wires import Client, turn

pytestmark = pytest.mark.anyio

ROW = np.array([[1, 2, 3]], np.float32)


class Watched:
    """Sockets that are remembered as long as they live, and how much each owed at most."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    _now = most = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.alive.add(self)

    @property
    def _owed(self) -> int:
        return self._now

    @_owed.setter
    def _owed(self, owed: int) -> None:
        self._now, self.most = owed, max(self.most, owed)


class WatchedBinary(Watched, BinarySocket):
    """`latch.binary`."""


class WatchedJson(Watched, JsonSocket):
    """`latch.json`."""


class House:
    """A door of small limits, the manager behind it, and clients."""

    def __init__(self, manager: SessionManager, metrics: Metrics) -> None:
        self.manager = manager
        self.metrics = metrics
        self.shared = Shared(
            manager, metrics, max_waiting=8, max_waiting_many=20, max_unsent_bytes=10**6, max_steps=5000, slow_reader=60
        )
        self.door = StreamDoor(self.shared)

    async def session(self, name: str) -> str:
        """A new session of that id."""
        await self.manager.create("toy", session_id=name)
        return name

    def at(self, name: str) -> int:
        """The steps that a session has committed."""
        return self.manager._live[name].step

    async def quiet(self) -> None:
        """Until no request has waited or run for a while."""
        calm = turns = 0
        while calm < 100:
            turns += 1
            await turn(turns)
            calm = 0 if any(engine.batcher._queues.depth for engine in self.manager.engines) else calm + 1

    def errors(self, code: str) -> float:
        """How many errors of a code were counted."""
        return self.metrics.registry.get_sample_value("latch_errors_total", {"code": code}) or 0.0

    async def single(self, name: str, subprotocol: str = JSON) -> Client:
        """A client on a socket of one session, who has read the hello."""
        client = Client(self.door, f"/v1/sessions/{await self.session(name)}/stream", subprotocol)
        await client.until(lambda: client.wire.received)
        client.wire.received.clear()
        return client

    async def many(self, *names: str) -> Client:
        """A client on a binary socket of many sessions, on channels 0 and up, who has read the hellos."""
        client = Client(self.door, "/v1/stream", BINARY)
        for channel, name in enumerate(names):
            client.send(peer.opens(channel, await self.session(name)))
        await client.until(lambda: len(replies(client)) == len(names))
        client.wire.received.clear()
        for socket in Watched.alive:
            socket.most = 0
        return client


def replies(client: Client) -> list[peer.Reply]:
    """All that a binary client was sent."""
    return peer.replies(b"".join(client.wire.received), lambda _: 16)


def documents(client: Client) -> list[Any]:
    """All that a JSON client was sent."""
    return [json.loads(message) for message in client.wire.received]


def message(step: int, **more: Any) -> str:
    """A step in JSON."""
    return json.dumps({"inputs": ROW.tolist(), "step": step, **more})


@pytest.fixture
async def house(repository: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """One service in this loop; its sockets are watched."""
    monkeypatch.setattr(stream, "BinarySocket", WatchedBinary)
    monkeypatch.setattr(stream, "JsonSocket", WatchedJson)
    Watched.alive.clear()
    found = [files for files in load_all(repository).found if files.manifest.name == "toy"]
    engines = load_engines(found, {}, replace(OPTIONS, max_session_queue=4), metrics)
    limits = IdleLimits(60.0, 1.0, 100.0)
    for engine in engines:
        engine.start()
    yield House(SessionManager(engines, MemoryStore(max_expired_ids=10), idle=limits, metrics=metrics), metrics)
    for engine in engines:
        await engine.close()


async def test_sessions_that_have_ended_are_forgotten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON socket may stay for weeks while sessions come and go; of those that live, it knows all."""
    monkeypatch.setattr(sockets, "_FED", 8)
    client = Client(house.door, "/v1/stream", JSON)
    await client.until(lambda: client.wire.on_message)
    for i in range(100):
        client.send(json.dumps({"type": "open", "session": await house.session(f"s{i}")}))
        await client.until(lambda: len(client.wire.received) == i + 1)  # noqa: B023 - awaited before the next
        if i % 10:
            await house.manager.delete(f"s{i}")
    [socket] = Watched.alive
    assert {f"s{i}" for i in range(0, 100, 10)} <= socket._fed
    assert len(socket._fed) < 40


@pytest.mark.parametrize("sessions", [1, 50])
@pytest.mark.parametrize("subprotocol", [JSON, BINARY])
async def test_a_flood_that_reads_nothing_is_not_read(house: House, sessions: int, subprotocol: str) -> None:
    """Thousands of steps from a client that reads no reply: few are taken; when it reads, all are, once, in order."""
    names = [f"s{i}" for i in range(sessions)]
    client = await house.many(*names)
    if subprotocol == JSON:
        client = Client(house.door, "/v1/stream", JSON)
        await client.until(lambda: client.wire.on_message)
    client.wire.reads = False
    for i in range(2000):
        name, channel, step = names[i % sessions], i % sessions, i // sessions + 1
        client.send(message(step, session=name) if subprotocol == JSON else peer.step(channel, ROW, step))
    await house.quiet()
    [socket] = [each for each in Watched.alive if each.most]
    assert client.wire.paused
    assert socket.most <= 20
    assert len(client.wire.sent) >= 2000 - 50
    assert len(client.wire.received) + len(socket._backlog) + socket._owed <= 50
    client.read()
    await client.until(lambda: sum(map(house.at, names)) == 2000 and not socket._owed)
    told: dict[Any, list[int]] = {}
    if subprotocol == JSON:
        for document in documents(client):
            told.setdefault(document["session"], []).append(document["step"])
    else:
        for reply in replies(client):
            told.setdefault(names[reply.channel], []).append(reply.first)
    assert told == {name: list(range(1, 2000 // sessions + 1)) for name in names}
    assert socket.most <= 20


@pytest.mark.parametrize(("ahead", "rows", "most"), [(0, 1, 19 + 16), (1, 1, 19 + 16), (0, 2, 20)])
async def test_what_is_owed_exceeds_the_limit_by_one_block_at_most(
    house: House, ahead: int, rows: int, most: int
) -> None:
    """Messages of sixteen frames: a block is taken where one reply is still allowed, and frames stop in between."""
    names = [f"s{i}" for i in range(16)]
    client = await house.many(*names)
    client.wire.reads = False
    rounds = 100
    for i in range(rounds):
        frames = [peer.step(channel, ROW, i + 1) for channel in range(16)]
        frames[5] = peer.step(5, np.repeat(ROW, rows, axis=0), i * rows + 1 + ahead)  # one, or no block at all
        client.send(b"".join(frames))
    await client.until(lambda: client.wire.paused)
    client.read()
    await client.until(lambda: len(replies(client)) == 16 * rounds)
    [socket] = Watched.alive
    assert socket.most <= most
    assert socket._owed == 0
    assert [house.at(name) for name in names] == [
        rounds if i != 5 else 0 if ahead else rounds * rows for i in range(16)
    ]


@pytest.mark.parametrize(
    "frame", [peer.frame(1, 0), peer.closes(0), peer.closes(7), peer.opens(0, "nobody")], ids=range(4)
)
async def test_a_message_of_many_frames_holds_nobody_up(house: House, frame: bytes) -> None:
    """Frames that cost little to send: refused or done in portions, others have their turn in between, few are owed."""
    client, other = await house.many("a"), await house.single("b")
    [socket] = [each for each in Watched.alive if isinstance(each, BinarySocket)]
    client.send(frame * 2000 + peer.opens(1, "b"))
    turns = 0
    while not any(b'"session":"b"' in received for received in client.wire.received[-2:]):
        other.send(message(turns + 1))
        await other.until(lambda n=turns: len(other.wire.received) == n + 1)
        turns += 1
    assert turns >= 3
    assert socket.most <= 20
    assert house.at("b") == turns


@pytest.mark.parametrize("subprotocol", [JSON, BINARY])
async def test_a_socket_that_comes_when_the_service_stops_is_told_to_go(house: House, subprotocol: str) -> None:
    """It was on its way when the others were told."""
    name = await house.session("a")
    assert house.shared.go_away() == 0
    client = Client(house.door, f"/v1/sessions/{name}/stream", subprotocol)
    await client.until(lambda: client.closed)
    assert client.closed["code"] == 1012
    assert b"draining" in client.wire.received[-1]


async def test_long_messages_of_many_sockets_take_turns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of them is given its time, all of them are none too long for the others."""
    monkeypatch.setattr("service.routers.binary_socket._SECONDS", 0.0)
    clients = [await house.many() for _ in range(6)]
    other = await house.single("b")
    handled = 0
    refuse = Socket.refuse

    def counted(*arguments: Any) -> None:
        nonlocal handled
        handled += 1
        refuse(*arguments)

    monkeypatch.setattr(Socket, "refuse", counted)
    for client in clients:
        client.send(peer.opens(0, "nobody") * 400)
    await other.until(lambda: handled >= 6 * 15)
    at, most = handled, 0
    while handled < 6 * 400:
        await asyncio.sleep(0)
        at, most = handled, max(most, handled - at)
    assert most <= 20


async def test_a_block_that_had_to_wait_runs_as_one(house: House) -> None:
    """Flow control puts messages off; what is a block when its turn comes is no sixteen requests."""
    client = await house.many(*[f"s{i}" for i in range(16)])
    taken: list[int] = []
    [socket] = Watched.alive
    take = socket.take_now
    socket.take_now = lambda message: taken.append(take(message)) or taken[-1]  # type: ignore[func-returns-value,method-assign]
    for i in range(30):
        client.send(b"".join(peer.step(channel, ROW, i + 1) for channel in range(16)))
    await client.until(lambda: len(replies(client)) == 16 * 30)
    assert taken == [True] * 30


@pytest.mark.parametrize("together", [True, False])
async def test_large_replies_are_owed_in_bytes(house: House, together: bool) -> None:
    """However few they are: no more is taken than replies of so many bytes, or one block over, until all are read."""
    house.shared.max_unsent_bytes, house.shared.max_waiting_many = 25_000, 1000
    names = ["a", "b", "c"]
    client = await house.many(*names)
    client.wire.reads = False
    frames = [peer.step(channel, np.repeat(ROW, 250, axis=0)) for channel in range(3)]
    for _ in range(20):
        client.send(*([b"".join(frames)] if together else frames))
    await house.quiet()
    [socket] = Watched.alive
    assert client.wire.paused
    assert 7 <= len(replies(client)) + socket._owed <= 9  # each is 4,000 bytes
    client.read()
    await client.until(lambda: len(replies(client)) == 60)
    assert [house.at(name) for name in names] == [5_000] * 3
    assert socket.most <= 9


async def test_a_full_queue_of_a_session_stops_the_reading(house: House) -> None:
    """Two sockets on one session overfill its queue: both wait for room, nobody is refused, and every step counts."""
    one = await house.single("a")
    two = Client(house.door, "/v1/sessions/a/stream", BINARY)
    await two.until(lambda: two.wire.received)
    two.wire.received.clear()
    for _ in range(50):
        one.send(json.dumps({"inputs": ROW.tolist()}))
        two.send(peer.step(0, ROW))
    await one.until(lambda: len(one.wire.received) == 50 and len(replies(two)) == 50)
    assert {document["type"] for document in documents(one)} == {"step"}
    assert {reply.kind for reply in replies(two)} == {STEPPED}
    assert house.at("a") == 100
    assert max(socket.most for socket in Watched.alive) <= 8


async def test_nothing_is_read_while_a_socket_is_greeted(house: House) -> None:
    """A client that floods before its hello, which waits for a busy session, is not read until then."""
    await house.session("a")
    session = house.manager._live["a"]
    late = asyncio.get_running_loop().create_future()

    async def turn(_: Any) -> int:
        return await late

    house.manager.turn = turn  # type: ignore[method-assign]
    client = Client(house.door, "/v1/sessions/a/stream", BINARY)
    await client.until(lambda: client.wire.paused)
    client.send(*[peer.step(0, ROW) for _ in range(100)])
    assert len(client.wire.sent) == 100
    late.set_result(session.step)
    await client.until(lambda: len(replies(client)) == 101)
    assert replies(client)[0].kind == HELLO
    assert house.at("a") == 100


async def test_what_came_before_the_handshake_was_over_is_not_lost(house: House) -> None:
    """A client that does not wait for the upgrade is answered in order all the same."""
    await house.session("a")
    client = Client(house.door, "/v1/sessions/a/stream")
    client.early(message(1))
    client.early(message(2))
    await client.until(lambda: len(client.wire.received) == 3)
    assert [document["type"] for document in documents(client)] == ["hello", "step", "step"]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("subprotocol", [JSON, BINARY])
async def test_a_client_that_reads_nothing_is_closed(
    house: House, subprotocol: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4408, after all that was owed and an error that says why; then its connection is dropped."""
    monkeypatch.setattr(sockets, "ABORT_SECONDS", 0.0)
    house.shared.slow_reader = 0.01
    client = await house.single("a", subprotocol)
    fewer, stuck = itertools.count(0, -1), False
    client.wire.unsent = lambda: 1 if stuck else next(fewer)  # type: ignore[method-assign]
    client.wire.reads = False
    for i in range(steps):
        client.send(message(i + 1) if subprotocol == JSON else peer.step(0, ROW, i + 1))
        await client.until(lambda i=i: house.at("a") == i + 1)
    stuck = True
    await client.task
    assert client.closed["code"] == 4408
    await client.until(lambda: client.wire.aborted)
    if subprotocol == JSON:
        *told, error = documents(client)
        assert [document["step"] for document in told] == list(range(1, steps + 1))
    else:
        *frames, last = replies(client)
        assert [reply.first for reply in frames] == list(range(1, steps + 1))
        assert last.kind == ERROR
        error = last.document
    assert (error["code"], error["retryable"]) == ("slow_reader", True)
    assert house.errors("slow_reader") == 1


async def test_a_client_that_reads_again_in_time_is_kept(house: House) -> None:
    """What piled up is written, and its time begins anew with the next reply that it leaves."""
    client = await house.single("a")
    [socket] = Watched.alive
    for i in range(3):
        client.wire.reads = False
        client.send(message(2 * i + 1), message(2 * i + 2))
        await client.until(lambda: socket._draining is not None)
        client.read()
        await client.until(lambda i=i: len(client.wire.received) == 2 * i + 2)
        await client.until(lambda: socket._draining is None)
    assert not client.task.done()
    assert [document["step"] for document in documents(client)] == [1, 2, 3, 4, 5, 6]


async def test_a_client_that_reads_slowly_is_kept(house: House) -> None:
    """As long as some bytes leave in each span of time, however many are left; when none do, it is closed."""
    house.shared.slow_reader = 0.001
    client = await house.single("a")
    looks = []

    def unsent() -> int:
        looks.append(max(100 - len(looks), 70))
        return looks[-1]

    client.wire.reads = False
    client.wire.unsent = unsent  # type: ignore[method-assign]
    client.send(message(1))
    await client.until(lambda: house.at("a") == 1)
    client.send(message(2))
    await client.task
    assert looks == [*range(100, 69, -1), 70]
    assert client.closed["code"] == 4408


async def test_answers_of_one_run_are_one_write(house: House) -> None:
    """Sixteen sessions' replies leave together, a binary message of at most half a megabyte."""
    names = [f"s{i}" for i in range(16)]
    client = await house.many(*names)
    client.send(*[peer.step(i, ROW) for i in range(16)])
    await client.until(lambda: len(replies(client)) == 16)
    assert len(client.wire.received) == 1
    client.wire.received.clear()
    client.send(*[peer.step(i, np.repeat(ROW, 3500, axis=0)) for i in range(16)])
    await client.until(lambda: len(replies(client)) == 16)
    assert all(len(received) <= sockets.MESSAGE_BYTES for received in client.wire.received)


@pytest.mark.parametrize("subprotocol", [BINARY, JSON])
async def test_a_reply_leaves_in_the_turn_of_its_run(house: House, subprotocol: str) -> None:
    """One turn of the loop after a message was read its reply is written, before anything else is read."""
    client = await house.single("a", subprotocol)
    message = peer.step(0, ROW) if subprotocol == BINARY else json.dumps({"inputs": ROW.tolist()})
    for _ in range(2):  # after a run the batcher stands elsewhere than after none
        client.wire.received.clear()
        client.wire.on_message(message)  # type: ignore[misc]
        await asyncio.sleep(0)
        assert len(client.wire.received) == 1


async def test_what_was_received_is_applied_when_the_client_is_gone(house: House) -> None:
    """Steps behind a full queue too: the last one's reply is kept for when the client comes again."""
    client = await house.single("a", BINARY)
    client.send(*[peer.step(0, ROW, i + 1) for i in range(8)])
    client.leave()
    await client.task
    received = 8 - len(client.wire.sent)  # the rest is in the network
    assert received > 4
    await client.until(lambda: house.at("a") == received)
    again = Client(house.door, "/v1/sessions/a/stream", BINARY)
    again.send(peer.step(0, ROW, received))
    await again.until(lambda: again.wire.on_message is not None)
    again.wire.deliver()
    await again.until(lambda: len(replies(again)) == 2)
    hello, reply = replies(again)
    assert (hello.document["step"], reply.kind, reply.flags) == (received, STEPPED, peer.REPLAYED)


async def test_a_fault_while_writing_ends_that_socket_alone(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Of two sockets answered by one run, the other gets its reply."""
    one, two = await house.single("a"), await house.single("b")

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a wire with a bug")

    one.wire.write = broken  # type: ignore[method-assign]
    one.send(message(1))
    two.send(message(1))
    await two.until(lambda: two.wire.received)
    assert documents(two)[0]["type"] == "step"
    with pytest.raises(ZeroDivisionError):  # it cannot be told why, either
        await one.task
    assert "a wire with a bug" in caplog.text
    two.send(message(2))
    await two.until(lambda: len(two.wire.received) == 2)


async def test_a_service_that_stops_ends_its_sockets(house: House) -> None:
    """Without a drain, a socket ends with the first thing it is refused; the last message says to come again."""
    client, idle = await house.single("a"), await house.single("b", BINARY)
    for engine in house.manager.engines:
        client.send(message(1))
        await engine.close()
    await client.task
    farewell = {"reason": "draining", "retry_after_ms": 100}
    assert (client.closed["code"], documents(client)) == (1012, [{"type": "going_away"} | farewell])
    idle.send(peer.step(0, ROW))
    await idle.task
    [last] = replies(idle)
    assert (idle.closed["code"], last.kind, last.channel, last.document) == (1012, GOING_AWAY, 0, farewell)


@pytest.mark.parametrize("subprotocol", [JSON, BINARY])
async def test_what_was_read_is_answered_before_a_socket_goes(house: House, subprotocol: str) -> None:
    """Behind a full queue too; what was not read stays unread, and unapplied; `going_away` is the last message."""
    client = await house.single("a", subprotocol)
    idle = await house.many("b", "c")
    client.send(*[message(i) if subprotocol == JSON else peer.step(0, ROW, i) for i in range(1, 101)])
    assert client.wire.paused
    assert house.shared.go_away() == 2
    await asyncio.wait_for(asyncio.gather(client.task, idle.task), 20)
    read = house.at("a")
    assert 4 < read < 100
    if subprotocol == JSON:
        *told, last = [document.get("step", document["type"]) for document in documents(client)]
    else:
        *told, last = [reply.first or reply.kind for reply in replies(client)]
    assert (told, last) == ([*range(1, read + 1)], "going_away" if subprotocol == JSON else GOING_AWAY)
    assert [reply.kind for reply in replies(idle)] == [GOING_AWAY]
    assert client.closed == idle.closed == {"type": "websocket.close", "code": 1012, "reason": "draining"}
    assert house.errors("draining") == 0


async def test_a_socket_that_comes_while_all_go_is_told_at_once(house: House) -> None:
    """After its hello; of a message that it has sent already, nothing is lost unsaid."""
    await house.session("a")
    assert house.shared.go_away() == 0
    client = Client(house.door, "/v1/sessions/a/stream", JSON)
    client.early(message(1))
    await asyncio.wait_for(client.task, 20)
    assert [document["type"] for document in documents(client)] == ["hello", "step", "going_away"]
    assert client.closed["code"] == 1012


async def test_a_slow_reader_gets_all_replies_before_it_goes(house: House) -> None:
    """As long as it may take; at the deadline it is told, and not waited for."""
    client, never = await house.single("a"), await house.single("b")
    for each in (client, never):
        each.wire.reads = False
        each.send(message(1))
        await each.until(lambda each=each: each.wire.received)
        each.send(message(2), message(3))
    house.shared.go_away()
    await house.quiet()
    assert [len(documents(each)) for each in (client, never)] == [1, 1]
    client.read()
    await asyncio.wait_for(client.task, 20)
    assert [document.get("step") for document in documents(client)] == [1, 2, 3, None]
    assert not never.task.done()
    house.shared.cut()
    await asyncio.wait_for(never.task, 20)
    assert (documents(never)[-1]["type"], never.closed["code"]) == ("going_away", 1012)


async def test_sockets_that_come_and_go_leave_nothing_behind(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone before the hello, idle, owed replies, with a full backlog, refused, deleted: no socket, no task is left."""
    monkeypatch.setattr(sockets, "ABORT_SECONDS", 0.0)
    before = len(asyncio.all_tasks())
    clients = []
    for i in range(8):
        names = [f"{i}-{kind}" for kind in range(7)]
        clients += [
            await house.single(names[0]),
            await house.single(names[1], BINARY),
            await house.many(names[2], names[3]),
            await house.single(names[4]),
            Client(house.door, "/v1/sessions/nobody/stream"),
            Client(house.door, "/v1/stream/nowhere", BINARY),
            Client(house.door, f"/v1/sessions/{await house.session(names[5])}/stream"),
        ]
        idle, owed, block, deleted, *_ = clients[-7:]
        owed.wire.reads = False
        owed.send(*[peer.step(0, ROW) for _ in range(100)])
        block.send(peer.step(0, ROW) + peer.step(1, ROW), peer.step(5, ROW), peer.opens(1, "nobody"), "text")
        await house.manager.delete(names[4])
        deleted.send(message(1))
        idle.send("{")
    assert Watched.alive
    for client in clients:
        client.leave()
    for client in clients:
        await client.task
    await client.until(lambda: len(asyncio.all_tasks()) == before)
    await client.until(lambda: not any(engine.batcher._queues.depth for engine in house.manager.engines))
    await client.until(lambda: not house.shared._unsent)
    del clients, client, idle, owed, block, deleted
    gc.collect()
    assert list(Watched.alive) == []


async def test_a_hello_does_not_wait_for_a_socket_that_has_ended(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that had received for the session, and not handed on, never will be."""
    monkeypatch.setattr(sockets, "_PATIENCE", 1000)
    client = await house.single("a")
    [socket] = Watched.alive
    session = house.manager._live["a"]
    async with session.engine.batcher.hold(session):
        client.send(*[message(number) for number in range(1, 10)])
        other = Client(house.door, "/v1/sessions/a/stream", JSON)
        await other.until(lambda: any(isinstance(each, asyncio.Future) for each in socket._backlog))
        socket.end(SlowReader("no reply was read"))
        await client.task
    await other.until(lambda: other.wire.received)
    assert documents(other)[0]["type"] == "hello"


async def test_sockets_that_open_a_session_again_at_once_do_not_wait_for_each_other(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has received something for it; but that is the wish itself."""
    monkeypatch.setattr(sockets, "_PATIENCE", 1000)
    await house.session("a")
    clients = [Client(house.door, "/v1/stream", BINARY) for _ in range(2)]
    for count in (1, 2):
        for client in clients:
            client.send(peer.opens(0, "a"))
        for client in clients:
            await client.until(lambda client=client, count=count: len(replies(client)) == count)
    assert {reply.kind for client in clients for reply in replies(client)} == {HELLO}


async def test_what_of_a_block_is_not_applied_is_not_told_as_if_it_were(house: House) -> None:
    """A session of it was deleted during the run: that is an error, once, and the other one is answered."""
    client = await house.many("a", "b")
    [socket] = Watched.alive
    block = Block(np.ones((2, 1, 3), np.float32), ("y",), np.array([1, 1], np.uint64))
    socket._owed += 2
    socket._answer(1, 1, SessionNotFound("the session was deleted"))
    socket._answer_block([0, 1], block, BlockReply([1, 1], [bytes(16)] * 2, [True, False]))
    await client.until(lambda: len(replies(client)) >= 2)
    assert [(reply.kind, reply.channel) for reply in replies(client)] == [(ERROR, 1), (STEPPED, 0)]
    assert socket._owed == 0
