"""The client's side of `latch.binary`, written from the protocol's page: it shares no code with the service."""

import json
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

STEP, OPEN, CLOSE, STEPPED, HELLO, ERROR, GOING_AWAY = 1, 2, 3, 129, 130, 131, 132
REPLAYED, ALREADY_APPLIED = 1, 2


def frame(kind: int, channel: int = 0, count: int = 0, first: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    """One frame of any kind, right or wrong."""
    numbers = ((kind, 1), (flags, 1), (channel, 2), (count, 4), (first, 8))
    return b"".join(number.to_bytes(size, "little") for number, size in numbers) + payload


def step(channel: int, rows: Any, first: int = 0) -> bytes:
    """A STEP: `rows` is an array [T, *shape]."""
    return frame(STEP, channel, len(rows), first, np.asarray(rows).tobytes())


def opens(channel: int, session: str, outputs: list[str] | None = None) -> bytes:
    """An OPEN."""
    payload = json.dumps({"session": session} | ({} if outputs is None else {"outputs": outputs})).encode()
    return frame(OPEN, channel, len(payload), payload=payload)


def closes(channel: int) -> bytes:
    """A CLOSE."""
    return frame(CLOSE, channel)


class Reply(NamedTuple):
    """A frame of the server."""

    kind: int
    flags: int
    channel: int
    count: int
    first: int
    payload: bytes

    @property
    def document(self) -> Any:
        """The JSON of a HELLO or an ERROR."""
        return json.loads(self.payload)

    def rows(self, dtype: str, *shape: int) -> np.ndarray:
        """[T, *shape] of a STEPPED that has one output."""
        return np.frombuffer(self.payload, dtype).reshape(self.count, *shape)


def replies(message: bytes, row_bytes: Callable[[int], int]) -> list[Reply]:
    """All frames of a message; `row_bytes` tells how many bytes an output row of a channel has."""
    found = []
    while message:
        kind, flags = message[0], message[1]
        channel, count, first = (int.from_bytes(message[a:b], "little") for a, b in ((2, 4), (4, 8), (8, 16)))
        size = count
        if kind == STEPPED:
            size = 0 if flags & ALREADY_APPLIED else count * row_bytes(channel)
        assert len(message) >= 16 + size, "a frame of the server is cut short"
        found.append(Reply(kind, flags, channel, count, first, message[16 : 16 + size]))
        message = message[16 + size :]
    return found


class Peer:
    """A client on a socket (a `websockets` one of the sync kind) that reads reply by reply."""

    def __init__(self, socket: Any, row_bytes: int = 16) -> None:
        self.socket = socket
        self.row_bytes: dict[int, int] = {}
        self._default = row_bytes
        self._come: deque[Reply] = deque()

    def send(self, *frames: bytes) -> None:
        """One message."""
        self.socket.send(b"".join(frames))

    def next(self) -> Reply:
        """The next reply."""
        while not self._come:
            message = self.socket.recv(timeout=30)
            assert isinstance(message, bytes)
            self._come += replies(message, lambda channel: self.row_bytes.get(channel, self._default))
        return self._come.popleft()

    def take(self, count: int) -> list[Reply]:
        """The next replies."""
        return [self.next() for _ in range(count)]

    def open(self, channel: int, session: str, outputs: list[str] | None = None, row_bytes: int | None = None) -> Any:
        """Binds a channel; what its hello says."""
        if row_bytes is not None:
            self.row_bytes[channel] = row_bytes
        self.send(opens(channel, session, outputs))
        hello = self.next()
        assert (hello.kind, hello.channel) == (HELLO, channel), hello
        return hello.document
