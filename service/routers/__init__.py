"""The doors: each router turns bytes into calls of `SessionManager` and its answers into bytes.

Rule: no behaviour of a session is decided here. What all HTTP routes share lives in this file.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect, HTTPConnection

from service.errors import LatchError, Malformed, PayloadTooLarge, UnsupportedMediaType
from service.sessions import SessionManager
from service.wire import native

JSON = "application/json"


class BoundedRoute(APIRoute):
    """Reads the whole body before the handler runs, never more of it than `max_body_bytes`, and only as JSON."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Wraps FastAPI's own handler; it finds the body that was read."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            request = _BoundedRequest(request.scope, request.receive)
            kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
            coding = request.headers.get("content-encoding", "identity")
            try:
                body = await request.body()
            except ClientDisconnect as error:
                raise Malformed("the client left before the body was whole") from error
            if body and coding != "identity":
                raise UnsupportedMediaType(f"content encoding {coding}: send the body as it is")
            # Any other type reaches a server on this machine from any web page, without the browser asking first.
            if body and kind != JSON:
                raise UnsupportedMediaType(f"content type {kind}: send the body as {JSON} (curl --json does)")
            return await handler(request)

        return bounded


class _BoundedRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            limit: int = self.app.state.max_body_bytes
            parts: list[bytes] = []
            size = int(self.headers.get("content-length", 0))
            if size <= limit:
                size = 0
                async for part in self.stream():
                    size += len(part)
                    if size > limit:
                        break
                    parts.append(part)
            if size > limit:
                raise PayloadTooLarge(f"the body is over {limit} bytes: send fewer steps at a time", limit=limit)
            self._body = b"".join(parts)
        return self._body


def error_response(error: LatchError) -> Response:
    """An error as an HTTP reply, with `Retry-After` in whole seconds where it tells when to come again."""
    headers = {}
    if "retry_after_ms" in error.extras:
        headers["Retry-After"] = str(max(1, -(-error.extras["retry_after_ms"] // 1000)))
    return Response(native.encode(error.to_dict()), error.http_status, headers, JSON)


async def _manager(connection: HTTPConnection) -> SessionManager:  # async, or FastAPI would hop to a thread for it
    manager: SessionManager = connection.app.state.manager
    return manager


async def _json_body(request: Request) -> bytes:
    return await request.body()


class ErrorInfo(BaseModel):
    """Why a call was refused. Further fields say more: `path`, `limit`, `expected_step`, `retry_after_ms`."""

    model_config = ConfigDict(extra="allow")

    error: str
    code: str
    retryable: bool


# For every route, and instead of FastAPI's own 422.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorInfo, "description": "Refused; nothing has changed"},
    "5XX": {"model": ErrorInfo, "description": "Failed; no state has moved"},
}


Manager = Annotated[SessionManager, Depends(_manager)]
JsonBody = Annotated[bytes, Depends(_json_body)]


def documented(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's request body for a route that decodes its bytes itself."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}
