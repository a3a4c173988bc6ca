"""Two replicas, one store that fails and falters, and clients that retry: every acknowledged step is applied once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.commits import MadeAnew
from service.errors import LatchError, SessionExists, StepNotKept, StoreUnavailable
from service.sessions import Session, SessionManager
from service.wire import StepReply, StepRequest
from tests.service import toys
from tests.service.replicas import Replica, SharedStore

SESSIONS, KEEP = 3, 3
Row = tuple[float, ...]


def request(rows: list[Row], first: int | None) -> StepRequest:
    """Steps for `toy`; the gate comes along, so that the reply is more than the state."""
    return StepRequest(np.array(rows, np.float32).tobytes(), len(rows), ("y", "z"), first)


async def step(manager: SessionManager, name: str, asked: StepRequest) -> StepReply:
    """A step by the session's id, as the doors of HTTP do it."""
    while True:
        with suppress(MadeAnew):
            return await manager.step(await manager.find(name), asked)


class World:
    """Two replicas of `toy`, in a loop that runs when the test says so; a third one that nobody disturbs folds."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.loop = asyncio.new_event_loop()
        self.store = SharedStore(keep_steps=KEEP)
        self.replicas = [self.replica() for _ in range(2)]
        self.oracle = self.replica()
        self.names = map("s{}".format, count())

    def replica(self) -> Replica:
        """A new process."""

        async def start() -> Replica:
            replica = Replica(self.repository, self.store, max_sessions=SESSIONS + 1, max_run_steps=2)
            await replica.start()
            return replica

        return self.run(start())

    def run(self, doing: Awaitable[Any]) -> Any:
        """Until it is done."""
        return self.loop.run_until_complete(doing)

    def fold(self, rows: list[Row]) -> bytes:
        """The packed outputs of all rows, from the initial state."""
        if not rows:
            return b""
        engine = self.oracle.engines.get("toy")
        [reply] = self.run(self.oracle.manager.predict(engine, [request(rows, None)]))
        return bytes(reply.data)


class Client:
    """One session as its client knows it: the rows that were acknowledged, and where the kept steps are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = []
        self.points = [0]

    @property
    def kept(self) -> list[int]:
        """Where it can be rolled back to."""
        return self.points[:-1][-KEEP:]

    def took(self, rows: list[Row]) -> None:
        """A request was acknowledged."""
        self.rows += rows
        self.points.append(len(self.rows))

    def returned(self, step: int) -> None:
        """It was rolled back."""
        del self.rows[step:]
        self.points = [*self.kept[: self.kept.index(step)], step] if step in self.kept else self.points


rows = st.lists(st.tuples(*[st.sampled_from([-1.0, 0.5, 2.0])] * toys.INPUTS), min_size=1, max_size=3)
clients = st.integers(0, SESSIONS - 1)
replicas = st.integers(0, 1)
faults = st.lists(st.sampled_from(["ok", "ok", "slow", "before", "after"]), max_size=6)


