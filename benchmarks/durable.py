"""What it costs that sessions survive: one step a message over 256 sockets, stored, beside the same in memory."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import socket

from benchmarks import latch
from benchmarks.doors import VARIANTS, loading
from benchmarks.latch import Latch, rolls
from benchmarks.machine import LOAD, describe, ratio, take_turns
from benchmarks.report import Row, at_least

CONNECTIONS = 256
GOALS = {"sqlite": 0.70, "redis": 0.55}


def run(quick: bool) -> Iterator[Row]:
    """Messages a second with each store by those without one."""
    rounds, seconds = (2, 0.5) if quick else (5, 1.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {"memory": "memory://", "sqlite": f"sqlite:///{folder / 'sessions.db'}"}
        if shutil.which("redis-server"):
            urls["redis"] = stack.enter_context(_redis(folder))
        contenders, services = {}, {}
        for name, url in urls.items():
            services[name] = service = stack.enter_context(Latch(store_url=url))
            sessions = service.create(CONNECTIONS)
            lines = [latch.websocket_binary(service.port, session, [*rolls(VARIANTS)]) for session in sessions]
            contenders[name] = loading(service, lines, seconds)
        taken = take_turns(contenders, rounds)
        without = taken.pop("memory")
        for name, rounds_of_it in taken.items():
            detail = f"{describe(rounds_of_it, 'steps/s')}; memory {describe(without, 'steps/s')}"
            yield at_least(
                GOALS[name], f"{CONNECTIONS} sockets, {name}", "memory", ratio(rounds_of_it, without), detail
            )


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    """A Redis with an append-only file, on the loading core: another machine has it, not the one that serves."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - our own program
    try:
        os.sched_setaffinity(process.pid, {LOAD})
        for _ in range(200):
            with socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(15)
