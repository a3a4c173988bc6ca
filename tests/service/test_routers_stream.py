"""One session over one WebSocket, with a real client."""

import asyncio
import gc
import json
import socket as std_socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State
from websockets.sync.client import connect as connect_to
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from service.routers.sockets import Shared
from tests.service import peer
from tests.service.conftest import Server
from tests.service.peer import Peer

ROW = [1.0, 2.0, 3.0]


def ask(socket: Any, **message: Any) -> Any:
    """Sends one message and reads one reply."""
    socket.send(json.dumps(message))
    return json.loads(socket.recv(timeout=10))


def is_busy(manager: Any, session: str) -> bool:
    """Whether requests of the session wait or run."""
    live = manager._live[session]
    return live.engine.batcher.is_busy(live)


def test_hello_then_steps(server: Server) -> None:
    """The server says who it talks about; steps answer as over HTTP, with the same bits."""
    session, other = server.create(), server.create()
    with server.socket(session) as socket:
        assert socket.subprotocol == "latch.json"
        hello = json.loads(socket.recv())
        assert {k: hello[k] for k in ("type", "session", "model", "version", "step")} == {
            "type": "hello", "session": session, "model": "toy", "version": "1", "step": 0,
        }  # fmt: skip
        reply = ask(socket, inputs=[ROW, ROW], step=1, outputs=["y", "z"])
    assert (reply["type"], reply["step"]) == ("step", 2)
    http = server.http.post(f"/v1/sessions/{other}/steps", json={"inputs": [ROW, ROW], "outputs": ["y", "z"]})
    assert http.json()["outputs"] == reply["outputs"]


def test_a_subprotocol_is_not_required(server: Server) -> None:
    """A client that names none speaks JSON; one that names another gets none."""
    for offered in (None, ["something.else"]):
        options = {"subprotocols": offered}
        with server.socket(server.create(), **options) as socket:
            assert socket.subprotocol is None
            assert json.loads(socket.recv())["type"] == "hello"


def test_messages_may_be_sent_without_waiting(server: Server) -> None:
    """A hundred pipelined messages are answered in order, each applied once."""
    with server.socket(server.create()) as socket:
        socket.recv()
        for i in range(100):
            socket.send(json.dumps({"inputs": [ROW], "step": i + 1}))
        replies = [json.loads(socket.recv(timeout=10)) for _ in range(100)]
    assert [(reply["type"], reply["step"]) for reply in replies] == [("step", i + 1) for i in range(100)]


def test_a_dropped_socket_loses_nothing(server: Server) -> None:
    """Reconnect, read the step from the hello, go on; the last message sent again is answered from the kept reply."""
    session, calm = server.create(), server.create()
    with server.socket(session) as socket:
        socket.recv()
        first = ask(socket, inputs=[ROW], step=1)
        socket.socket.close()
    with server.socket(session) as socket:
        assert json.loads(socket.recv())["step"] == 1
        again = ask(socket, inputs=[ROW], step=1)
        assert (again["outputs"], again["replayed"]) == (first["outputs"], True)
        second = ask(socket, inputs=[ROW], step=2)
    with server.socket(calm) as socket:
        socket.recv()
        assert ask(socket, inputs=[ROW], step=1)["outputs"] == first["outputs"]
        assert ask(socket, inputs=[ROW], step=2)["outputs"] == second["outputs"]


BAD_MESSAGES: list[tuple[str | bytes, str]] = [
    ("", "malformed"),
    ("{", "malformed"),
    ("[]", "invalid_input"),
    ('{"inputs": [[1, 2]]}', "invalid_input"),
    ('{"inputs": [[1, 2, NaN]]}', "invalid_input"),
    ('{"inputs": []}', "invalid_input"),
    ('{"inputs": [[1, 2, 3]], "step": 7}', "step_conflict"),
    (json.dumps({"inputs": [ROW] * 16_385}), "payload_too_large"),
    (b"\x00\x01", "malformed"),
]


