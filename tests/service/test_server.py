"""What the server does beside ASGI: peers that do not read. How it stops is in `test_drain.py`."""

import asyncio
import socket as std_socket
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from service.server import _WebSocket
from tests.service import peer
from tests.service.conftest import Server


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
