"""Any messages in any order on a binary socket of many sessions, compared with a model of the protocol's page."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from prometheus_client import CollectorRegistry

from service.engine import load_engines
from service.metrics import Metrics
from service.registry import load_all
from service.routers.sockets import Shared
from service.routers.stream import StreamDoor
from service.sessions import IdleLimits, SessionManager
from service.stores.memory import MemoryStore
from service.wire import StepRequest
from tests.service import peer
from tests.service.conftest import OPTIONS
from tests.service.peer import ALREADY_APPLIED, ERROR, HELLO, REPLAYED, STEPPED
from tests.service.wires import Client

MAX_STEPS, KEEP_BYTES = 6, 24
SESSIONS = 6
# What a channel is opened with, by its number: y, which is the default, two names, or nothing.
OUTPUTS: list[Any] = [None, None, ["y"], ["y"], ["total", "y"], []]


class World:
    """A service with the model `counter`, in a loop that runs when the test says so."""

    def __init__(self, repository: Path) -> None:
        self.loop = asyncio.new_event_loop()
        metrics = Metrics(CollectorRegistry())
        found = [files for files in load_all(repository).found if files.manifest.name == "counter"]
        limits = {"max_session_queue": 3, "max_run_steps": 4, "max_steps": MAX_STEPS, "keep_reply_bytes": KEEP_BYTES}
        self.engines = load_engines(found, {}, replace(OPTIONS, **limits), metrics)
        idle = IdleLimits(60.0, 1.0, 100.0)
        self.manager = SessionManager(self.engines, MemoryStore(max_expired_ids=10), idle=idle, metrics=metrics)
        self.door = StreamDoor(Shared(self.manager, metrics, 8, 12, 10**6, MAX_STEPS, 60))
        self.names = map("s{}".format, count())

    def run(self, doing: Any) -> Any:
        """Until it is done."""
        return self.loop.run_until_complete(doing)

    async def start(self) -> None:
        """Starts the batcher."""
        for engine in self.engines:
            engine.start()

    async def close(self) -> None:
        """Ends it."""
        for engine in self.engines:
            await engine.close()


@dataclass
class Counted:
    """What a session of `counter` should be: 0.5 and the squares of its ids."""

    name: str
    totals: list[float] = field(default_factory=lambda: [0.5])
    last: tuple[int, list[int], Any] | None = None
    live: bool = True

    @property
    def step(self) -> int:
        """Steps committed."""
        return len(self.totals) - 1

    def take(self, ids: list[int], first: int, outputs: list[str]) -> tuple[Any, ...]:
        """What a STEP is answered: kind, and flags, count, first step and rows, or code and first step."""
        if len(ids) > MAX_STEPS:
            return ERROR, "payload_too_large", first
        if not ids or first >= 2**63:
            return ERROR, "invalid_input", first
        if not self.live:
            return ERROR, "session_not_found", first
        if first in (0, self.step + 1):
            if 7 in ids:
                return ERROR, "inference_failed", first
            first = self.step + 1
            for number in ids:
                self.totals.append(self.totals[-1] + number**2)
            self.last = (first, ids, outputs)
            return self._stepped(0, outputs)
        if self.last == (first, ids, outputs):
            return self._stepped(REPLAYED, outputs)
        return ERROR, "step_conflict", first

    def _stepped(self, flags: int, outputs: list[str]) -> tuple[Any, ...]:
        assert self.last is not None
        first, ids, _ = self.last
        rows = np.repeat(np.float32(self.totals[first:]), len(outputs)).tobytes()
        if flags and len(rows) > KEEP_BYTES:
            flags, rows = flags | ALREADY_APPLIED, b""
        return STEPPED, flags, len(ids), first, rows


def names(channel: int) -> list[str]:
    """The outputs of a channel."""
    return ["y"] if OUTPUTS[channel] is None else OUTPUTS[channel]


channels = st.integers(0, len(OUTPUTS) - 1)
ids = st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=4)
steps = st.tuples(
    st.just("step"),
    channels,
    ids | st.lists(st.sampled_from([1, 2, 7]), max_size=MAX_STEPS + 1),
    st.sampled_from(["next", "next", "next", "any", "again", "again", "stale", "gap", "huge"]),
)
opens = st.tuples(st.just("open"), channels, st.integers(0, SESSIONS), st.sampled_from([True, True, False]))
closes = st.tuples(st.just("close"), channels)
garbage = st.tuples(st.just("garbage"), st.sampled_from([b"", b"\1\0", peer.frame(5), peer.frame(1, 2, flags=8)]))


class Protocol(RuleBasedStateMachine):
    """One client, its sessions, and what every channel should be told."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.sessions = [Counted(next(self.world.names)) for _ in range(SESSIONS)]
        self.bound: dict[int, Counted] = {}
        self.sent: dict[int, tuple[Any, ...]] = {}
        self.expected: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        self.client: Client = self.world.run(self._connect())

    async def _connect(self) -> Client:
        for session in self.sessions:
            await self.world.manager.create("counter", session_id=session.name)
        client = Client(self.world.door, "/v1/stream", "latch.binary")
        await client.until(lambda: client.wire.on_message)
        return client

    def teardown(self) -> None:
        """The client leaves."""
        self.client.leave()
        self.world.run(self.client.task)

    @initialize()
    def open_all(self) -> None:
        """A channel for every session."""
        self._send([("open", channel, channel % SESSIONS, True) for channel in range(len(OUTPUTS))])

    @rule(
        message=st.lists(st.one_of(steps, steps, steps, steps, steps, opens, closes, garbage), min_size=1, max_size=5)
    )
    def message(self, message: list[Any]) -> None:
        """Any frames."""
        self._send(message)

    @rule(
        ids=ids,
        odd=channels,
        number=st.sampled_from(["next", "any"]),
        other=st.sampled_from(["next", "any", "gap", "again", "bad id"]),
        over=st.integers(3, 6),
        times=st.integers(1, 3),
    )
    def blocks(self, ids: list[int], odd: int, number: str, other: str, over: int, times: int) -> None:
        """Without waiting, the same number of steps for some channels each time; of one of them others, or a bad id."""
        blocks = []
        for _ in range(times):
            block = [("step", channel, ids, number) for channel in sorted(self.bound.keys() & range(over))]
            if odd in self.bound and odd < over:
                bad = ("step", odd, [7, *ids[1:]], number) if other == "bad id" else ("step", odd, ids, other)
                block[sorted(self.bound).index(odd)] = bad
            blocks.append(block)
        self._send(*blocks)

    @rule()
    def block_again(self) -> None:
        """What every channel was sent last."""
        self._send([("step", channel, [], "again") for channel in self.bound.keys() & self.sent.keys()])

    @precondition(lambda self: self.client.wire.reads)
    @rule(which=st.integers(0, SESSIONS - 1), ids=ids)
    def step_elsewhere(self, which: int, ids: list[int]) -> None:
        """Another door moves a session."""
        session = self.sessions[which]
        if session.live:
            request = StepRequest(np.array(ids).tobytes(), len(ids), ("y",))
            self.world.run(self.world.manager.step(self.world.manager._live[session.name], request))
            session.take(ids, 0, ["y"])

    @precondition(lambda self: self.client.wire.reads)
    @rule(which=st.integers(0, SESSIONS - 1))
    def reset(self, which: int) -> None:
        """Back to where it began, and nothing kept."""
        session = self.sessions[which]
        if session.live:
            self.world.run(self.world.manager.reset(session.name))
            session.totals, session.last = [0.5], None

    @precondition(lambda self: self.client.wire.reads and sum(each.live for each in self.sessions) > 2)
    @rule(which=st.integers(0, SESSIONS - 1))
    def delete(self, which: int) -> None:
        """Gone under its channels."""
        if self.sessions[which].live:
            self.world.run(self.world.manager.delete(self.sessions[which].name))
            self.sessions[which].live = False

    @precondition(lambda self: self.client.wire.reads)
    @rule()
    def stop_reading(self) -> None:
        """From now on replies pile up."""
        self.client.wire.reads = False

    @precondition(lambda self: not self.client.wire.reads)
    @rule()
    def read_again(self) -> None:
        """All that piled up is read."""
        self.client.read()
        self.world.run(self._settle())

    def _until_garbage(self, message: list[Any]) -> Iterator[Any]:
        """Frames up to one that ends the message, which is the last."""
        for each in message:
            yield each
            if each[0] == "garbage" or (each[0] == "step" and each[1] not in self.bound):
                return

    def _frame(self, kind: str, *rest: Any) -> bytes:
        """A frame's bytes; what it does is done to the model, and what it is answered is expected."""
        if kind == "garbage":
            channel = 2 if rest[0][2:3] == b"\2" else 0
            if rest[0]:
                self.expected[channel].append((ERROR, "malformed", 0))
            return bytes(rest[0])
        channel = rest[0]
        if kind == "close":
            self.bound.pop(channel, None)
            return peer.closes(channel)
        if kind == "open":
            _, which, good = rest
            outputs = OUTPUTS[channel] if good else ["y", "q"]
            session = self.sessions[which] if which < SESSIONS else Counted("nobody", live=False)
            self.bound.pop(channel, None)
            if not session.live:
                self.expected[channel].append((ERROR, "session_not_found", 0))
            elif not good:
                self.expected[channel].append((ERROR, "invalid_input", 0))
            else:
                self.bound[channel] = session
                self.expected[channel].append((HELLO, session.name, session.step))
            return peer.opens(channel, session.name, outputs)
        _, ids, number = rest
        if channel not in self.bound:
            self.expected[channel].append((ERROR, "channel_not_open", 9))
            return peer.step(channel, np.array(ids, np.int64), 9)
        session = self.bound[channel]
        if number == "again" and channel in self.sent:
            ids, first = self.sent[channel]
        else:
            step = session.step
            first = {"any": 0, "stale": max(step - 1, 1), "gap": step + 3, "huge": 2**63}.get(number, step + 1)
        self.sent[channel] = ids, first
        self.expected[channel].append(session.take(ids, first, names(channel)))
        return peer.step(channel, np.array(ids, np.int64), first)

    def _send(self, *messages: list[Any]) -> None:
        """Messages of frames, and all that comes of them."""
        sent = []
        for message in messages:
            sent.append(b"".join([self._frame(*each) for each in self._until_garbage(message)]))
            if not sent[-1]:
                self.expected[0].append((ERROR, "malformed", 0))
        self.world.run(self._settle(*sent))

    def _replies(self) -> list[peer.Reply]:
        return peer.replies(b"".join(self.client.wire.received), lambda channel: 4 * len(names(channel)))

    async def _settle(self, *messages: bytes) -> None:
        """Where the client reads: all that is expected has come, in the order of each channel, and nothing else."""
        self.client.send(*messages)
        if not self.client.wire.reads:
            return
        awaited = sum(map(len, self.expected.values()))
        await self.client.until(lambda: len(self._replies()) >= awaited)
        for _ in range(3):
            await asyncio.sleep(0)
        told = defaultdict(list)
        for reply in self._replies():
            if reply.kind == STEPPED:
                told[reply.channel].append((STEPPED, reply.flags, reply.count, reply.first, reply.payload))
            elif reply.kind == HELLO:
                told[reply.channel].append((HELLO, reply.document["session"], reply.document["step"]))
            else:
                told[reply.channel].append((ERROR, reply.document["code"], reply.first))
        assert told == {channel: answers for channel, answers in self.expected.items() if answers}
        self.expected.clear()
        self.client.wire.received.clear()
        for session in self.sessions:
            if session.live:
                assert self.world.manager._live[session.name].step == session.step


@pytest.fixture(scope="module", autouse=True)
def world(repository: Path) -> Iterator[None]:
    """One service for all the clients."""
    Protocol.world = World(repository)
    Protocol.world.run(Protocol.world.start())
    yield
    Protocol.world.run(Protocol.world.close())
    Protocol.world.loop.close()


Protocol.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestProtocol = Protocol.TestCase
