"""The load generator: one thread, one epoll loop, plain sockets that send prebuilt bytes and count replies.

Rule: it costs less than the fastest server that it loads; rounds say how busy it was.
"""

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.wire import Take, payload, upgrade

PATIENCE = 20.0
Array = NDArray[Any]


def connect(port: int) -> socket.socket:
    """A blocking connection to a server on this machine."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def websocket(port: int, path: str, subprotocol: str, *, greets: bool) -> socket.socket:
    """A connection that has become a WebSocket; a server that greets has sent its hello."""
    connection = connect(port)
    connection.sendall(upgrade(path, subprotocol))
    head, _, rest = _until(connection, lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        raise RuntimeError(f"no WebSocket at {path}: {head[:400]!r}")
    if greets:
        _until(connection, lambda data: payload(data, 0) is not None, rest)
    return connection


def ask(connection: socket.socket, data: bytes, take: Take, replies: int = 1) -> bytes:
    """Sends, and waits for so many replies."""
    connection.sendall(data)
    return _until(connection, lambda data: take(data)[1] >= replies)


def _until(connection: socket.socket, enough: Callable[[bytes], bool], data: bytes = b"") -> bytes:
    while not enough(data):
        more = connection.recv(1 << 16)
        if not more:
            raise RuntimeError(f"the server closed a connection after {data[-400:]!r}")
        data += more
    return data


class Line:
    """A connection, made by `dial`, with up to `window` requests under way, each answered by `replies` replies."""

    def __init__(
        self,
        dial: Callable[[], socket.socket],
        requests: Sequence[bytes],
        take: Take,
        *,
        replies: int = 1,
        window: int = 1,
    ) -> None:
        self._dial = dial
        self.connection = dial()
        self._buffer = 1 << 14 if len(requests[0]) < 1 << 14 else 1 << 17  # Python allocates it for every read
        self.owed = 0
        self.due: deque[float] = deque()
        self._room = (window - 1) * replies  # when no more replies than this are owed, another request may go
        self._requests = cycle(requests)
        self._replies = replies
        self._take = take
        self._rest = b""
        self._unsent = b""

    def revive(self) -> None:
        """Before a round: servers close HTTP connections that are idle for some seconds."""
        self.connection.setblocking(False)
        with suppress(BlockingIOError):
            if not self.connection.recv(1, socket.MSG_PEEK):
                self.connection = self._dial()
                self.connection.setblocking(False)

    def send(self) -> bool:
        """One request more; as `flush`."""
        self._unsent += next(self._requests)
        self.owed += self._replies
        return self.flush()

    def once(self) -> None:
        """One request and its replies, then the connection is closed."""
        with self.connection:
            self.connection.settimeout(PATIENCE)
            self.send()
            while self.owed:
                self.receive()

    def fill(self) -> bool:
        """As many requests as the window has room for; as `flush`."""
        while self.owed <= self._room:
            if not self.send():
                return False
        return True

    def flush(self) -> bool:
        """Sends what waits. False when the kernel has no room for all of it."""
        try:
            self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            return False
        return not self._unsent

    def receive(self) -> int:
        """Takes what has come; how many replies that was."""
        data = self.connection.recv(self._buffer)
        if not data:
            raise RuntimeError("the server closed a connection")
        if self._rest:
            data = self._rest + data
        used, replies = self._take(data)
        self._rest = data[used:]
        self.owed -= replies
        return replies


class _Loop:
    """Which lines can be read, and which wait for room to send."""

    def __init__(self, lines: Sequence[Line]) -> None:
        for line in lines:
            line.revive()
        self._lines = {line.connection.fileno(): line for line in lines}
        self._epoll = select.epoll()
        for number in self._lines:
            self._epoll.register(number, select.EPOLLIN)

    def sent(self, line: Line, all_of_it: bool) -> None:
        """Tells the outcome of a `send`, `fill` or `flush`: a line that has more to send is watched for room."""
        if not all_of_it:
            self._epoll.modify(line.connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def ready(self, seconds: float) -> Iterator[Line]:
        """Lines that can be read, at most after `seconds`."""
        for number, events in self._epoll.poll(seconds):
            line = self._lines[number]
            if events & select.EPOLLOUT and line.flush():
                self._epoll.modify(number, select.EPOLLIN)
            if events & select.EPOLLIN:
                yield line

    def reading(self) -> Iterator[Line | None]:
        """Endless: a line that can be read, or None where there was none at this look."""
        while True:
            yield from self.ready(0)
            yield None

    def drain(self) -> None:
        """Until nobody is owed a reply."""
        give_up = time.perf_counter() + PATIENCE
        while any(line.owed for line in self._lines.values()):
            for line in self.ready(0.01):
                line.receive()
            if time.perf_counter() > give_up:
                raise RuntimeError(f"a reply did not come within {PATIENCE:g} s")
        self._epoll.close()


def closed_loop(lines: Sequence[Line], seconds: float) -> float:
    """Replies a second when every line sends whenever its window has room."""
    loop, replies = _Loop(lines), 0
    start = time.perf_counter()
    for line in lines:
        loop.sent(line, line.fill())
    while (elapsed := time.perf_counter() - start) < seconds:
        for line in loop.ready(PATIENCE):
            replies += line.receive()
            if not line.fill():
                loop.sent(line, False)
    loop.drain()
    return replies / elapsed


class Latencies(NamedTuple):
    """Seconds from when a message was due to its reply; and how late messages were sent, 99th percentile."""

    replies: Array
    late: float


def open_loop(lines: Sequence[Line], rate: float, seconds: float, seed: int = 0) -> Latencies:
    """Messages at random moments (Poisson), `rate` a second over all lines, however late the replies are.

    It spins, and looks at the clock after every line that it reads, so that messages leave in time: it uses its core
    up, whatever it does.
    """
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds))).tolist()
    turns = iter([lines[i] for i in rng.integers(len(lines), size=len(due))])
    loop, late, replies = _Loop(lines), list[float](), list[float]()
    reading = loop.reading()
    start = time.perf_counter()
    for moment in due:
        while (now := time.perf_counter() - start) < moment:
            if (ready := next(reading)) is not None:
                count, came = ready.receive(), time.perf_counter() - start
                replies.extend(came - ready.due.popleft() for _ in range(count))
        line = next(turns)
        line.due.append(moment)
        loop.sent(line, line.send())
        late.append(now - moment)
    loop.drain()
    for line in lines:  # the last few replies tell nothing new
        line.due.clear()
    return Latencies(np.array(replies), float(np.percentile(late, 99)))
