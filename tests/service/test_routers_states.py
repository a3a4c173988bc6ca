"""Fork, rollback, reset and snapshots over HTTP; and sessions that outlive the process, through every door."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from tests.service import peer
from tests.service.conftest import Server, serving
from tests.service.peer import STEPPED, Peer

OCTETS = {"content-type": "application/octet-stream"}
Start = Callable[..., Server]


def row(number: int) -> list[float]:
    """An input for `toy` that no other number has."""
    return [0.1 * number, 1.0, -0.5]


def step(server: Server, session: str, number: int, **body: Any) -> Any:
    """One numbered step."""
    reply = server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": [row(number)], "step": number} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def alone(server: Server, count: int) -> list[Any]:
    """What a session gives that sees rows 1 to `count` and nothing else."""
    body = {"sequences": [[row(number) for number in range(1, count + 1)]]}
    return list(server.http.post("/v1/models/toy/predict", json=body).json()["sequences"][0]["outputs"]["y"])


def post(server: Server, path: str, body: Any = None) -> Any:
    """The reply's status and document."""
    reply = server.http.post(f"/v1/sessions/{path}", json=body)
    return reply.status_code, reply.json()


def refused(code: int, name: str, found: Any) -> Any:
    """The error, if it is this one."""
    assert (found[0], found[1]["code"]) == (code, name)
    return found[1]


@pytest.fixture(params=["memory", "sqlite"])
def keeping(request: pytest.FixtureRequest, start: Start, tmp_path: Path) -> Server:
    """A service that keeps three earlier steps, with each embedded store."""
    url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/s.db"}[request.param]
    return start(store_url=url, keep_steps=3)


def test_a_fork_goes_its_own_way(server: Server) -> None:
    """It begins where the other one stands, kept reply and all; from there, neither feels the other."""
    one = server.create(idle_ttl_ms=50_000, metadata={"who": "me"})
    first = [step(server, one, number) for number in (1, 2)]
    status, fork = post(server, f"{one}/fork", {"id": f"{one}-b", "idle_ttl_ms": 40_000})
    assert (status, fork["step"], fork["idle_ttl_ms"], fork["metadata"]) == (201, 2, 40_000, {"who": "me"})
    replay = step(server, fork["id"], 2)
    assert (replay["outputs"], replay["replayed"]) == (first[1]["outputs"], True)
    values = [step(server, name, 3)["outputs"]["y"][0] for name in (one, fork["id"])]
    assert values == alone(server, 3)[2:] * 2
    step(server, one, 4)
    assert server.http.get(f"/v1/sessions/{fork['id']}").json()["step"] == 3


def test_a_fork_without_wishes_is_named_by_the_server(server: Server) -> None:
    """No body is needed; the address of the new session is told."""
    one = server.create()
    reply = server.http.post(f"/v1/sessions/{one}/fork")
    assert reply.status_code == 201
    assert reply.headers["location"] == f"/v1/sessions/{reply.json()['id']}"
    assert reply.json()["id"] != one


def test_a_fork_takes_no_id_that_is_taken(server: Server) -> None:
    """Nothing is changed of either."""
    one, other = server.create(), server.create()
    step(server, other, 1)
    refused(409, "session_exists", post(server, f"{one}/fork", {"id": other}))
    refused(422, "invalid_input", post(server, f"{one}/fork", {"id": "no/slash"}))
    refused(404, "session_not_found", post(server, "nobody/fork"))
    assert server.http.get(f"/v1/sessions/{other}").json()["step"] == 1


