"""`/v1/sessions/{id}/stream`: one session over one WebSocket, in JSON (subprotocol `latch.json`).

The protocol, one JSON object a message:
    server, at once    {"type": "hello", "session", "model", "version", "step", "expires_at"}
    client, any number {"inputs": [[...], ...], "step"?: n, "outputs"?: [...]}
    server, in order   {"type": "step", "outputs", "step", "expires_at"}
                       {"type": "error", "error", "code", "retryable", ...}
Messages may be sent without waiting for replies. A refused message changes nothing and the socket stays open, unless
the session itself is gone. After a broken connection, connect again and go on from the hello's `step`.

A message over the size limit closes the socket with 1009, before it is read.

Rule: reading stops while `max_waiting` replies are owed or the session's queue is full, so neither a flood nor a slow
reader costs memory.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from service.errors import Internal, LatchError, Malformed, NotFound, Overloaded
from service.routers import Manager
from service.sessions import Session, SessionManager
from service.wire import StepReply, native

log = logging.getLogger(__name__)

router = APIRouter(tags=["sessions"])

SUBPROTOCOL = "latch.json"

_Owed = asyncio.Future[StepReply]


@router.websocket("/v1/sessions/{session_id}/stream")
async def stream(websocket: WebSocket, session_id: str, manager: Manager) -> None:
    """Steps of one session, pipelined; see the module's first page for the messages."""
    socket = _Socket(websocket)
    try:
        await socket.accept()
        session = await manager.find(session_id)
        await _Stream(socket, manager, session, websocket.app.state.max_waiting).run()
    except WebSocketDisconnect:
        pass
    except LatchError as error:
        await socket.fail(error)
    except Exception:
        log.exception("the stream of session %s failed", session_id)
        await socket.fail(Internal("the service failed on this socket; its log says why"))


@router.websocket("/{path:path}")
async def nowhere(websocket: WebSocket, path: str) -> None:
    """Any other address: told in a message, because a browser shows nothing of a refused handshake."""
    socket = _Socket(websocket)
    with suppress(WebSocketDisconnect):
        await socket.accept()
        await socket.fail(NotFound(f"/{path}: no such address; a session's is /v1/sessions/<id>/stream"))


class _Socket:
    """A WebSocket that speaks JSON. Writing to one that the other side has left is a `WebSocketDisconnect`."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def accept(self) -> None:
        """Agrees on `latch.json` if the client offers it."""
        offered = self._websocket.scope.get("subprotocols", [])
        with self._left():
            await self._websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)

    async def receive(self) -> str:
        """The next message. Raises Malformed for a binary one."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        text: str | None = message.get("text")
        if text is None:
            raise Malformed(f"a binary message: this socket speaks {SUBPROTOCOL}, in text")
        return text

    async def send(self, content: bytes) -> None:
        """One JSON object."""
        with self._left():
            await self._websocket.send_text(content.decode())

    async def tell(self, error: LatchError) -> None:
        """An error that leaves the socket open."""
        self._websocket.app.state.metrics.errors.labels(error.code).inc()
        await self.send(native.encode({"type": "error"} | error.to_dict()))

    async def fail(self, error: LatchError) -> None:
        """An error that ends the socket, with its close code."""
        with suppress(WebSocketDisconnect):
            await self.tell(error)
            with self._left():
                await self._websocket.close(error.ws_close or 1011, error.code)

    @staticmethod
    @contextmanager
    def _left() -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # how uvicorn and Starlette say that the socket was closed meanwhile
            raise WebSocketDisconnect(1006) from error


def _heard(future: _Owed) -> None:
    """Looks at the outcome, so that asyncio does not complain of one that nobody was left to read."""
    if not future.cancelled():
        future.exception()


class _Stream:
    """A reader that turns messages into futures, and a writer that sends what they hold, in order."""

    def __init__(self, socket: _Socket, manager: SessionManager, session: Session, max_waiting: int) -> None:
        self._socket = socket
        self._manager = manager
        self._session = session
        self._room = asyncio.Semaphore(max_waiting)
        self._owed: asyncio.Queue[_Owed] = asyncio.Queue()

    async def run(self) -> None:
        """Until the client leaves, or the session is gone (its error is raised)."""
        record = self._session.record
        hello = {
            "type": "hello",
            "session": record.id,
            "model": record.model,
            "version": record.version,
            # After what an earlier socket may have left in the queue: the client goes on from here.
            "step": await self._manager.turn(self._session),
            "expires_at": native.timestamp(self._manager.expires_at(self._session)),
        }
        await self._socket.send(native.encode(hello))
        reader, writer = asyncio.create_task(self._read()), asyncio.create_task(self._write())
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            reader.cancel()
            writer.cancel()
            # What was received is applied even if nobody reads the reply: a client that comes back finds it kept.
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            await self._room.acquire()
            try:
                future = await self._submit(await self._socket.receive())
            except LatchError as error:
                future = asyncio.get_running_loop().create_future()
                future.set_exception(error)
            future.add_done_callback(_heard)
            self._owed.put_nowait(future)

    async def _submit(self, text: str) -> _Owed:
        await self._manager.find(self._session.record.id)
        request = self._session.engine.codec.decode_step(text)
        while True:
            try:
                return self._manager.step(self._session, request)
            except Overloaded:  # others fill the queue: read no further until the session has had its turn
                await self._manager.turn(self._session)

    async def _write(self) -> None:
        while True:
            future = await self._owed.get()
            try:
                reply = await asyncio.shield(future)
            except LatchError as error:
                if error.ws_close is not None:
                    raise
                await self._socket.tell(error)
            else:
                await self._socket.send(
                    native.encode_reply(reply, self._manager.expires_at(self._session), type="step")
                )
            self._room.release()
