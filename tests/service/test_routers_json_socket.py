"""`latch.json` on a socket of many sessions, with a real client."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.service.conftest import Server

ROW = [1.0, 2.0, 3.0]


class Client:
    """Sends and reads JSON."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket

    def send(self, **message: Any) -> None:
        """One message."""
        self.socket.send(json.dumps(message))

    def next(self) -> Any:
        """The next reply."""
        return json.loads(self.socket.recv(timeout=30))

    def ask(self, **message: Any) -> Any:
        """One message and its reply."""
        self.send(**message)
        return self.next()


@contextmanager
def many(server: Server, **options: Any) -> Iterator[Client]:
    """A socket of many sessions."""
    url = server.url.replace("http", "ws") + "/v1/stream"
    with connect(url, **({"subprotocols": ["latch.json"]} | options)) as socket:
        yield Client(socket)


def test_each_message_names_its_session(server: Server) -> None:
    """Steps of two sessions of two models on one socket have the bits that HTTP has; replies name their session."""
    toy, counter, plain = server.create(), server.create("counter"), server.create()
    with many(server) as client:
        assert client.socket.subprotocol == "latch.json"
        first = client.ask(session=toy, inputs=[ROW], step=1, outputs=["y", "z"])
        assert (first["type"], first["session"], first["step"]) == ("step", toy, 1)
        assert client.ask(session=counter, inputs=[2, 3])["outputs"] == {"y": [4.5, 13.5]}
        second = client.ask(session=toy, inputs=[ROW], step=2, outputs=["y", "z"])
        again = client.ask(session=toy, inputs=[ROW], step=2, outputs=["y", "z"])
        assert (again["outputs"], again["replayed"]) == (second["outputs"], True)
    body = {"inputs": [ROW, ROW], "outputs": ["y", "z"]}
    alone = server.http.post(f"/v1/sessions/{plain}/steps", json=body).json()["outputs"]
    assert {name: [*first["outputs"][name], *second["outputs"][name]] for name in ("y", "z")} == alone


def test_an_open_is_answered_with_where_the_session_stands(server: Server) -> None:
    """At any time, as often as wished; it need not come first, and without a subprotocol JSON is spoken too."""
    session = server.create()
    with many(server, subprotocols=None) as client:
        for step in range(3):
            hello = client.ask(type="open", session=session)
            expected = {"type": "hello", "session": session, "model": "toy", "version": "1", "step": step}
            assert expected.items() <= hello.items()
            client.ask(session=session, inputs=[ROW])


def test_replies_come_in_order_for_each_session(server: Server) -> None:
    """Good and bad messages of ten sessions without waiting: each session's replies are in order of its messages."""
    sessions = [server.create() for _ in range(10)]
    expected: dict[str, list[tuple[str, int | None]]] = {session: [] for session in sessions}
    with many(server) as client:
        for turn in range(20):
            for i, session in enumerate(sessions):
                if (turn + i) % 5 == 0:
                    client.send(session=session, inputs=[[1.0]])
                    expected[session].append(("error", None))
                elif (turn + i) % 7 == 0:
                    client.send(session=session, type="open")
                    expected[session].append(("hello", len([x for x in expected[session] if x[0] == "step"])))
                else:
                    step = 1 + len([x for x in expected[session] if x[0] == "step"])
                    client.send(session=session, inputs=[ROW], step=step)
                    expected[session].append(("step", step))
        for _ in range(200):
            reply = client.next()
            assert (reply["type"], reply.get("step")) == expected[reply["session"]].pop(0)


REFUSED: dict[str, tuple[str | bytes, str, bool]] = {
    "nothing": ("", "malformed", False),
    "no JSON": ("{", "malformed", False),
    "a list": ("[]", "invalid_input", False),
    "no session": (json.dumps({"inputs": [ROW]}), "invalid_input", False),
    "a session that is no name": (json.dumps({"session": 5, "inputs": [ROW]}), "invalid_input", False),
    "cut short": ('{"session": "SESSION", "inputs": [[1, 2', "malformed", False),
    "a session that is no text": ('{"session": "\\ud800", "inputs": [[NaN]]}', "malformed", False),
    "bytes": (b"\1\0\0\0", "malformed", False),
    "an unknown session": (json.dumps({"session": "nobody", "inputs": [ROW]}), "session_not_found", True),
    "an open of one": (json.dumps({"type": "open", "session": "nobody"}), "session_not_found", True),
    "an open with a step": ('{"type": "open", "session": "SESSION", "inputs": [[1, 2, 3]]}', "invalid_input", True),
    "no inputs": ('{"session": "SESSION"}', "invalid_input", True),
    "another type": ('{"type": "close", "session": "SESSION"}', "invalid_input", True),
    "a type that is no name": ('{"session": "SESSION", "type": 5}', "invalid_input", True),
    "NaN": ('{"session": "SESSION", "inputs": [[1, 2, NaN]]}', "invalid_input", True),
    "a gap": ('{"session": "SESSION", "inputs": [[1, 2, 3]], "step": 9}', "step_conflict", True),
    "an unknown output": ('{"session": "SESSION", "inputs": [[1, 2, 3]], "outputs": ["q"]}', "invalid_input", True),
}


@pytest.mark.parametrize(("message", "code", "named"), REFUSED.values(), ids=REFUSED)
def test_a_refused_message_leaves_the_socket_open(server: Server, message: str | bytes, code: str, named: bool) -> None:
    """The error names the session where the message did; nothing moves, and the next message is answered."""
    session = server.create()
    if isinstance(message, str):
        message = message.replace("SESSION", session)
    with many(server) as client:
        client.socket.send(message)
        error = client.next()
        assert (error["type"], error["code"]) == ("error", code)
        assert ("session" in error) == named
        assert ("path" in error) == (code == "invalid_input")
        assert client.ask(session=session, inputs=[ROW], step=1)["step"] == 1


def test_sessions_that_go_and_come_are_told_apart(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted is 404, expired 410; a new session under the same id is found by the next message that names it."""
    session = server.create()
    slab = server.app.state.manager.engines.get("toy").slab
    with many(server) as client:
        client.ask(session=session, inputs=[ROW])
        server.http.delete(f"/v1/sessions/{session}")
        assert client.ask(session=session, inputs=[ROW])["code"] == "session_not_found"
        server.http.put(f"/v1/sessions/{session}", json={"model": "toy"})
        assert client.ask(session=session, inputs=[ROW])["step"] == 1
        monkeypatch.setattr(slab, "_clock", lambda: time.monotonic() + 10_000)
        assert client.ask(session=session, inputs=[ROW])["code"] == "session_expired"
        assert client.ask(session=session, type="open")["code"] == "session_expired"


def test_the_same_session_may_be_on_sockets_of_every_kind(server: Server) -> None:
    """Steps from a socket of its own, from one of many and over HTTP follow each other."""
    session = server.create()
    with many(server) as client, server.socket(session) as own:
        own.recv()
        for step in range(0, 9, 3):
            assert client.ask(session=session, inputs=[ROW], step=step + 1)["step"] == step + 1
            own.send(json.dumps({"inputs": [ROW], "step": step + 2}))
            assert json.loads(own.recv(timeout=30))["step"] == step + 2
            body = {"inputs": [ROW], "step": step + 3}
            assert server.http.post(f"/v1/sessions/{session}/steps", json=body).json()["step"] == step + 3
