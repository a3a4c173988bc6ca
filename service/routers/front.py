"""The front door: the ASGI app that hands steps and sockets straight to their doors, and all else to FastAPI.

Rule: a shortcut, never another behaviour. A step costs microseconds; FastAPI's way to a route costs a hundred.
"""

from collections.abc import Awaitable

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from service.routers.steps import StepDoor
from service.routers.stream import StreamDoor

_BEFORE, _AFTER = "/v1/sessions/", "/steps"


class FrontDoor:
    """The outermost app.

    Args:
        app: everything but steps and sockets.
        steps: `POST /v1/sessions/{id}/steps`.
        streams: every WebSocket.
    """

    def __init__(self, app: FastAPI, steps: StepDoor, streams: StreamDoor) -> None:
        self.app = app
        self._steps = steps
        self._streams = streams

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """One call, socket or lifespan."""
        kind = scope["type"]
        if kind == "http":
            path: str = scope["path"]
            if scope["method"] == "POST" and path.startswith(_BEFORE) and path.endswith(_AFTER):
                session_id = path[len(_BEFORE) : -len(_AFTER)]
                if session_id and "/" not in session_id:
                    return self._steps.serve(session_id, scope, receive, send)
        elif kind == "websocket":
            return self._streams.serve(scope, receive, send)
        return self.app(scope, receive, send)
