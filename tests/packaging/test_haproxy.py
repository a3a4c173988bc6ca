"""`deploy/haproxy.cfg` as it is, before replicas of the test's own, found through a DNS server of the test's own."""

import asyncio
import base64
import hashlib
import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from websockets.sync.client import connect

from tests.packaging.proxy import CONFIG, HAPROXY, Names

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
TEXT, CLOSE = 0x81, 0x88  # first bytes of WebSocket frames
IDS = [f"motor-{number}" for number in range(60)]

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="no haproxy (on Debian: apt install haproxy)")


@dataclass
class Replica:
    """Answers every request with its own address, and a socket's handshake with one message that says it."""

    host: str
    ready: bool = True
    silent: bool = False  # takes a request and closes the connection
    draining: bool = False  # answers 503
    seen: list[str] = field(default_factory=list)
    server: asyncio.Server | None = None

    async def serve(self, port: int) -> None:
        """Listens."""
        self.server = await asyncio.start_server(self._connected, self.host, port)

    def stop(self) -> None:
        """Refuses connections from now on."""
        if self.server is not None:
            self.server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = lines[0].split()
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                await reader.readexactly(int(headers.get("content-length", 0)))
                status = 200
                if path == "/health/ready":
                    status = 200 if self.ready else 503
                else:
                    self.seen.append(f"{method} {path}")
                    if self.silent:
                        return
                    if self.draining:
                        status = 503
                    elif key := headers.get("sec-websocket-key"):
                        self._greet(key, writer)
                        while (frame := await reader.read(1024)) and frame[0] != CLOSE:
                            pass
                        writer.write(bytes([CLOSE, 0]))
                        return
                body = json.dumps({"replica": self.host}).encode()
                writer.write(b"HTTP/1.1 %d -\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _greet(self, key: str, writer: asyncio.StreamWriter) -> None:
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())  # noqa: S324 - the protocol's
        writer.write(
            b"HTTP/1.1 101 -\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: %s\r\n\r\n" % accept
            + bytes([TEXT, len(self.host)])
            + self.host.encode()
        )


@dataclass
class Deployment:
    """HAProxy, what is behind it, and the names of that."""

    port: int
    metrics: int
    replicas: dict[str, Replica]
    named: set[str]
    loop: asyncio.AbstractEventLoop

    def client(self) -> httpx.Client:
        """HTTP through HAProxy, a connection a request: a client keeps its replica where nothing says else."""
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            timeout=30,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def routes(self, ids: list[str] = IDS) -> dict[str, str]:
        """Where each session's steps go."""
        with self.client() as http:
            return {name: http.post(f"/v1/sessions/{name}/steps", json={}).json()["replica"] for name in ids}

    def up(self) -> set[str]:
        """The replicas that HAProxy thinks are well."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics}/;csv", trust_env=False).text
        head, *rows = (line.split(",") for line in text.splitlines() if line)
        servers = [dict(zip(head, row, strict=False)) for row in rows]
        return {
            server["addr"].rpartition(":")[0]
            for server in servers
            if server["svname"].startswith("replica") and server["status"].startswith("UP")  # "UP 1/2": failing
        }

    def stop(self, host: str) -> None:
        """A replica refuses connections from now on."""

        async def stop() -> None:
            self.replicas[host].stop()

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(30)

    def wait_for(self, *hosts: str) -> None:
        """Until exactly these are well."""
        wait_until(lambda: self.up() == set(hosts), f"HAProxy should see {hosts}")


def wait_until(reached: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Waits for something that happens elsewhere; fails with `what` where it does not."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            pytest.fail(what)
        time.sleep(0.05)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody has, on every loopback address."""
    with socket.socket(type=kind) as probe:
        probe.bind(("0.0.0.0", 0))  # noqa: S104 - to see that each address has it
        return probe.getsockname()[1]


