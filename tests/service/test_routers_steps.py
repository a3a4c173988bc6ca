"""Steps over HTTP in packed rows, through the front door and through FastAPI's: the same bits, errors and headers."""

from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.settings import load_settings
from service.stores import open_store
from tests.service.conftest import Server

ROWS = np.array([[1, 2, 3], [0.1, -0.2, 1e-30], [4, 5, 6]], np.float32)
PACKED = {"Content-Type": "application/octet-stream"}


def pack(server: Server, session: str, rows: Any = ROWS, query: str = "", **headers: str) -> httpx.Response:
    """One request of packed rows."""
    content = rows if isinstance(rows, bytes) else rows.tobytes()
    return server.http.post(f"/v1/sessions/{session}/steps{query}", content=content, headers=PACKED | headers)


def state(server: Server, session: str) -> Any:
    """Where a session stands: its step, and what the next one makes of its state."""
    reply = server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": [[1, 1, 1]], "outputs": ["h"]}).json()
    return reply["step"], reply["outputs"]["h"]


def test_packed_rows_are_answered_with_the_bits_of_json(server: Server) -> None:
    """Rows in, rows of the prediction out, T of them; the step is in a header."""
    packed, plain = server.create(), server.create()
    expected = server.http.post(f"/v1/sessions/{plain}/steps", json={"inputs": ROWS.tolist()}).json()
    for part, step in ((ROWS[:1], 1), (ROWS[1:], 3)):
        reply = pack(server, packed, part)
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/octet-stream")
        got = np.frombuffer(reply.content, np.float32).reshape(len(part), 4)
        assert got.tolist() == np.array(expected["outputs"]["y"], np.float32)[step - len(part) : step].tolist()
        assert reply.headers["Latch-Step"] == str(step)
        assert not {"latch-replayed", "latch-already-applied"} & set(reply.headers)
    assert state(server, packed) == state(server, plain)


def test_a_model_of_integers_and_scalars_is_packed_too(server: Server) -> None:
    """Ids of 8 bytes in; a float, a float and an integer a row out, in the order asked for."""
    session = server.create("counter")
    reply = pack(server, session, np.array([1, 2, 3]), "?outputs=total,steps,y")
    row = np.dtype([("total", "<f4"), ("steps", "<i8"), ("y", "<f4")])
    assert np.frombuffer(reply.content, row).tolist() == [(1.5, 2, 1.5), (5.5, 4, 5.5), (14.5, 6, 14.5)]


def test_a_numbered_step_is_applied_once(server: Server) -> None:
    """Sent again it is replayed, and flagged; another input under its number, a stale one and a gap are conflicts."""
    session = server.create()
    first = pack(server, session, ROWS, "?step=1&outputs=y,h")
    again = pack(server, session, ROWS, "?step=1&outputs=y,h")
    assert (again.status_code, again.content) == (200, first.content)
    assert (again.headers["Latch-Step"], again.headers["Latch-Replayed"]) == ("3", "true")
    assert "Latch-Already-Applied" not in again.headers
    for query in ("?step=1", "?step=2", "?step=5"):
        refused = pack(server, session, ROWS, query)
        assert (refused.status_code, refused.json()["code"]) == (409, "step_conflict")
        assert refused.json()["expected_step"] == 4
    assert pack(server, session, ROWS, "?step=4").headers["Latch-Step"] == "6"


def test_json_and_packed_rows_are_one_request(server: Server) -> None:
    """A step sent in JSON may be sent again in packed rows: the same inputs and outputs are the same request."""
    session = server.create()
    body = {"inputs": ROWS.tolist(), "step": 1, "outputs": ["z"]}
    values = server.http.post(f"/v1/sessions/{session}/steps", json=body).json()["outputs"]["z"]
    again = pack(server, session, ROWS, "?step=1&outputs=z")
    assert again.headers["Latch-Replayed"] == "true"
    assert np.frombuffer(again.content, np.float32).tolist() == np.array(values, np.float32).ravel().tolist()


