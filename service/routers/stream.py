"""The WebSockets: steps of one session (`/v1/sessions/{id}/stream`) or of many (`/v1/stream`), pipelined.

Two subprotocols: `latch.json`, which is also what a client gets that names none, and `latch.binary`, whose frames are
described in `service/wire/frames.py`. In `latch.json` a message is one JSON object:

    one session
    server, at once    {"type": "hello", "session", "model", "version", "step", "created_at", "idle_ttl_ms",
                        "expires_at"}
    client, any number {"inputs": [[...], ...], "step"?: n, "outputs"?: [...]}
    server, in order   {"type": "step", "outputs", "step", "expires_at"}
                       {"type": "error", "error", "code", "retryable", ...}
    many sessions: every message names its own
    client             {"type": "open", "session"}: answered with that session's hello; it need not come first, but
                       where replicas share sessions one that was made anew at another is refused once without it
                       {"session", "inputs", "step"?, "outputs"?}
    server             the same messages, each with its "session"; in order for each session
    either, when the service stops
    server, at last    {"type": "going_away", "reason", "retry_after_ms"}, and then it closes with 1012

On a socket of one session that speaks `latch.binary`, `?outputs=y,h` says what comes back of every step.

Messages may be sent without waiting for replies. A refused message changes nothing and the socket stays open, unless
it is a socket of one session and that is gone. After a broken connection, connect again and go on from the hello's
`step`; of what was applied before, only the last request is answered again. Who closes gets no more replies, and what
was received is applied all the same. A service that stops answers what it has read before it says `going_away`: what
has no answer by then was not read, unless the service ran out of time; send it again on another connection, with its
number. A message over the size limit closes the socket with 1009, before it is read.

Rule: the addresses and the agreement on a subprotocol; how a socket is read and written is in `sockets.py`.
"""

import asyncio
import logging
from collections.abc import Mapping
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from service.errors import Draining, Internal, InvalidInput, LatchError, NotFound
from service.routers.binary_socket import BinarySocket
from service.routers.json_socket import JsonSocket
from service.routers.sockets import BINARY, JSON, Shared

log = logging.getLogger(__name__)


class StreamDoor:
    """Serves every WebSocket."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One socket, from its handshake to its end."""
        if (await receive())["type"] != "websocket.connect":
            return
        offered = scope["subprotocols"]
        subprotocol = next((name for name in offered if name in (JSON, BINARY)), None)
        await send({"type": "websocket.accept", "subprotocol": subprotocol})
        socket = (BinarySocket if subprotocol == BINARY else JsonSocket)(self._shared, scope, receive, send)
        path: str = scope["path"]
        try:
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
            if path == "/v1/stream":
                if "outputs" in query:
                    raise InvalidInput("on /v1/stream each OPEN, or each JSON step, has its `outputs`", path="query")
                await socket.run()
            else:
                before, _, session_id = path.removesuffix("/stream").rpartition("/")
                if before != "/v1/sessions" or not path.endswith("/stream"):
                    raise NotFound(f"{path}: no such address; /v1/stream, or a session's /v1/sessions/<id>/stream")
                await socket.run(session_id, _outputs(query, subprotocol))
        except LatchError as error:
            await socket.fail(error)
        except asyncio.CancelledError:  # as in the front door
            await socket.fail(Draining())
        except Exception:
            log.exception("the stream at %s failed", path)
            await socket.fail(Internal("the service failed on this socket; its log says why"))


def _outputs(query: Mapping[str, list[str]], subprotocol: str | None) -> list[str] | None:
    """What a socket of one session gives of every step. Raises InvalidInput. Other names are left alone: a token for a
    proxy, say, for which browsers have no other place.
    """
    values = query.get("outputs")
    if values is None:
        return None
    if subprotocol != BINARY:
        raise InvalidInput(f"a JSON step has `outputs` in its message; {BINARY} has them in the query", path="query")
    return [name for value in values for name in value.split(",") if name]
