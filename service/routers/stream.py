"""The WebSockets: steps of one session (`/v1/sessions/{id}/stream`) or of many (`/v1/stream`), pipelined.

Two subprotocols: `latch.json`, which is also what a client gets that names none, and `latch.binary`, whose frames are
described in `service/wire/frames.py`. In `latch.json` a message is one JSON object:

    one session
    server, at once    {"type": "hello", "session", "model", "version", "step", "expires_at"}
    client, any number {"inputs": [[...], ...], "step"?: n, "outputs"?: [...]}
    server, in order   {"type": "step", "outputs", "step", "expires_at"}
                       {"type": "error", "error", "code", "retryable", ...}
    many sessions: every message names its own
    client             {"type": "open", "session"}: answered with that session's hello; it need not come first
                       {"session", "inputs", "step"?, "outputs"?}
    server             the same messages, each with its "session"; in order for each session

Messages may be sent without waiting for replies. A refused message changes nothing and the socket stays open, unless
it is a socket of one session and that is gone. After a broken connection, connect again and go on from the hello's
`step`. A message over the size limit closes the socket with 1009, before it is read.

Rule: reading stops while too many replies are owed or a session's queue is full, and a client that does not read for
`slow_reader` seconds is closed with 4408, so neither a flood nor a slow reader costs memory. No task and no future a
message: it is handled where it arrives (`take_now`) unless something must be waited for (`take`), and an answer is
written where it comes up, those of one run of the model in one write.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Protocol

from starlette.types import Receive, Scope, Send

from service.batcher import Answer, BlockReply, Outcome
from service.errors import Internal, LatchError, Malformed, NotFound, Overloaded, SessionNotFound, SlowReader
from service.metrics import Metrics
from service.sessions import Session, SessionManager
from service.slab import Slot
from service.wire import StepReply, StepRequest, frames, native
from service.wire.frames import Frame, Kind

log = logging.getLogger(__name__)

JSON, BINARY = "latch.json", "latch.binary"
# After a close that the peer does not read, its connection is dropped.
ABORT_SECONDS = 5.0


class StreamDoor:
    """Serves every WebSocket.

    Args:
        manager: has the sessions.
        metrics: counts what is refused.
        max_waiting, max_waiting_many: replies that a socket of one session, or of many, may owe.
        max_unsent_bytes: of replies that the client does not read; then no more is read from it.
        max_steps: steps that one request may carry.
        slow_reader: seconds.
    """

    def __init__(
        self,
        manager: SessionManager,
        metrics: Metrics,
        *,
        max_waiting: int,
        max_waiting_many: int,
        max_unsent_bytes: int,
        max_steps: int,
        slow_reader: float,
    ) -> None:
        self.manager = manager
        self.metrics = metrics
        self.max_waiting = max_waiting
        self.max_waiting_many = max_waiting_many
        self.max_unsent_bytes = max_unsent_bytes
        self.max_steps = max_steps
        self.slow_reader = slow_reader
        self._unsent: list[_Socket] = []

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One socket, from its handshake to its end."""
        if (await receive())["type"] != "websocket.connect":
            return
        offered = scope["subprotocols"]
        subprotocol = next((name for name in offered if name in (JSON, BINARY)), None)
        await send({"type": "websocket.accept", "subprotocol": subprotocol})
        socket = (_BinarySocket if subprotocol == BINARY else _JsonSocket)(self, scope, receive, send)
        path: str = scope["path"]
        try:
            if path == "/v1/stream":
                await socket.run()
            else:
                before, _, session_id = path.removesuffix("/stream").rpartition("/")
                if before != "/v1/sessions" or not path.endswith("/stream"):
                    raise NotFound(f"{path}: no such address; /v1/stream, or a session's /v1/sessions/<id>/stream")
                await socket.run(session_id)
        except LatchError as error:
            await socket.fail(error)
        except Exception:
            log.exception("the stream at %s failed", path)
            await socket.fail(Internal("the service failed on this socket; its log says why"))

    def flush_later(self, socket: "_Socket") -> None:
        """Writes what the socket has to say once all answers of a run are there."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(socket)

    def _flush(self) -> None:
        sockets, self._unsent = self._unsent, []
        for socket in sockets:
            try:
                socket.flush()
            except Exception as error:  # noqa: BLE001 - it ends this socket, and the others are written to
                socket.end(error)


class Wire(Protocol):
    """What a socket needs of the server beside ASGI; see `service/server.py`."""

    on_message: Callable[[bytes | str], None] | None
    writable: asyncio.Event

    def write(self, message: bytes, *, text: bool) -> None:
        """Sends a message, whether the peer reads or not; to one that has left, nothing."""

    def pause(self) -> None:
        """Reads no more."""

    def resume(self) -> None:
        """Reads again."""

    def abort(self) -> None:
        """Drops the connection."""


def _ignore(_message: bytes | str) -> None:
    """What comes after the end."""


class _Socket:
    """What both subprotocols share: reading under flow control, writing without waiting, and the end."""

    text: ClassVar[bool]

    def __init__(self, door: StreamDoor, scope: Scope, receive: Receive, send: Send) -> None:
        self.door = door
        self.manager = door.manager
        self._receive = receive
        self._send = send
        self._wire: Wire = scope["extensions"]["latch.wire"]
        self.single: Session | None = None
        self._max_owed = door.max_waiting_many
        self._said: list[bytes] = []
        self._owed = self._answered = self._said_bytes = 0
        self._room = asyncio.Event()
        self._backlog: deque[bytes | str] = deque()
        self._behind: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def run(self, session_id: str | None = None) -> None:
        """Until the client leaves; or the one session of the socket is gone, or the client does not read (raised)."""
        if session_id is not None:
            self.single = await self.manager.find(session_id)
            self._max_owed = self.door.max_waiting
        self._wire.pause()
        self._behind = asyncio.create_task(self._start())
        self._wire.on_message = self._on_message
        left = asyncio.create_task(self._left())
        try:
            await asyncio.wait((left, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if left.done() and self._behind is not None:
                # What was received is applied even if nobody reads the reply: a client that comes back finds it kept.
                await asyncio.wait((self._behind, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                raise self._ended.result()
        finally:
            self._wire.on_message = _ignore
            for task in (left, self._behind, self._draining):
                if task is not None:
                    task.cancel()

    async def fail(self, error: LatchError) -> None:
        """Tells why, and closes with the error's code, even if the client does not read: then it is dropped."""
        self.door.metrics.errors.labels(error.code).inc()
        with suppress(OSError, RuntimeError):  # how uvicorn says that the client has left
            for message in (*self._said, self.error(error)):
                self._wire.write(message, text=self.text)
            self._said = []
            self._wire.resume()
            self._wire.writable.set()
            await self._send({"type": "websocket.close", "code": error.ws_close or 1011, "reason": error.code})
            asyncio.get_running_loop().call_later(ABORT_SECONDS, self._wire.abort)

    async def _left(self) -> None:
        while (event := await self._receive())["type"] != "websocket.disconnect":
            # What a client sent before it was told that it may went the way of ASGI.
            self._on_message(event["bytes"] if event.get("bytes") is not None else event["text"])

    async def _start(self) -> None:
        if self.single is not None:
            await self.greet(self.single)
        await self._catch_up()

    def _on_message(self, message: bytes | str) -> None:
        if self._behind is None:
            try:
                if not self._owes_too_much() and self.take_now(message):
                    return
            except Exception as error:  # noqa: BLE001 - a fault of ours ends this socket, not uvicorn's reading
                self.end(error)
                return
            self._behind = asyncio.create_task(self._catch_up())
            self._wire.pause()
        self._backlog.append(message)

    async def _catch_up(self) -> None:
        """Handles what could not be handled at once, and reads on when that is done."""
        try:
            while self._backlog:
                while self._owes_too_much():
                    self._room.clear()
                    await self._room.wait()
                await self.take(self._backlog.popleft())
        except Exception as error:  # noqa: BLE001 - as above
            self.end(error)
        self._behind = None
        self._wire.resume()

    def _owes_too_much(self) -> bool:
        return self._owed >= self._max_owed or self._said_bytes >= self.door.max_unsent_bytes

    async def greet(self, session: Session, channel: int = 0) -> None:
        """Says where a session stands, after what an earlier socket may have left in its queue: go on from there."""
        step = await self.manager.turn(session)
        facts = {
            "session": session.id,
            "model": session.model,
            "version": session.version,
            "step": step,
            "expires_at": native.timestamp(self.manager.expires_at(session)),
        }
        self._owed += 1
        self.say(self.hello(facts, channel))

    def submit_now(self, session: Session, request: StepRequest, answer: Answer) -> bool:
        """Hands a request on. False, and nothing done, where something must be waited for first."""
        if session.has_idled_out:
            return False
        try:
            self.manager.submit(session, request, answer)
        except Overloaded:
            return False
        self._owed += 1
        return True

    async def submit(self, session: Session, request: StepRequest, answer: Answer) -> None:
        """Hands a request on; where a queue is full, only when the session has had its turn."""
        while not self.submit_now(session, request, answer):
            await self.manager.find(session.id)  # raises what became of it
            await self.manager.turn(session)

    def refuse(self, session: Session | None, error: LatchError, answer: Answer) -> None:
        """Answers with an error, in the order of the session's replies where there is a session that lives."""
        self._owed += 1
        if session is None or not session.is_live:
            answer(error)
        else:
            session.engine.batcher.at_turn(session, lambda: error, answer)

    def say(self, message: bytes, answers: int = 1) -> None:
        """Sends a message soon, with all others of the same run; it answers so many requests."""
        self._answered += answers
        self._said.append(message)
        self._said_bytes += len(message)
        if len(self._said) == 1:
            self.door.flush_later(self)

    def flush(self) -> None:
        """Writes what was said, or sees to it that it is written when the client has read some."""
        if not self._wire.writable.is_set():
            if self._draining is None and not self._ended.done():
                self._draining = asyncio.create_task(self._drain())
            return
        said, self._said = self._said, []
        if self.text or len(said) < 2:
            for message in said:
                self._wire.write(message, text=self.text)
        else:
            self._wire.write(b"".join(said), text=False)
        self._owed -= self._answered
        self._answered = self._said_bytes = 0
        self._room.set()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self.door.slow_reader):
                await self._wire.writable.wait()
        except TimeoutError:
            self.end(SlowReader(f"no reply was read for {self.door.slow_reader:g} s"))
        else:
            self._draining = None
            self.flush()

    def end(self, error: Exception) -> None:
        """Ends the socket, from wherever it is found out that it must."""
        if not self._ended.done():
            self._ended.set_result(error)

    def ends(self, error: LatchError) -> bool:
        """Counts an error that is about to be said; True where the socket ends instead: its only session is gone."""
        if error.ws_close is not None and self.single is not None:
            self.end(error)
            return True
        self.door.metrics.errors.labels(error.code).inc()
        return False

    def take_now(self, message: bytes | str) -> bool:
        """Handles a message at once. False, and nothing done, where something must be waited for first."""
        raise NotImplementedError

    async def take(self, message: bytes | str) -> None:
        """Handles a message."""
        raise NotImplementedError

    def hello(self, facts: dict[str, Any], channel: int) -> bytes:
        """The message that says where a session stands."""
        raise NotImplementedError

    def error(self, error: LatchError) -> bytes:
        """The message that says an error of the socket itself."""
        raise NotImplementedError


