"""`latch.binary` with a real client: one session a socket, many sessions a socket, and blocks of them."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.service import peer
from tests.service.conftest import Server
from tests.service.peer import ALREADY_APPLIED, ERROR, GOING_AWAY, HELLO, REPLAYED, STEPPED, Peer

ROW = np.array([[1, 2, 3]], np.float32)


@contextmanager
def many(server: Server, **options: Any) -> Iterator[Peer]:
    """A socket of many sessions."""
    url = server.url.replace("http", "ws") + "/v1/stream"
    with connect(url, **({"subprotocols": ["latch.binary"], "max_size": None} | options)) as socket:
        yield Peer(socket)


@contextmanager
def single(server: Server, session: str, query: str = "", **options: Any) -> Iterator[Peer]:
    """A socket of one session, its hello not yet read."""
    url = server.url.replace("http", "ws") + f"/v1/sessions/{session}/stream{query}"
    with connect(url, **({"subprotocols": ["latch.binary"]} | options)) as socket:
        yield Peer(socket)


def post(server: Server, session: str, rows: Any, **body: Any) -> Any:
    """The same steps over HTTP: what they answer."""
    reply = server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": np.asarray(rows).tolist(), **body})
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["outputs"].get("y", []), np.float32)


def at(server: Server, session: str) -> int:
    """The steps that a session has committed."""
    return int(server.http.get(f"/v1/sessions/{session}").json()["step"])


def inputs(*shape: int) -> np.ndarray:
    """Rows for `toy`."""
    return np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)


@pytest.fixture
def blocks(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each message that was offered as a block to `toy`, whether it was taken; on a machine that is never slow."""
    batcher = server.app.state.manager.engines.get("toy").batcher
    monkeypatch.setattr(batcher._runner, "is_short", lambda rows, steps: True)
    offered: list[bool] = []
    submit = batcher.submit_block

    def submit_block(*args: Any) -> bool:
        offered.append(submit(*args))
        return offered[-1]

    monkeypatch.setattr(batcher, "submit_block", submit_block)
    return offered


def test_one_session_on_channel_0(server: Server) -> None:
    """The hello is the first frame; rows go in and out packed, with the bits that JSON has, and numbers are kept."""
    session, plain = server.create(), server.create()
    rows = inputs(5)
    expected = post(server, plain, rows)
    with single(server, session) as client:
        assert client.socket.subprotocol == "latch.binary"
        hello = client.next()
        assert (hello.kind, hello.flags, hello.channel, hello.first) == (HELLO, 0, 0, 0)
        assert {"session": session, "model": "toy", "version": "1", "step": 0}.items() <= hello.document.items()
        client.send(peer.step(0, rows[:1]))
        client.send(peer.step(0, rows[1:4], 2))
        client.send(peer.step(0, rows[1:4], 2))
        client.send(peer.step(0, rows[4:], 5))
        got = client.take(4)
    assert [(r.kind, r.flags, r.channel, r.count, r.first) for r in got] == [
        (STEPPED, 0, 0, 1, 1), (STEPPED, 0, 0, 3, 2), (STEPPED, REPLAYED, 0, 3, 2), (STEPPED, 0, 0, 1, 5),
    ]  # fmt: skip
    assert got[2].payload == got[1].payload
    assert np.concatenate([got[i].rows("f4", 4) for i in (0, 1, 3)]).tolist() == expected.tolist()


def test_one_session_answers_what_its_address_asks_for(server: Server) -> None:
    """The outputs of the query, in that order; none is no bytes, and without it there is the prediction."""
    body = {"inputs": ROW.tolist(), "outputs": ["z", "h"]}
    outputs = server.http.post(f"/v1/sessions/{server.create()}/steps", json=body).json()["outputs"]
    expected = np.concatenate([np.float32(outputs[name]) for name in ("z", "h")], axis=1).tobytes()
    for query, payload in (("?outputs=z,h", expected), ("?outputs=z&outputs=h", expected), ("?outputs=", b"")):
        with single(server, server.create(), query) as client:
            client.row_bytes[0] = len(payload)
            client.next()
            client.send(peer.step(0, ROW))
            assert client.next().payload == payload
    with single(server, server.create(), "?other=1") as client:
        client.next()
        client.send(peer.step(0, ROW))
        assert client.next().rows("f4", 4).tolist() == post(server, server.create(), ROW).tolist()


