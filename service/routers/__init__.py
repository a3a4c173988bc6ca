"""The doors: each router turns bytes into calls of `SessionManager` and its answers into bytes.

Rule: no behaviour of a session is decided here. What all HTTP routes share lives in this file.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from math import inf
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope

from service.errors import LatchError, Malformed, PayloadTooLarge, UnsupportedMediaType
from service.repository import Repository
from service.sessions import SessionManager
from service.wire import native

JSON, PACKED = "application/json", "application/octet-stream"
KINDS = {JSON.encode(): JSON, PACKED.encode(): PACKED}  # as most clients spell them
BYTES = {"type": "string", "format": "binary"}  # in OpenAPI
ROW = [41.2, 48.0, 2.1, 9.8, 22.4]  # of `sensors`, which is shipped: the examples in OpenAPI may be sent as they are

_CONTROL_BYTES = 262_144


class BoundedRoute(APIRoute):
    """Reads the whole body before the handler runs, never more of it than `max_body_bytes`, and only of its type."""

    content_type = JSON
    most_bytes = inf

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Wraps FastAPI's own handler; it finds the body that was read."""
        handler, kinds = super().get_route_handler(), (self.content_type,)

        async def bounded(request: Request) -> Response:
            limit = min(request.app.state.max_body_bytes, self.most_bytes)
            _, request._body = await read_body(request.scope, request.receive, limit, kinds)
            return await handler(request)

        return bounded


class ControlRoute(BoundedRoute):
    """The same for a body that pydantic reads, which says of every value what is wrong: seconds for some megabytes, in
    which nobody else would be served.
    """

    most_bytes = _CONTROL_BYTES


class PackedRoute(BoundedRoute):
    """The same for a body of bytes."""

    content_type = PACKED


async def read_body(scope: Scope, receive: Receive, limit: float, kinds: tuple[str, ...]) -> tuple[str, bytes]:
    """The whole body of a call, and its content type, one of `kinds` unless there is no body.

    Raises:
        PayloadTooLarge: more than `limit` bytes, announced or sent.
        UnsupportedMediaType: another type (any type that a form may have reaches a server on this machine from any
            web page, without the browser asking first), or an encoded body.
        Malformed: the client left before the body was whole.
    """
    kind, coding, size = "none", "identity", 0
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = KINDS.get(value) or value.decode("latin-1").partition(";")[0].strip().lower()
        elif name == b"content-length":
            size = int(value)
        elif name == b"content-encoding":
            coding = value.decode("latin-1")
    parts: list[bytes] = []
    more = size <= limit
    received = 0
    while more and received <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Malformed("the client left before the body was whole")
        parts.append(message["body"])
        received += len(parts[-1])
        more = message["more_body"]
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    if max(size, received) > limit:
        raise PayloadTooLarge(f"the body is over {limit} bytes: send less at a time", limit=limit)
    if body and coding != "identity":
        raise UnsupportedMediaType(f"content encoding {coding}: send the body as it is")
    if body and kind not in kinds:
        hint = " (curl --json does)" if kinds == (JSON,) else ""
        raise UnsupportedMediaType(f"content type {kind}: send the body as {' or '.join(kinds)}{hint}")
    return kind, body


async def in_turns(parts: Iterable[bytes]) -> bytes:
    """A long answer, written while others have their turns."""
    written: list[bytes] = []
    for part in parts:
        written.append(part)
        await asyncio.sleep(0)
    return b"".join(written)


def error_response(error: LatchError) -> Response:
    """An error as an HTTP reply, with `Retry-After` in whole seconds where it tells when to come again."""
    headers = {}
    if "retry_after_ms" in error.extras:
        headers["Retry-After"] = str(max(1, -(-error.extras["retry_after_ms"] // 1000)))
    return Response(native.encode(error.to_dict()), error.http_status, headers, JSON)


async def _manager(connection: HTTPConnection) -> SessionManager:  # async, or FastAPI would hop to a thread for it
    manager: SessionManager = connection.app.state.manager
    return manager


async def _repository(connection: HTTPConnection) -> Repository:
    repository: Repository = connection.app.state.repository
    return repository


async def _body(request: Request) -> bytes:
    return await request.body()


class ErrorInfo(BaseModel):
    """Why a call was refused. Further fields say more: `path`, `limit`, `expected_step`, `retry_after_ms`."""

    model_config = ConfigDict(extra="allow")

    error: str
    code: str
    retryable: bool


LOCATION = {"Location": {"schema": {"type": "string"}, "description": "The session's address"}}
# For every route, and instead of FastAPI's own 422.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorInfo, "description": "Refused; nothing has changed"},
    "5XX": {
        "model": ErrorInfo,
        "description": "Failed; no state has moved, unless the code is one that leaves it open (`store_unavailable`, "
        "`draining`): send a numbered step again",
    },
}


SessionId = Annotated[
    str, Path(description="Letters, digits and . _ ~ : -, a letter or digit first, 128 at most", examples=["motor-7"])
]
Manager = Annotated[SessionManager, Depends(_manager)]
Models = Annotated[Repository, Depends(_repository)]
Body = Annotated[bytes, Depends(_body)]


def documented(schema: dict[str, Any], kind: str = JSON) -> dict[str, Any]:
    """OpenAPI's request body for a route that decodes its bytes itself."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}
