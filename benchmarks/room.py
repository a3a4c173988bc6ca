"""A process full of sessions, without a server around them: what they weigh, and how fast some of them step.

Rule: it runs aside, in a process that holds nothing else; every session has made a step, so it has a kept reply.
"""

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from benchmarks.latch import ROW, rolls
from benchmarks.machine import resident
from benchmarks.wire import dumps
from service.app import engine_options
from service.batcher import Outcome
from service.engine import load_engines
from service.errors import LatchError
from service.metrics import Metrics
from service.registry import load
from service.server import calm_collector
from service.sessions import IdleLimits, Session, SessionManager
from service.settings import load_settings
from service.stores import open_store

BATCH = 250


class Room:
    """A session manager of one model without a server around it, and its sessions."""

    def __init__(self, folder: Path, capacity: int) -> None:
        files, metrics = load(folder), Metrics(CollectorRegistry())
        options = engine_options(load_settings(max_sessions=capacity))
        self.loop = asyncio.new_event_loop()
        self.engines = load_engines([files], {}, options, metrics)
        store = open_store("memory://", keep_steps=0, max_expired_ids=0)
        self.manager = SessionManager(self.engines, store, idle=IdleLimits(1e6, 1.0, 1e6), metrics=metrics)
        self.model = files.manifest.name
        self.bodies = [dumps({"inputs": row.tolist()}) for row in rolls(16)]
        self.sessions: list[Session] = []
        self.longest = 0.0
        calm_collector()  # as `latch serve` does
        self.loop.run_until_complete(self._start())
        gc.collect()
        gc.freeze()  # as the server does when it starts

    def fill(self, count: int) -> float:
        """Sessions until there are `count`, each of which makes a step; bytes that each has added."""
        self.loop.run_until_complete(self._grow(BATCH))  # what the first ones allocate once
        before, there = resident(), len(self.sessions)
        self.loop.run_until_complete(self._grow(count - there))
        return (resident() - before) / (count - there)

    def rate(self, among: int, seconds: float) -> float:
        """Steps a second of sessions taken at random from the first `among`, a batch at a time."""
        return self.loop.run_until_complete(self._rate(among, seconds))

    async def _start(self) -> None:
        for engine in self.engines:
            engine.start()

    async def _grow(self, count: int) -> None:
        for _ in range(0, count, BATCH):
            batch = [(await self.manager.create(self.model))[0] for _ in range(BATCH)]
            await self._step(batch)
            self.sessions += batch

    async def _step(self, batch: Sequence[Session]) -> None:
        """As the doors do it: no future and no task a step."""
        decode, done, answers = batch[0].engine.codec.decode_step, self.loop.create_future(), list[Outcome]()

        def answer(outcome: Outcome) -> None:
            answers.append(outcome)
            if len(answers) == len(batch):
                done.set_result(None)

        for i, session in enumerate(batch):
            self.manager.submit(session, decode(self.bodies[i % len(self.bodies)]), answer)
        await done
        for outcome in answers:
            if isinstance(outcome, LatchError):
                raise outcome

    async def _rate(self, among: int, seconds: float) -> float:
        rng, count, start = np.random.default_rng(), 0, self.loop.time()
        now = start
        while now - start < seconds:
            before = now
            await self._step([self.sessions[i] for i in rng.choice(among, BATCH, replace=False)])
            now = self.loop.time()
            self.longest = max(self.longest, now - before)
            count += BATCH
        return count / (now - start)


_rooms: list[Room] = []


def fill(folder: Path, count: int) -> tuple[float, int]:
    """Run aside: makes the room of this process; bytes a session, and how many of them are state and reply."""
    _rooms.append(Room(folder, count))
    manifest = load(folder).manifest
    return _rooms[0].fill(count), manifest.state_bytes + ROW


def rate(among: int, seconds: float) -> float:
    """Run aside, after `fill`."""
    return _rooms[0].rate(among, seconds)


def leave() -> float:
    """Run aside, at the end; seconds of the longest wait for a batch."""
    room = _rooms.pop()
    for engine in room.engines:
        room.loop.run_until_complete(engine.close())
    return room.longest