@pytest.mark.parametrize(
    ("query", "subprotocol", "error"),
    [
        ("?outputs=z,nope", "latch.binary", "'nope' at $.outputs[1] is no output of this model: it has"),
        ("?outputs=z", "latch.json", "a JSON step has `outputs` in its message"),
    ],
)
def test_outputs_that_cannot_be_given_end_the_socket(server: Server, query: str, subprotocol: str, error: str) -> None:
    """The last message says why; the session is left as it was."""
    session = server.create()
    with single(server, session, query, subprotocols=[subprotocol]) as client:
        said = client.socket.recv(timeout=10)
        document = json.loads(said if isinstance(said, str) else said[16:])
        assert document["code"] == "invalid_input"
        assert error in document["error"]
        with pytest.raises(ConnectionClosed):
            client.socket.recv(timeout=10)
    assert at(server, session) == 0


def test_one_session_is_all_that_its_socket_has(server: Server) -> None:
    """OPEN, CLOSE and other channels are refused there; the socket stays open, and nothing else is touched."""
    session, other = server.create(), server.create()
    with single(server, session) as client:
        client.next()
        for refused in (peer.opens(0, other), peer.opens(1, "nobody"), peer.closes(0)):
            client.send(refused)
            assert client.next().document["code"] == "invalid_input"
        client.send(peer.step(1, ROW))
        assert client.next().document["code"] == "channel_not_open"
        client.send(peer.step(0, ROW))
        assert client.next().first == 1
    assert (at(server, session), at(server, other)) == (1, 0)


def test_many_sessions_on_channels_of_the_clients_choice(server: Server) -> None:
    """OPEN binds a channel and is answered with where the session stands; steps go to the channel's session."""
    sessions = [server.create() for _ in range(3)]
    post(server, sessions[1], ROW)
    channels = [0, 7, 65_535]
    with many(server) as client:
        for channel, session in zip(channels, sessions, strict=True):
            hello = client.open(channel, session)
            assert (hello["session"], hello["step"]) == (session, int(session == sessions[1]))
        for channel in (65_535, 0, 7, 0):
            client.send(peer.step(channel, ROW))
            assert (reply := client.next()).channel == channel
            assert reply.kind == STEPPED
    assert [at(server, session) for session in sessions] == [2, 2, 1]


def test_a_channel_answers_what_it_was_opened_with(server: Server) -> None:
    """The outputs named at OPEN, in that order, one after another in each row; none is no bytes."""
    session = server.create()
    expected = {name: [] for name in ("y", "h", "z")}
    body = {"inputs": [*ROW.tolist()] * 2, "outputs": [*expected]}
    outputs = server.http.post(f"/v1/sessions/{server.create()}/steps", json=body).json()["outputs"]
    with many(server) as client:
        client.open(3, session, ["z", "h"], row_bytes=32)
        client.send(peer.step(3, np.repeat(ROW, 2, axis=0)))
        got = client.next().rows("f4", 2, 4)
        assert np.array_equal(got, np.stack([np.float32(outputs["z"]), np.float32(outputs["h"])], axis=1))
        client.open(3, session, [], row_bytes=0)
        client.send(peer.step(3, ROW))
        assert (reply := client.next()).payload == b""
        assert (reply.count, reply.first) == (1, 3)


def test_a_channel_may_be_bound_anew_and_closed(server: Server) -> None:
    """An OPEN of a bound channel gives it another session; after CLOSE it has none, and the session lives on."""
    one, two = server.create(), server.create()
    with many(server) as client:
        client.open(1, one)
        client.send(peer.step(1, ROW))
        assert client.next().first == 1
        assert client.open(1, two)["session"] == two
        client.send(peer.step(1, ROW), peer.step(1, ROW), peer.closes(1))
        client.send(peer.step(1, ROW))
        *stepped, refused = client.take(3)
        assert [r.kind for r in stepped] == [STEPPED, STEPPED]
        assert (refused.channel, refused.document["code"]) == (1, "channel_not_open")
        client.send(peer.closes(1), peer.closes(9))  # of what is not open: nothing
        assert client.open(1, one)["step"] == 1
    assert (at(server, one), at(server, two)) == (1, 2)