class _JsonSocket(_Socket):
    """`latch.json`: a message is a JSON object; on a socket of many sessions, each names its own."""

    text = True

    def take_now(self, message: bytes | str) -> bool:
        session, name = self.single, _NO_NAME
        try:
            if session is None:
                envelope = native.read_envelope(_text(message))
                session, name = self.manager.resident(envelope.session), {"session": envelope.session}
                if session is None or envelope.type == "open":
                    return False
            request = session.engine.codec.decode_step(_text(message), named=self.single is None)
            return self.submit_now(session, request, partial(self._answer, session, name))
        except LatchError as error:
            self.refuse(session, error, partial(self._answer, session, name))
            return True

    async def take(self, message: bytes | str) -> None:
        session, name = self.single, _NO_NAME
        try:
            if session is None:
                envelope = native.read_envelope(_text(message))
                name = {"session": envelope.session}
                session = await self.manager.find(envelope.session)
                if envelope.type == "open":
                    await self.greet(session)
                    return
            request = session.engine.codec.decode_step(_text(message), named=self.single is None)
            await self.submit(session, request, partial(self._answer, session, name))
        except LatchError as error:
            self.refuse(session, error, partial(self._answer, session, name))

    def _answer(self, session: Session | None, name: dict[str, str], outcome: Outcome) -> None:
        if isinstance(outcome, StepReply):
            assert session is not None  # noqa: S101 - who is answered with a reply has asked for a session
            expires_at = self.manager.expires_at(session)
            self.say(session.engine.codec.encode_reply(outcome, expires_at, type="step", **name))
        elif not self.ends(outcome):
            self.say(native.encode({"type": "error"} | name | outcome.to_dict()))

    def hello(self, facts: dict[str, Any], channel: int) -> bytes:
        return native.encode({"type": "hello"} | facts)

    def error(self, error: LatchError) -> bytes:
        return native.encode({"type": "error"} | error.to_dict())


