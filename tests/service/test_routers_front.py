"""What goes where: the front door hands on steps and sockets, and FastAPI answers everything else as it would alone."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from service.routers.front import FrontDoor
from tests.service.conftest import Server


class Doors:
    """Three doors that note who came in."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self.app = FrontDoor(self._fastapi, self, _Streams(self.came))  # type: ignore[arg-type]

    async def serve(self, session: str, *_: Any) -> None:
        """A step."""
        self.came.append(("step", session))

    async def _fastapi(self, scope: Any, *_: Any) -> None:
        self.came.append(("fastapi", scope.get("path")))

    def enter(self, **scope: Any) -> Any:
        """Who answers a call."""
        asyncio.run(self.app({"headers": []} | scope, None, None))  # type: ignore[arg-type]
        return self.came[-1]


class _Streams:
    def __init__(self, came: list[Any]) -> None:
        self._came = came

    async def serve(self, scope: Any, *_: Any) -> None:
        self._came.append(("stream", scope["path"]))


@pytest.mark.parametrize("session", ["a", "my-stream.7", "steps", "..", "a b", "é"])
def test_a_step_goes_to_its_door(session: str) -> None:
    """With the id as it stands in the address; whether there is such a session is not decided here."""
    assert Doors().enter(type="http", method="POST", path=f"/v1/sessions/{session}/steps") == ("step", session)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/sessions/a/steps"),
        ("PUT", "/v1/sessions/a/steps"),
        ("post", "/v1/sessions/a/steps"),
        ("POST", "/v1/sessions//steps"),
        ("POST", "/v1/sessions/steps"),
        ("POST", "/v1/sessions/a/b/steps"),
        ("POST", "/v1/sessions/a/steps/"),
        ("POST", "/v1/sessions/a"),
        ("POST", "/v2/sessions/a/steps"),
        ("GET", "/"),
    ],
)
def test_everything_else_goes_to_fastapi(method: str, path: str) -> None:
    """Other methods, other addresses, ids that are empty or have a slash in them."""
    assert Doors().enter(type="http", method=method, path=path) == ("fastapi", path)


def test_sockets_and_the_lifespan_have_their_doors() -> None:
    """Every WebSocket goes to the streams, wherever it leads; start and stop go to FastAPI."""
    for path in ("/v1/stream", "/v1/sessions/a/steps", "/nowhere"):
        assert Doors().enter(type="websocket", path=path) == ("stream", path)
    assert Doors().enter(type="lifespan") == ("fastapi", None)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/sessions/a/steps", 405),
        ("POST", "/v1/sessions//steps", 404),
        ("POST", "/v1/sessions/a/b/steps", 404),
        ("POST", "/v1/sessions/a%2Fb/steps", 404),
        ("POST", "/v1/sessions/a/steps/", 404),
        ("POST", "/v1/sessions/steps", 405),
    ],
)
def test_what_is_no_step_has_the_one_shape_of_an_error(server: Any, method: str, path: str, status: int) -> None:
    """Over real HTTP: a 405 names the methods there are, a 404 the address."""
    reply = server.http.request(method, path, json={"inputs": [[1, 2, 3]]})
    assert reply.status_code == status
    assert reply.json()["code"] == {404: "not_found", 405: "method_not_allowed"}[status]
    allowed = {"/v1/sessions/a/steps": "POST", "/v1/sessions/steps": "GET, PUT, DELETE"}.get(path)
    assert reply.headers.get("allow") == (allowed if status == 405 else None)


FOREIGN = "https://elsewhere.example"


def call(server: Server, session: str, origin: str, path: str) -> httpx.Response:
    """A step, or another call, as a page of that origin sends it."""
    body = {"inputs": [[1.0, 2.0, 3.0]]} if path == "steps" else {}
    return server.http.post(f"/v1/sessions/{session}/{path}", json=body, headers={"origin": origin})


@pytest.mark.parametrize("path", ["steps", "reset"])
@pytest.mark.parametrize("origin", [FOREIGN, "null", "", "http://[", "http://127.0.0.1:1"])
def test_a_web_page_of_another_host_is_refused(server: Server, origin: str, path: str) -> None:
    """On every door, before anything has moved, and counted."""
    session = server.create()
    reply = call(server, session, origin, path)
    assert (reply.status_code, reply.json()["code"], reply.json()["origin"]) == (403, "foreign_origin", origin)
    with pytest.raises(InvalidStatus) as refused, server.socket(session, origin=origin):
        pass
    response = refused.value.response
    assert (response.status_code, b"LATCH_ORIGINS" in response.body) == (403, True)
    assert server.http.get(f"/v1/sessions/{session}").json()["step"] == 0
    assert 'latch_errors_total{code="foreign_origin"}' in server.http.get("/metrics").text


@pytest.mark.parametrize("origins", ["", f"http://a.example, {FOREIGN}/", "*"])
def test_pages_of_the_service_and_those_that_are_named_may_call(start: Callable[..., Server], origins: str) -> None:
    """Its own are those of the host that they call, by whatever name, and who is no page says nothing."""
    server = start(origins=origins)
    session = server.create()
    for count, origin in enumerate([server.url, FOREIGN] if origins else [server.url], 1):
        assert call(server, session, origin, "steps").json()["step"] == count
        with server.socket(session, origin=origin) as socket:
            assert f'"step":{count}' in socket.recv(timeout=10)


def test_named_pages_may_read_the_answers(start: Callable[..., Server]) -> None:
    """A browser asks before it sends JSON, and shows a page what the answers allow: steps, other calls, errors."""
    server = start(origins=FOREIGN)
    session = server.create()
    path, asks = f"/v1/sessions/{session}/steps", {"access-control-request-headers": "content-type"}
    for method in ("POST", "PUT", "DELETE"):
        asked = {**asks, "origin": FOREIGN, "access-control-request-method": method}
        reply = server.http.options(path, headers=asked)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, FOREIGN)
        assert method in reply.headers["access-control-allow-methods"]
        assert reply.headers["access-control-allow-headers"] == "content-type"
        asked["origin"] = "https://a.third.example"
        assert server.http.options(path, headers=asked).status_code == 403
    body = {"inputs": [[1.0, 2.0, 3.0]]}
    for status, where, sent in ((200, path, body), (200, path.replace("steps", "reset"), {}), (422, path, {"x": 1})):
        reply = server.http.post(where, json=sent, headers={"origin": FOREIGN})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, FOREIGN)
        assert "latch-step" in reply.headers["access-control-expose-headers"].lower()
    own = server.http.post(path, json=body, headers={"origin": server.url})
    assert (own.status_code, "access-control-allow-origin" in own.headers) == (200, False)
    assert server.http.post(path, json=body).json()["step"] == 2
