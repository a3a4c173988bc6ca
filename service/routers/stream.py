"""`/v1/sessions/{id}/stream`: one session over one WebSocket, in JSON (subprotocol `latch.json`).

The protocol, one JSON object a message:
    server, at once    {"type": "hello", "session", "model", "version", "step", "expires_at"}
    client, any number {"inputs": [[...], ...], "step"?: n, "outputs"?: [...]}
    server, in order   {"type": "step", "outputs", "step", "expires_at"}
                       {"type": "error", "error", "code", "retryable", ...}
Messages may be sent without waiting for replies. A refused message changes nothing and the socket stays open, unless
the session itself is gone. After a broken connection, connect again and go on from the hello's `step`.

Rule: reading stops while `max_waiting` replies are owed, so neither a flood nor a slow reader costs memory.
"""

import asyncio
from contextlib import suppress

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from service.errors import LatchError, Malformed, SessionNotFound
from service.routers import Manager, body_too_large
from service.sessions import Session, SessionManager
from service.wire import StepReply, native

router = APIRouter(tags=["sessions"])

SUBPROTOCOL = "latch.json"

_Owed = asyncio.Future[StepReply]


@router.websocket("/v1/sessions/{session_id}/stream")
async def stream(websocket: WebSocket, session_id: str, manager: Manager) -> None:
    """Steps of one session, pipelined; see the module's first page for the messages."""
    offered = websocket.scope.get("subprotocols", [])
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    with suppress(WebSocketDisconnect):
        try:
            session = await manager.find(session_id)
        except LatchError as error:
            await _send_error(websocket, error)
        else:
            await _Stream(websocket, manager, session).run()


class _Stream:
    """A reader that turns messages into futures, and a writer that sends what they hold, in order."""

    def __init__(self, websocket: WebSocket, manager: SessionManager, session: Session) -> None:
        self._websocket = websocket
        self._manager = manager
        self._session = session
        self._max_bytes: int = websocket.app.state.max_body_bytes
        self._room = asyncio.Semaphore(websocket.app.state.max_waiting)
        self._owed: asyncio.Queue[_Owed | None] = asyncio.Queue()

    async def run(self) -> None:
        """Until the client leaves or the session is gone."""
        session = self._session
        hello = {
            "type": "hello",
            "session": session.record.id,
            "model": session.record.model,
            "version": session.record.version,
            "step": session.step,
            "expires_at": native.timestamp(self._manager.expires_at(session)),
        }
        await self._websocket.send_text(native.encode(hello).decode())
        reader = asyncio.create_task(self._read())
        try:
            await self._write()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            # What was received is applied even if nobody reads the reply: a client that comes back finds it kept.
            while not self._owed.empty():
                if (future := self._owed.get_nowait()) is not None:
                    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _read(self) -> None:
        try:
            while True:
                await self._room.acquire()
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                self._owed.put_nowait(await self._submit(message.get("text")))
        finally:
            self._owed.put_nowait(None)

    async def _submit(self, text: str | None) -> _Owed:
        try:
            if text is None:
                raise Malformed(f"a binary message: this socket speaks {SUBPROTOCOL}, in text")
            if len(text) > self._max_bytes:
                raise body_too_large(self._max_bytes)
            session = await self._manager.find(self._session.record.id)
            if session is not self._session:
                raise SessionNotFound("the session was deleted, and its id belongs to a new one: connect again")
            return self._manager.step(session, session.engine.codec.decode_step(text))
        except LatchError as error:
            refused: _Owed = asyncio.get_running_loop().create_future()
            refused.set_exception(error)
            return refused

    async def _write(self) -> None:
        while (future := await self._owed.get()) is not None:
            try:
                reply = await future
            except LatchError as error:
                if await _send_error(self._websocket, error):
                    return
            else:
                content = native.encode_reply(reply, self._manager.expires_at(self._session), type="step")
                await self._websocket.send_text(content.decode())
            self._room.release()


async def _send_error(websocket: WebSocket, error: LatchError) -> bool:
    """Tells the client; where the error ends the socket, closes it and returns True."""
    websocket.app.state.metrics.errors.labels(error.code).inc()
    await websocket.send_text(native.encode({"type": "error"} | error.to_dict()).decode())
    if error.ws_close is None:
        return False
    await websocket.close(error.ws_close, error.code)
    return True
