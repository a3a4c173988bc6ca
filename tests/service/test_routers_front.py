"""What goes where: the front door hands on steps and sockets, and FastAPI answers everything else as it would alone."""

import asyncio
from typing import Any

import pytest

from service.routers.front import FrontDoor


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
        asyncio.run(self.app(scope, None, None))  # type: ignore[arg-type]
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
    assert ("allow" in reply.headers) == (status == 405)