class Sessions(RuleBasedStateMachine):
    """Clients that retry what failed until it is acknowledged, at either replica."""

    world: ClassVar[World]

    @initialize()
    def begin(self) -> None:
        """New sessions."""
        self.clients = [Client(next(self.world.names)) for _ in range(SESSIONS)]
        for client in self.clients:
            self.world.run(self.world.replicas[0].manager.create("toy", session_id=client.name))

    async def persist(self, replica: int, call: Callable[[Replica], Awaitable[Any]]) -> Any:
        """Calls until it is acknowledged, at one replica after the other."""
        while True:
            try:
                return await call(self.world.replicas[replica])
            except StoreUnavailable:
                replica = 1 - replica

    async def step(self, replica: int, client: Client, rows: list[Row]) -> StepReply:
        """A numbered request."""
        asked = request(rows, len(client.rows) + 1)

        async def call(replica: Replica) -> StepReply:
            return await step(replica.manager, client.name, asked)

        return await self.persist(replica, call)

    def check(self, client: Client, rows: list[Row], reply: StepReply) -> None:
        """What is acknowledged is the fold, to the last bit."""
        assert reply.step == len(client.rows) + len(rows)
        whole = self.world.fold(client.rows + rows)
        assert reply.data == whole[-len(reply.data) :]

    @rule(asked=st.lists(st.tuples(clients, replicas, rows), min_size=1, max_size=SESSIONS), faults=faults)
    def steps(self, asked: list[tuple[int, int, list[Row]]], faults: list[str]) -> None:
        """Different sessions at once, while the store fails."""
        self.world.store.faults.extend(faults)
        todo = {which: (replica, rows) for which, replica, rows in asked}

        async def everybody() -> list[StepReply]:
            return await asyncio.gather(
                *(self.step(replica, self.clients[which], rows) for which, (replica, rows) in todo.items())
            )

        for (which, (_, rows)), reply in zip(todo.items(), self.world.run(everybody()), strict=True):
            self.check(self.clients[which], rows, reply)
            self.clients[which].took(rows)

    @rule(which=clients, rows=rows, faults=faults)
    def same_step_at_both(self, which: int, rows: list[Row], faults: list[str]) -> None:
        """The same numbered step sent to two replicas at once is applied once, and answered twice with the same."""
        self.world.store.faults.extend(faults)
        client = self.clients[which]

        async def both() -> list[StepReply]:
            return await asyncio.gather(*(self.step(replica, client, rows) for replica in (0, 1)))

        for reply in self.world.run(both()):
            self.check(client, rows, reply)
        client.took(rows)

    @rule(which=clients, rows=rows, slow=st.booleans())
    def unnumbered_at_both(self, which: int, rows: list[Row], slow: bool) -> None:
        """Two requests without a number are two, however alike."""
        self.world.store.faults.extend(["slow"] * slow)
        client = self.clients[which]

        async def both() -> list[StepReply]:
            async def call(replica: Replica) -> StepReply:
                return await step(replica.manager, client.name, request(rows, None))

            return await asyncio.gather(*map(call, self.world.replicas))

        replies = sorted(self.world.run(both()), key=lambda reply: reply.step)
        for reply in replies:
            self.check(client, rows, reply)
            client.took(rows)

    @rule(which=clients, replica=replicas, faults=faults)
    def unnumbered_and_unsure(self, which: int, replica: int, faults: list[str]) -> None:
        """Without a number a failed call may have been applied: once, and as the session then says."""
        client, rows = self.clients[which], [(0.25,) * toys.INPUTS]
        manager = self.world.replicas[replica].manager
        before = len(client.rows)

        async def call() -> bool:
            session = await manager.find(client.name)
            self.world.store.faults.extend(faults)
            try:
                await manager.step(session, request(rows, None))
            except MadeAnew:  # an older copy: what the faults were for did not come to be
                return False
            except StoreUnavailable:
                return False
            return True

        applied = self.world.run(call())
        self.world.store.faults.clear()
        step = self.world.run(self.world.store.load(client.name)).step
        assert step == before + 1 if applied else step in (before, before + 1)
        if step > before:
            client.took(rows)

    @rule(which=clients, replica=replicas, index=st.integers(0, KEEP), faults=faults)
    def rollback(self, which: int, replica: int, index: int, faults: list[str]) -> None:
        """To one of the last steps, or to one that is not kept."""
        client = self.clients[which]
        places = [*client.kept, len(client.rows)]
        step = places[index] if index < len(places) else len(client.rows) + 5
        self.world.store.faults.extend(faults)
        back = self.persist(replica, lambda replica: replica.manager.rollback(client.name, step))
        if step in places:
            self.world.run(back)
            client.returned(step)
        else:
            with pytest.raises(StepNotKept) as caught:
                self.world.run(back)
            assert caught.value.extras["kept_steps"] == places

    @rule(which=clients, replica=replicas, faults=faults)
    def reset(self, which: int, replica: int, faults: list[str]) -> None:
        """Back to the start."""
        client = self.clients[which]
        self.world.store.faults.extend(faults)
        self.world.run(self.persist(replica, lambda replica: replica.manager.reset(client.name)))
        client.rows, client.points = [], [0]

    @rule(source=clients, goal=clients, replica=replicas, faults=faults)
    def fork(self, source: int, goal: int, replica: int, faults: list[str]) -> None:
        """A client goes on with a fork of another's session."""
        client, fork = self.clients[source], Client(next(self.world.names))
        fork.rows, fork.points = [*client.rows], [len(client.rows)]
        self.world.store.faults.extend(faults)

        async def call(replica: Replica) -> Session | None:
            try:
                return await replica.manager.fork(client.name, fork_id=fork.name)
            except SessionExists:  # it was made, and the answer was lost
                return None

        self.world.run(self.persist(replica, call))
        self.clients[goal] = fork

    @rule(source=clients, goal=clients, replicas=st.tuples(replicas, replicas), faults=faults)
    def carry(self, source: int, goal: int, replicas: tuple[int, int], faults: list[str]) -> None:
        """A session is set to where another one stands, by its bytes."""
        one, other = self.clients[source], self.clients[goal]
        self.world.store.faults.extend(faults)
        data = self.world.run(self.persist(replicas[0], lambda replica: replica.manager.state(one.name)))
        self.world.run(self.persist(replicas[1], lambda replica: replica.manager.restore(other.name, data)))
        other.rows, other.points = [*one.rows], [len(one.rows)]

    @rule(which=clients, replica=replicas)
    def made_anew(self, which: int, replica: int) -> None:
        """A session is deleted, and another of its id made, while the other replica may have a copy of the old one."""
        client, manager = self.clients[which], self.world.replicas[replica].manager
        self.world.store.faults.clear()
        self.world.run(manager.delete(client.name))
        self.world.run(manager.create("toy", session_id=client.name))
        client.rows, client.points = [], [0]

    @rule(replica=replicas)
    def crash(self, replica: int) -> None:
        """A process dies; another takes its place."""
        dead, self.world.replicas[replica] = self.world.replicas[replica], self.world.replica()
        self.world.run(dead.close())

    @precondition(lambda self: any(client.rows for client in self.clients))
    @rule(which=clients, replica=replicas)
    def last_request_again(self, which: int, replica: int) -> None:
        """A retry long after the answer, at whichever replica, is a replay or says where the session is."""
        client = self.clients[which]
        before = client.points[-2] if len(client.points) > 1 else 0
        manager = self.world.replicas[replica].manager

        async def call() -> StepReply | LatchError:
            try:
                return await step(manager, client.name, request(client.rows[before:], before + 1))
            except LatchError as error:
                return error

        if client.rows[before:] and len(client.points) > 1:
            reply = self.world.run(call())
            assert isinstance(reply, StepReply)
            assert reply.replayed
            assert reply.step == len(client.rows)

    @invariant()
    def every_state_is_the_fold(self) -> None:
        """In the store stands what was acknowledged, nothing more and nothing less."""
        self.world.store.faults.clear()
        for client in self.clients:
            stored = self.world.run(self.world.store.load(client.name))
            assert stored.step == len(client.rows)
            engine = self.world.oracle.engines.get("toy")
            state = engine.snapshots.unpack(stored.saved.snapshot).state[0]
            last = np.frombuffer(self.world.fold(client.rows), np.float32)[-2 * toys.HIDDEN :][: toys.HIDDEN]
            assert state.tobytes() == (last / 2 if client.rows else np.zeros(toys.HIDDEN, np.float32)).tobytes()

    def teardown(self) -> None:
        """Ends the sessions."""
        self.world.store.faults.clear()
        for client in getattr(self, "clients", []):
            self.world.run(self.world.replicas[0].manager.delete(client.name))


@pytest.fixture(autouse=True)
def world(repository: Path) -> Iterator[None]:
    """The replicas, for all examples."""
    Sessions.world = World(repository)
    yield
    for replica in (*Sessions.world.replicas, Sessions.world.oracle):
        Sessions.world.run(replica.close())
    Sessions.world.loop.close()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