_NO_NAME: dict[str, str] = {}


def _text(message: bytes | str) -> str:
    if isinstance(message, str):
        return message
    raise Malformed(f"a binary message: this socket speaks {JSON}, in text")


class _Channel:
    """A session bound to a number on a binary socket."""

    __slots__ = ("number", "outputs", "row_bytes", "session")

    def __init__(self, number: int, session: Session, outputs: list[str] | None) -> None:
        self.number = number
        self.session = session
        self.outputs = session.engine.rows.names(outputs, "$.outputs")
        self.row_bytes = session.engine.rows.input_bytes


class _BinarySocket(_Socket):
    """`latch.binary`: a message is one frame or more; see `wire/frames.py`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._channels: dict[int, _Channel] = {}

    async def greet(self, session: Session, channel: int = 0, outputs: list[str] | None = None) -> None:
        """Binds the channel, then says hello on it."""
        self._channels[channel] = _Channel(channel, session, outputs)
        await super().greet(session, channel)

    text = False

    def take_now(self, message: bytes | str) -> bool:
        if isinstance(message, str) or (frame := frames.read_single(message)) is None:
            return False
        channel = self._channels.get(frame.channel)
        if channel is None:
            return False
        if len(frame.payload) != channel.row_bytes * frame.count:
            return self._take_block(message, channel)
        session, answer = channel.session, partial(self._answer, frame.channel, frame.first_step)
        try:
            request = frames.step_request(frame, channel.outputs, self.door.max_steps)
            return self.submit_now(session, request, answer)
        except LatchError as error:
            self.refuse(session, error, answer)
            return True

    async def take(self, message: bytes | str) -> None:
        try:
            if isinstance(message, str):
                raise Malformed(f"a text message: this socket speaks {BINARY}, in frames")
            for frame in frames.read(message, self._row_bytes):
                channel = self._channels.get(frame.channel)
                try:
                    await self._take_frame(frame, channel)
                except LatchError as error:  # of this frame only: where the next one begins is known
                    answer = partial(self._answer, frame.channel, frame.first_step)
                    self.refuse(channel.session if channel else None, error, answer)
        except LatchError as error:
            number = error.extras.get("channel", 0)
            channel = self._channels.get(number)
            self.refuse(channel.session if channel else None, error, partial(self._answer, number, 0))

    def _take_block(self, message: bytes, first: _Channel) -> bool:
        """Handles at once a message that carries the same number of steps for each of many sessions of one model."""
        engine = first.session.engine
        found = frames.read_block(message, engine.rows, first.outputs)
        if found is None:
            return False
        numbers, block = found
        channels = [self._channels.get(number) for number in numbers]
        sessions: list[Slot] = []
        for channel in channels:
            if channel is None or channel.session.engine is not engine or channel.outputs != first.outputs:
                return False
            sessions.append(channel.session)
        if len(set(sessions)) < len(sessions) or not engine.batcher.submit_block(
            sessions,
            block,
            partial(self._answer_block, numbers, block.inputs.shape[1]),
            lambda i: partial(self._answer, numbers[i], int(block.first_steps[i])),
        ):
            return False
        self._owed += len(sessions)
        return True

    async def _take_frame(self, frame: Frame, channel: _Channel | None) -> None:
        if frame.kind == Kind.OPEN:
            opened = frames.open_request(frame)
            await self.greet(await self.manager.find(opened.session), frame.channel, opened.outputs)
        elif frame.kind == Kind.CLOSE:
            self._channels.pop(frame.channel, None)
        elif channel is not None:
            session = channel.session
            request = frames.step_request(frame, channel.outputs, self.door.max_steps)
            await self.submit(session, request, partial(self._answer, frame.channel, frame.first_step))

    def _row_bytes(self, number: int) -> int | None:
        channel = self._channels.get(number)
        return channel.row_bytes if channel else None

    def _answer(self, number: int, first_step: int, outcome: Outcome) -> None:
        if isinstance(outcome, StepReply):
            self.say(frames.stepped(number, outcome))
        elif not self.ends(outcome):
            self.say(frames.notice(Kind.ERROR, number, outcome.to_dict(), first_step))

    def _answer_block(self, numbers: list[int], steps: int, outcome: BlockReply) -> None:
        if all(outcome.live):
            self.say(frames.stepped_block(numbers, steps, outcome.first_steps, outcome.replies), len(numbers))
            return
        outputs = self._channels[numbers[0]].outputs if numbers[0] in self._channels else ()
        for number, first, data, live in zip(numbers, *outcome, strict=True):
            reply = StepReply(outputs, data, first, first + steps - 1)
            self._answer(
                number, first, reply if live else SessionNotFound("the session was deleted while this step ran")
            )

    def hello(self, facts: dict[str, Any], channel: int) -> bytes:
        return frames.notice(Kind.HELLO, channel, facts)

    def error(self, error: LatchError) -> bytes:
        return frames.notice(Kind.ERROR, 0, error.to_dict())