def test_a_reply_too_large_to_keep_is_flagged(start: Callable[..., Server]) -> None:
    """A duplicate of it has no rows, and says that it was applied before."""
    server = start(keep_reply_bytes=20)
    session = server.create()
    assert len(pack(server, session, ROWS, "?step=1").content) == 48
    again = pack(server, session, ROWS, "?step=1")
    assert (again.status_code, again.content, again.headers["Latch-Step"]) == (200, b"", "3")
    assert (again.headers["Latch-Replayed"], again.headers["Latch-Already-Applied"]) == ("true", "true")


def test_a_reply_that_would_be_too_large_is_refused(start: Callable[..., Server]) -> None:
    """Through every door of HTTP, with the limit; nothing is applied, and fewer outputs or steps go."""
    server = start(max_body_bytes=1024)
    session = server.create()
    rows = np.ones((40, 3), np.float32)
    refused = [
        pack(server, session, rows, "?outputs=y,z"),
        server.http.post(
            f"/v1/sessions/{session}/steps", json={"inputs": rows.astype(int).tolist(), "outputs": ["y", "z"]}
        ),
        server.http.post("/v1/models/toy/predict", json={"sequences": [[[1, 1, 1]] * 20] * 2, "outputs": ["y", "z"]}),
    ]
    for reply in refused:
        assert (reply.status_code, reply.json()["code"], reply.json()["limit"]) == (413, "payload_too_large", 1024)
    assert server.http.get(f"/v1/sessions/{session}").json()["step"] == 0
    assert pack(server, session, rows).headers["Latch-Step"] == "40"


