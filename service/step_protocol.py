"""`StepProtocol`: uvicorn's HTTP, but that a step comes and goes by plain calls (`routers.steps.Plain`).

A scope, a task, an event and the task's second turn cost a request more than the step that it carries.

Rule: a shortcut for what clients send as a rule: a short body, announced and plain, of one of the two types, while no
other answer is owed on its connection. All else is uvicorn's, and the answers are the same.
"""

import asyncio
import re
from collections.abc import Coroutine, Sized
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import Draining, Malformed
from service.routers import KINDS
from service.routers.front import FrontDoor
from service.routers.steps import Answer, StepDoor

_PATH = re.compile(rb"/v1/sessions/([\w.~:-]+)/steps(?:\?([^#]*))?")
_NOT_PLAIN = {b"content-encoding", b"transfer-encoding", b"upgrade", b"origin"}
_NOBODY_WAITS = asyncio.Event()
_LARGEST_HEAD = 65_536  # bytes of request line and headers, about; uvicorn and its parser know no limit
_OFFER = {b"upgrade", b"connection", b"http2-settings"}


class _Step:
    """A step and the way back, in the place of uvicorn's cycle of a request, of which it has what uvicorn asks for."""

    disconnected = response_complete = False
    more_body = True
    message_event = _NOBODY_WAITS

    def __init__(
        self, protocol: "StepProtocol", door: StepDoor, session_id: str, kind: str, query: bytes, keep_alive: bool
    ) -> None:
        self.session_id = session_id
        self.kind = kind
        self.query = query
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.door = door
        self._protocol = protocol

    def reply(self, answer: Answer) -> None:
        """See `Plain`."""
        if not self.response_complete:
            self.response_complete = True
            protocol = self._protocol
            del self._protocol  # a closed connection and its last step would wait for the collector
            protocol.send_answer(answer, keep_alive=self.keep_alive)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """See `Plain`."""
        tasks = self._protocol.tasks
        task = self._protocol.loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


class _Flow(FlowControl):
    """uvicorn's, but that nothing is read while requests of the connection wait: it would read on at every answer, and
    at every look for a body, and keep all that a client sends in advance.
    """

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class StepProtocol(HttpToolsProtocol):
    """A connection to a `FrontDoor`."""

    app: FrontDoor
    _owed: _Step | None = None
    _running: RequestResponseCycle | None = None
    _is_head = _is_offer = False
    _head_bytes = _segment = 0
    _is_silent = False
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's, with another flow control."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but for the two kinds of heads that it has no answer for."""
        self._is_silent = False
        self._unset_keepalive_if_required()
        while data:
            self._segment = len(data)
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            except httptools.HttpParserUpgrade as stopped:
                if self._is_offer:
                    data = self._declined(data[stopped.args[0] :])
                    continue
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
            else:
                if self._is_head:
                    self._head_bytes += self._segment
                    if self._head_bytes > _LARGEST_HEAD:
                        self.transport.write(STATUS_LINE[431] + b"connection: close\r\ncontent-length: 0\r\n\r\n")
                        self.transport.close()
            return

    def _declined(self, rest: bytes) -> bytes:
        """What to read instead where a client would rather have spoken another protocol (h2c, say): the same in
        HTTP/1.1, as it expects (RFC 9110, 7.8). The parser has stopped behind the head, and would lose the body.
        """
        head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [b"%b: %b" % pair for pair in self.headers if pair[0] not in _OFFER]
        if not self.parser.should_keep_alive():
            head.append(b"connection: close")
        self._is_offer = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return b"\r\n".join([*head, b"", rest])

    def on_message_begin(self) -> None:
        """A request begins; its scope is made once it is known that somebody needs one."""
        self._is_head, self._head_bytes = True, -self._segment  # its first bytes come with the end of another request
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """Decides which way the request goes."""
        self._is_head = False
        if self.timeout_keep_alive_task is not None:  # set by an answer to a request before this one, of the same bytes
            self._unset_keepalive_if_required()
        if self.parser.should_upgrade() and not self._should_upgrade():
            self._is_offer = any(name == b"upgrade" for name, _ in self.headers)  # without it, it is a CONNECT
            if self._is_offer:
                return
        if step := self._as_step():
            self.cycle = step  # type: ignore[assignment]
            return
        url, expects, headers = self.url, self.expect_100_continue, self.headers
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Hands over a step."""
        if self._is_offer:
            return
        super().on_message_complete()
        step: object = self.cycle
        if isinstance(step, _Step) and not step.response_complete:
            self._owed = step
            step.door.take(step, bytes(step.body))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is answered any more."""
        step: object = self.cycle
        if isinstance(step, _Step) and step.more_body:
            step.door.refuse(step, Malformed("the client left before the body was whole"))
        if self._running is not None:  # uvicorn tells the newest request only, and would begin those that wait
            self._running.disconnected = True
            self._running = None
        self.pipeline.clear()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Goes on with the next request; reads again when there is none that waits."""
        super().on_response_complete()
        self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_answer(self, answer: Answer, *, keep_alive: bool) -> None:
        """Answers the step that is owed."""
        self._owed = None
        if not self.transport.is_closing():
            content = [STATUS_LINE[answer.status]]
            for name, value in (*self.server_state.default_headers, *answer.headers):
                content += (name, b": ", value, b"\r\n")
            content += (b"\r\n" if keep_alive else b"connection: close\r\n\r\n", answer.body)
            self.transport.write(b"".join(content))
            if not keep_alive:
                self.transport.close()
        self.on_response_complete()

    @property
    def _owes(self) -> bool:
        """Whether a request is whole, and its answer is not."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that sends no more may still read what it is owed."""
        if owes := self._owes:
            self.cycle.keep_alive = False
        return owes

    def drop_silent(self) -> None:
        """Closes a connection that is owed nothing, or has begun a request, if nothing has come since the last call."""
        if not self.flow.read_paused and (self._is_head or not self._owes):
            if self._is_silent:
                self.transport.close()
            self._is_silent = True
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()
        self._unsent = unsent

    def cut(self) -> None:
        """Whoever waits for a step is told that the service ends."""
        if self._owed is not None:
            self._owed.door.refuse(self._owed, Draining())

    def _as_step(self) -> _Step | None:
        door = self.app.step_door
        owes = self.cycle is not None and not self.cycle.response_complete
        if door is None or owes or self.flow.write_paused or self.expect_100_continue:
            return None
        found = _PATH.fullmatch(self.url)
        if not found or self.parser.get_method() != b"POST":
            return None
        kind = size = None
        for name, value in self.headers:
            if name == b"content-type":
                kind = KINDS.get(value)
            elif name == b"content-length":
                size = int(value)
            elif name in _NOT_PLAIN:
                return None
        if kind is None or size is None or size > min(HIGH_WATER_LIMIT, door.max_body_bytes):
            return None
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        return _Step(self, door, found[1].decode(), kind, found[2] or b"", keep_alive)
