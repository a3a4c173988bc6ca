"""`/v1/sessions` over real HTTP: every call, every error, and that a refused step moves nothing."""

import asyncio
import gzip
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import Server

ROW = [1.0, 2.0, 3.0]


def committed(server: Server, session: str) -> Any:
    """The steps that a session has committed."""
    return server.http.get(f"/v1/sessions/{session}").json()["step"]


def step(server: Server, session: str, **body: Any) -> httpx.Response:
    """One request to step."""
    return server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": [ROW], **body})


def hidden(server: Server, session: str, first: int) -> Any:
    """The session's hidden state after step `first`, with the same input every time this is asked."""
    reply = step(server, session, step=first, outputs=["h"])
    assert reply.status_code == 200, reply.text
    return reply.json()["outputs"]["h"]


def test_a_session_lives(server: Server) -> None:
    """Create, step, inspect, list, reset, delete: the whole life over HTTP."""
    created = server.http.post("/v1/sessions", json={"model": "toy", "metadata": {"stream": "7"}})
    assert created.status_code == 201
    session = created.json()["id"]
    assert created.headers["Location"] == f"/v1/sessions/{session}"
    assert (created.json()["step"], created.json()["metadata"]) == (0, {"stream": "7"})
    reply = step(server, session, step=1, outputs=["y", "h", "z"])
    assert reply.status_code == 200
    body = reply.json()
    assert (body["step"], set(body["outputs"]), np.shape(body["outputs"]["z"])) == (1, {"y", "h", "z"}, (1, 4))
    for part in ("queue;dur=", "compute;dur=", "store;dur="):
        assert part in reply.headers["Server-Timing"]
    assert session in [s["id"] for s in server.http.get("/v1/sessions", params={"model": "toy"}).json()["sessions"]]
    assert server.http.get(f"/v1/sessions/{session}").json()["step"] == 1
    assert server.http.post(f"/v1/sessions/{session}/reset").json()["step"] == 0
    assert server.http.delete(f"/v1/sessions/{session}").status_code == 204
    assert server.http.get(f"/v1/sessions/{session}").status_code == 404


def test_put_is_idempotent(server: Server) -> None:
    """201 when new, 200 when there, 409 for another model; the session keeps its steps."""
    url = "/v1/sessions/my-stream.7"
    assert server.http.put(url, json={"model": "toy"}).status_code == 201
    step(server, "my-stream.7")
    again = server.http.put(url, json={"model": "toy"})
    assert (again.status_code, again.json()["step"]) == (200, 1)
    other = server.http.put(url, json={"model": "counter"})
    assert (other.status_code, other.json()["code"]) == (409, "session_exists")
    assert server.http.get(url).json()["model"] == "toy"


def test_a_duplicate_replays_and_a_gap_says_what_is_expected(server: Server) -> None:
    """The step table over HTTP."""
    session = server.create()
    first = step(server, session, step=1)
    again = step(server, session, step=1)
    assert again.json()["outputs"] == first.json()["outputs"]
    assert (again.json()["replayed"], again.json()["step"]) == (True, 1)
    for number, inputs in ((3, [ROW]), (1, [[9, 9, 9]])):
        refused = step(server, session, step=number, inputs=inputs)
        assert (refused.status_code, refused.json()["code"]) == (409, "step_conflict")
        assert refused.json()["expected_step"] == 2
    assert committed(server, session) == 1


def test_a_chunk_equals_its_steps(server: Server) -> None:
    """Three rows in one request give the bits of three requests."""
    a, b = server.create(), server.create()
    chunk = step(server, a, inputs=[ROW, [0, 0, 1], ROW]).json()["outputs"]["y"]
    rows = [step(server, b, inputs=[row]).json()["outputs"]["y"][0] for row in (ROW, [0, 0, 1], ROW)]
    assert chunk == rows


BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "malformed"),
    (b"{", 400, "malformed"),
    (b"\xff\xfe\x00", 400, "malformed"),
    (b"[]", 422, "invalid_input"),
    (b"{}", 422, "invalid_input"),
    (b'{"inputs": []}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2]]}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2, 3], [1, 2, 3, 4]]}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2, "3"]]}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2, NaN]]}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2, Infinity]]}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2, 1e39]]}', 422, "invalid_input"),
    (b'{"inputs": [[1, 2, 3]], "step": 5}', 409, "step_conflict"),
    (b'{"inputs": [[1, 2, 3]], "outputs": ["nope"]}', 422, "invalid_input"),
    (json.dumps({"inputs": [ROW] * 16_385}).encode(), 413, "payload_too_large"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES, ids=[repr(b[:40]) for b, _, _ in BAD_BODIES])
