"""Steps past ASGI: the same answers as through it, in order, whatever way a request is written."""

import asyncio
import gc
import json
import logging
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.routers.steps import StepDoor
from service.step_protocol import StepProtocol, _Step
from tests.service.conftest import Server, serving

PACKED = "application/octet-stream"
ROW = {"inputs": [[1, 2, 3]]}
BODY = json.dumps(ROW).encode()


class Connection:
    """A connection on which a test writes what it likes."""

    def __init__(self, server: Server) -> None:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self._reader = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.socket.sendall(data)

    def reply(self) -> tuple[int, dict[str, str], Any]:
        """The next answer: status, headers, and what its body says."""
        line = self._reader.readline()
        while line == b"HTTP/1.1 100 Continue\r\n":
            self._reader.readline()
            line = self._reader.readline()
        headers = {}
        while (field := self._reader.readline().decode().strip()) != "":
            name, _, value = field.partition(": ")
            headers[name.lower()] = value
        body = self._reader.read(int(headers["content-length"]))
        return int(line.split()[1]), headers, json.loads(body) if "json" in headers["content-type"] else body

    def is_closed(self) -> bool:
        """Whether nothing more comes."""
        return self._reader.read(1) == b""


@contextmanager
def connected(server: Server) -> Iterator[Connection]:
    """Opens a connection, and closes it: a socket is not closed before what reads from it."""
    connection = Connection(server)
    with connection.socket, connection._reader:
        yield connection


def request(
    session: str,
    body: bytes = BODY,
    *,
    query: str = "",
    kind: str = "application/json",
    version: str = "1.1",
    **headers: str,
) -> bytes:
    """A step as clients write it."""
    fields = {"Host": "x", "Content-Type": kind, "Content-Length": str(len(body))} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/sessions/{session}/steps{query} HTTP/{version}\r\n{lines}\r\n".encode() + body


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step that comes, whether it goes past ASGI."""
    found: list[bool] = []
    decide = StepProtocol._as_step

    def watched(self: StepProtocol) -> Any:
        step = decide(self)
        if b"/steps" in self.url:
            found.append(step is not None)
        return step

    monkeypatch.setattr(StepProtocol, "_as_step", watched)
    return found


@pytest.mark.parametrize("body", [BODY, json.dumps({"inputs": [[1, 2, 3]] * 6000}).encode()], ids=["short", "long"])
def test_who_sends_no_more_is_answered(server: Server, body: bytes) -> None:
    """A client may close its side behind the request."""
    session = server.create()
    predict = json.dumps({"sequences": [[[1, 2, 3]] * 5]}).encode()
    head = "POST /v1/models/toy/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    for data in (request(session, body), f"{head}{len(predict)}\r\n\r\n".encode() + predict):
        with connected(server) as connection:
            connection.send(data)
            connection.socket.shutdown(socket.SHUT_WR)
            assert connection.reply()[0] == 200
            answered = time.monotonic()
            assert connection.is_closed()
            assert time.monotonic() - answered < 3, "an idle connection is kept for five seconds"


@pytest.mark.parametrize(
    ("answered", "begun"),
    [
        (b"", b""),
        (b"", b"GET /health/live HT"),
        (b"", request("a")[:-3]),
        (request("a"), request("a")[:50]),
        (request("a"), b"\r\n"),
    ],
    ids=range(5),
)
def test_a_request_that_does_not_go_on_ends_its_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, answered: bytes, begun: bytes
) -> None:
    """Whether there was one before or not."""
    monkeypatch.setattr("service.server.SILENT_SECONDS", 0.2)
    server.http.put("/v1/sessions/a", json={"model": "toy"})
    with connected(server) as connection:
        connection.send(answered + begun)
        if answered:
            assert connection.reply()[0] == 200
        started = time.monotonic()
        assert connection.is_closed()
        assert time.monotonic() - started < 4, "uvicorn keeps an idle one for five seconds"


def test_a_slow_request_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as some of it comes between two looks."""
    monkeypatch.setattr("service.server.SILENT_SECONDS", 1.0)
    session = server.create()
    with connected(server) as connection:
        for part in (request(session)[:-3], b"]", b"]"):
            connection.send(part)
            time.sleep(0.6)
        connection.send(b"}")
        assert connection.reply()[0] == 200


@pytest.mark.parametrize("behind", [b"", request("a")[:-3]], ids=["alone", "another begun"])
def test_who_waits_for_an_answer_is_not_silent(server: Server, monkeypatch: pytest.MonkeyPatch, behind: bytes) -> None:
    """However long it takes, and whatever has come of a request behind it."""
    monkeypatch.setattr("service.server.SILENT_SECONDS", 0.2)

    async def slowly(parts: Iterable[bytes]) -> bytes:
        await asyncio.sleep(1)
        return b"".join(parts)

    monkeypatch.setattr("service.routers.steps.in_turns", slowly)
    server.http.put("/v1/sessions/a", json={"model": "toy"})
    body = json.dumps({"inputs": [[1, 2, 3]] * 6000, "outputs": ["y", "h", "z"]}).encode()
    with connected(server) as connection:
        connection.send(request("a", body) + behind)
        if behind:
            time.sleep(0.8)
            connection.send(b"]]}")
        assert [connection.reply()[0] for _ in range(1 + bool(behind))] == [200] * (1 + bool(behind))


def test_answers_that_nobody_reads_are_dropped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lie in memory for ever."""
    monkeypatch.setattr("service.server.SILENT_SECONDS", 0.2)
    session = server.create()
    body = json.dumps({"inputs": [[1, 2, 3]] * 6000, "outputs": ["y", "h", "z"]}).encode()
    with connected(server) as connection:
        connection.send(request(session, body) * 20)
        own, seen = connection.socket.getsockname(), list[bool]()
        deadline = time.monotonic() + 20
        while not (True in seen and not seen[-1]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            seen.append(any(each.client == own for each in [*server.uvicorn.server_state.connections]))


def test_the_short_way_answers_as_the_long_one(server: Server, taken: list[bool]) -> None:
    """The same status, headers and body for steps, retries, conflicts and everything that is wrong with a body."""
    rows = np.ones((2, 3), np.float32).tobytes()
    calls: list[tuple[bytes, dict[str, str]]] = [
        (json.dumps(ROW | {"step": 1}).encode(), {}),
        (json.dumps(ROW | {"step": 1}).encode(), {}),
        (json.dumps(ROW | {"step": 7}).encode(), {}),
        (json.dumps(ROW | {"outputs": ["h", "y"]}).encode(), {}),
        (json.dumps(ROW | {"outputs": ["nonsense"]}).encode(), {}),
        (rows, {"kind": PACKED, "query": "?step=3&outputs=h,y"}),
        (rows, {"kind": PACKED, "query": "?step=3&outputs=h,y"}),
        (rows[:-1], {"kind": PACKED}),
        (b'{"inputs": [[1, 2, NaN]]}', {}),
        (b'{"inputs": [[1, 2]]}', {}),
        (b"{", {}),
        (b"", {}),
        (BODY, {"query": "?step=1"}),
    ]

    def answers(**way: str) -> list[Any]:
        session, found = server.create(), []
        with connected(server) as connection:
            for name, body, options in [*((session, *call) for call in calls), ("nobody", BODY, {})]:
                connection.send(request(name, body, **options, **way))
                status, headers, said = connection.reply()
                headers = {name: value for name, value in headers.items() if name not in ("server-timing", "date")}
                found.append((status, headers, said | {"expires_at": ""} if isinstance(said, dict) else said))
        found.append(server.http.get(f"/v1/sessions/{session}").json()["step"])
        return found

    short, long = answers(), answers(Expect="100-continue")
    *replies, step = short
    assert [status for status, *_ in replies] == [200, 200, 409, 200, 422, 200, 200, 422, 422, 422, 400, 400, 422, 404]
    assert step == 4
    assert short == long
    assert taken == [True] * len(replies) + [False] * len(replies)


@pytest.mark.parametrize(
    ("written", "is_short"),
    [
        (lambda session: request(session), True),
        (lambda session: request(session, version="1.0", Connection="keep-alive"), True),
        (lambda session: request(session, connection="close"), True),
        (lambda session: request(session, kind="application/json; charset=utf-8"), False),
        (lambda session: request(f"%{ord(session[0]):x}{session[1:]}"), False),
        (lambda session: request(session).replace(b"POST /v1", b"POST http://x/v1"), False),
        (lambda session: chunked(session, BODY[:5], BODY[5:]), False),
        (lambda session: request(session, b" " * 70_000 + BODY), False),
    ],
)
def test_whichever_way_it_is_written_a_step_is_applied(
    server: Server, taken: list[bool], written: Callable[[str], bytes], is_short: bool
) -> None:
    """In one piece and byte by byte; what is not plain takes the long way."""
    session = server.create()
    with connected(server) as connection:
        data = written(session)
        connection.send(data)
        assert connection.reply()[2]["step"] == 1
        if b"HTTP/1.0" in data or b"close" in data:
            assert connection.is_closed()
            return
        for byte in data if len(data) < 1000 else ():
            connection.send(bytes([byte]))
        if len(data) < 1000:
            assert connection.reply()[2]["step"] == 2
    assert set(taken) == {is_short}


def chunked(session: str, *parts: bytes) -> bytes:
    """A body whose length is not announced."""
    head = request(session, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def test_pipelined_requests_are_answered_in_order(server: Server, taken: list[bool]) -> None:
    """Steps, a step that is refused, and other calls, written at once; after them the connection is as good as new."""
    session = server.create()
    step = request(session)
    look = f"GET /v1/sessions/{session} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with connected(server) as connection:
        connection.send(step * 3 + request(session, b"{") + look + step + look)
        replies = [connection.reply() for _ in range(7)]
        assert [status for status, *_ in replies] == [200, 200, 200, 400, 200, 200, 200]
        assert [said.get("step") for *_, said in replies] == [1, 2, 3, None, 3, 4, 4]
        connection.send(step)
        assert connection.reply()[2]["step"] == 5
    assert taken == [True] + [False] * 4 + [True]


def test_who_does_not_read_is_not_read_from(server: Server) -> None:
    """Answers that nobody takes are few, and so are the steps that are applied for them; all come when he reads."""
    session, rows, count = server.create(), 4000, 150
    data = request(session, np.ones((rows, 3), np.float32).tobytes(), kind=PACKED, query="?outputs=y,h")
    with connected(server) as connection:
        writer = threading.Thread(target=connection.send, args=(data * count,))
        writer.start()
        while (step := server.http.get(f"/v1/sessions/{session}").json()["step"]) == 0 or step != steady(
            server, session
        ):
            pass
        assert step < 4000 * count
        assert [int(connection.reply()[1]["latch-step"]) for _ in range(count)] == [
            *range(4000, 4000 * count + 1, 4000)
        ]
        writer.join()


@pytest.mark.parametrize("call", ["look", "step"])
def test_what_is_sent_in_advance_is_left_in_the_network(
    server: Server, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Of thousands of pipelined requests no more are taken in than one read brings; all are answered."""
    session, count = server.create(), 20_000
    data = request(session) if call == "step" else b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    most = 0
    start = StepProtocol._start_asgi_task

    def watched(self: StepProtocol, *arguments: Any) -> None:
        nonlocal most
        most = max(most, len(self.pipeline))
        start(self, *arguments)

    monkeypatch.setattr(StepProtocol, "_start_asgi_task", watched)
    with connected(server) as connection:
        writer = threading.Thread(target=connection.send, args=(data * count,))
        writer.start()
        assert {connection.reply()[0] for _ in range(count)} == {200}
        writer.join()
    assert 0 < most <= 2 * 2**18 // len(data)  # the second buffer is one that came before the pause took hold


def test_who_leaves_with_requests_waiting_is_no_fault(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is begun for him any more, and nothing is logged or counted as the service's own failure."""
    before = server.http.get("/metrics").text.count('code="internal"')
    data = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000  # their answers are more than the network holds

    def send() -> None:
        with suppress(OSError):
            connection.send(data)

    with connected(server) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer = threading.Thread(target=send)
        writer.start()
        while not (waiting := stuck(server)):
            pass
        connection.socket.shutdown(socket.SHUT_RDWR)
        writer.join()
    while any(waiting):
        pass
    assert server.http.get("/metrics").text.count('code="internal"') == before
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def stuck(server: Server) -> list[Any]:
    """What waits on each connection whose client does not read."""
    found = [one for one in list(server.uvicorn.server_state.connections) if isinstance(one, StepProtocol)]
    return [one.pipeline for one in found if one.flow.write_paused and one.pipeline]


def steady(server: Server, session: str) -> int:
    """The step of a session a while later."""
    time.sleep(0.5)
    return int(server.http.get(f"/v1/sessions/{session}").json()["step"])


def test_a_session_that_must_be_looked_for_is_answered_too(repository: Path, tmp_path: Path, taken: list[bool]) -> None:
    """After a restart it is in the store alone."""
    url = f"sqlite:///{tmp_path}/sessions.db"
    with serving(repository, store_url=url) as server:
        session = server.create()
    for step in (1, 2):
        with serving(repository, store_url=url) as server, connected(server) as connection:
            connection.send(request(session))
            assert connection.reply()[2]["step"] == step
    assert taken == [True] * 2


@pytest.mark.parametrize(("broken_part", "next_step"), [("_request", 1), ("_answer", 2)])
def test_a_fault_of_the_service_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, broken_part: str, next_step: int
) -> None:
    """Before the step or after it; the connection goes on."""
    session = server.create()
    with connected(server) as connection:
        with monkeypatch.context() as broken:
            broken.setattr(f"service.routers.steps.StepDoor.{broken_part}", lambda *_: 1 / 0)
            connection.send(request(session))
            status, _, said = connection.reply()
            assert (status, said["code"]) == (500, "internal")
        connection.send(request(session))
        assert connection.reply()[2]["step"] == next_step


