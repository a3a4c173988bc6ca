"""What a step costs inside the service, in calls and not in seconds: a guard against a request path that grows.

Counted are calls, of Python and of C and the event loop's own among them, from when 64 messages of 64 sessions lie
before a door until their replies are written; divided by 64. The runtime and the network are not in it: the runner
answers from nothing, and the wires are lists.

Over budget? Each message then pays for something new: a future, a task, a copy, a look at a clock. The failure names
the calls that are made most. Take the new one off the path, or make it once a run; where it is worth its price, raise
the budget and say so in the commit. Budgets leave as little as a call or two above what Python 3.11 counts.
"""

import asyncio
import gc
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.engine import load_engines
from service.metrics import Metrics
from service.registry import load_all
from service.routers.front import FrontDoor
from service.routers.sockets import Shared
from service.routers.steps import StepDoor
from service.routers.stream import StreamDoor
from service.sessions import IdleLimits, SessionManager
from service.stores.memory import MemoryStore
from tests.service import peer
from tests.service.conftest import OPTIONS
from tests.service.wires import Client

pytestmark = pytest.mark.anyio

SESSIONS = 64
# Counted: 8.6, 48.8, 60.8, 81.6, 95.6 and 57.7.
BUDGETS = {"block": 10, "binary": 56, "json": 69, "packed": 93, "http": 109, "plain": 67}
CHEAP = {"len", "isinstance", "list.append", "dict.get", "deque.append", "deque.popleft"}  # tens of nanoseconds
ROW = np.array([[1, 2, 3]], np.float32)
TEXT = json.dumps({"inputs": ROW.tolist()})

Round = Callable[[], Awaitable[None]]


class Still:
    """A runner that does nothing, at once."""

    def run(self, inputs: Any, state: Sequence[Any], outputs: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
        """Zeros."""
        return {name: np.zeros((*inputs.shape[:2], 4), np.float32) for name in outputs}, list(state)

    def is_short(self, rows: int, steps: int) -> bool:
        """Nothing is shorter."""
        return True

    def is_long(self, rows: int, steps: int) -> bool:
        """See `is_short`."""
        return False


@contextmanager
def counting(calls: Counter[str]) -> Iterator[None]:
    """Counts calls by what is called."""

    def count(frame: Any, event: str, called: Any) -> None:
        if event == "call":
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        elif event == "c_call" and (name := getattr(called, "__qualname__", str(called))) not in CHEAP:
            calls[name] += 1

    collects = gc.isenabled()
    gc.disable()  # whoever has asked to be told of collections would be counted
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


class Doors:
    """All doors of one service, and a round of steps through each."""

    def __init__(self, manager: SessionManager, metrics: Metrics) -> None:
        self.manager = manager
        self.streams = StreamDoor(Shared(manager, metrics, 64, 4096, 10**7, 100, 60))
        self.steps = StepDoor(manager, metrics, max_body_bytes=10**6, max_steps=100)
        self.front = FrontDoor(None, self.steps, self.streams)  # type: ignore[arg-type]

    async def names(self, sessions: int) -> list[str]:
        """New sessions."""
        return [(await self.manager.create("toy"))[0].id for _ in range(sessions)]

    async def binary(self, sessions: int) -> Round:
        """Binary sockets of one session each, a frame each."""
        return await self._sockets(sessions, "latch.binary", peer.step(0, ROW))

    async def json(self, sessions: int) -> Round:
        """JSON sockets of one session each, a message each."""
        return await self._sockets(sessions, "latch.json", TEXT)

    async def block(self, sessions: int) -> Round:
        """One binary socket of all sessions, one message."""
        client = Client(self.streams, "/v1/stream", "latch.binary")
        for channel, name in enumerate(await self.names(sessions)):
            client.send(peer.opens(channel, name))
        await client.until(lambda: b"".join(client.wire.received).count(b'"session"') == sessions)
        message = b"".join(peer.step(channel, ROW) for channel in range(sessions))

        async def once() -> None:
            client.wire.received.clear()
            client.send(message)
            await turns()
            assert sum(map(len, client.wire.received)) == 32 * sessions

        return once

    async def http(self, sessions: int) -> Round:
        """Calls in JSON."""
        return await self._calls(sessions, b"application/json", TEXT.encode())

    async def packed(self, sessions: int) -> Round:
        """Calls in packed rows."""
        return await self._calls(sessions, b"application/octet-stream", ROW.tobytes())

    async def plain(self, sessions: int) -> Round:
        """Calls in JSON, past ASGI."""
        calls = [
            SimpleNamespace(session_id=name, kind="application/json", query=b"") for name in await self.names(sessions)
        ]
        statuses: list[int] = []
        for call in calls:
            call.reply = lambda answer: statuses.append(answer.status)

        async def once() -> None:
            statuses.clear()
            for call in calls:
                self.steps.take(call, TEXT.encode())  # type: ignore[arg-type]
            await turns()
            assert statuses == [200] * sessions

        return once

    async def _sockets(self, sessions: int, subprotocol: str, message: bytes | str) -> Round:
        names = await self.names(sessions)
        clients = [Client(self.streams, f"/v1/sessions/{name}/stream", subprotocol) for name in names]
        for client in clients:
            await client.until(lambda client=client: client.wire.received and not client.wire.paused)

        async def once() -> None:
            for client in clients:
                client.wire.received.clear()
                client.wire.on_message(message)  # type: ignore[misc]
            await turns()
            assert all(len(client.wire.received) == 1 for client in clients)

        return once

    async def _calls(self, sessions: int, kind: bytes, body: bytes) -> Round:
        headers = [(b"host", b"latch"), (b"content-type", kind), (b"content-length", b"%d" % len(body))]
        scopes = [
            {
                "type": "http",
                "method": "POST",
                "path": f"/v1/sessions/{name}/steps",
                "query_string": b"",
                "headers": headers,
            }
            for name in await self.names(sessions)
        ]
        statuses: list[int] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: Any) -> None:
            if "status" in event:
                statuses.append(event["status"])

        async def once() -> None:
            statuses.clear()
            tasks = [asyncio.ensure_future(self.front(scope, receive, send)) for scope in scopes]
            await turns()
            assert all(task.done() for task in tasks)
            assert statuses == [200] * sessions

        return once


