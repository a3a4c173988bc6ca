"""Replicas of a service in one process: managers that share a store, which fails when the test says so."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from service.engine import load_engines
from service.errors import StoreUnavailable
from service.ledger import Ledger
from service.metrics import Metrics
from service.registry import load_all
from service.sessions import IdleLimits, SessionManager
from service.stores import Save, Saved, SessionRecord, SessionStore, Stored
from service.stores.memory import MemoryStore
from tests.service.conftest import OPTIONS


@dataclass(frozen=True)
class Record:
    """What a session is, apart from the process that serves it."""

    id: str
    model: str
    version: str
    idle_ttl: float
    created_at: float
    metadata: Mapping[str, Any]


class SharedStore(MemoryStore):
    """A store that several processes could share. `faults` are what becomes of the next calls, in order.

    "ok"; "slow": others go first; "before": fails, and nothing was done; "after": is done, and then fails.
    """

    is_durable = is_shared = True

    def __init__(self, *, keep_steps: int = 0, max_expired_ids: int = 10) -> None:
        super().__init__(keep_steps=keep_steps, max_expired_ids=max_expired_ids)
        self.faults: deque[str] = deque()
        self.saves: list[int] = []

    async def _meet(self, when: str) -> None:
        fault = self.faults[0] if self.faults else "ok"
        if when == "before" and fault == "slow":
            for _ in range(20):
                await asyncio.sleep(0)
        if when == "after" and self.faults:
            self.faults.popleft()
        if fault == when:
            if when == "before":
                self.faults.popleft()
            raise StoreUnavailable("the wire is cut")

    async def create(self, record: SessionRecord, token: bytes, saved: Saved) -> None:
        """See `MemoryStore`."""
        await self._meet("before")
        plain = Record(
            record.id, record.model, record.version, record.idle_ttl, record.created_at, dict(record.metadata)
        )
        await super().create(plain, token, saved)
        await self._meet("after")

    async def load(self, session: str) -> Stored:
        """See `MemoryStore`."""
        await self._meet("before")
        stored = await super().load(session)
        await self._meet("after")
        return stored

    async def save(self, saves: Sequence[Save]) -> Sequence[bool]:
        """See `MemoryStore`."""
        await self._meet("before")
        done = await super().save(saves)
        self.saves.append(len(saves))
        await self._meet("after")
        return done


class Replica:
    """One process: engines of its own, and a manager."""

    def __init__(self, repository: Path, store: SessionStore, **limits: Any) -> None:
        metrics = Metrics(CollectorRegistry())
        self.metrics = metrics
        self.ledger = Ledger(store, metrics)
        self.engines = load_engines(
            load_all(repository).found, {}, replace(OPTIONS, **limits), metrics, ledger=self.ledger
        )
        self.manager = SessionManager(
            self.engines, store, ledger=self.ledger, idle=IdleLimits(60.0, 0.001, 100.0), metrics=metrics
        )

    async def start(self) -> None:
        """Begins to serve."""
        self.ledger.start()
        for engine in self.engines:
            engine.start()

    async def close(self) -> None:
        """Ends as on SIGTERM."""
        for engine in self.engines:
            await engine.close()
        await self.ledger.close()