@pytest.mark.parametrize(("message", "code"), BAD_MESSAGES, ids=[repr(m[:30]) for m, _ in BAD_MESSAGES])
def test_a_refused_message_moves_nothing_and_the_socket_stays(server: Server, message: str | bytes, code: str) -> None:
    """A typed error; the next good step is the same as for a session never bothered."""
    results = []
    for bad in (message, None):
        with server.socket(server.create()) as socket:
            socket.recv()
            ask(socket, inputs=[ROW], step=1)
            if bad is not None:
                socket.send(bad)
                error = json.loads(socket.recv(timeout=10))
                assert (error["type"], error["code"]) == ("error", code)
                assert isinstance(error["error"], str)
            results.append(ask(socket, inputs=[ROW], step=2, outputs=["h"])["outputs"])
    assert results[0] == results[1]


def test_a_hello_waits_for_what_the_last_socket_left(start: Callable[..., Server]) -> None:
    """Chunks still queued when a socket dies are applied, and the next hello counts them: resuming never conflicts."""
    server = start()
    session, chunks, rows = server.create(), 8, 2_000
    with server.socket(session) as socket:
        socket.recv()
        for i in range(chunks):
            socket.send(json.dumps({"inputs": [ROW] * rows, "step": i * rows + 1, "outputs": []}))
        socket.socket.close()
    with server.socket(session) as socket:
        step = json.loads(socket.recv(timeout=30))["step"]
        assert step % rows == 0
        assert ask(socket, inputs=[ROW], step=step + 1)["step"] == step + 1


@pytest.mark.parametrize("together", [True, False], ids=["frames", "messages"])
def test_a_hello_waits_for_what_the_last_socket_had_read(start: Callable[..., Server], together: bool) -> None:
    """Steps that a broken connection has brought and no queue has had room for yet are counted, too."""
    server = start(max_session_queue=4)
    session, count = server.create(), 2000
    with server.socket(session, subprotocols=["latch.binary"]) as socket:
        socket.recv()
        frames = [peer.step(0, np.ones((1, 3), np.float32), i + 1) for i in range(count)]
        for message in [b"".join(frames)] if together else frames:
            socket.send(message)
        while not server.app.state.manager._live[session].step:
            pass
        socket.socket.close()
    with server.socket(session) as socket:
        step = json.loads(socket.recv(timeout=30))["step"]
        assert ask(socket, inputs=[ROW], step=step + 1)["step"] == step + 1
    assert step > 4