@contextmanager
def deployed(**environment: str) -> Iterator[Deployment]:
    """Three replicas and HAProxy in front, with settings of the configuration in its environment."""
    port, names = free_port(), free_port(socket.SOCK_DGRAM)
    replicas, named = {host: Replica(host) for host in HOSTS}, set(HOSTS)
    ended = asyncio.Event()
    started: Future[asyncio.AbstractEventLoop] = Future()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        for replica in replicas.values():
            await replica.serve(port)
        resolver, _ = await loop.create_datagram_endpoint(lambda: Names(named), ("127.0.0.1", names))
        started.set_result(loop)
        await ended.wait()
        resolver.close()
        for replica in replicas.values():
            replica.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    deployment = Deployment(free_port(), free_port(), replicas, named, started.result(30))
    environment |= {
        "BIND": f"127.0.0.1:{deployment.port}",
        "METRICS": f"127.0.0.1:{deployment.metrics}",
        "DNS": f"127.0.0.1:{names}",
        "REPLICAS": f"replicas.test:{port}",
    }
    process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(CONFIG)], env=os.environ | environment)
    try:
        wait_until(lambda: listens(deployment.metrics), "HAProxy should listen")
        deployment.wait_for(*HOSTS)
        yield deployment
    finally:
        process.terminate()
        process.wait(30)
        deployment.loop.call_soon_threadsafe(ended.set)
        thread.join(30)


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """One deployment for the tests of this file that leave it as it was."""
    with deployed() as deployment:
        yield deployment


@pytest.fixture
def latch(shared: Deployment) -> Iterator[Deployment]:
    """All three well, whatever the test before did to them."""
    yield shared
    shared.named.update(HOSTS)
    for replica in shared.replicas.values():
        replica.ready, replica.silent, replica.draining = True, False, False
    shared.wait_for(*HOSTS)


