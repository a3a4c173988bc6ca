"""What saving costs: batches of 600-byte snapshots through each store, beside one raw write of as many bytes.

Rule: the store of a batch and the raw write go to the same disk or the same kind of server, with the same durability.
"""

import asyncio
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import redis

from benchmarks.machine import LOAD, Contender, aside, doubts, ratio, take_turns
from benchmarks.report import Row
from service.stores import Save, Saved, open_store

SIZES, SNAPSHOT, SOONEST = (1, 16, 64, 256), 600, 10.0
SQLITE, REDIS = ("full", "normal"), ("always", "everysec", "no")


def run(quick: bool) -> Iterator[Row]:
    """Microseconds a row; and for each size the time of a batch by that of the raw write."""
    rounds, seconds = (2, 0.2) if quick else (5, 0.5)
    for mode in SQLITE:
        with tempfile.TemporaryDirectory(prefix="latch-") as folder:
            url, path = f"sqlite:///{folder}/{{size}}.db?synchronous={mode}", Path(folder, "raw.db")
            yield _row(f"sqlite, synchronous={mode}", url, (raw_sqlite, path, mode), "one commit", rounds, seconds)
    for mode in REDIS:
        with redis_server(mode) as (port, _):
            url = f"redis://127.0.0.1:{port}"
            yield _row(f"redis, appendfsync {mode}", url, (raw_redis, port), "one SET", rounds, seconds)


def _row(what: str, url: str, raw: tuple[Any, ...], against: str, rounds: int, seconds: float) -> Row:
    costs, ratios, doubt = [], [], ""
    with aside() as pool:
        for size in SIZES:
            taken = take_turns(
                {
                    "store": Contender.of(pool, saving, url, size, seconds),
                    "raw": Contender.of(pool, *raw, size * SNAPSHOT, seconds),
                },
                rounds,
            )
            costs.append(f"{median(one.value for one in taken['store']) / size * 1e6:.1f}")
            ratios.append(f"{ratio(taken['store'], taken['raw']):.1f}")
            doubt = doubt or doubts([*taken["store"], *taken["raw"]])
    sizes = ", ".join(map(str, SIZES))
    detail = f"us a row: {', '.join(costs)} in batches of {sizes}; by the raw write: {', '.join(ratios)}{doubt}"
    return Row(f"{what}, {SIZES[-1]} rows", f"{against} of the same bytes", "", ratios[-1], None, detail)


@dataclass(frozen=True)
class Record:
    """A session."""

    id: str
    model: str = "m"
    version: str = "1"
    idle_ttl: float = 900.0
    created_at: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@cache
def batches(url: str, size: int) -> tuple[asyncio.Runner, Callable[[], Awaitable[object]]]:
    """A loop, and a call that saves so many sessions. `{size}` in the URL: a file is one store's."""
    runner, store = asyncio.Runner(), open_store(url.format(size=size), keep_steps=0, max_expired_ids=0)
    ids = [f"{size}-{number}" for number in range(size)]
    token, saved = os.urandom(16), Saved(0, os.urandom(SNAPSHOT))

    async def create() -> None:
        await asyncio.gather(*(store.create(Record(name), token, saved) for name in ids))

    async def save() -> None:
        nonlocal token
        following = os.urandom(16)
        if not all(await store.save([Save(name, token, following, saved) for name in ids])):
            raise RuntimeError("a save was refused")
        token = following

    runner.run(create())
    return runner, save


def saving(url: str, size: int, seconds: float) -> float:
    """Seconds that a save of so many sessions takes, the median."""
    runner, save = batches(url, size)

    async def saves() -> float:
        times, end = [], time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            await save()
            times.append(time.perf_counter() - start)
        return median(times)

    return runner.run(saves())


def raw_sqlite(path: Path, synchronous: str, size: int, seconds: float) -> float:
    """Seconds that SQLite takes for a transaction of one blob."""
    db = sqlite3.connect(path, isolation_level=None)
    for line in ("journal_mode = WAL", f"synchronous = {synchronous}"):
        db.execute(f"PRAGMA {line}")
    db.execute("CREATE TABLE IF NOT EXISTS raw (size INTEGER PRIMARY KEY, bytes BLOB)")
    blob = os.urandom(size)
    try:
        return _timed(lambda: db.execute("INSERT OR REPLACE INTO raw VALUES (?, ?)", (size, blob)), seconds)
    finally:
        db.close()


def raw_redis(port: int, size: int, seconds: float) -> float:
    """Seconds that Redis takes for one SET."""
    blob = os.urandom(size)
    with redis.Redis(port=port) as client:
        return _timed(lambda: client.set(f"raw-{size}", blob), seconds)


def _timed(call: Callable[[], object], seconds: float) -> float:
    times, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
    return median(times)


@contextmanager
def redis_server(appendfsync: str) -> Iterator[tuple[int, int]]:
    """A server with an empty folder, on the loading core; gives its port and its process."""
    program = shutil.which("redis-server")
    if program is None:
        raise RuntimeError("no redis-server: apt-get install redis-server")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="latch-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        options = {"port": str(port), "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
        options["appendfsync"] = appendfsync
        command = [program, *(word for name, value in options.items() for word in (f"--{name}", value))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - found on the path
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.sched_setaffinity(process.pid, {LOAD})
        with redis.Redis(port=port) as client:
            end = time.monotonic() + SOONEST
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    if time.monotonic() > end:
                        raise RuntimeError("redis-server does not answer") from None
                    time.sleep(0.02)
        yield port, process.pid
