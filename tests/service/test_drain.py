"""How the service stops: real processes and real sockets, with work in flight at the moment of the signal."""

import asyncio
import itertools
import json
import os
import re
import signal
import socket as std_socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any, Self

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.service import peer
from tests.service.conftest import Server

PATIENCE = 120.0
ROWS = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
HOUR_MS = 3_600_000


class Latch:
    """`latch serve` in a process of its own, and a client of it."""

    def __init__(self, models: Path, folder: Path, **settings: Any) -> None:
        command = [sys.executable, "-m", "service", "serve", "--port", "0", "--models", str(models), "--device", "cpu"]
        command += ["--store", f"sqlite:///{folder / 'sessions.db'}?synchronous=normal"]
        self._log = (folder / "log").open("w+")
        environment = {f"LATCH_{name.upper()}": str(value) for name, value in settings.items()}
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | environment
        )
        assert self._process.stdout is not None
        found = re.search(r"http://\S+", self._process.stdout.readline())
        assert found is not None, (folder / "log").read_text()
        self.url = found[0].replace("localhost", "127.0.0.1")
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        """Tells it to stop."""
        self._process.send_signal(which)

    def ends(self) -> str:
        """Waits until it has ended, with 0; its log, without the time of each line."""
        assert self._process.wait(PATIENCE) == 0
        self._log.seek(0)
        return re.sub(r"(?m)^\S+ \S+ ", "", self._log.read())

    def socket(self, path: str, kind: str, **options: Any) -> Any:
        """A WebSocket."""
        url = self.url.replace("http", "ws") + path
        return connect(url, subprotocols=[Subprotocol(kind)], max_size=None, **options)