def test_the_configuration_is_valid_without_any_setting() -> None:
    """HAProxy reads it without a complaint."""
    checked = subprocess.run(
        [str(HAPROXY), "-c", "-f", str(CONFIG)], capture_output=True, text=True, timeout=30, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_every_call_of_a_session_goes_to_one_replica(latch: Deployment) -> None:
    """Steps, inspection, creation under the client's id and the socket meet at the same replica, again and again."""
    first = latch.routes()
    assert latch.routes() == first
    with latch.client() as http:
        for name in IDS[:10]:
            assert http.get(f"/v1/sessions/{name}").json()["replica"] == first[name]
            assert http.put(f"/v1/sessions/{name}", json={}).json()["replica"] == first[name]
            with connect(f"ws://127.0.0.1:{latch.port}/v1/sessions/{name}/stream", proxy=None) as stream:
                assert stream.recv(timeout=30) == first[name]


def test_an_escaped_id_is_the_same_id(latch: Deployment) -> None:
    """Clients escape differently; `motor%2D3` is `motor-3`."""
    assert latch.routes(["motor%2D3"])["motor%2D3"] == latch.routes(["motor-3"])["motor-3"]


def test_every_replica_has_its_share(latch: Deployment) -> None:
    """None of three has less than half of a third of 600 sessions, nor more than twice that third."""
    share = Counter(latch.routes([f"stream-{number}" for number in range(600)]).values())
    assert set(share) == set(HOSTS)
    assert min(share.values()) > 100
    assert max(share.values()) < 400


def test_the_header_names_the_session_where_the_path_does_not(latch: Deployment) -> None:
    """`X-Session-ID` leads where the path would; where both are given the path wins."""
    first = latch.routes()
    with latch.client() as http:
        for name in IDS[:20]:
            headers = {"X-Session-ID": name}
            assert http.post("/v2/models/sensors/infer", json={}, headers=headers).json()["replica"] == first[name]
            elsewhere = next(other for other in IDS if first[other] != first[name])
            answer = http.get(f"/v1/sessions/{elsewhere}", headers=headers)
            assert answer.json()["replica"] == first[elsewhere]
            url = f"ws://127.0.0.1:{latch.port}/v1/stream"
            with connect(url, proxy=None, additional_headers=headers) as stream:
                assert stream.recv(timeout=30) == first[name]


def test_what_belongs_to_no_session_goes_anywhere(latch: Deployment) -> None:
    """Sixty calls without a session reach all three."""
    with latch.client() as http:
        assert {http.post("/v1/sessions", json={}).json()["replica"] for _ in IDS} == set(HOSTS)


def test_a_replica_that_goes_takes_only_its_own_sessions_along(latch: Deployment) -> None:
    """Gone from DNS, its sessions go to the others, and every other session stays; back again, all are as before."""
    before = latch.routes()
    latch.named.remove(HOSTS[1])
    latch.wait_for(HOSTS[0], HOSTS[2])
    without = latch.routes()
    latch.named.add(HOSTS[1])
    latch.wait_for(*HOSTS)
    moved = {name for name in IDS if without[name] != before[name]}
    assert moved == {name for name in IDS if before[name] == HOSTS[1]}
    assert HOSTS[1] not in without.values()
    assert latch.routes() == before


def test_a_replica_that_drains_gets_nothing_new_and_keeps_its_sockets(latch: Deployment) -> None:
    """Unready, it is passed over; a socket that it holds stays open until it closes it itself."""
    before = latch.routes()
    name = next(name for name in IDS if before[name] == HOSTS[0])
    with connect(f"ws://127.0.0.1:{latch.port}/v1/sessions/{name}/stream", proxy=None) as stream:
        assert stream.recv(timeout=30) == HOSTS[0]
        latch.replicas[HOSTS[0]].ready = False
        latch.wait_for(HOSTS[1], HOSTS[2])
        assert HOSTS[0] not in latch.routes().values()
        stream.ping().wait(0.1)
        with pytest.raises(TimeoutError):
            stream.recv(timeout=0.2)


def test_before_a_drain_is_seen_reads_handshakes_and_numbered_steps_go_on_elsewhere(latch: Deployment) -> None:
    """A 503 of a draining replica is not what these get; an unnumbered step gets it, and may be sent again."""
    name, replica = somebody(latch)
    replica.draining = True
    with latch.client() as http:
        assert http.get(f"/v1/sessions/{name}").json()["replica"] != replica.host
        numbered = http.post(f"/v1/sessions/{name}/steps?step=4&outputs=y", content=b"rows")
        assert numbered.json()["replica"] != replica.host
        assert http.post(f"/v1/sessions/{name}/steps", json={}).status_code == 503
    with connect(f"ws://127.0.0.1:{latch.port}/v1/sessions/{name}/stream", proxy=None) as stream:
        assert stream.recv(timeout=30) != replica.host


@pytest.mark.parametrize("path", ["steps", "rollback?step=3", "fork?step=1"])
def test_an_unnumbered_step_is_sent_once(latch: Deployment, path: str) -> None:
    """Its answer lost, the client is told so in the service's own shape; no replica has got it a second time. Nor any
    other call, whatever stands in its address.
    """
    name, replica = somebody(latch)
    replica.silent = True
    for each in latch.replicas.values():
        each.seen.clear()
    with latch.client() as http:
        answer = http.post(f"/v1/sessions/{name}/{path}", json={"inputs": [[1.0]]})
    assert answer.status_code == 502
    assert answer.json() | {"error": ""} == {"error": "", "code": "interrupted", "retryable": True}
    assert [call for each in latch.replicas.values() for call in each.seen] == [f"POST /v1/sessions/{name}/{path}"]


def test_a_numbered_step_whose_answer_is_lost_is_sent_to_the_next_replica(latch: Deployment) -> None:
    """It may be applied twice without harm, so the proxy repeats it."""
    name, replica = somebody(latch)
    replica.silent = True
    path = f"/v1/sessions/{name}/steps?step=7"
    with latch.client() as http:
        answer = http.post(path, content=b"rows")
    assert answer.status_code == 200
    assert answer.json()["replica"] != replica.host
    assert f"POST {path}" in replica.seen


def test_figures_are_for_this_machine_only_and_not_behind_the_door(latch: Deployment) -> None:
    """HAProxy's own are on the loopback address; a replica's are not passed on, for one's alone would mislead."""
    own = httpx.get(f"http://127.0.0.1:{latch.metrics}/metrics", trust_env=False).text
    assert "haproxy_backend_http_responses_total" in own
    assert "presetenv METRICS 127.0.0.1:" in CONFIG.read_text()
    with latch.client() as http:
        answer = http.get("/metrics")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_random_routing_ignores_the_session() -> None:
    """ROUTING=random: one session's calls reach all three, so that a test can show that affinity is only for speed."""
    with deployed(ROUTING="random") as latch:
        assert {latch.routes(["motor-7"])["motor-7"] for _ in range(60)} == set(HOSTS)


def test_a_connection_that_is_refused_costs_no_call() -> None:
    """Replicas that die between two checks are passed over, for calls of every kind; with none left, it is 503."""
    with deployed() as latch:
        gone, stays = HOSTS[:2], HOSTS[2]
        for host in gone:
            latch.stop(host)
        with latch.client() as http:
            answers = [http.post(f"/v1/sessions/{name}/steps", json={}) for name in IDS]
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.json()["replica"] for answer in answers} == {stays}
            latch.stop(stays)
            latch.wait_for()
            none = http.post("/v1/sessions/motor-7/steps", json={})
    assert none.status_code == 503
    assert none.headers["Retry-After"] == "1"
    assert none.json() == {"error": "no replica can be reached", "code": "unavailable", "retryable": True}


def somebody(latch: Deployment) -> tuple[str, Replica]:
    """A session and the replica that has it."""
    name, host = next(iter(latch.routes().items()))
    return name, latch.replicas[host]