@pytest.mark.parametrize("headers", [{}, {"Expect": "100-continue"}], ids=["plain", "asgi"])
def test_a_long_reply_in_json_says_the_same(
    server: Server, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written in parts, while others are served; also past ASGI."""
    written: list[int] = []

    async def in_turns(parts: Iterable[bytes]) -> bytes:
        written.append(len(found := [*parts]))
        return b"".join(found)

    monkeypatch.setattr("service.routers.steps.in_turns", in_turns)
    rows = np.random.default_rng(0).integers(0, 3, (6000, 3))
    one, other = server.create(), server.create()
    body = {"inputs": rows.tolist(), "step": 1, "outputs": ["y", "h", "z"]}
    reply = server.http.post(f"/v1/sessions/{one}/steps", json=body, headers=headers).json()
    packed = pack(server, other, rows.astype(np.float32), "?outputs=y,h,z")
    values = np.frombuffer(packed.content, np.float32).reshape(6000, 3, 4)
    for i, name in enumerate(("y", "h", "z")):
        assert (np.array(reply["outputs"][name], np.float32) == values[:, i]).all()
    assert (reply["step"], reply["expires_at"][:2]) == (6000, "20")
    assert written[0] > 8
    assert len(written) == 1


def test_outputs_are_named_in_the_query(server: Server) -> None:
    """With commas or one by one, each once, in that order; none at all answers no bytes."""
    sizes = {"": 16, "?outputs=y,z,h": 48, "?outputs=h&outputs=y": 32, "?outputs=y,y": 16, "?outputs=": 0}
    for query, size in sizes.items():
        assert len(pack(server, server.create(), ROWS[:1], query).content) == size
    one, two = (pack(server, server.create(), ROWS, query).content for query in ("?outputs=h,z", "?outputs=z,h"))
    swapped = np.frombuffer(one, np.float32).reshape(3, 2, 4)[:, ::-1]
    assert swapped.tobytes() == two


BAD: dict[str, tuple[Any, str, int, str, str | None]] = {
    "nothing": (b"", "", 422, "invalid_input", "count"),
    "a byte too few": (ROWS.tobytes()[:-1], "", 422, "invalid_input", "body"),
    "a byte too many": (ROWS.tobytes() + b"\0", "", 422, "invalid_input", "body"),
    "too many steps": (np.zeros((16_385, 3), np.float32), "", 413, "payload_too_large", "count"),
    "NaN": (np.float32([[1, 2, 3], [1, np.nan, 3]]), "", 422, "invalid_input", "$.inputs[1][1]"),
    "infinity": (np.float32([[1, 2, -np.inf]]), "", 422, "invalid_input", "$.inputs[0][2]"),
    "NaN far behind": (np.float32([[1, 2, 3]] * 900 + [[np.nan] * 3]), "", 422, "invalid_input", "$.inputs[900][0]"),
    "step 0": (ROWS, "?step=0", 422, "invalid_input", "step"),
    "two steps": (ROWS, "?step=2&step=3", 422, "invalid_input", "step"),
    "a negative step": (ROWS, "?step=-1", 422, "invalid_input", "step"),
    "a signed step": (ROWS, "?step=%2B1", 422, "invalid_input", "step"),
    "no number": (ROWS, "?step=one", 422, "invalid_input", "step"),
    "an empty number": (ROWS, "?step=", 422, "invalid_input", "step"),
    "a number in another script": (ROWS, "?step=%D9%A1", 422, "invalid_input", "step"),
    "a superscript": (ROWS, "?step=%C2%B2", 422, "invalid_input", "step"),
    "a number of 64 bits": (ROWS, f"?step={2**63}", 422, "invalid_input", "first_step"),
    "a number of 5,000 digits": (ROWS, f"?step={'1' * 5000}", 422, "invalid_input", "step"),
    "an unknown output": (ROWS, "?outputs=y,q", 422, "invalid_input", "outputs[1]"),
    "an unknown field": (ROWS, "?steps=1", 422, "invalid_input", "steps"),
    "no field": (ROWS, "?step", 422, "invalid_input", "query"),
    "many fields": (ROWS, "?" + "&".join(["outputs=y"] * 50), 422, "invalid_input", "query"),
    "a gap": (ROWS, "?step=9", 409, "step_conflict", None),
}


@pytest.mark.parametrize(("rows", "query", "status", "code", "path"), BAD.values(), ids=BAD)
def test_refused_rows_move_nothing(
    server: Server, rows: Any, query: str, status: int, code: str, path: str | None
) -> None:
    """The typed error with its path, as JSON; afterwards the session is as one that was never bothered."""
    bothered, calm = server.create(), server.create()
    reply = pack(server, bothered, rows, query)
    assert (reply.status_code, reply.json()["code"]) == (status, code), reply.text
    assert path is None or reply.json()["path"] == path
    assert state(server, bothered) == state(server, calm)


def test_a_compressed_or_untyped_body_is_refused(server: Server) -> None:
    """415, and nothing moves; the type may carry parameters and be spelled in any case."""
    session = server.create()
    for headers in ({"Content-Encoding": "gzip"}, {"Content-Type": "text/plain"}):
        assert pack(server, session, **headers).status_code == 415
    untyped = server.http.post(f"/v1/sessions/{session}/steps", content=ROWS.tobytes())
    assert (untyped.status_code, untyped.json()["code"]) == (415, "unsupported_media_type")
    assert "application/octet-stream" in untyped.json()["error"]
    for kind in ("application/octet-stream; x=1", "Application/OCTET-Stream"):
        assert pack(server, session, **{"Content-Type": kind}).status_code == 200


def test_a_session_that_is_gone_is_told_apart(start: Callable[..., Server]) -> None:
    """404 for one that was never made or was deleted, 410 for one that idled out."""
    server = start(min_idle_ttl_ms=1)
    deleted, expired = server.create(), server.create(idle_ttl_ms=1)
    server.http.delete(f"/v1/sessions/{deleted}")
    for session in ("nobody", deleted):
        assert (pack(server, session).status_code, pack(server, session).json()["code"]) == (404, "session_not_found")
    for _ in range(1000):
        reply = pack(server, expired)
        if reply.status_code != 200:
            break
    assert (reply.status_code, reply.json()["code"]) == (410, "session_expired")


def test_a_step_tells_how_long_it_waited_and_computed(server: Server) -> None:
    """Server-Timing has queue, compute and store in milliseconds, in both kinds of reply; a replay took neither."""
    session = server.create()
    for reply in (
        server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": ROWS.tolist()}),
        pack(server, session, ROWS, "?step=4"),
        pack(server, session, ROWS, "?step=4"),
    ):
        parts = [part.split(";dur=") for part in reply.headers["Server-Timing"].split(", ")]
        assert [name for name, _ in parts] == ["queue", "compute", "store"]
        assert all(float(value) >= 0 for _, value in parts)
    assert reply.headers["Server-Timing"] == "queue;dur=0.000, compute;dur=0.000, store;dur=0.000"


@pytest.fixture
async def inner(repository: Path) -> AsyncIterator[Any]:
    """Both doors of one service in this loop: the outermost app, and the FastAPI app inside."""
    app = create_app(load_settings(models=repository))
    async with app.app.router.lifespan_context(app.app):
        yield app


@pytest.mark.anyio
async def test_a_service_that_stops_tells_its_store_of_the_last_uses(repository: Path, tmp_path: Path) -> None:
    """A retry is told a later end than its save has: the next process keeps to it."""
    url = f"sqlite:///{tmp_path}/s.db"
    app = create_app(load_settings(models=repository, store_url=url))
    async with (
        app.app.router.lifespan_context(app.app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://latch") as client,
    ):
        await client.put("/v1/sessions/a", json={"model": "toy"})
        for replayed in (None, True):
            body = {"inputs": ROWS.tolist(), "step": 1}
            assert (await client.post("/v1/sessions/a/steps", json=body)).json().get("replayed") is replayed
        app.app.state.manager._store._db.execute("UPDATE sessions SET expires_at = 0")
    store = open_store(url, keep_steps=0, max_expired_ids=0)
    assert (await store.load("a")).time_left > 800
    await store.close()


@pytest.mark.anyio
async def test_fastapi_answers_as_the_front_door(inner: Any) -> None:
    """The documented route and the shortcut past it give the same status, headers and body for the same calls."""
    calls: list[dict[str, Any]] = [
        {"json": {"inputs": ROWS.tolist(), "step": 1}},
        {"json": {"inputs": ROWS.tolist(), "step": 1}},
        {"content": ROWS.tobytes(), "headers": PACKED, "params": {"step": "4", "outputs": "y,h"}},
        {"content": ROWS.tobytes(), "headers": PACKED, "params": {"step": "4", "outputs": "y,h"}},
        {"content": ROWS.tobytes(), "headers": PACKED, "params": {"step": "9"}},
        {"content": b"123", "headers": PACKED},
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
    ]

    async def answers(app: Any) -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://latch") as client:
            await client.put("/v1/sessions/same", json={"model": "toy"})
            replies = [await client.post("/v1/sessions/same/steps", **call) for call in calls]
            replies.append(await client.post("/v1/sessions/nobody/steps", **calls[0]))
            await client.delete("/v1/sessions/same")
        for reply in replies:
            reply.headers.pop("server-timing", None)
        return [
            (
                reply.status_code,
                dict(reply.headers),
                {**reply.json(), "expires_at": None} if "json" in reply.headers["content-type"] else reply.content,
            )
            for reply in replies
        ]

    front, back = await answers(inner), await answers(inner.app)
    assert [status for status, *_ in front] == [200, 200, 200, 200, 409, 422, 400, 415, 404]
    assert front == back


def test_a_query_beside_json_is_refused(server: Server) -> None:
    """A step number in the wrong place is not overlooked: the client would believe that its retries are harmless."""
    session = server.create()
    for query in ("?step=1", "?bogus=1"):
        reply = server.http.post(f"/v1/sessions/{session}/steps{query}", json={"inputs": [[1, 2, 3]]})
        assert (reply.status_code, reply.json()["path"]) == (422, "query")
    assert server.http.get(f"/v1/sessions/{session}").json()["step"] == 0