async def turns() -> None:
    """As many turns of the loop as any round needs."""
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.fixture
async def doors(repository: Path, metrics: Metrics) -> AsyncIterator[Doors]:
    """A service whose model costs nothing."""
    found = [files for files in load_all(repository).found if files.manifest.name == "toy"]
    engines = load_engines(found, {}, OPTIONS, metrics)
    for engine in engines:
        engine.batcher._runner = Still()
        engine.start()
    limits = IdleLimits(60.0, 1.0, 100.0)
    yield Doors(SessionManager(engines, MemoryStore(max_expired_ids=10), idle=limits, metrics=metrics), metrics)
    for engine in engines:
        await engine.close()


async def cost(once: Round) -> Counter[str]:
    """The calls of a round; the same in every round once everything has been seen."""
    for _ in range(2):
        await once()
    rounds = []
    for _ in range(2):
        with counting(calls := Counter()):
            await once()
        rounds.append(calls)
    assert rounds[0] == rounds[1], "rounds differ: what is counted is no property of the code"
    return rounds[0]


@pytest.mark.parametrize("door", BUDGETS)
async def test_a_step_stays_within_its_budget(doors: Doors, door: str) -> None:
    """Among 64 a step makes few calls; most of what a run costs is paid once, not by each."""
    many, alone = await cost(await getattr(doors, door)(SESSIONS)), await cost(await getattr(doors, door)(1))
    each = many.total() / SESSIONS
    most = ", ".join(f"{name} {count / SESSIONS:.1f}" for name, count in many.most_common(25))
    assert each <= BUDGETS[door], (
        f"a step through {door!r} makes {each:.1f} calls, its budget is {BUDGETS[door]}: {most}"
    )
    assert each <= 0.5 * alone.total(), f"beside 63 others a step makes {each:.1f} calls, alone {alone.total()}: {most}"


async def test_a_future_a_message_is_over_budget(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard is for: an answer that takes the way of a future and its callback does not go unseen."""
    submit = doors.manager.submit

    def by_future(session: Any, request: Any, answer: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: answer(done.result()))
        return submit(session, request, future.set_result)

    monkeypatch.setattr(doors.manager, "submit", by_future)
    assert (await cost(await doors.binary(SESSIONS))).total() / SESSIONS > BUDGETS["binary"]