def test_a_channel_bound_anew_first_answers_what_was_sent_on_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hello comes after the replies of the session before, however long they take: none is taken for another's."""
    engine = server.app.state.manager.engines.get("toy")
    monkeypatch.setattr(engine._runner, "is_short", lambda rows, steps: False)
    for closing in ([], [peer.closes(1)]):
        one, two = server.create(), server.create()
        with many(server) as client:
            client.open(1, one)
            client.send(peer.step(1, inputs(2000)), *closing, peer.opens(1, two), peer.step(1, ROW))
            replies = client.take(3)
        assert [(r.kind, r.count if r.kind == STEPPED else r.document["session"]) for r in replies] == [
            (STEPPED, 2000), (HELLO, two), (STEPPED, 1),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("refused", "code"),
    [
        (peer.opens(1, "nobody"), "session_not_found"),
        (peer.opens(1, "other", ["y", "q"]), "invalid_input"),
        (peer.frame(peer.OPEN, 1, 1, payload=b"{"), "malformed"),
    ],
)
def test_an_open_that_fails_leaves_the_channel_unbound(server: Server, refused: bytes, code: str) -> None:
    """What comes behind it is meant for that session: it must not reach the one that the channel had before."""
    session = server.create()
    server.http.put("/v1/sessions/other", json={"model": "toy"})
    with many(server) as client:
        client.open(1, session)
        client.send(peer.step(1, ROW), refused, peer.step(1, ROW, 2))
        client.send(peer.opens(1, session), peer.step(1, ROW, 2))
        stepped, told, behind, hello, again = client.take(5)
    assert [(r.kind, r.channel) for r in (told, behind)] == [(ERROR, 1)] * 2
    assert [r.document["code"] for r in (told, behind)] == [code, "channel_not_open"]
    assert (behind.first, behind.document["message"], behind.document["frame"]) == (2, 1, 2)
    assert [(r.kind, r.first) for r in (stepped, again)] == [(STEPPED, 1), (STEPPED, 2)]
    assert (hello.kind, hello.document["step"]) == (HELLO, 1)
    assert (at(server, session), at(server, "other")) == (2, 0)


@pytest.mark.parametrize("steps", [1, 5, 64])
@pytest.mark.parametrize("numbered", [False, True])
def test_a_block_has_the_bits_of_its_steps(server: Server, blocks: list[bool], steps: int, numbered: bool) -> None:
    """Sixty-four sessions in one message, twice, are two runs; each has what it would have alone, gates included."""
    rows = inputs(64, 2 * steps)
    sessions = [server.create() for _ in rows]
    with many(server) as client:
        for channel, session in enumerate(sessions):
            client.open(channel, session, ["z", "y"], row_bytes=32)
        got = []
        for start in (0, steps):
            first = start + 1 if numbered else 0
            client.send(*[peer.step(i, rows[i, start : start + steps], first) for i in range(64)])
            replies = client.take(64)
            assert [(r.kind, r.flags, r.channel, r.count, r.first) for r in replies] == [
                (STEPPED, 0, channel, steps, start + 1) for channel in range(64)
            ]
            got.append([r.rows("f4", 2, 4) for r in replies])
    assert blocks == [True, True]
    for i in range(0, 64, 9):
        body = {"inputs": rows[i].tolist(), "outputs": ["y", "z"]}
        alone = server.http.post(f"/v1/sessions/{server.create()}/steps", json=body).json()["outputs"]
        values = np.concatenate([part[i] for part in got])
        assert values[:, 0].tolist() == np.float32(alone["z"]).tolist()
        assert values[:, 1].tolist() == np.float32(alone["y"]).tolist()


