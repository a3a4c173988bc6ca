"""`Socket`: how every WebSocket is read and written, whatever it speaks.

Rule: reading stops while too many replies are owed or a session's queue is full, and a client that does not read for
`slow_reader` seconds is closed with 4408, so neither a flood nor a slow reader costs memory. No task and no future a
message: it is handled where it arrives (`take_now`) unless something must be waited for (`take`), and an answer is
written where it comes up, those of one run of the model in one write. When the service ends, nothing more is read,
what was read is answered, and `going_away` is the last message.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from starlette.types import Receive, Scope, Send

from service.commits import MadeAnew
from service.errors import Draining, InvalidInput, LatchError, Overloaded, SlowReader
from service.metrics import Metrics
from service.queues import Answer, resolve
from service.sessions import Session, SessionManager
from service.wire import StepRequest, native

JSON, BINARY = "latch.json", "latch.binary"
# A connection that is closed and whose peer does not read is dropped after this long.
ABORT_SECONDS = 5.0
_FED = 1024  # ids, from which on those of sessions that have ended are looked for
_PATIENCE = 5.0  # seconds for which a hello waits for another socket, whose client may be slow to read
# Replies that are written together are one message up to this size: client libraries take a megabyte by default.
MESSAGE_BYTES = 2**19


@dataclass
class Shared:
    """What all sockets share.

    Attributes:
        manager: has the sessions.
        metrics: counts what is refused.
        max_waiting, max_waiting_many: replies that a socket of one session, or of many, may owe.
        max_unsent_bytes: of replies that a socket may owe; then no more is read from it until all are sent.
        max_steps: steps that one request may carry.
        slow_reader: seconds.
        long: for whoever handles a message of many frames, and lets others have their turn.
    """

    manager: SessionManager
    metrics: Metrics
    max_waiting: int
    max_waiting_many: int
    max_unsent_bytes: int
    max_steps: int
    slow_reader: float
    long: asyncio.Lock = field(default_factory=asyncio.Lock)
    _unsent: list["Socket"] = field(default_factory=list)
    _is_flushing: bool = False
    _open: set["Socket"] = field(default_factory=set)
    _is_leaving: bool = False

    async def passed(self, session_id: str, socket: "Socket") -> None:
        """Waits, for seconds at most, until what other sockets have received for a session by now is in its queue."""
        marks = [mark for other in self._open if other is not socket and (mark := other.mark(session_id))]
        if marks:
            await asyncio.wait(marks, timeout=_PATIENCE)

    def came(self, socket: "Socket") -> None:
        """A socket begins to read."""
        self._open.add(socket)
        if self._is_leaving:
            socket.go_away()

    def left(self, socket: "Socket") -> None:
        """A socket has ended."""
        self._open.discard(socket)

    def go_away(self) -> int:
        """Tells every socket to go, each when what was read from it is answered, and whoever comes from now on.

        Returns:
            How many there are now.
        """
        self._is_leaving = True
        for socket in self._open:
            socket.go_away()
        return len(self._open)

    def cut(self) -> None:
        """Tells those that are left to go, whatever they wait for."""
        for socket in self._open:
            socket.end(Draining())

    def flush_later(self, socket: "Socket") -> None:
        """Writes what the socket has to say once all answers of a run are there."""
        self._unsent.append(socket)
        self.flush_soon()

    def flush_soon(self) -> None:
        """Has sockets written when the loop turns. Whoever submits a step asks for it, too: then replies leave in the
        turn of their run, and not behind the messages that are read before the next turn.
        """
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        sockets, self._unsent = self._unsent, []
        for socket in sockets:
            try:
                socket.flush()
            except Exception as error:  # noqa: BLE001 - it ends this socket, and the others are written to
                socket.end(error)


class Wire(Protocol):
    """What a socket needs of the server beside ASGI; see `service/server.py`."""

    on_message: Callable[[bytes | str], None] | None
    on_full: Callable[[], None] | None
    writable: asyncio.Event

    def write(self, message: bytes, *, text: bool) -> None:
        """Sends a message, whether the peer reads or not; to one that has left, nothing."""

    def pause(self) -> None:
        """Reads no more."""

    def resume(self) -> None:
        """Reads again."""

    def unsent(self) -> int:
        """Bytes that were written and have not left."""

    def abort(self) -> None:
        """Drops the connection."""


def _joined(messages: list[bytes]) -> Iterator[bytes]:
    """The same as few messages, none of them large that was not."""
    start = size = 0
    for end, message in enumerate(messages):
        if end > start and size + len(message) > MESSAGE_BYTES:
            yield b"".join(messages[start:end])
            start, size = end, 0
        size += len(message)
    if messages:
        yield b"".join(messages[start:])


def _ignore(_message: bytes | str) -> None:
    """What comes after the end."""


class Socket:
    """What both subprotocols share: reading under flow control, writing without waiting, and the end."""

    text: ClassVar[bool]

    def __init__(self, shared: Shared, scope: Scope, receive: Receive, send: Send) -> None:
        self.shared = shared
        self.manager = shared.manager
        self._receive = receive
        self._send = send
        self._wire: Wire = scope["extensions"]["latch.wire"]
        self.single: Session | None = None
        self._outputs: list[str] | None = None  # of every step, where it has one session
        self._max_owed = shared.max_waiting_many
        self._said: list[bytes] = []
        self._owed = self._answered = 0
        self._taken_bytes = 0  # of replies to what was taken since nothing was owed
        self._room = asyncio.Event()
        self._backlog: deque[bytes | str | asyncio.Future[None]] = deque()
        self._handled = 0  # messages
        self._behind: asyncio.Task[None] | None = None
        self._is_greeting = False
        self._max_fed = _FED
        self._fed: set[str] = set()  # ids of the sessions that it has said hello for
        self._draining: asyncio.Task[None] | None = None
        self._going: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def run(self, session_id: str | None = None, outputs: list[str] | None = None) -> None:
        """Until the client leaves; or, raised: the one session of the socket is gone, the client does not read, or the
        service ends. `outputs` is what comes back of every step of that session.
        """
        if session_id is not None:
            self.single = await self.manager.find(session_id)
            self._max_owed = self.shared.max_waiting
            self._outputs = outputs
        self._wire.pause()
        self._behind = asyncio.create_task(self._start())
        self._wire.on_message, self._wire.on_full = self._on_message, self._watch
        left = asyncio.create_task(self._left())
        self.shared.came(self)
        try:
            await asyncio.wait((left, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if left.done() and self._behind is not None:
                # What was received is applied even if nobody reads the reply: a client that comes back finds it kept.
                await asyncio.wait((self._behind, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                raise self._ended.result()
        finally:
            self._wire.on_message, self._wire.on_full = _ignore, None
            self.shared.left(self)
            for mark in self._backlog:
                if isinstance(mark, asyncio.Future):
                    resolve(mark)
            for task in (left, self._behind, self._draining, self._going):
                if task is not None:
                    task.cancel()

    async def fail(self, error: LatchError) -> None:
        """Tells why, and closes with the error's code, even if the client does not read: then it is dropped."""
        if isinstance(error, Draining):
            last = self.going_away({"reason": error.code} | error.extras)
        else:
            self.shared.metrics.errors.labels(error.code).inc()
            last = self.error(error)
        with suppress(OSError, RuntimeError):  # how uvicorn says that the client has left
            for message in (*self._said, last):
                self._wire.write(message, text=self.text)
            self._said = []
            self._wire.resume()
            self._wire.writable.set()
            code = error.ws_close or (1011 if error.http_status >= 500 else 1008)
            await self._send({"type": "websocket.close", "code": code, "reason": error.code})
            asyncio.get_running_loop().call_later(ABORT_SECONDS, self._wire.abort)

    async def _left(self) -> None:
        while (event := await self._receive())["type"] != "websocket.disconnect":
            # What a client sent before it was told that it may went the way of ASGI.
            self._on_message(event["bytes"] if event.get("bytes") is not None else event["text"])

    async def _start(self) -> None:
        if self.single is not None:
            try:
                self.single = await self.welcome(self.single.id, outputs=self._outputs)
            except Exception as error:  # noqa: BLE001 - deleted meanwhile, say: the socket ends and tells it
                self.end(error)
                return
        await self._catch_up()

    def _on_message(self, message: bytes | str) -> None:
        if self._behind is None:
            try:
                if not self._owes_too_much() and self.take_now(message):
                    self._handled += 1
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
                await self.room()
                message = self._backlog.popleft()
                if isinstance(message, asyncio.Future):
                    resolve(message)
                    continue
                if not self.take_now(message):
                    await self.take(message)
                self._handled += 1
        except Exception as error:  # noqa: BLE001 - as above
            self.end(error)
        self._behind = None
        if self._going is None:
            self._wire.resume()

    def mark(self, session_id: str) -> asyncio.Future[None] | None:
        """Done when all is handed on that was received by now for a session; None where that is so already, or may take
        long: its client does not read, or it waits for marks itself.
        """
        if self._behind is None or self._is_greeting or not self._wire.writable.is_set() or session_id not in self._fed:
            return None
        mark: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._backlog.append(mark)
        return mark

    def go_away(self) -> None:
        """Reads no more, and ends the socket when what was read is answered."""
        if self._going is None:
            self._wire.pause()
            self._going = asyncio.create_task(self._go())

    async def _go(self) -> None:
        while self._behind is not None:
            await asyncio.wait((self._behind,))
        while self._owed:
            self._room.clear()
            await self._room.wait()
        self.end(Draining())

    async def room(self) -> None:
        """Waits while too many replies are owed."""
        while self._owes_too_much():
            self._room.clear()
            await self._room.wait()

    def _owes_too_much(self) -> bool:
        return self._owed >= self._max_owed or self._taken_bytes >= self.shared.max_unsent_bytes

    async def greet(self, session: Session, channel: int, outputs: list[str] | None) -> None:
        """Says where a session stands, after what it has waiting: go on from there."""
        step = await self.manager.turn(session)
        facts = {
            "session": session.id,
            "model": session.model,
            "version": session.version,
            "step": step,
            "created_at": native.timestamp(session.created_at),
            "idle_ttl_ms": round(session.idle_ttl * 1000),
            "expires_at": native.timestamp(self.manager.expires_at(session)),
        }
        self._owed += 1
        self.say(self.hello(facts, channel))

    async def welcome(self, session_id: str, channel: int = 0, outputs: list[str] | None = None) -> Session:
        """Greets with the session of an id, whichever that is by now, after what an earlier socket has received for it.
        Raises as `SessionManager.find`.
        """
        self._is_greeting = True
        try:
            await self.shared.passed(session_id, self)
        finally:
            self._is_greeting = False
        while True:
            session = await self.manager.find(session_id)
            if len(self._fed) > self._max_fed:  # sessions come and go while a socket stays
                self._fed = {each for each in self._fed if self.manager.resident(each) is not None}
                self._max_fed = 2 * len(self._fed) + _FED
            self._fed.add(session_id)
            try:
                await self.greet(session, channel, outputs)
                return session
            except MadeAnew:
                continue
            except InvalidInput:  # outputs, of the model of a session that has the id no more
                if await self.manager.is_current(session):
                    raise

    def submit_now(self, session: Session, request: StepRequest, answer: Answer) -> bool:
        """Hands a request on. False, and nothing done, where something must be waited for first."""
        if session.has_idled_out:
            return False
        try:
            self.manager.submit(session, request, answer)
        except Overloaded:
            return False
        self.shared.flush_soon()  # behind the batcher, which was woken
        self._owed += 1
        self._takes(session, request.steps, request.outputs)
        return True

    def _takes(self, session: Session, steps: int, outputs: tuple[str, ...]) -> None:
        """Counts what the replies will weigh. Nothing is taken off before all is answered: reading stops for that."""
        self._taken_bytes += steps * session.engine.rows.output_bytes(outputs)

    async def submit(self, session: Session, request: StepRequest, answer: Answer) -> None:
        """Hands a request on; where a queue is full, only when there is room."""
        while not self.submit_now(session, request, answer):
            session = await self.present(session)
            await self.manager.room(session)

    async def present(self, session: Session) -> Session:
        """The session, loaded again where this process has let it go. Raises as `SessionManager.find`."""
        found = await self.manager.find(session.id)
        if found is not session and found.created_at != session.created_at:
            raise MadeAnew
        return found

    def refuse(self, session: Session | None, error: LatchError, answer: Answer) -> None:
        """Answers with an error, in the order of the session's replies where there is a session that lives."""
        self._owed += 1
        if session is None or not session.is_live:
            answer(error)
        else:
            session.engine.batcher.refuse(session, error, answer)

    def say(self, message: bytes, answers: int = 1) -> None:
        """Sends a message soon, with all others of the same run; it answers so many requests."""
        self._answered += answers
        self._said.append(message)
        if len(self._said) == 1:
            self.shared.flush_later(self)

    def flush(self) -> None:
        """Writes what was said, or sees to it that it is written when the client has read some."""
        if not self._wire.writable.is_set():
            self._watch()
            return
        said, self._said = self._said, []
        for message in said if self.text else _joined(said):
            self._wire.write(message, text=self.text)
        self._owed -= self._answered
        self._answered = 0
        if not self._owed:
            self._taken_bytes = 0
        self._room.set()

    def _watch(self) -> None:
        if self._draining is None and not self._ended.done():
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        unsent = self._wire.unsent()
        while not self._wire.writable.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wire.writable.wait(), self.shared.slow_reader)
                break
            before, unsent = unsent, self._wire.unsent()
            if unsent >= before:
                self.end(SlowReader(f"no reply was read for {self.shared.slow_reader:g} s"))
                return
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
        self.shared.metrics.errors.labels(error.code).inc()
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

    def going_away(self, facts: dict[str, Any]) -> bytes:
        """The last message before the service closes the socket because it stops."""
        raise NotImplementedError