def test_a_rollback_returns_to_a_kept_step(keeping: Server) -> None:
    """What was undone is done again with other inputs; then only what is still kept can be returned to."""
    one = keeping.create()
    for number in range(1, 6):
        step(keeping, one, number)
    assert post(keeping, f"{one}/rollback", {"step": 3})[1]["step"] == 3
    assert step(keeping, one, 3)["replayed"]
    assert [step(keeping, one, number)["outputs"]["y"][0] for number in (4, 5)] == alone(keeping, 5)[3:]
    assert post(keeping, f"{one}/rollback", {"step": 5})[0] == 200
    error = refused(409, "step_not_kept", post(keeping, f"{one}/rollback", {"step": 1}))
    assert error["kept_steps"] == [2, 3, 4, 5]
    refused(422, "invalid_input", post(keeping, f"{one}/rollback", {"step": -1}))
    refused(422, "invalid_input", post(keeping, f"{one}/rollback", {}))


def test_a_rollback_that_is_not_kept_for_says_which_setting(server: Server) -> None:
    """By default nothing is kept, and the error says how to change that."""
    one = server.create()
    step(server, one, 1)
    error = refused(409, "step_not_kept", post(server, f"{one}/rollback", {"step": 0}))
    assert "LATCH_KEEP_STEPS" in error["error"]
    assert error["kept_steps"] == [1]
    assert post(server, f"{one}/rollback", {"step": 1})[1]["step"] == 1


def test_a_reset_begins_anew(keeping: Server) -> None:
    """The initial state, step 0, and nothing to return to."""
    one = keeping.create()
    step(keeping, one, 1)
    assert post(keeping, f"{one}/reset")[1]["step"] == 0
    assert refused(409, "step_not_kept", post(keeping, f"{one}/rollback", {"step": 1}))["kept_steps"] == [0]
    again = step(keeping, one, 1)
    assert again["outputs"]["y"] == alone(keeping, 1)
    assert "replayed" not in again


def test_a_snapshot_moves_to_another_machine(server: Server, start: Start) -> None:
    """Bytes from one service make the session at another, or set it; it goes on there with the same bits."""
    other = start()
    one = server.create()
    last = [step(server, one, number) for number in (1, 2)][1]
    reply = server.http.get(f"/v1/sessions/{one}/state")
    assert reply.headers["content-type"] == "application/octet-stream"
    for status in (201, 200):
        ttl = {"idle_ttl_ms": 7000 if status == 201 else 8000}  # of a session that is made; the other one has its own
        made = other.http.put("/v1/sessions/moved/state", content=reply.content, headers=OCTETS, params=ttl)
        assert (made.status_code, made.json()["step"], made.json()["model"]) == (status, 2, "toy")
        assert made.json()["idle_ttl_ms"] == 7000
        replay = step(other, "moved", 2)
        assert (replay["outputs"], replay["replayed"]) == (last["outputs"], True)
        assert step(other, "moved", 3)["outputs"]["y"] == alone(server, 3)[2:]


def test_what_is_no_snapshot_changes_nothing(server: Server) -> None:
    """Cut short, damaged, of another model, of another type, or none at all."""
    one, counter = server.create(), server.create("counter")
    step(server, one, 1)
    whole = server.http.get(f"/v1/sessions/{one}/state").content
    put = lambda session, data, **headers: server.http.put(  # noqa: E731
        f"/v1/sessions/{session}/state", content=data, headers=OCTETS | headers
    )
    for data in (b"", whole[:-1], whole[:-30] + b"\1" + whole[-29:], b"\xff" * 64):
        for session in (one, "nobody"):
            found = put(session, data)
            refused(422, "snapshot_invalid", (found.status_code, found.json()))
    found = put(counter, whole)
    error = refused(409, "snapshot_mismatch", (found.status_code, found.json()))
    hashes = [server.http.get(f"/v1/models/{name}").json()["sha256"] for name in ("toy", "counter")]
    assert all(digest in error["error"] for digest in hashes)
    assert put(one, whole, **{"content-type": "application/json"}).status_code == 415
    for ttl in (1, "soon"):
        found = server.http.put("/v1/sessions/nobody/state", content=whole, headers=OCTETS, params={"idle_ttl_ms": ttl})
        assert "idle_ttl_ms" in refused(422, "invalid_input", (found.status_code, found.json()))["error"]
    assert server.http.get(f"/v1/sessions/{one}").json()["step"] == 1
    assert server.http.get("/v1/sessions/nobody").status_code == 404