def test_a_refused_step_moves_nothing(server: Server, body: bytes, status: int, code: str) -> None:
    """The typed error, and afterwards the same step number and the same hidden state as a session never bothered."""
    bothered, calm = server.create(), server.create()
    for session in (bothered, calm):
        assert step(server, session, step=1).status_code == 200
    headers = {"Content-Type": "application/json"}
    reply = server.http.post(f"/v1/sessions/{bothered}/steps", content=body, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert isinstance(reply.json()["error"], str)
    assert committed(server, bothered) == 1
    assert hidden(server, bothered, 2) == hidden(server, calm, 2)


def test_an_oversize_body_is_refused_with_the_limit(start: Callable[..., Server]) -> None:
    """Announced by its length or found while it streams in; the connection and the session live on."""
    server = start(max_body_bytes=2000)
    session = server.create()
    url = f"/v1/sessions/{session}/steps"
    large = json.dumps({"inputs": [ROW] * 500}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (large, iter([large[:1500], large[1500:]])):
        reply = server.http.post(url, content=content, headers=headers)
        assert (reply.status_code, reply.json()["code"], reply.json()["limit"]) == (413, "payload_too_large", 2000)
    assert server.http.post("/v1/sessions", content=large, headers=headers).status_code == 413
    assert committed(server, session) == 0
    assert step(server, session, step=1).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/msgpack"])
def test_only_json_and_packed_rows_are_read(server: Server, kind: str) -> None:
    """Types that a web page can send unasked are refused: 415, and nothing moves."""
    session = server.create()
    for url in ("/v1/sessions", f"/v1/sessions/{session}/steps", "/v1/models/toy/predict"):
        reply = server.http.post(url, content=json.dumps({"inputs": [ROW]}), headers={"Content-Type": kind})
        assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_media_type")
    assert committed(server, session) == 0


def test_a_compressed_body_is_refused(server: Server) -> None:
    """Gzip is told to be what it is, not called broken JSON."""
    session = server.create()
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    content = gzip.compress(json.dumps({"inputs": [ROW]}).encode())
    reply = server.http.post(f"/v1/sessions/{session}/steps", content=content, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_media_type")
    assert "gzip" in reply.json()["error"]
    assert committed(server, session) == 0


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/steps", {"inputs": [ROW]}),
        ("POST", "/reset", None),
    ],
)
def test_an_unknown_session_is_named(server: Server, method: str, path: str, body: Any) -> None:
    """404 on every call that names a session."""
    reply = server.http.request(method, f"/v1/sessions/nobody{path}", json=body)
    assert (reply.status_code, reply.json()["code"]) == (404, "session_not_found")
    assert "nobody" in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "code", "word"),
    [
        ({"model": "nope"}, 404, "model_not_found", "nope"),
        ({"model": "toy", "version": "9"}, 404, "model_not_found", "toy/9"),
        ({}, 422, "invalid_input", "$.model"),
        ({"model": 5}, 422, "invalid_input", "$.model"),
        ({"model": "toy", "idle_ttl_ms": 1}, 422, "invalid_input", "idle_ttl_ms 1 "),
        ({"model": "toy", "idle_ttl_ms": "soon"}, 422, "invalid_input", "$.idle_ttl_ms"),
        ({"model": "toy", "idle_ttl_ms": "5000"}, 422, "invalid_input", "$.idle_ttl_ms"),
        ({"model": "toy", "idle_ttl_ms": 10**400}, 422, "invalid_input", "$.idle_ttl_ms"),
        ({"model": "toy", "idle_ttl_ms": 10**17}, 422, "invalid_input", "$.idle_ttl_ms"),
        ({"model": "toy", "idle_ttl_ms": -1}, 422, "invalid_input", "$.idle_ttl_ms"),
        ({"model": "toy", "ttl": 5}, 422, "invalid_input", "$.ttl"),
        ({"model": "toy", "metadata": {"a": 5}}, 422, "invalid_input", "$.metadata.a"),
        ({"model": "toy", "metadata": {str(i): "" for i in range(17)}}, 422, "invalid_input", "$.metadata"),
    ],
)
def test_a_bad_create_says_what_is_wrong(server: Server, body: Any, status: int, code: str, word: str) -> None:
    """Each mistake has its code and names the bad value; no session comes of it."""
    before = len(server.http.get("/v1/sessions", params={"limit": 1000}).json()["sessions"])
    reply = server.http.post("/v1/sessions", json=body)
    assert (reply.status_code, reply.json()["code"]) == (status, code), reply.text
    assert word in reply.json()["error"]
    assert len(server.http.get("/v1/sessions", params={"limit": 1000}).json()["sessions"]) == before


