"""What it costs that sessions survive: one step a message, stored, beside the same in memory."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import latch
from benchmarks.doors import VARIANTS, loading
from benchmarks.latch import Latch, rolls
from benchmarks.load import Line, closed_loop
from benchmarks.machine import Contender, describe, pinned, ratio, take_turns
from benchmarks.report import Row, at_least
from benchmarks.stores import redis_server

CONNECTIONS, REPLICAS = 256, (1, 2, 4)
GOALS = {"sqlite": 0.70, "sqlite, synchronous=normal": 0.70, "redis, appendfsync everysec": 0.55}


def run(quick: bool) -> Iterator[Row]:
    """Steps a second by those in memory; bytes written; seconds from kill -9 to the next answer; replicas."""
    rounds, seconds = (2, 0.5) if quick else (5, 1.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latch-")))
        urls = {
            "memory": "memory://",
            "sqlite": f"sqlite:///{folder}/full.db",
            "sqlite, synchronous=normal": f"sqlite:///{folder}/normal.db?synchronous=normal",
        }
        helpers = dict[str, int]()
        if shutil.which("redis-server"):
            port, helpers["redis, appendfsync everysec"] = stack.enter_context(redis_server("everysec"))
            urls |= dict.fromkeys(helpers, f"redis://127.0.0.1:{port}")
        yield from _stored(urls, helpers, rounds, seconds)
        yield from _recovery(f"sqlite:///{folder}/recovery.db", 3 if quick else 7)
        for name, pid in helpers.items():
            yield from _replicas(urls[name], pid, rounds, seconds)
        if not helpers:
            yield Row("redis", "memory", "", "left out", None, "there is no redis-server here")


def _stored(urls: dict[str, str], helpers: dict[str, int], rounds: int, seconds: float) -> Iterator[Row]:
    contenders, written = {}, {}
    with ExitStack() as stack:
        for name, url in urls.items():
            service = stack.enter_context(Latch(store_url=url))
            lines = _lines(latch.websocket_binary, service.port, service.create(CONNECTIONS))
            mine = [helpers[name]] if name in helpers else []
            contenders[name] = replace(loading(service, lines, seconds), helpers=mine)
            if "sqlite" in name:
                written[name] = _bytes_a_step(service.pid, lines, seconds)
        taken = take_turns(contenders, rounds)
    memory = taken.pop("memory")
    for name, stored in taken.items():
        detail = f"{describe(stored, 'steps/s')}; memory {describe(memory, 'steps/s')}"
        yield at_least(GOALS[name], f"{CONNECTIONS} sockets, {name}", "memory", ratio(stored, memory), detail)
    for name, size in written.items():
        yield Row(f"bytes written a step, {name}", "", "", f"{size:,.0f}", None, f"{CONNECTIONS} busy sessions")


def _lines(door: Callable[..., Line], port: int, sessions: Sequence[str]) -> list[Line]:
    return [door(port, session, [*rolls(VARIANTS)]) for session in sessions]


def _bytes_a_step(pid: int, lines: Sequence[Line], seconds: float) -> float:
    """What a server hands to the kernel for its disk."""

    def written() -> int:
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(fields["write_bytes"])

    before = written()
    with pinned():
        rate = closed_loop(lines, seconds)
    return (written() - before) / (rate * seconds)


def _recovery(url: str, rounds: int) -> Iterator[Row]:
    """From kill -9 to the next answer of a session that was there, by a process that starts with nothing to recover."""
    crashed, fresh = list[float](), list[float]()
    with Latch(store_url=url) as service:
        names = service.create(CONNECTIONS)
        _step_all(service, names)
        service.kill()
    for _ in range(rounds):
        start = time.perf_counter()
        with Latch(store_url=url) as service:
            _step_all(service, names[:1])
            crashed.append(time.perf_counter() - start)
            _step_all(service, names)
            service.kill()
        start = time.perf_counter()
        with Latch() as service:
            _step_all(service, service.create(1))
            fresh.append(time.perf_counter() - start)
    detail = f"{median(crashed) * 1000:.0f} ms and {median(fresh) * 1000:.0f} ms, {rounds} processes each"
    value = median(crashed) / median(fresh)
    yield Row(
        "from a start after kill -9 to the next step, sqlite",
        "a start without sessions",
        "",
        f"{value:.2f}",
        None,
        detail,
    )


def _step_all(service: Latch, sessions: Sequence[str]) -> None:
    for line in _lines(latch.http_binary, service.port, sessions):
        line.once()


def _replicas(url: str, store: int, rounds: int, seconds: float) -> Iterator[Row]:
    """The same sessions on 1, 2 and 4 replicas that share a core; and every session fed through two of them at once."""
    with ExitStack() as stack:
        services = [stack.enter_context(Latch(store_url=url)) for _ in range(max(REPLICAS))]
        contenders: dict[str, Contender[Any]] = {}
        for count in REPLICAS:
            lines = []
            for number, service in enumerate(services[:count]):
                names = service.create(CONNECTIONS // 4 // count, prefix=f"of-{count}-{number}")
                lines += _lines(latch.http_binary, service.port, names)
            pids = [service.pid for service in services[:count]]
            contenders[f"{count} replicas"] = Contender(partial(_load, lines, seconds), pids, helpers=[store])
        names = services[0].create(CONNECTIONS // 8, prefix="both")
        lines = [line for service in services[:2] for line in _lines(latch.http_binary, service.port, names)]
        pids = [service.pid for service in services[:2]]
        both = Contender(partial(_load, lines, seconds), pids, helpers=[store])
        contenders["every session at 2 replicas at once"] = both
        taken = take_turns(contenders, rounds)
        one = taken.pop("1 replicas")
        for name, many in taken.items():
            detail = (
                f"{describe(many, 'steps/s')}; 1 replica {describe(one, 'steps/s')}; HTTP packed rows, "
                f"{CONNECTIONS // 4} clients, one core for all"
            )
            yield Row(f"redis, {name}, steps/s", "1 replica", "", f"{ratio(many, one):.2f}", None, detail)


def _load(lines: Sequence[Line], seconds: float) -> float:
    with pinned():
        return closed_loop(lines, seconds)