def until(condition: Callable[[], bool]) -> None:
    """Waits for what the service does by itself."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.005)


def is_draining(http: httpx.Client) -> bool:
    """Whether it says so."""
    ready = http.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) in [(200, "ready"), (503, "draining")]
    return ready.status_code == 503


def pour(socket: Any, messages: Iterator[str | bytes]) -> None:
    """Sends without waiting for anything, until the service closes."""
    with suppress(ConnectionClosed):
        for message in messages:
            socket.send(message)


def received(socket: Any) -> Iterator[Any]:
    """What comes, until the service closes with 1012."""
    with suppress(ConnectionClosed):
        while True:
            yield socket.recv(timeout=PATIENCE)
    assert socket.close_code == 1012


@pytest.mark.parametrize("kind", ["latch.json", "latch.binary"])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]], ids=["single", "many"])
def test_sigterm_answers_what_was_read_and_applies_nothing_else(
    repository: Path, tmp_path: Path, kind: str, names: list[str]
) -> None:
    """In the middle of a flood: replies without a gap, `going_away`, 1012 and exit 0; in the store each session stands
    where its last reply said, and goes on from there with the bits of one that was never interrupted.
    """
    is_json, single = kind == "latch.json", len(names) == 1
    channels = {name: channel for channel, name in enumerate(names)}
    signalled = Event()
    with Latch(repository, tmp_path, drain_ms=HOUR_MS) as latch:
        for name in names:
            assert latch.http.put(f"/v1/sessions/{name}", json={"model": "toy"}).status_code == 201
        with latch.socket(f"/v1/sessions/{names[0]}/stream" if single else "/v1/stream", kind) as socket:
            if not (single or is_json):
                socket.send(b"".join(peer.opens(channel, name) for name, channel in channels.items()))

            def messages() -> Iterator[str | bytes]:
                for i, row in enumerate(itertools.cycle(ROWS)):  # until the service closes
                    if i == len(ROWS) // 2:
                        signalled.wait(PATIENCE)
                    for name in names:
                        if is_json:
                            to = {} if single else {"session": name}
                            yield json.dumps({"inputs": [row.tolist()], "step": i + 1} | to)
                        else:
                            yield peer.step(channels[name], row[None], i + 1)

            told: dict[str, list[int]] = {name: [] for name in names}
            last: list[Any] = []
            with ThreadPoolExecutor() as pool:
                pool.submit(pour, socket, messages())
                for message in received(socket):
                    assert not last, "nothing comes after going_away"
                    if is_json:
                        document = json.loads(message)
                        if document["type"] == "step":
                            told[document.get("session", names[0])].append(document["step"])
                        elif document["type"] != "hello":
                            last.append(document)
                    else:
                        for reply in peer.replies(message, lambda _: 16):
                            if reply.kind == peer.STEPPED:
                                told[names[reply.channel]].append(reply.first)
                            elif reply.kind != peer.HELLO:
                                last.append(reply)
                    if len(told[names[-1]]) >= 100:
                        latch.signal()
                        signalled.set()
        log = latch.ends()
    for steps in told.values():
        assert steps == [*range(1, len(steps) + 1)]
        assert len(steps) >= 100
    farewell = {"reason": "draining", "retry_after_ms": 100}
    if is_json:
        assert last == [{"type": "going_away"} | farewell]
    else:
        assert [(reply.kind, reply.document) for reply in last] == [(peer.GOING_AWAY, farewell)]
    assert re.findall(r"(?m)^(WARNING|ERROR|Traceback).*", log) == []
    assert re.search(r"stopped in \S+ s: 1 sockets told, 0 requests answered, 0 connections cut", log), log
    with Latch(repository, tmp_path) as latch:
        latch.http.put("/v1/sessions/calm", json={"model": "toy"})
        for name, steps in told.items():
            assert latch.http.get(f"/v1/sessions/{name}").json()["step"] == len(steps)
            rows = np.resize(ROWS, (len(steps) + 50, 3))
            rest = latch.http.post(f"/v1/sessions/{name}/steps", json={"inputs": rows[len(steps) :].tolist()})
            for part in (*np.array_split(rows[: len(steps)], 1 + len(steps) // 4000), rows[len(steps) :]):
                calm = latch.http.post("/v1/sessions/calm/steps", json={"inputs": part.tolist()})
            assert rest.json()["outputs"]["y"] == calm.json()["outputs"]["y"]
            latch.http.post("/v1/sessions/calm/reset")


def test_while_it_drains_it_serves_what_it_has_and_nothing_new(repository: Path, tmp_path: Path) -> None:
    """Before it closes its port: not ready, alive; no new sessions, but those there are go on, each HTTP answer the
    last on its connection. A second SIGTERM changes nothing, SIGINT ends it, both with exit 0.
    """
    with Latch(repository, tmp_path, drain_delay_ms=HOUR_MS) as latch:
        latch.http.put("/v1/sessions/old", json={"model": "toy"})
        snapshot = latch.http.get("/v1/sessions/old/state").content
        with latch.socket("/v1/sessions/old/stream", "latch.json") as early:
            latch.signal()
            until(lambda: is_draining(latch.http))
            latch.signal()
            assert latch.http.get("/health/live").status_code == 200
            for answer in (
                latch.http.post("/v1/sessions", json={"model": "toy"}),
                latch.http.put("/v1/sessions/new", json={"model": "toy"}),
                latch.http.post("/v1/sessions/old/fork", json={"id": "new"}),
                latch.http.put(
                    "/v1/sessions/new/state", content=snapshot, headers={"Content-Type": "application/octet-stream"}
                ),
            ):
                error = answer.json()
                assert (answer.status_code, error["code"], error["retryable"]) == (503, "draining", True)
                assert answer.headers["Retry-After"] == "1"
                assert answer.headers["Connection"] == "close"
            assert latch.http.put("/v1/sessions/old", json={"model": "toy"}).status_code == 200
            step = latch.http.post("/v1/sessions/old/steps", json={"inputs": [[1, 2, 3]], "step": 1})
            assert (step.status_code, step.json()["step"], step.headers["Connection"]) == (200, 1, "close")
            with latch.socket("/v1/sessions/old/stream", "latch.json") as late:
                for i, socket in enumerate((early, late)):
                    assert json.loads(socket.recv(timeout=PATIENCE))["type"] == "hello"
                    socket.send(json.dumps({"inputs": [[1, 2, 3]], "step": i + 2}))
                    assert json.loads(socket.recv(timeout=PATIENCE))["step"] == i + 2
                latch.signal(signal.SIGINT)
                for socket in (early, late):
                    assert [json.loads(message)["type"] for message in received(socket)] == ["going_away"]
        assert re.search(r"stopped in \S+ s: 2 sockets told", latch.ends())


class Held:
    """A model whose runs begin and do not go on before `go` is set."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        runner = server.app.state.manager.engines.get("toy")._runner
        run = runner.run

        def held(*arguments: Any) -> Any:
            self.entered.set()
            assert self.go.wait(PATIENCE)
            return run(*arguments)

        monkeypatch.setattr(runner, "is_short", lambda rows, steps: False)
        monkeypatch.setattr(runner, "run", held)


@contextmanager
def closing(server: Server) -> Iterator[None]:
    """Tells a server of this process to stop; at the end of the block, it has."""
    server.uvicorn.should_exit = True
    until(lambda: server.app.state.manager.is_draining)
    yield
    until(lambda: not server.uvicorn.server_state.connections)


def test_a_request_in_flight_is_answered_and_its_connection_closed(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes within the deadline; an idle connection is closed meanwhile, and nobody new let in."""
    server = start(drain_ms=HOUR_MS)
    session, held = server.create(), Held(server, monkeypatch)
    connections = server.uvicorn.server_state.connections
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=server.url, timeout=PATIENCE) as other:
        waiting = pool.submit(other.post, f"/v1/sessions/{session}/steps", json={"inputs": ROWS.tolist()})
        assert held.entered.wait(PATIENCE)
        assert len(connections) == 2
        with closing(server):
            until(lambda: len(connections) == 1)
            with pytest.raises(httpx.ConnectError), httpx.Client() as late:
                late.get(f"{server.url}/health/live")
            held.go.set()
            reply = waiting.result(PATIENCE)
    assert (reply.status_code, reply.json()["step"], reply.headers["Connection"]) == (200, len(ROWS), "close")


def test_what_a_client_has_left_behind_is_applied(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps were read, and nobody waits for them: the service does, before it ends."""
    server = start(drain_ms=HOUR_MS)
    name, held = server.create(), Held(server, monkeypatch)
    session = server.app.state.manager.resident(name)
    with server.socket(name) as socket:
        socket.recv(timeout=PATIENCE)
        for i in range(3):
            socket.send(json.dumps({"inputs": [[1, 2, 3]], "step": i + 1}))
        until(lambda: session.engine.batcher._queues.depth == 3)
    until(lambda: len(server.uvicorn.server_state.connections) == 1)
    with closing(server):
        until(lambda: not server.uvicorn.server_state.connections)
        held.go.set()
    until(lambda: session.step == 3)


def test_at_the_deadline_whoever_waits_is_told(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """HTTP gets 503; on a socket of many sessions each request is refused, on one of a single session none is answered;
    both end with `going_away` and 1012, and no step is applied.
    """
    server = start(drain_ms=100)
    one, two, three = (server.create() for _ in range(3))
    held = Held(server, monkeypatch)
    many = connect(f"{server.url.replace('http', 'ws')}/v1/stream", subprotocols=[Subprotocol("latch.json")])
    with ThreadPoolExecutor() as pool, many, server.socket(two) as single:
        waiting = pool.submit(server.http.post, f"/v1/sessions/{three}/steps", json={"inputs": [[1, 2, 3]]})
        single.recv(timeout=PATIENCE)
        for i in (1, 2):
            many.send(json.dumps({"session": one, "inputs": [[1, 2, 3]], "step": i}))
            single.send(json.dumps({"inputs": [[1, 2, 3]], "step": i}))
        until(lambda: server.app.state.manager.engines.get("toy").batcher._queues.depth == 5)
        with closing(server):
            reply = waiting.result(PATIENCE)
            assert (reply.status_code, reply.json()["code"]) == (503, "draining")
            told = [json.loads(message) for message in received(many)]
            assert [each.get("code", each["type"]) for each in told] == ["draining", "draining", "going_away"]
            assert [json.loads(message)["type"] for message in received(single)] == ["going_away"]
        held.go.set()
    assert "Traceback" not in caplog.text


def test_at_the_deadline_who_waits_for_a_store_is_told(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that does not answer holds up no end: a call, a step and a socket are told, and the log is clean."""
    server = start(drain_ms=100)
    entered = threading.Semaphore(0)

    async def hang(*_: Any) -> None:
        entered.release()
        await asyncio.Event().wait()

    monkeypatch.setattr(server.app.state.manager, "inspect", hang)
    monkeypatch.setattr(server.app.state.manager, "find", hang)
    with ThreadPoolExecutor() as pool, server.socket("a") as socket:
        calls = [
            pool.submit(httpx.get, f"{server.url}/v1/sessions/a", timeout=PATIENCE),
            pool.submit(httpx.post, f"{server.url}/v1/sessions/a/steps", json={"inputs": []}, timeout=PATIENCE),
        ]
        for _ in range(3):
            assert entered.acquire(timeout=PATIENCE)
        with closing(server):
            replies = [call.result(PATIENCE) for call in calls]
            assert [(reply.status_code, reply.json()["code"]) for reply in replies] == [(503, "draining")] * 2
            assert [json.loads(message)["type"] for message in received(socket)] == ["going_away"]
    assert "Traceback" not in caplog.text


def test_a_client_that_never_reads_is_cut_at_the_deadline(repository: Path, tmp_path: Path) -> None:
    """More replies than buffers hold lie there untaken; the process ends all the same, with 0 and without complaint."""
    with Latch(repository, tmp_path, drain_ms=200) as latch:
        latch.http.put("/v1/sessions/a", json={"model": "toy"})
        with latch.socket("/v1/sessions/a/stream", "latch.binary", max_queue=1, close_timeout=0.1) as socket:
            stop = threading.Event()
            chunk = peer.step(0, np.tile(ROWS, (4, 1)))

            def chunks() -> Iterator[bytes]:
                while not stop.is_set():
                    yield chunk

            with ThreadPoolExecutor() as pool:
                pool.submit(pour, socket, chunks())
                until(lambda: latch.http.get("/v1/sessions/a").json()["step"] > 40 * 16_000)
                latch.signal()
                log = latch.ends()
                stop.set()
    assert re.search(r"1 sockets told, \d+ requests answered, 1 connections cut at the deadline", log)
    assert re.findall(r"(?m)^(WARNING|ERROR|Traceback).*", log) == []


@pytest.mark.parametrize(
    ("sent", "cut"),
    [
        (b"", 0),
        (b"POST /v1/sess", 0),
        (b"POST /v1/sessions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", 1),
        (b"POST /v1/sessions/a/steps HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", 1),
    ],
    ids=["nothing", "half a head", "half a body", "half a step"],
)
def test_a_request_that_does_not_come_whole_holds_nobody_up(
    repository: Path, tmp_path: Path, sent: bytes, cut: int
) -> None:
    """A connection without a request is closed; a body that stops in the middle gets 503 at the deadline."""
    with Latch(repository, tmp_path, drain_ms=200) as latch:
        host, _, port = latch.url.removeprefix("http://").rpartition(":")
        with std_socket.create_connection((host, int(port)), timeout=PATIENCE) as raw:
            raw.sendall(sent)
            assert latch.http.get("/health/live").status_code == 200
            latch.signal()
            log = latch.ends()
            with suppress(ConnectionResetError):
                assert raw.recv(12) == b"HTTP/1.1 503"[: 12 * cut]
    assert re.search(rf"0 sockets told, \d requests answered, {cut} connections cut", log)
    assert re.findall(r"(?m)^(WARNING|ERROR|Traceback).*", log) == []
