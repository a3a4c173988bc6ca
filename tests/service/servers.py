"""Redis servers of the tests' own: real processes on free ports, to be killed and started again."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import redis

PROGRAM = shutil.which("redis-server")
PATIENCE = 60.0


# Below the ports that the system gives to outgoing connections: what a killed server leaves, nobody takes meanwhile.
# Each process of the tests starts elsewhere.
_PORTS = itertools.cycle([10_000 + (os.getpid() * 97 + number) % 12_000 for number in range(12_000)])


def free_port() -> int:
    """A port that nobody listens on, nor on the one that a cluster's node would take for its bus."""
    return next(port for port in _PORTS if _is_free(port) and _is_free(port + 10_000))


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("0.0.0.0", port))  # noqa: S104 - on every address of this machine
        except OSError:
            return False
        return True


class RedisServer:
    """A `redis-server` on one port with one folder, through all its lives.

    Args:
        folder: where its files are.
        options: of its command line: `appendonly="yes"`, `maxmemory="1"`; an underscore stands for a dash. Nothing is
            written to the disk unless asked.
    """

    def __init__(self, folder: Path, **options: str) -> None:
        if PROGRAM is None:
            pytest.skip("no redis-server: apt-get install redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._password = options.get("requirepass")
        self._folder = folder
        self._options = {"save": "", "appendonly": "no", "bind": "127.0.0.1"} | options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Starts it, again too, and waits until it answers."""
        command = [str(PROGRAM), "--port", str(self.port), "--dir", str(self._folder)]
        for name, value in self._options.items():
            command += [f"--{name.replace('_', '-')}", value]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers)
        return self

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            return bool(self("PING"))
        except redis.ConnectionError:
            return False

    def __call__(self, *command: str) -> Any:
        """What it says to a command."""
        with redis.Redis(port=self.port, password=self._password, protocol=2, decode_responses=True) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """Ends it as a crash does: `kill -9`."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ends it with its own goodbye."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """It keeps its connections, and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait(PATIENCE)
            self._process = None


@contextmanager
def running(folder: Path, **options: str) -> Iterator[RedisServer]:
    """One server, ended with the block."""
    server = RedisServer(folder, **options)
    try:
        yield server.start()
    finally:
        server.kill()


@contextmanager
def cluster(folder: Path, nodes: int = 3, announced: Sequence[int] = (), **options: str) -> Iterator[list[RedisServer]]:
    """Primaries that share the slots in equal parts; `announced` are the ports that clients are sent to instead."""
    with ExitStack() as stack:
        servers = []
        for i in range(nodes):
            own = options | {"cluster_enabled": "yes"}
            if announced:
                own["cluster_announce_port"] = str(announced[i])
            servers.append(stack.enter_context(running(folder / str(i), **own)))
        for i, server in enumerate(servers):
            first, after = (16_384 * edge // nodes for edge in (i, i + 1))
            server("CLUSTER ADDSLOTSRANGE", str(first), str(after - 1))
            server("CLUSTER SET-CONFIG-EPOCH", str(i + 1))
            server("CLUSTER MEET", "127.0.0.1", str(servers[0].port))
        for server in servers:
            until(lambda server=server: is_whole(server, nodes))
            until(
                lambda server=server: not announced or {part[2][1] for part in server("CLUSTER SLOTS")} == {*announced}
            )
        yield servers


def is_whole(server: RedisServer, nodes: int) -> bool:
    """Whether a node knows all others, and that every slot is served."""
    info = server("CLUSTER INFO")
    wanted = {"cluster_state": "ok", "cluster_known_nodes": str(nodes), "cluster_slots_ok": "16384"}
    return wanted.items() <= info.items()


def cluster_url(servers: list[RedisServer]) -> str:
    """Of all its nodes."""
    return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


def until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Waits for something that a server does by itself."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "the server did not come to it"
        time.sleep(0.02)
