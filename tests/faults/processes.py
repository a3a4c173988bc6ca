"""Replicas of the service as real processes, HAProxy in front of them, and wires that a test cuts."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from tests.packaging.proxy import CONFIG, HAPROXY, Names
from tests.service.servers import free_port

PATIENCE = 120.0


class Process:
    """A program that listens on a port of its own, through all its lives.

    Attributes:
        host, port: the same in every life.
        url: of it.
    """

    def __init__(self, folder: Path, *, ready: str, host: str = "127.0.0.1", port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.host = host
        self.port = port or free_port()
        self.url = f"http://{self.host}:{self.port}"
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """What is run."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """What it finds beside that of the tests."""
        return {}

    @property
    def pid(self) -> int:
        """Of this life."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has said in all its lives."""
        return (self.folder / "log").read_text()

    async def start(self) -> Self:
        """Starts it, again too, and waits until it is ready.

        One that ends, since a busy store did not answer in time, is started again, as orchestrators do.
        """
        self._launch()
        end = time.monotonic() + PATIENCE
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            while True:
                with suppress(httpx.HTTPError):
                    if (await client.get(self.url + self._ready)).status_code == 200:
                        return self
                assert time.monotonic() < end, f"the process did not get ready: {self.log}"
                await asyncio.sleep(0.02)
                if self._process is not None and self._process.poll() is not None:
                    self._launch()

    def _launch(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env=os.environ | self.environment()
            )

    async def kill(self) -> None:
        """Ends it as a crash does: `kill -9`."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Ends it as an orchestrator does; its exit status."""
        return await self._end(signal.SIGTERM)

    def pause(self) -> None:
        """It keeps its connections, and answers nobody."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        os.kill(self.pid, signal.SIGCONT)

    async def _end(self, how: signal.Signals) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        return await asyncio.to_thread(process.wait, PATIENCE)


class Replica(Process):
    """`latch serve`.

    Args:
        folder: of its log.
        models: the repository.
        store: its URL.
        settings: further ones, as `LATCH_...` in the environment.
        address: host and port, where they matter.
    """

    def __init__(
        self, folder: Path, models: Path, store: str, settings: dict[str, str] | None = None, **address: Any
    ) -> None:
        super().__init__(folder, ready="/health/ready", **address)
        self._models = models
        self._store = store
        self._settings = {"LATCH_LOG_LEVEL": "warning", "LATCH_KEEP_STEPS": "5"} | (settings or {})

    def command(self) -> list[str]:
        """See `Process`."""
        options = {"host": self.host, "port": str(self.port), "models": str(self._models), "store": self._store}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return [sys.executable, "-m", "service", "serve", "--device", "cpu", *words]

    def environment(self) -> dict[str, str]:
        """See `Process`."""
        return self._settings


class HAProxy(Process):
    """`deploy/haproxy.cfg` in front of replicas.

    Args:
        folder: of its log.
        replicas: all on one port, each on an address of its own.
        routing: by `session`, or `random`.
        names: the port of a DNS server that knows them.
    """

    def __init__(self, folder: Path, replicas: Sequence[Replica], routing: str, names: int) -> None:
        super().__init__(folder, ready="/health/live")
        [port] = {replica.port for replica in replicas}
        self._settings = {
            "BIND": f"127.0.0.1:{self.port}",
            "METRICS": f"127.0.0.1:{free_port()}",
            "DNS": f"127.0.0.1:{names}",
            "REPLICAS": f"replicas.test:{port}",
            "ROUTING": routing,
        }
        self._old: list[subprocess.Popen[bytes]] = []

    def command(self) -> list[str]:
        """See `Process`."""
        return [str(HAPROXY), "-db", "-f", str(CONFIG), *(("-sf", str(self._old[-1].pid)) if self._old else ())]

    def environment(self) -> dict[str, str]:
        """See `Process`."""
        return self._settings

    async def reload(self) -> None:
        """Another process takes the port over; this one goes on with its connections for a while."""
        assert self._process is not None
        self._old.append(self._process)
        await self.start()

    async def kill(self) -> None:
        """See `Process`; with it, all that it has taken over from."""
        await super().kill()
        while self._old:
            old = self._old.pop()
            old.kill()
            await asyncio.to_thread(old.wait, PATIENCE)


@asynccontextmanager
async def proxied(folder: Path, replicas: Sequence[Replica], routing: str) -> AsyncIterator[HAProxy]:
    """HAProxy in front of replicas, once it has found one."""
    if HAPROXY is None:
        pytest.skip("no haproxy: apt-get install haproxy")
    known = Names({replica.host for replica in replicas})
    resolver, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: known, ("127.0.0.1", 0))
    proxy = HAProxy(folder, replicas, routing, resolver.get_extra_info("sockname")[1])
    try:
        yield await proxy.start()
    finally:
        await proxy.kill()
        resolver.close()


class Wire:
    """A way through TCP to a port of this machine, which a test cuts, holds up and leads elsewhere.

    Attributes:
        target: the port that new connections lead to.
        delay: seconds that whatever goes through takes, each way.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_cut = False
        self._ends: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Connections break, and none can be made; what was on its way is lost."""
        self._is_cut = True
        for end in self._ends:
            end.transport.abort()
        self._flows.set()

    def hold(self) -> None:
        """A partition: connections stay, and nothing goes through until `heal`."""
        self._flows.clear()

    def heal(self) -> None:
        """As before; what was held goes on its way."""
        self._is_cut = False
        self._flows.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        """Listens."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await self.close()

    async def close(self) -> None:
        """Ends what goes through."""
        self.cut()
        while self._ends:  # noqa: ASYNC110 - a moment, at the end
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b"") -> None:
        """Leads a connection on, with what was read from it already."""
        if self._is_cut:
            writer.transport.abort()
            return
        self._ends.add(writer)
        try:
            await self._flows.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._drop(writer)
            return
        self._ends.add(far_writer)
        far_writer.write(first)
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._drop(writer)
            self._drop(far_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flows.wait()
                if self._is_cut:
                    break
                writer.write(data)
                await writer.drain()
        self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        writer.close()
        self._ends.discard(writer)


@asynccontextmanager
async def junction(wires: Mapping[str, Wire]) -> AsyncIterator[int]:
    """A port of a Redis where every user has a wire of its own: who calls, it says first."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(65_536)
        wire = next((wire for user, wire in wires.items() if user.encode() in first), None)
        if wire is None:  # it has ended before it said a word
            writer.transport.abort()
        else:
            await wire.serve(reader, writer, first)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for wire in wires.values():
            await wire.close()
