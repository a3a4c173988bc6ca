"""Both wire formats from the client's side: requests as prebuilt bytes, replies counted and never decoded.

Rule: a reply that is not the expected kind ends the benchmark. A client's WebSocket mask is 0 here: the masked bytes
are then the bytes themselves.
"""

import json
import struct
from collections.abc import Callable
from typing import Any

TEXT, BINARY = 0x81, 0x82
PING = 0x89  # the server does not wait for the pong
STEP, OPEN, STEPPED, HELLO = 1, 2, 129, 130
FRAME = struct.Struct("<BBHIQ")  # type, flags, channel, count, first step
JSON, OCTETS = "application/json", "application/octet-stream"

# Bytes received -> how many of them are whole replies, and how many replies those are.
Take = Callable[[bytes], tuple[int, int]]


def message(payload: bytes, opcode: int) -> bytes:
    """A WebSocket message of a client."""
    size = len(payload)
    if size < 126:
        head = struct.pack(">BB", opcode, 128 | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", opcode, 128 | 126, size)
    else:
        head = struct.pack(">BBQ", opcode, 128 | 127, size)
    return head + bytes(4) + payload


def step_frame(rows: bytes, steps: int, channel: int = 0) -> bytes:
    """STEP: the next `steps` rows of the session on a channel."""
    return FRAME.pack(STEP, 0, channel, steps, 0) + rows


def open_frame(session: str, channel: int) -> bytes:
    """OPEN: binds a session to a channel."""
    body = json.dumps({"session": session}).encode()
    return FRAME.pack(OPEN, 0, channel, len(body), 0) + body


def request(method: str, path: str, body: bytes = b"", content_type: str = JSON) -> bytes:
    """An HTTP/1.1 request that keeps its connection."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def upgrade(path: str, subprotocol: str) -> bytes:
    """The request that makes a connection a WebSocket."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        f"Sec-WebSocket-Protocol: {subprotocol}\r\n\r\n"
    ).encode()


def messages(begins: bytes) -> Take:
    """Replies that are WebSocket messages, each of which begins so."""

    def take(data: bytes) -> tuple[int, int]:
        at = count = 0
        while (found := payload(data, at)) is not None:
            start, end = found
            if data[at] != PING:
                if not data.startswith(begins, start):
                    raise _unexpected(data[at:])
                count += 1
            at = end
        return at, count

    return take


def frames(row: int) -> Take:
    """Replies that are frames, one or many in a message: STEPPED with rows of `row` bytes, or HELLO."""

    def take(data: bytes) -> tuple[int, int]:
        at = count = 0
        while (found := payload(data, at)) is not None:
            place, end = found
            while place < end and data[at] != PING:
                kind, _, _, size, _ = FRAME.unpack_from(data, place)
                if kind not in (STEPPED, HELLO):
                    raise _unexpected(data[place:])
                place += FRAME.size + size * (row if kind == STEPPED else 1)
                count += 1
            at = end
        return at, count

    return take


def payload(data: bytes, at: int) -> tuple[int, int] | None:
    """Where the payload of the WebSocket message at `at` starts and ends, if all of it is there."""
    start, have = at + 2, len(data)
    if start > have:
        return None
    size = data[at + 1]
    if size > 125:
        width = 2 if size == 126 else 8
        start += width
        if start > have:
            return None
        size = int.from_bytes(data[at + 2 : start])
    end = start + size
    return (start, end) if end <= have else None


def responses(data: bytes) -> tuple[int, int]:
    """Replies that are HTTP responses, each of which must say 2xx and how long it is."""
    at = count = 0
    while (body := data.find(b"\r\n\r\n", at) + 4) > 3:
        if not data.startswith(b"HTTP/1.1 2", at):
            raise _unexpected(data[at:])
        place = data.find(b"ength: ", at, body) + 7
        end = body + (int(data[place : data.index(b"\r", place)]) if place > 6 else 0)  # a 204 has none
        if end > len(data):
            break
        at = end
        count += 1
    return at, count


def _unexpected(data: bytes) -> Exception:
    return RuntimeError(f"an unexpected reply: {data[:400]!r}")


def dumps(value: Any) -> bytes:
    """Compact JSON, as a frugal client writes it."""
    return json.dumps(value, separators=(",", ":")).encode()
