"""The load: clients in a closed loop over plain sockets, one thread, prebuilt bytes; HTTP/1.1 or WebSocket.

Rule: the same loop loads every server and costs less than any of them. A client has one session and one request under
way. The mask of a WebSocket message is 0 here: the masked bytes are then the bytes themselves.
"""

import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

SILENT = 10.0  # seconds without any reply after which a server counts as stuck


def http(method: str, path: str, body: bytes, kind: str = "application/json", *headers: str) -> bytes:
    """An HTTP request that keeps its connection."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def upgrade(path: str, *headers: str) -> bytes:
    """The request that opens a WebSocket."""
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: Upgrade", "Upgrade: websocket", *headers]
    lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    return "\r\n".join([*lines, "", ""]).encode()


def message(payload: bytes, opcode: int = 1) -> bytes:
    """A WebSocket message of a client: text is 1, binary 2, pong 10."""
    size, first = len(payload), 128 | opcode
    head = struct.pack(">BB", first, 128 | size) if size < 126 else struct.pack(">BBH", first, 254, size)
    return head + bytes(4) + payload


def response(data: bytes) -> tuple[int, int]:
    """Where the body of the HTTP response at the start of `data` begins and ends; ends at 0 while not all is there."""
    begin = data.find(b"\r\n\r\n") + 4
    if begin == 3:
        return 0, 0
    head = data[:begin].lower()
    if not head.startswith((b"http/1.1 101", b"http/1.1 200", b"http/1.1 201")):
        raise RuntimeError(f"an unexpected reply: {data[:600]!r}")
    place = head.find(b"\r\ncontent-length:")
    end = begin if place < 0 else begin + int(head[place + 17 : head.index(b"\r", place + 2)])
    return begin, end if end <= len(data) else 0


def frame(data: bytes) -> tuple[int, int]:
    """Where the payload of the WebSocket frame at the start of `data` begins and ends; ends at 0 while incomplete."""
    if len(data) < 10:
        return 0, (2 if len(data) >= 2 and data[1] == 0 else 0)
    size, begin = data[1], 2
    if size == 126:
        size, begin = int.from_bytes(data[2:4]), 4
    elif size == 127:
        size, begin = int.from_bytes(data[2:10]), 10
    return begin, begin + size if begin + size <= len(data) else 0


class Client:
    """A connection with its session.

    Args:
        port: of the server.
        opening: requests that open the session, each answered; an upgrade to WebSocket is the last.
        greeted: whether the server speaks first on the WebSocket.
        requests: sent in turn, and from `cycle` on again and again.
        cycle: how many of them are sent once only.
    """

    def __init__(
        self, port: int, opening: Sequence[bytes], greeted: bool, requests: Sequence[bytes], cycle: int
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SILENT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent, self.last, self.started = 0, b"", 0.0
        self._requests, self._cycle = requests, cycle
        self._data, self._split = b"", response
        for request in opening:
            self.socket.sendall(request)
            self._wait()
            self._split = frame if request.startswith(b"GET") else response
        if greeted:
            self._wait()

    def send(self) -> None:
        """Sends the next request."""
        at, cycle = self.sent, self._cycle
        self.sent += 1
        self.started = time.perf_counter()
        self.socket.send(self._requests[at if at < cycle else cycle + (at - cycle) % (len(self._requests) - cycle)])

    def receive(self) -> bool:
        """Reads once; whether a reply is complete. It is then `last`."""
        if not (received := self.socket.recv(65536)):
            raise ConnectionError("the server closed the connection")
        self._data += received
        return self._take()

    def _wait(self) -> None:
        while not self._take() and not self.receive():
            pass

    def _take(self) -> bool:
        begin, end = self._split(self._data)
        if not end:
            return False
        opcode, payload, self._data = self._data[0] & 15, self._data[begin:end], self._data[end:]
        if self._split is frame and opcode == 8:
            raise ConnectionError(f"the server closed the socket: {payload!r}")
        if self._split is frame and opcode == 9:
            self.socket.send(message(payload, 10))
            return self._take()
        self.last = payload
        return True


def closed_loop(clients: Sequence[Client], seconds: float, replied: Callable[[Client, float], None]) -> float:
    """Every client sends as soon as it has its reply; ends when all replies are there. -> replies a second.

    Args:
        clients: none has a request under way.
        seconds: how long requests are sent; 0 sends one each.
        replied: called with each reply's client and its latency in seconds.
    """
    by_socket = {client.socket.fileno(): client for client in clients}
    poll = select.epoll()
    for number in by_socket:
        poll.register(number, select.EPOLLIN)
    begin = time.perf_counter()
    for client in clients:
        client.send()
    waiting, count = len(clients), 0
    while waiting:
        if not (ready := poll.poll(SILENT)):
            raise TimeoutError(f"{waiting} of {len(clients)} clients got no reply for {SILENT:.0f} s")
        for number, _ in ready:
            client = by_socket[number]
            if not client.receive():
                continue
            now = time.perf_counter()
            replied(client, now - client.started)
            count += 1
            if now - begin < seconds:
                client.send()
            else:
                waiting -= 1
    poll.close()
    return count / (time.perf_counter() - begin)