def test_a_copy_that_is_given_up_while_a_hello_waits_is_loaded_again(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store was away for a moment, say: the session is there all the same."""
    server = start(store_url=f"sqlite:///{tmp_path}/s.db")
    session = server.create()

    async def meanwhile(shared: Shared, session_id: str, _: Any) -> None:
        shared.manager._forget(shared.manager._live[session_id])

    monkeypatch.setattr(Shared, "passed", meanwhile)
    with server.socket(session) as socket:
        assert json.loads(socket.recv(timeout=30))["type"] == "hello"
        assert ask(socket, inputs=[ROW], step=1)["step"] == 1


def test_sockets_that_are_greeted_at_once_do_not_wait_for_each_other(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for a client that does not read."""
    monkeypatch.setattr("service.routers.sockets._PATIENCE", 1000)
    server = start()
    session = server.create()
    with ExitStack() as stack:
        sockets = []
        for _ in range(8):
            sockets.append(stack.enter_context(server.socket(session)))
            sockets[-1].send(json.dumps({"inputs": [ROW]}))
        for socket in sockets:
            assert json.loads(socket.recv(timeout=30))["type"] == "hello"


def test_outputs_in_the_address_are_for_one_session(server: Server) -> None:
    """On a socket of many each channel has its own; other names may be for a proxy."""
    url = server.url.replace("http", "ws") + "/v1/stream"
    with connect_to(f"{url}?outputs=y") as socket:
        error = json.loads(socket.recv())
        assert (error["code"], error["path"]) == ("invalid_input", "query")
    with connect_to(f"{url}?token=a", subprotocols=[Subprotocol("latch.json")]) as socket:
        socket.send(json.dumps({"session": server.create(), "inputs": [ROW]}))
        assert json.loads(socket.recv())["step"] == 1


def test_what_was_received_is_applied_when_the_client_leaves(server: Server) -> None:
    """Messages that the server has read run to their end, and the last one's reply is kept for the retry."""
    session = server.create()
    manager = server.app.state.manager
    with server.socket(session) as socket:
        socket.recv()
        for i in range(5):
            socket.send(json.dumps({"inputs": [ROW] * 500, "step": i * 500 + 1}))
        while not manager._live[session].step:
            pass
        received = manager._live[session].step + 500 * is_busy(manager, session)
    with server.socket(session) as socket:
        step = json.loads(socket.recv(timeout=30))["step"]
        assert step >= received
        assert ask(socket, inputs=[ROW] * 500, step=step - 499)["replayed"] is True


def test_a_step_that_fails_after_its_client_left_is_no_noise(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """Deleted under a socket that is gone: the outcome nobody waits for is not reported as forgotten."""
    server = start()
    session = server.create()
    with server.socket(session) as socket:
        socket.recv()
        for _ in range(4):
            socket.send(json.dumps({"inputs": [ROW] * 4_000, "outputs": []}))
        while not is_busy(server.app.state.manager, session):
            pass
        socket.socket.close()
    server.http.delete(f"/v1/sessions/{session}")
    with server.socket(server.create()) as socket:
        socket.recv()
        ask(socket, inputs=[ROW])
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_two_sockets_on_one_session_wait_for_each_other(start: Callable[..., Server]) -> None:
    """Together they overfill the session's queue: reading pauses, and nobody is told overloaded."""
    server = start(max_session_queue=4)
    session = server.create()
    with server.socket(session) as one, server.socket(session) as two:
        for socket in (one, two):
            socket.recv()
            for _ in range(50):
                socket.send(json.dumps({"inputs": [ROW] * 20, "outputs": []}))
        replies = [json.loads(socket.recv(timeout=30)) for socket in (one, two) for _ in range(50)]
    assert {reply["type"] for reply in replies} == {"step"}
    assert max(reply["step"] for reply in replies) == 2_000


def test_an_unknown_address_is_told_and_closed(server: Server) -> None:
    """A socket to nowhere gets the one error shape, and close code 4404."""
    with connect_to(server.url.replace("http", "ws") + "/v1/stream/nowhere") as socket:
        assert json.loads(socket.recv())["code"] == "not_found"
        with pytest.raises(ConnectionClosed):
            socket.recv()
        assert socket.close_code == 4404


def test_a_fault_of_ours_is_told_logged_and_closed(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A decoder with a bug ends the socket with `internal` and 1011, and the log has the traceback."""
    server = start()
    session = server.create()
    with server.socket(session) as socket:
        socket.recv()
        monkeypatch.setattr(server.app.state.manager.engines.get("toy").codec, "decode_step", None)
        assert ask(socket, inputs=[ROW])["code"] == "internal"
        with pytest.raises(ConnectionClosed):
            socket.recv()
        assert socket.close_code == 1011
    assert "NoneType" in caplog.text
    assert 'latch_errors_total{code="internal"} 1.0' in server.http.get("/metrics").text


def test_sockets_torn_down_at_any_moment_leave_no_traceback(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """Reset after the handshake, between messages, or by an oversize message behind good ones: the log stays clean."""
    server = start(max_body_bytes=2000)
    for i in range(60):
        with server.socket(server.create()) as socket:
            for _ in range(i % 3):
                socket.send(json.dumps({"inputs": [ROW]}))
            if i % 2:
                socket.send("x" * 3000)
            linger = struct.pack("ii", 1, 0)
            socket.socket.setsockopt(std_socket.SOL_SOCKET, std_socket.SO_LINGER, linger)
            socket.socket.close()
    with server.socket(server.create()) as socket:
        socket.recv()
        assert ask(socket, inputs=[ROW])["type"] == "step"
    servers = ("service", "uvicorn", "asyncio")  # the client's own library logs, too
    assert not [record for record in caplog.records if record.exc_info and record.name.startswith(servers)]


def test_errors_keep_their_place_in_the_pipeline(server: Server) -> None:
    """Good, bad, good without waiting: replies come in that order, and the bad one takes no step."""
    with server.socket(server.create()) as socket:
        socket.recv()
        for message in ({"inputs": [ROW], "step": 1}, {"inputs": [[1]]}, {"inputs": [ROW], "step": 2}):
            socket.send(json.dumps(message))
        replies = [json.loads(socket.recv(timeout=10)) for _ in range(3)]
    assert [reply["type"] for reply in replies] == ["step", "error", "step"]
    assert replies[2]["step"] == 2


def test_an_unknown_session_is_told_and_closed(server: Server) -> None:
    """An error message that a browser can read, then close code 4404."""
    with server.socket("nobody") as socket:
        error = json.loads(socket.recv())
        assert (error["type"], error["code"]) == ("error", "session_not_found")
        with pytest.raises(ConnectionClosed):
            socket.recv()
        assert socket.close_code == 4404


def test_a_session_deleted_under_its_socket_is_told_and_closed(server: Server) -> None:
    """The next message learns of it; a new session under the same id is not touched."""
    session = server.create()
    with server.socket(session) as socket:
        socket.recv()
        server.http.delete(f"/v1/sessions/{session}")
        assert server.http.put(f"/v1/sessions/{session}", json={"model": "toy"}).status_code == 201
        assert ask(socket, inputs=[ROW])["code"] == "session_not_found"
        with pytest.raises(ConnectionClosed):
            socket.recv()
        assert socket.close_code == 4404
    assert server.http.get(f"/v1/sessions/{session}").json()["step"] == 0


def test_an_expired_session_is_told_and_closed(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Close code 4410 for a session that idled out under its socket, after its hello."""
    server = start(min_idle_ttl_ms=1_000)
    session = server.create(idle_ttl_ms=1_000)
    with server.socket(session) as socket:
        assert json.loads(socket.recv())["type"] == "hello"
        manager = server.app.state.manager
        monkeypatch.setattr(manager.engines.get("toy").slab, "_clock", lambda: time.monotonic() + 1)
        assert ask(socket, inputs=[ROW])["code"] == "session_expired"
        with pytest.raises(ConnectionClosed):
            socket.recv()
        assert socket.close_code == 4410


def test_an_oversize_message_closes_with_1009(start: Callable[..., Server]) -> None:
    """The library refuses to buffer it; the session is unharmed."""
    server = start(max_body_bytes=2000)
    session = server.create()
    with server.socket(session) as socket:
        socket.recv()
        socket.send(json.dumps({"inputs": [ROW] * 500}))
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)
        assert socket.close_code == 1009
    assert server.http.get(f"/v1/sessions/{session}").json()["step"] == 0


def test_a_flood_is_slowed_down_and_never_refused(start: Callable[..., Server]) -> None:
    """Thousands of messages at once on one socket with a queue of eight: reading pauses, all are answered in order."""
    server = start(max_session_queue=8)
    session = server.create()

    async def flood() -> list[Any]:
        url = server.url.replace("http", "ws") + f"/v1/sessions/{session}/stream"
        async with connect(url) as socket:
            await socket.recv()

            async def send() -> None:
                for i in range(3000):
                    await socket.send(json.dumps({"inputs": [ROW], "step": i + 1, "outputs": ["y", "z", "h"]}))

            sender = asyncio.create_task(send())
            replies = [json.loads(await socket.recv()) for _ in range(3000)]
            await sender
            return replies

    replies = asyncio.run(flood())
    assert [(reply["type"], reply["step"]) for reply in replies] == [("step", i + 1) for i in range(3000)]


def test_a_client_that_does_not_read_is_closed_with_4408(start: Callable[..., Server]) -> None:
    """Megabytes of replies lie unread: the socket ends with a retryable error, after what it had to say."""
    server = start(slow_reader_ms=100)
    session, rows = server.create(), 16_384
    with std_socket.socket() as raw:
        raw.setsockopt(std_socket.SOL_SOCKET, std_socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        url = server.url.replace("http", "ws") + "/v1/stream"
        with connect_to(url, sock=raw, subprotocols=["latch.binary"], max_size=None, max_queue=1) as socket:
            client = Peer(socket)
            client.open(0, session, ["y", "z", "h"], row_bytes=48)
            for _ in range(12):
                client.send(peer.step(0, np.zeros((rows, 3), np.float32)))
            while 'latch_errors_total{code="slow_reader"} 1.0' not in server.http.get("/metrics").text:
                pass
            replies = []
            with suppress(ConnectionClosed):
                while True:
                    replies.append(client.next())
            assert socket.close_code == 4408
    *steps, error = replies
    assert [reply.first for reply in steps] == [1 + i * rows for i in range(len(steps))]
    assert (error.document["code"], error.document["retryable"]) == ("slow_reader", True)


def test_hundreds_of_sockets_and_http_at_once(server: Server) -> None:
    """Two hundred sessions, half over sockets and half over HTTP, all get what one alone gets."""
    rows = [[0.1 * i, 0.2, -0.3] for i in range(10)]
    alone = server.http.post(f"/v1/sessions/{server.create()}/steps", json={"inputs": rows}).json()["outputs"]["y"]

    async def over_socket(session: str) -> list[Any]:
        url = server.url.replace("http", "ws") + f"/v1/sessions/{session}/stream"
        async with connect(url) as socket:
            await socket.recv()
            outputs = []
            for i, row in enumerate(rows):
                await socket.send(json.dumps({"inputs": [row], "step": i + 1}))
                outputs += json.loads(await socket.recv())["outputs"]["y"]
            return outputs

    async def over_http(client: Any, session: str) -> list[Any]:
        outputs = []
        for i, row in enumerate(rows):
            body = {"inputs": [row], "step": i + 1}
            outputs += (await client.post(f"/v1/sessions/{session}/steps", json=body)).json()["outputs"]["y"]
        return outputs

    async def all_at_once() -> list[list[Any]]:
        import httpx

        sessions = [server.create() for _ in range(200)]
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            sockets = [over_socket(session) for session in sessions[:100]]
            return await asyncio.gather(*sockets, *[over_http(client, session) for session in sessions[100:]])

    assert all(outputs == alone for outputs in asyncio.run(all_at_once()))


def test_a_session_deleted_before_its_hello_ends_the_socket(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hello waits for what the session has queued; when that ends with the session, the client is told 4404."""
    server = start()
    session = server.create()
    entered, go = threading.Event(), threading.Event()
    runner = server.app.state.manager.engines.get("toy")._runner
    run = runner.run

    def hold(*arguments: Any) -> Any:
        entered.set()
        go.wait(20)
        return run(*arguments)

    monkeypatch.setattr(runner, "is_short", lambda rows, steps: False)
    monkeypatch.setattr(runner, "run", hold)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.http.post, f"/v1/sessions/{session}/steps", json={"inputs": [ROW]})
        assert entered.wait(20)
        with server.socket(session) as socket:
            assert server.http.delete(f"/v1/sessions/{session}").status_code == 204
            assert json.loads(socket.recv(timeout=10))["code"] == "session_not_found"
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=10)
            assert socket.close_code == 4404
        go.set()
        assert waiting.result(20).status_code == 404


def test_one_large_reply_that_nobody_reads_closes_with_4408(start: Callable[..., Server]) -> None:
    """The watch begins with what was written, not only with what comes after it."""
    server = start(slow_reader_ms=100, max_steps=100_000)
    session = server.create()
    with std_socket.socket() as raw:
        raw.setsockopt(std_socket.SOL_SOCKET, std_socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        client = ClientProtocol(parse_uri(server.url.replace("http", "ws") + f"/v1/sessions/{session}/stream"))
        client.send_request(client.connect())
        raw.sendall(b"".join(client.data_to_send()))
        while client.state is not State.OPEN:
            client.receive_data(raw.recv(4096))
        client.send_text(json.dumps({"inputs": [[0.123456789] * 3] * 80_000, "outputs": ["y", "z", "h"]}).encode())
        raw.sendall(b"".join(client.data_to_send()))
        while 'latch_errors_total{code="slow_reader"} 1.0' not in server.http.get("/metrics").text:
            pass


def test_a_channel_of_a_session_that_was_made_anew_is_gone(server: Server) -> None:
    """Deleted and created again under its channel: its steps are refused, and OPEN finds the new one."""
    session = server.create()
    url = server.url.replace("http", "ws") + "/v1/stream"
    with connect_to(url, subprotocols=["latch.binary"]) as socket:
        client = Peer(socket)
        client.open(0, session)
        server.http.delete(f"/v1/sessions/{session}")
        server.http.put(f"/v1/sessions/{session}", json={"model": "toy"})
        client.send(peer.step(0, np.zeros((1, 3), np.float32)))
        assert client.next().document["code"] == "session_not_found"
        assert server.http.get("/health/live").status_code == 200
        assert client.open(0, session)["step"] == 0
        client.send(peer.step(0, np.zeros((1, 3), np.float32)))
        assert client.next().first == 1
