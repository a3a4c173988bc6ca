"""A socket's far end without a network: the test says when the client reads, and sees all that is kept for it."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from service.routers.stream import StreamDoor


async def turn(number: int) -> None:
    """A turn of the loop. Every twentieth rests: beside a loop that never does, a run in another thread may wait
    seconds for Python's lock, which is taken back before the thread is awake.
    """
    await asyncio.sleep(0 if number % 20 else 0.001)


class Wire:
    """What `service/server.py` gives a socket; the bytes in between are lists.

    Attributes:
        sent: messages on their way to the service, which has paused reading them.
        received: messages that the client has been sent.
        left: bytes that lie in between.
        reads: whether the client reads; if not, the service is told after one write that the line is full.
    """

    def __init__(self) -> None:
        self.on_message: Callable[[bytes | str], None] | None = None
        self.on_full: Callable[[], None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.sent: deque[bytes | str] = deque()
        self.received: list[bytes] = []
        self.reads = True
        self.left = 0
        self.paused = self.aborted = self.gone = False

    def write(self, message: bytes, *, text: bool) -> None:
        """Takes a message, unless nobody is there any more."""
        if not self.gone:
            self.received.append(message)
            if not self.reads:
                self.left += len(message)
                self.writable.clear()
                if self.on_full is not None:
                    self.on_full()

    def pause(self) -> None:
        """Leaves messages where they are."""
        self.paused = True

    def resume(self) -> None:
        """Hands on what lies there, when the loop turns."""
        self.paused = False
        asyncio.get_running_loop().call_soon(self.deliver)

    def unsent(self) -> int:
        """What lies in between."""
        return self.left

    def abort(self) -> None:
        """Notes it."""
        self.aborted = True

    def deliver(self) -> None:
        """Hands messages to the service until it reads no more."""
        while self.sent and not self.paused and not self.gone and self.on_message is not None:
            self.on_message(self.sent.popleft())


class Client:
    """A client of `door` on a wire of its own, from its handshake on."""

    def __init__(self, door: StreamDoor, path: str, subprotocol: str | None = None) -> None:
        self.wire = Wire()
        self.closed: dict[str, Any] = {}
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._events.put_nowait({"type": "websocket.connect"})
        scope = {
            "type": "websocket",
            "path": path,
            "subprotocols": [subprotocol] if subprotocol else [],
            "extensions": {"latch.wire": self.wire},
        }
        self.task = asyncio.create_task(door.serve(scope, self._events.get, self._send))

    async def _send(self, event: Any) -> None:
        await self.wire.writable.wait()
        if event["type"] == "websocket.close":
            self.closed = event

    def send(self, *messages: bytes | str) -> None:
        """Messages, one after another."""
        self.wire.sent += messages
        self.wire.deliver()

    def early(self, message: bytes | str) -> None:
        """A message that went before the service had said that it speaks."""
        kind = "text" if isinstance(message, str) else "bytes"
        self._events.put_nowait({"type": "websocket.receive", kind: message})

    def read(self) -> None:
        """From now on the client reads."""
        self.wire.reads = True
        self.wire.left = 0
        self.wire.writable.set()

    def leave(self) -> None:
        """The connection is gone, and with it what was still in the network."""
        self.wire.gone = True
        self.wire.writable.set()
        self._events.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def until(self, seen: Callable[[], Any]) -> None:
        """Turns the loop until something is so."""
        async with asyncio.timeout(20):
            turns = 0
            while not seen():
                turns += 1
                await turn(turns)