def test_a_closed_connection_leaves_nothing_for_the_collector(server: Server) -> None:
    """A connection and its last step do not keep each other."""
    gc.collect()
    gc.disable()
    try:
        with connected(server) as connection:
            connection.send(request(server.create()))
            connection.reply()
            [weak] = [
                weakref.ref(each) for each in server.uvicorn.server_state.connections if isinstance(each.cycle, _Step)
            ]
        deadline = time.monotonic() + 10
        while weak() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()


@pytest.mark.parametrize("cut", [0, 1, -1])
def test_an_offer_of_another_protocol_is_declined(server: Server, taken: list[bool], cut: int) -> None:
    """As Java's client and `curl --http2` make it with every call: the call itself is answered, its body is not lost,
    wherever it is cut; the connection goes on.
    """
    session = server.create()
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    with connected(server) as connection:
        for number in (1, 2, 3):
            body = json.dumps(ROW | {"step": number}).encode()
            data = request(session, body, **offer)
            at = len(data) - len(body) if cut == 1 else cut
            connection.send(data[:at])
            time.sleep(0.02 * bool(at))
            connection.send(data[at:])
            assert (connection.reply()[2] | {"outputs": 0, "expires_at": 0})["step"] == number
        connection.send(request(session, b"{}", **offer | {"Connection": "close, Upgrade"}))
        assert connection.reply()[0] == 422
        assert connection.is_closed()
    assert len(taken) == 4
    with connected(server) as connection:  # a thousand at once
        connection.send(request(session, b"{}", **offer) * 1000)
        assert {connection.reply()[0] for _ in range(1000)} == {422}
        connection.send(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.reply()[0] == 400


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 5000, b"long: " + b"x" * 30_000])
def test_a_head_has_an_end(server: Server, piece: bytes) -> None:
    """One that has none is refused before it fills the memory."""
    with connected(server) as connection:
        connection.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
        with suppress(OSError):  # closed, while more is sent
            for _ in range(40):
                connection.send(piece)
                time.sleep(0.005)
        assert connection.socket.recv(100).startswith(b"HTTP/1.1 431 ")


def test_a_long_way_to_a_head_is_none_of_it(server: Server) -> None:
    """Of a segment, what comes before a request begins belongs to others."""
    session, rows = server.create(), np.ones((7000, 3), np.float32).tobytes()
    get = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(server) as connection:
        connection.send(request(session, rows, kind=PACKED) + get[:20])
        assert connection.reply()[0] == 200
        connection.send(get[20:] + get * 5000 + get[:9])
        assert {connection.reply()[0] for _ in range(5001)} == {200}
        connection.send(get[9:])
        assert connection.reply()[0] == 200


def test_who_waits_behind_a_refusal_is_not_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal starts the clock of an idle connection, and the next request, of the same bytes, must stop it."""
    made, take = StepProtocol.connection_made, StepDoor.take

    def hurried(self: StepProtocol, transport: Any) -> None:
        made(self, transport)
        self.timeout_keep_alive = 0.1

    def slowly(self: StepDoor, call: Any, body: bytes) -> None:
        if body == BODY:
            asyncio.get_running_loop().call_later(0.5, take, self, call, body)
        else:
            take(self, call, body)

    monkeypatch.setattr(StepProtocol, "connection_made", hurried)
    session = server.create()
    with connected(server) as connection:
        monkeypatch.setattr(StepDoor, "take", slowly)
        connection.send(request(session, b"123", kind=PACKED) + request(session))
        assert [connection.reply()[0] for _ in range(2)] == [422, 200]