@pytest.mark.parametrize("why", ["at another step", "busy", "deleted", "idled out", "not a number"])
def test_one_session_of_a_block_that_cannot_go_on_harms_no_other(
    server: Server, blocks: list[bool], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """The seventeenth of thirty-two is refused, or waits its turn; all others are applied and answered, once."""
    rows = inputs(32, 2)
    sessions = [server.create(idle_ttl_ms=1_000_000 if i == 17 else 2_000_000) for i in range(32)]
    alone = post(server, server.create(), rows[3])
    code, first = None, [1] * 32
    with many(server) as client:
        for channel, session in enumerate(sessions):
            client.open(channel, session)
        if why == "at another step":
            code = "step_conflict"
            first[17] = 2
        elif why == "busy":
            first[17] = 2
            client.send(peer.step(17, rows[17, :1]))
        elif why == "deleted":
            code = "session_not_found"
            server.http.delete(f"/v1/sessions/{sessions[17]}")
        elif why == "idled out":
            code = "session_expired"
            slab = server.app.state.manager.engines.get("toy").slab
            monkeypatch.setattr(slab, "_clock", lambda: time.monotonic() + 1_500)
        else:
            code = "invalid_input"
            rows[17, 1, 2] = np.nan
        client.send(*[peer.step(i, rows[i], first[i]) for i in range(32)])
        replies = {(r.channel, r.first): r for r in client.take(32 + (why == "busy"))}
        assert len(replies) == 32 + (why == "busy")
        for i in range(32):
            reply = replies[i, first[i]]
            assert reply.kind == (ERROR if code and i == 17 else STEPPED), i
        if code:
            error = replies[17, first[17]].document
            assert error["code"] == code
            if why == "not a number":
                assert error["path"] == "$.inputs[1][2]"
            if why == "at another step":
                assert error["expected_step"] == 1
        assert replies[3, 1].rows("f4", 4).tolist() == alone.tolist()
        monkeypatch.undo()
        if code not in ("session_not_found", "session_expired"):
            assert [at(server, session) for session in sessions[16:19]] == [2, 3 if why == "busy" else 0, 2]
        client.send(peer.step(18, ROW))  # and it goes on
        assert client.next().first == 3


def test_a_block_sent_again_is_replayed(server: Server) -> None:
    """Each session's reply as it was, flagged; one of another length, or with another row, is a conflict of its own."""
    rows = inputs(8, 3)
    with many(server) as client:
        for channel in range(8):
            client.open(channel, server.create())
        message = [peer.step(i, rows[i], 1) for i in range(8)]
        client.send(*message)
        before = client.take(8)
        client.send(*message)
        again = client.take(8)
        assert sorted(again) == sorted(r._replace(flags=REPLAYED) for r in before)
        rows[5, 0, 0] += 1
        client.send(*[peer.step(i, rows[i], 1) for i in range(8)])
        replies = {r.channel: r for r in client.take(8)}
    assert {i: r.kind for i, r in replies.items()} == {i: ERROR if i == 5 else STEPPED for i in range(8)}
    assert replies[5].document["expected_step"] == 4
    assert replies[5].first == 1


def test_a_reply_too_large_to_keep_says_so_without_rows(start: Callable[..., Server]) -> None:
    """Flags 3 and no payload, for a block and for a lone step."""
    server = start(keep_reply_bytes=16)
    rows = inputs(3, 2)
    with many(server) as client:
        for channel in range(3):
            client.open(channel, server.create())
        client.send(*[peer.step(i, rows[i], 1) for i in range(3)])
        client.take(3)
        client.send(*[peer.step(i, rows[i], 1) for i in range(3)])
        client.send(peer.step(1, rows[1], 1))
        for reply in client.take(4):
            assert (reply.flags, reply.payload) == (REPLAYED | ALREADY_APPLIED, b"")
            assert (reply.count, reply.first) == (2, 1)


def test_a_block_is_held_to_the_steps_that_a_request_may_carry(start: Callable[..., Server]) -> None:
    """A message of many is refused as each of its frames would be, and moves nobody."""
    server = start(max_steps=4)
    sessions = [server.create() for _ in range(3)]
    with many(server) as client:
        for channel, session in enumerate(sessions):
            client.open(channel, session)
        client.send(*[peer.step(i, inputs(5)) for i in range(3)])
        assert [r.document["code"] for r in client.take(3)] == ["payload_too_large"] * 3
        client.send(*[peer.step(i, inputs(4)) for i in range(3)])
        assert [r.kind for r in client.take(3)] == [STEPPED] * 3
    assert [at(server, session) for session in sessions] == [4] * 3


def test_two_models_share_a_socket(server: Server) -> None:
    """Rows of different sizes, in one message and in many; each channel has its own model's rows."""
    toy, counter = server.create(), server.create("counter")
    expected = post(server, server.create(), np.repeat(ROW, 3, axis=0))
    with many(server) as client:
        client.open(1, toy)
        client.open(2, counter, ["total", "y"], row_bytes=8)
        client.send(peer.step(1, ROW), peer.step(2, np.array([3, 2])), peer.step(1, ROW))
        client.send(peer.step(2, np.array([1])))
        client.send(peer.step(1, ROW))
        by_channel: dict[int, list[Any]] = {1: [], 2: []}
        for reply in client.take(5):
            by_channel[reply.channel].append(reply)
    assert [r.rows("f4", 4).tolist() for r in by_channel[1]] == [[row] for row in expected.tolist()]
    assert [r.rows("f4", 2).tolist() for r in by_channel[2]] == [[[9.5, 9.5], [13.5, 13.5]], [[14.5, 14.5]]]


def test_a_session_on_two_channels_takes_a_frame_of_each(server: Server) -> None:
    """In one message, which is no block then: the second goes on from where the first has left it."""
    session, rows = server.create(), inputs(4)
    expected = post(server, server.create(), rows)
    with many(server) as client:
        for channel in (1, 2):
            client.open(channel, session)
        got = []
        for start in (0, 2):
            client.send(peer.step(1, rows[start : start + 1]), peer.step(2, rows[start + 1 : start + 2]))
            got += client.take(2)
    assert [(r.kind, r.channel, r.first) for r in got] == [(STEPPED, 1 + i % 2, 1 + i) for i in range(4)]
    assert np.concatenate([r.rows("f4", 4) for r in got]).tolist() == expected.tolist()
    assert at(server, session) == 4


def test_frames_of_one_channel_in_a_message_run_in_order(server: Server) -> None:
    """Several steps of one session, numbered, beside steps of another, an OPEN and an error: order is kept."""
    one, two = server.create(), server.create()
    with many(server) as client:
        client.open(1, one)
        client.send(
            peer.step(1, ROW, 1),
            peer.opens(2, two),
            peer.step(2, ROW, 1),
            peer.step(1, ROW, 2),
            peer.step(1, ROW, 9),
            peer.step(1, inputs(4), 3),
            peer.step(1, ROW, 2**63),
            peer.step(1, ROW, 7),
        )
        replies = client.take(8)
    assert [(r.kind, r.first) for r in replies if r.channel == 1] == [
        (STEPPED, 1), (STEPPED, 2), (ERROR, 9), (STEPPED, 3), (ERROR, 2**63), (STEPPED, 7),
    ]  # fmt: skip
    assert [r.kind for r in replies if r.channel == 2] == [HELLO, STEPPED]
    assert (at(server, one), at(server, two)) == (7, 1)


BROKEN: dict[str, tuple[bytes | str, str]] = {
    "text": ("hello", "malformed"),
    "nothing": (b"", "malformed"),
    "half a header": (b"\1\0\0", "malformed"),
    "an unknown type": (peer.frame(9, 1), "malformed"),
    "flags": (peer.frame(1, 1, 1, payload=ROW.tobytes(), flags=1), "malformed"),
    "half a row": (peer.step(1, ROW)[:-1], "malformed"),
    "a count beyond the message": (peer.frame(1, 1, 2**32 - 1, payload=bytes(100)), "malformed"),
    "a channel that is not open": (peer.step(6, ROW), "channel_not_open"),
    "no step": (peer.frame(1, 1), "invalid_input"),
    "not a number": (peer.step(1, ROW * np.float32(np.nan)), "invalid_input"),
    "too many steps": (peer.step(1, np.zeros((16_385, 3), np.float32)), "payload_too_large"),
    "a number of 64 bits": (peer.step(1, ROW, 2**63), "invalid_input"),
}


@pytest.mark.parametrize(("message", "code"), BROKEN.values(), ids=BROKEN)
def test_a_bad_message_counts_up_to_its_fault(server: Server, message: bytes | str, code: str) -> None:
    """Alone or behind a good frame: one ERROR, what came before it is applied, and the socket and session go on."""
    session = server.create()
    with many(server) as client:
        client.open(1, session)
        client.socket.send(message)
        reply = client.next()
        assert (reply.kind, reply.document["code"]) == (ERROR, code)
        before = at(server, session)
        if isinstance(message, bytes):
            client.send(peer.step(1, ROW), message or b"\1")
            good, bad = sorted(client.take(2))
            assert (good.kind, good.first, bad.document["code"]) == (STEPPED, before + 1, code)
        step = at(server, session)
        client.send(peer.step(1, ROW, step + 1))
        assert client.next().kind == STEPPED


def test_a_session_deleted_under_its_channel_is_told(server: Server) -> None:
    """On a socket of many the frame is refused and the others go on; on its own socket it is closed with 4404."""
    gone, other, last = (server.create() for _ in range(3))
    with many(server) as client, single(server, last) as alone:
        client.open(1, gone)
        client.open(2, other)
        alone.next()
        for session in (gone, last):
            server.http.delete(f"/v1/sessions/{session}")
        client.send(peer.step(1, ROW))
        client.send(peer.step(1, ROW), peer.step(2, ROW))
        replies = client.take(3)
        assert [(r.channel, r.kind) for r in replies if r.channel == 1] == [(1, ERROR)] * 2
        assert {r.document["code"] for r in replies if r.channel == 1} == {"session_not_found"}
        assert [r.kind for r in replies if r.channel == 2] == [STEPPED]
        alone.send(peer.step(0, ROW))
        assert alone.next().document["code"] == "session_not_found"
        with pytest.raises(ConnectionClosed):
            alone.next()
        assert alone.socket.close_code == 4404


def test_an_oversize_message_closes_with_1009(start: Callable[..., Server]) -> None:
    """The library refuses to buffer it; what came before it counts, and the session lives."""
    server = start(max_body_bytes=2000)
    session = server.create()
    with many(server) as client:
        client.open(1, session)
        client.send(peer.step(1, ROW))
        assert client.next().first == 1
        client.send(*[peer.step(1, ROW)] * 100)
        with pytest.raises(ConnectionClosed):
            client.next()
        assert client.socket.close_code == 1009
    assert at(server, session) == 1


def test_the_code_of_an_oversize_message_reaches_who_still_sends_it(start: Callable[..., Server]) -> None:
    """The service does not close over what is on its way: that would reset the connection, and lose the code."""
    server = start(max_body_bytes=2000)
    for _ in range(20):
        with many(server) as client:
            with suppress(ConnectionClosed):
                client.socket.send(bytes(20_000_000))
            with pytest.raises(ConnectionClosed):
                client.next()
            assert client.socket.close_code == 1009


def test_messages_of_many_sessions_may_be_sent_without_waiting(server: Server) -> None:
    """Hundreds of blocks, steps and errors in flight: each channel's replies come in its order, each applied once."""
    rng = np.random.default_rng(3)
    sessions = [server.create() for _ in range(10)]
    expected: dict[int, list[tuple[int, int]]] = {i: [] for i in range(10)}
    step = [0] * 10
    with many(server) as client:
        for channel, session in enumerate(sessions):
            client.open(channel, session)
        for _ in range(150):
            picked, count = rng.permutation(10)[: rng.integers(1, 11)].tolist(), int(rng.integers(1, 4))
            frames = []
            for i in picked:
                bad = rng.random() < 0.02
                first = step[i] + 1 + 5 * bad
                frames.append(peer.step(i, np.repeat(ROW, count, axis=0), first))
                expected[i].append((ERROR if bad else STEPPED, first))
                step[i] += count * (not bad)
            client.send(*frames)
        for reply in client.take(sum(map(len, expected.values()))):
            assert (reply.kind, reply.first) == expected[reply.channel].pop(0)
    assert [at(server, session) for session in sessions] == step


@pytest.mark.parametrize("together", [False, True])
def test_replies_written_together_are_no_large_message(server: Server, together: bool) -> None:
    """A client library takes a megabyte by default: where each reply is smaller, so is each message."""
    with many(server, max_size=2**20) as client:
        for channel in range(120):
            client.open(channel, server.create(), ["y", "z", "h"], row_bytes=48)
        steps = [peer.step(channel, inputs(256)) for channel in range(120)]
        for message in [steps] if together else [[step] for step in steps]:
            client.send(*message)
        assert {(r.kind, r.count) for r in client.take(120)} == {(STEPPED, 256)}


def test_a_stopping_service_closes_with_1012(start: Callable[..., Server]) -> None:
    """Sockets of both subprotocols that wait for nothing are told to go, and to come again elsewhere."""
    server = start()
    with many(server) as binary, many(server, subprotocols=["latch.json"]) as plain:
        binary.open(1, server.create())
        plain.socket.send(json.dumps({"type": "open", "session": server.create()}))
        assert json.loads(plain.socket.recv())["type"] == "hello"
        server.uvicorn.should_exit = True
        farewell = {"reason": "draining", "retry_after_ms": 100}
        last = binary.next()
        assert (last.kind, last.channel, last.document) == (GOING_AWAY, 0, farewell)
        assert json.loads(plain.socket.recv(timeout=30)) == {"type": "going_away"} | farewell
        for client in (binary, plain):
            with pytest.raises(ConnectionClosed):
                client.socket.recv(timeout=30)
            assert client.socket.close_code == 1012
