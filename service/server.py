"""The HTTP and WebSocket server around the app: uvicorn, and the little that it does not do.

Rule: how uvicorn is set up, and what it lacks, is here and nowhere else.
"""

import asyncio
import gc
import logging
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import uvicorn
from rich.console import Console
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame

from service.drain import Drain
from service.errors import SettingsInvalid
from service.routers.front import FrontDoor
from service.routers.sockets import ABORT_SECONDS
from service.step_protocol import StepProtocol

log = logging.getLogger(__name__)

# A request that is on its way when its idle connection is about to be closed has this long to come in.
SETTLE_SECONDS = 0.1
# Bytes of a WebSocket that are handled at once; the frames of one read that are not many; and bytes at once of more.
READ_AT_ONCE, FRAMES_AT_ONCE, READ_ON_AT_ONCE = 65_536, 256, 2_048
# A client that sent what is no WebSocket's, or too much, has this long to read that it was refused.
LINGER_SECONDS = 1.0
# A connection is looked at this often, and closed where a request does not go on: it would be kept for ever.
SILENT_SECONDS = 15.0
# Whoever is told at the deadline that the service stops has this long to take it.
GOODBYE_SECONDS = 1.0


class _WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose messages come and go by plain calls: `routers.sockets.Wire`, found in the ASGI scope.

    The ASGI app still accepts, closes and is told of the end; but a queue, a task's wake-up and two changes of the
    poll set a message cost more than the step that it carries.
    """

    on_message: Callable[[bytes | str], None] | None = None
    on_full: Callable[[], None] | None = None
    _unread = b""  # what came with too many frames to handle in one turn
    _frames_handled = 0
    _is_paused = False

    def data_received(self, data: bytes) -> None:
        """In parts, and many small frames over many turns of the loop: nobody waits for a flood of pings."""
        if self.conn.parser_exc is not None:
            return
        if self._unread:  # it was read before the pause took hold, or behind uvicorn's back, which reads on by itself
            self._unread += data
            if not self.transport.is_closing():
                self.transport.pause_reading()
            return
        was_flood, self._frames_handled = self._frames_handled > FRAMES_AT_ONCE, 0
        if was_flood:
            self._unread = data
        else:
            for start in range(0, len(data), READ_AT_ONCE):
                super().data_received(data[start : start + READ_AT_ONCE])
                if self._frames_handled > FRAMES_AT_ONCE:
                    self._unread = data[start + READ_AT_ONCE :]
                    break
        if self._unread and not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_soon(self._read_on)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # The library has read no request in it (a head too large, one with a body), and would wait for ever.
            self.handshake_complete = self.close_sent = True
            self.transport.write(STATUS_LINE[431] + b"connection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def _read_on(self) -> None:
        if not self._unread or self._is_paused or self.transport.is_closing():
            return
        data, self._unread = self._unread[:READ_ON_AT_ONCE], self._unread[READ_ON_AT_ONCE:]
        super().data_received(data)
        if self._unread:
            self.loop.call_soon(self._read_on)
        elif not self._is_paused and not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions["latch.wire"] = self
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent:  # a refusal by way of HTTP is an answer, too, and nothing for the log
            self.handshake_complete = True

    def handle_parser_exception(self) -> None:
        """As uvicorn's, but what is on its way is still read, and dropped: closed over that, the connection would be
        reset, and the client never see the code.
        """
        if self.close_sent:  # more of the same read, or there is a goodbye already
            return
        assert self.conn.close_sent is not None  # noqa: S101 - the parser has failed, and said so
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent, self._unread = True, b""
        self.transport.write_eof()  # who has read that closes, too
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def handle_cont(self, event: Frame) -> None:
        self._frames_handled += 1
        whole = self.frames[0] if isinstance(self.frames[0], bytearray) else bytearray(self.frames[0])
        whole += event.data  # a list of millions of fragments weighs many times what is in them
        self.frames = [whole]  # type: ignore[list-item]
        if event.fin:
            self.frames = [bytes(whole)]
            self.send_receive_event_to_app()

    def handle_pong(self, event: Frame) -> None:
        self._frames_handled += 1
        super().handle_pong(event)

    def send_receive_event_to_app(self) -> None:
        self._frames_handled += 1
        if self.on_message is None or self.close_sent:
            super().send_receive_event_to_app()
            return
        data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        self.frames = []
        if self.curr_msg_data_type == "bytes":
            self.on_message(data)
            return
        try:
            self.on_message(data.decode())
        except UnicodeDecodeError:
            try:
                self.conn.send_close(1007)
            except InvalidState:  # the peer has closed in the same breath
                self.transport.abort()
            else:
                super().handle_parser_exception()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.on_full is not None:
            self.on_full()

    def handle_ping(self) -> None:
        self._frames_handled += 1
        pongs = self.conn.data_to_send()
        if self.writable.is_set():  # who does not read gets no more of them: they would pile up
            self.transport.write(b"".join(pongs))

    def handle_close(self, event: Frame) -> None:
        super().handle_close(event)
        # A peer that says goodbye and does not read what is on its way must not keep the connection.
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)

    def write(self, message: bytes, *, text: bool) -> None:
        """Sends a message, whether the peer reads or not; to one that has left, nothing."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        (self.conn.send_text if text else self.conn.send_binary)(message)
        self.transport.write(b"".join(self.conn.data_to_send()))

    def pause(self) -> None:
        """Reads no more."""
        self._is_paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Reads again."""
        self._is_paused = False
        if self._unread:
            self.loop.call_soon(self._read_on)
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def unsent(self) -> int:
        """Bytes that were written and have not left."""
        size: int = self.transport.get_write_buffer_size()
        return size

    def abort(self) -> None:
        """Drops the connection with what was not sent."""
        self.transport.abort()


class Server(uvicorn.Server):
    """Says where to look once it listens; when it is to stop, finishes what it has before it goes.

    A second SIGINT (Ctrl-C) makes the deadline now; a second SIGTERM, which some supervisors send, changes nothing.

    Args:
        config: how the app is served.
        drain: tells the app, stage by stage.
        patience: seconds that what is in flight may take.
        delay: seconds before that, in which everything is served as before, but the service is not ready.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, *, patience: float, delay: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._patience = patience
        self._delay = delay

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Instead of uvicorn's, which closes sockets unanswered and cancels what takes long."""
        start, before = time.perf_counter(), self.server_state.total_requests
        self._drain.begin()
        await self._until(lambda: self.force_exit, self._delay)
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        told = self._drain.go_away()
        await asyncio.sleep(SETTLE_SECONDS)
        for connection in list(self.server_state.connections):
            if not isinstance(connection, _WebSocket):
                connection.shutdown()
        await self._until(lambda: self.force_exit or self._is_quiet, self._patience)
        cut = len(self.server_state.connections)
        if not self._is_quiet:
            await self._drain.cut()
            await self._until(lambda: self._is_quiet, GOODBYE_SECONDS)
            for task in list(self.server_state.tasks):
                task.cancel()  # the doors answer for what it waits for
            for connection in list(self.server_state.connections):
                if isinstance(connection, StepProtocol):
                    connection.cut()
            await self._until(lambda: not self.server_state.tasks, GOODBYE_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        answered = self.server_state.total_requests - before
        await self.lifespan.shutdown()
        seconds = time.perf_counter() - start
        what = "stopped in %.1f s: %d sockets told, %d requests answered, %d connections cut at the deadline"
        log.info(what, seconds, told, answered, cut)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second."""
        if counter % int(10 * SILENT_SECONDS) == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, StepProtocol):
                    connection.drop_silent()
        return await super().on_tick(counter)

    @property
    def _is_quiet(self) -> bool:
        return not self.server_state.connections and not self.server_state.tasks and self._drain.is_done

    @staticmethod
    async def _until(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:  # noqa: ASYNC110 - uvicorn sets no event for any of them
            await asyncio.sleep(0.01)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, then the addresses."""
        await super().startup(sockets)
        calm_collector()
        out = Console(highlight=False, soft_wrap=True)
        for server in self.servers:
            host, port = server.sockets[0].getsockname()[:2]
            address = ip_address(host)
            name = "localhost" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
            url = f"http://{name}:{port}"
            out.print(f"Latch listens on {url}  (stop it with Ctrl-C)")
            for path, what in (
                ("/docs", "every call, to read and to try"),
                ("/v1/models", "what it serves"),
                ("/health/ready", "whether all of it loaded"),
                ("/metrics", "figures for Prometheus"),
            ):
                out.print(f"  {url}{path:<16} {what}")
            program = sys.argv[0] if sys.argv[0].endswith("latch") else "latch"
            out.print(f"  {program} demo --url {url}   a chorale, note by note")


def calm_collector() -> None:
    """Has Python's collector of cycles look less often, and at less, while steps wait."""
    gc.collect()
    gc.freeze()  # what is there now stays
    gc.set_threshold(20_000, 20, 20)  # requests come and go without cycles; the default looks after 700 objects


def listen(host: str, port: int) -> socket.socket:
    """Takes the address, before models are loaded for nothing. Raises SettingsInvalid where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsInvalid(f"cannot listen on {host}:{port}: {reason}; choose --host and --port") from error


def configure(app: Any, *, host: str, port: int, max_message_bytes: int) -> uvicorn.Config:
    """How an app is served, whichever app it is: the benchmarks' echoes are served the same way."""
    return uvicorn.Config(
        app,
        interface="asgi3",
        host=host,
        port=port,
        loop="auto",
        http=StepProtocol if isinstance(app, FrontDoor) else "httptools",
        ws=_WebSocket,
        ws_max_size=max_message_bytes,
        # Rows of float32 do not compress, and a compressor a socket costs more memory than the session.
        ws_per_message_deflate=False,
        # Where reading pauses for a full queue, the pong waits behind the messages: its lateness proves nothing.
        ws_ping_timeout=None,
        # Nobody asks where a request comes from: no proxy's word for it is needed.
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )
