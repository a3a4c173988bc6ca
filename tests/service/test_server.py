"""What the server does beside ASGI: peers that do not read. How it stops is in `test_drain.py`."""

import asyncio
import logging
import socket as std_socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from service.server import READ_AT_ONCE, READ_ON_AT_ONCE, _WebSocket
from tests.service import peer
from tests.service.conftest import Server
from tests.service.peer import STEPPED


def a_socket() -> tuple[_WebSocket, SimpleNamespace]:
    """A protocol object without a connection, and what was done to its transport."""
    done = SimpleNamespace(written=[], aborted=False)

    def abort() -> None:
        done.aborted = True

    socket = _WebSocket.__new__(_WebSocket)
    socket.transport = SimpleNamespace(write=done.written.append, abort=abort)  # type: ignore[assignment]
    socket.writable = asyncio.Event()
    return socket, done


def test_pongs_do_not_pile_up_for_a_peer_that_does_not_read() -> None:
    """A ping is answered while the socket is writable; beyond that its pong is dropped, not kept."""
    socket, done = a_socket()
    socket.conn = SimpleNamespace(data_to_send=lambda: [b"po", b"ng"])  # type: ignore[assignment]
    socket.handle_ping()
    assert done.written == []
    socket.writable.set()
    socket.handle_ping()
    assert done.written == [b"pong"]


@contextmanager
def raw(server: Server, session: str) -> Iterator[tuple[std_socket.socket, Any]]:
    """A connection as bytes, and a client's protocol to write them with, behind its handshake and hello."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    url = f"ws://{host}:{port}/v1/sessions/{session}/stream"
    line = std_socket.create_connection((host, int(port)), timeout=20)
    with line, connect(url, sock=line, subprotocols=[Subprotocol("latch.binary")], ping_interval=None) as client:
        client.recv()
        yield line, client


@pytest.mark.parametrize("flood", [Opcode.PING, Opcode.PONG, Opcode.CONT], ids=["pings", "pongs", "fragments"])
def test_a_flood_of_small_frames_is_handled_over_many_turns(
    server: Server, monkeypatch: pytest.MonkeyPatch, flood: Opcode
) -> None:
    """No more of it at once than a read and then little by little; what comes behind it is handled as ever."""
    sizes: list[int] = []
    inherited = WebSocketsSansIOProtocol.data_received

    def watched(self: WebSocketsSansIOProtocol, data: bytes) -> None:
        sizes.append(len(data))
        inherited(self, data)

    session = server.create()
    row = np.ones((1, 3), np.float32)
    with raw(server, session) as (line, client):
        monkeypatch.setattr(WebSocketsSansIOProtocol, "data_received", watched)
        step = peer.step(0, row)
        frames = [Frame(flood, b"", fin=flood != Opcode.CONT)] * 100_000
        if flood == Opcode.CONT:
            frames = [Frame(Opcode.BINARY, step[:9], fin=False), *frames, Frame(Opcode.CONT, step[9:])]
        else:
            frames.append(Frame(Opcode.BINARY, step))
        data = b"".join(frame.serialize(mask=True) for frame in frames)
        writer = threading.Thread(target=line.sendall, args=(data,))
        writer.start()
        [reply] = peer.replies(client.recv(timeout=60), lambda _: 16)
        writer.join()
        assert (reply.kind, reply.first) == (STEPPED, 1)
    flooded = [size for size in sizes if size > READ_ON_AT_ONCE]
    assert sum(sizes) >= len(data)
    assert max(sizes) <= READ_AT_ONCE
    assert len(flooded) <= 3, "the first reads only, until it shows what they bring"


def test_fragments_are_kept_as_bytes() -> None:
    """A million of them weigh what is in them."""
    socket, _ = a_socket()
    socket.frames = [b"a"]
    for letter in (b"b", b"c"):
        socket.handle_cont(Frame(Opcode.CONT, letter, fin=False))
    assert socket.frames == [bytearray(b"abc")]


def test_a_flood_is_not_read_on_while_the_reading_is_paused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of steps in one read, and a session that takes few at a time: all are answered, in order."""
    monkeypatch.setattr("service.server.READ_AT_ONCE", 1000)
    monkeypatch.setattr("service.server.FRAMES_AT_ONCE", 4)
    session, count = server.create(), 3000
    with raw(server, session) as (line, client):
        row = np.ones((1, 3), np.float32)
        messages = [Frame(Opcode.BINARY, peer.step(0, row, i + 1)) for i in range(count)]
        writer = threading.Thread(target=line.sendall, args=(b"".join(each.serialize(mask=True) for each in messages),))
        writer.start()
        firsts: list[int] = []
        while len(firsts) < count:
            firsts += [reply.first for reply in peer.replies(client.recv(timeout=60), lambda _: 16)]
        writer.join()
        assert firsts == [*range(1, count + 1)]


@pytest.mark.parametrize(
    "head",
    [
        "Cookie: " + "a" * 9000,
        "\r\n".join(f"X-{i}: 1" for i in range(200)),
        "Content-Length: 5\r\n\r\nabcd",
        "",
    ],
    ids=["a fat cookie", "many headers", "a body", "a long address"],
)
def test_a_handshake_that_cannot_be_read_is_answered(server: Server, head: str) -> None:
    """And the connection ends, so that nothing waits for it when the service stops."""
    path = "/v1/stream" + ("" if head else "?" + "a" * 9000)
    text = (
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{head or 'X: 1'}\r\n\r\n"
    )
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with std_socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(text.encode())
        assert line.makefile("rb").read().startswith(b"HTTP/1.1 431 ")


def test_a_refused_origin_is_nothing_for_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Any page of the world may cause it."""
    with pytest.raises(InvalidStatus) as caught:
        connect(server.url.replace("http", "ws") + "/v1/stream", origin=Origin("http://evil.example"))
    assert caught.value.response.status_code == 403
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_peer_that_says_goodbye_and_does_not_read_is_dropped(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With replies still on their way that nobody takes, its connection ends all the same."""
    monkeypatch.setattr("service.server.ABORT_SECONDS", 0.2)
    server = start()
    session = server.create()
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    url = f"ws://{host}:{port}/v1/sessions/{session}/stream"
    with std_socket.socket() as raw:
        raw.setsockopt(std_socket.SOL_SOCKET, std_socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        with connect(
            url, sock=raw, subprotocols=[Subprotocol("latch.binary")], max_queue=1, close_timeout=0.1
        ) as client:
            for _ in range(30):
                client.send(peer.step(0, np.ones((16_000, 3), np.float32)))
            while server.http.get(f"/v1/sessions/{session}").json()["step"] < 30 * 16_000:
                pass
            client.protocol.send_close(1000)
            raw.sendall(b"".join(client.protocol.data_to_send()))
            while any(isinstance(one, _WebSocket) for one in list(server.uvicorn.server_state.connections)):
                pass