def test_a_session_may_begin_in_a_state_of_its_own(server: Server) -> None:
    """Given by name; a bad one makes no session."""
    one = server.create()
    for number in (1, 2):
        step(server, one, number, outputs=["y", "h"])
    reply = server.http.post(f"/v1/sessions/{one}/steps", json={"inputs": [row(3)], "outputs": ["h"]})
    state = reply.json()["outputs"]["h"][0]
    other = server.create(state={"h": state})
    assert server.http.get(f"/v1/sessions/{other}").json()["step"] == 0
    values = [
        server.http.post(f"/v1/sessions/{name}/steps", json={"inputs": [row(4)]}).json()["outputs"]["y"]
        for name in (one, other)
    ]
    assert values[0] == values[1]
    for bad in ({"h": state[1:]}, {"g": state}, {"h": "zeros"}):
        found = server.http.put("/v1/sessions/bad", json={"model": "toy", "state": bad})
        assert found.json()["path"].startswith("$.state.")
    assert server.http.get("/v1/sessions/bad").status_code == 404


def test_sessions_go_on_after_a_restart(start: Start, repository: Path, tmp_path: Path) -> None:
    """Every door finds the session where it was, with its last reply; the list and its metadata are there, too."""
    url = f"sqlite:///{tmp_path}/s.db"
    with serving(repository, store_url=url) as first:
        one, gone, idle = first.create(metadata={"who": "me"}), first.create(), first.create(idle_ttl_ms=1000)
        last = [step(first, one, number) for number in range(1, 5)][3]
        first.http.delete(f"/v1/sessions/{gone}")
        info = first.http.get(f"/v1/sessions/{one}").json()
    second = start(store_url=url)
    found = second.http.get(f"/v1/sessions/{one}").json()
    assert {**found, "expires_at": ""} == {**info, "expires_at": ""}
    assert second.http.get(f"/v1/sessions/{gone}").status_code == 404
    assert [each["id"] for each in second.http.get("/v1/sessions").json()["sessions"]] == sorted([one, idle])
    replay = step(second, one, 4)
    assert (replay["outputs"], replay["replayed"]) == (last["outputs"], True)
    with second.socket(one) as socket:
        assert json.loads(socket.recv())["step"] == 4
        socket.send(json.dumps({"inputs": [row(5)], "step": 5}))
        assert json.loads(socket.recv())["outputs"]["y"] == alone(second, 5)[4:]


def test_more_sessions_than_there_is_room_for(start: Start, tmp_path: Path) -> None:
    """Those used least recently make room, and come back when they are asked for: over HTTP, and on open sockets."""
    server = start(store_url=f"sqlite:///{tmp_path}/s.db", max_sessions=4)
    names = [server.create() for _ in range(12)]
    url = server.url.replace("http", "ws") + "/v1/stream"
    with (
        server.socket(names[0]) as single,
        connect(url, subprotocols=["latch.binary"]) as many,
        connect(url, subprotocols=["latch.json"]) as texts,
    ):
        assert json.loads(single.recv())["step"] == 0
        client = Peer(many)
        for channel in (0, 1):
            client.open(channel, names[channel + 1])
        for turn in (1, 2, 3):
            for name in names[4:]:
                assert step(server, name, turn)["step"] == turn
            single.send(json.dumps({"inputs": [row(turn)], "step": turn}))
            assert json.loads(single.recv())["outputs"]["y"] == alone(server, turn)[turn - 1 :]
            for channel in (0, 1):
                client.send(peer.step(channel, np.array([row(turn)], np.float32), turn))
                [reply] = client.take(1)
                assert (reply.kind, reply.first) == (STEPPED, turn)
            texts.send(json.dumps({"session": names[3], "inputs": [row(turn)], "step": turn}))
            assert json.loads(texts.recv())["step"] == turn
    assert [server.http.get(f"/v1/sessions/{name}").json()["step"] for name in names] == [3] * 12