def test_a_broken_create_body_is_malformed(server: Server) -> None:
    """Not JSON at all is 400 on the control calls too."""
    reply = server.http.post("/v1/sessions", content=b"{", headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed")


def test_a_client_that_leaves_in_mid_body_is_no_fault_of_ours(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """No traceback and no internal error; the session is as it was."""
    server = start()
    session = server.create()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(
            f"POST /v1/sessions/{session}/steps HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            'Content-Length: 1000\r\n\r\n{"i'.encode()
        )
    for _ in range(500):
        if 'latch_errors_total{code="malformed"} 1.0' in server.http.get("/metrics").text:
            break
    else:
        pytest.fail("the broken request was not noticed")
    assert "Traceback" not in caplog.text
    assert committed(server, session) == 0


def test_an_idle_session_answers_410(start: Callable[..., Server]) -> None:
    """After its idle_ttl a session says that it expired, on every call, whoever finds it first."""
    server = start(min_idle_ttl_ms=1, sweep_interval_ms=10)
    session = server.create(idle_ttl_ms=1)
    for _ in range(1000):
        reply = step(server, session)
        if reply.status_code == 410:
            break
    assert (reply.status_code, reply.json()["code"]) == (410, "session_expired")
    assert server.http.get(f"/v1/sessions/{session}").status_code == 410
    assert server.http.put(f"/v1/sessions/{session}", json={"model": "toy"}).status_code == 201


def test_a_full_model_answers_429(start: Callable[..., Server]) -> None:
    """With every slot taken, a create is told when to come again; a delete makes room."""
    server = start(max_sessions=2)
    sessions = [server.create() for _ in range(2)]
    reply = server.http.post("/v1/sessions", json={"model": "toy"})
    assert (reply.status_code, reply.json()["code"], reply.json()["retryable"]) == (429, "capacity_exceeded", True)
    assert int(reply.headers["Retry-After"]) >= 1
    assert reply.json()["limit"] == 2
    server.http.delete(f"/v1/sessions/{sessions[0]}")
    server.create()


def test_a_full_queue_answers_429_and_loses_nothing(start: Callable[..., Server]) -> None:
    """Of many requests to one session at once some are refused; the session has exactly those that were answered."""
    server = start(max_session_queue=2)
    session = server.create("counter")

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            url = f"/v1/sessions/{session}/steps"
            return await asyncio.gather(*[client.post(url, json={"inputs": [1] * 2000}) for _ in range(20)])

    replies = asyncio.run(burst())
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.json()["code"] == "overloaded"
    assert "Retry-After" in refused.headers
    assert committed(server, session) == 2000 * codes.count(200)
    reply = server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": [0], "outputs": ["total"]})
    assert reply.json()["outputs"]["total"] == [[0.5 + 2000 * codes.count(200)]]


def test_pages_of_sessions_are_complete(server: Server) -> None:
    """Walking by cursor sees every session once."""
    made = {server.create("exploding") for _ in range(7)}
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = server.http.get("/v1/sessions", params={"model": "exploding", "limit": 3, "cursor": cursor}).json()
        seen += [session["id"] for session in page["sessions"]]
        cursor = page["cursor"]
    assert len(seen) == len(set(seen))
    assert made <= set(seen)


def test_a_step_that_leaves_the_numbers_is_refused(server: Server) -> None:
    """An overflow inside the model is 500 `inference_failed`, and the state stays finite where it was."""
    session = server.create("exploding")
    url = f"/v1/sessions/{session}/steps"
    assert server.http.post(url, json={"inputs": [[1e20]], "step": 1}).status_code == 200
    reply = server.http.post(url, json={"inputs": [[1.0]], "step": 2})
    assert (reply.status_code, reply.json()["code"]) == (500, "inference_failed")
    assert committed(server, session) == 1


def test_what_only_says_what_to_do_is_short(server: Server) -> None:
    """Every value of it that is wrong is told, so it must not have a million of them; rows may be as long as ever."""
    many = {"model": "toy"} | {f"unknown {i}": 0 for i in range(20_000)}
    one = server.create()
    for method, path in (("PUT", "/v1/sessions/long"), ("POST", "/v1/sessions"), ("POST", f"/v1/sessions/{one}/fork")):
        answer = server.http.request(method, path, json=many)
        assert (answer.status_code, answer.json()["limit"]) == (413, 262_144)
    rows = {"inputs": [[0.123456789, 1, 2]] * 15_000}
    assert server.http.post(f"/v1/sessions/{one}/steps", json=rows).status_code == 200
