"""The front door: the ASGI app that hands steps and sockets straight to their doors, and all else to FastAPI; web pages
of other hosts stay outside.

Rule: a shortcut, never another behaviour. A step costs microseconds; FastAPI's way to a route costs a hundred.
"""

import asyncio
from collections.abc import Awaitable, Collection

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Draining, ForeignOrigin
from service.routers import error_response
from service.routers.steps import StepDoor
from service.routers.stream import StreamDoor

_BEFORE, _AFTER = "/v1/sessions/", "/steps"
# What the service says in headers that browsers hide from a page of another origin unless they are told not to.
_READABLE = ("location", "retry-after", "server-timing", "latch-step", "latch-replayed", "latch-already-applied")


class FrontDoor:
    """The outermost app.

    Args:
        app: everything but steps and sockets.
        steps: `POST /v1/sessions/{id}/steps`.
        streams: every WebSocket.
        origins: of web pages that may call and read the answers (CORS), beside those of the host that they call; `*` is
            all. Browsers say of what origin a page is, and let one of any open a WebSocket; other clients say nothing.

    Attributes:
        is_leaving: every answer over HTTP is the last one on its connection.
    """

    def __init__(self, app: FastAPI, steps: StepDoor, streams: StreamDoor, origins: Collection[str] = ()) -> None:
        self.is_leaving = False
        self._origins = origins
        self.app = app
        self._steps = steps
        self._streams = streams
        self._http: ASGIApp = self._serve
        if origins:  # their pages may read the answers, too
            self._http = CORSMiddleware(
                self._serve,
                allow_origins=[*origins],
                allow_methods=("*",),
                allow_headers=("*",),
                expose_headers=_READABLE,
            )

    @property
    def step_door(self) -> StepDoor | None:
        """Takes steps past ASGI, too; None once every answer is the last one."""
        return None if self.is_leaving else self._steps

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """One call, socket or lifespan."""
        kind = scope["type"]
        if kind != "lifespan" and (error := self._foreign(scope)):
            self.app.state.metrics.errors.labels(error.code).inc()
            return error_response(error)(scope, receive, send)
        if kind == "http":
            return self._http(scope, receive, _last(send) if self.is_leaving else send)
        if kind == "websocket":
            return self._streams.serve(scope, receive, send)
        return self.app(scope, receive, send)

    def _serve(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        path: str = scope["path"]
        if scope["method"] == "POST" and path.startswith(_BEFORE) and path.endswith(_AFTER):
            session_id = path[len(_BEFORE) : -len(_AFTER)]
            if session_id and "/" not in session_id:
                return self._steps.serve(session_id, scope, receive, send)
        return self._call(scope, receive, send)

    def _foreign(self, scope: Scope) -> ForeignOrigin | None:
        headers = dict(scope["headers"])
        said = headers.get(b"origin")
        if said is None or "*" in self._origins:
            return None
        origin, host = said.decode("latin-1"), headers.get(b"host", b"").decode("latin-1")
        if origin in self._origins or origin.partition("://")[2] == host:
            return None
        return ForeignOrigin(
            f"a web page of {origin} may not call {host}: LATCH_ORIGINS is to name it, separated by commas from others",
            origin=origin,
        )

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:  # by the server, when its time is over: the call waits for a store, say
            await error_response(Draining())(scope, receive, send)


def _last(send: Send) -> Send:
    """The same `send`; the client, or a proxy of its, is told to come again on another connection."""

    async def send_last(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return send_last
