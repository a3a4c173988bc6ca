"""The benchmarks' reading of replies: a count that is wrong would make every figure wrong."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import wire
from benchmarks.wire import Take

ROW = 8


def message(payload: bytes, opcode: int = wire.BINARY) -> bytes:
    """A WebSocket message of a server: unmasked."""
    size = len(payload)
    if size < 126:
        return struct.pack(">BB", opcode, size) + payload
    if size < 1 << 16:
        return struct.pack(">BBH", opcode, 126, size) + payload
    return struct.pack(">BBQ", opcode, 127, size) + payload


def stepped(steps: int) -> bytes:
    """A frame of output rows."""
    return wire.FRAME.pack(wire.STEPPED, 0, 0, steps, 1) + bytes(ROW * steps)


def fed(take: Take, data: bytes, cuts: list[int]) -> int:
    """Replies counted when `data` comes in pieces."""
    total, rest, start = 0, b"", 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        rest += data[start:cut]
        start = cut
        used, count = take(rest)
        rest, total = rest[used:], total + count
    assert rest == b""
    return total


CUTS = st.lists(st.integers(0, 10**6), max_size=6)


@given(st.lists(st.sampled_from([2, 125, 126, 70_000]), min_size=1, max_size=4), CUTS)
def test_messages_are_counted_however_they_arrive(sizes: list[int], cuts: list[int]) -> None:
    """Cut anywhere, of any length of length, with a ping between them."""
    data = message(b"{ping", wire.PING).join(message(b"{}".ljust(size), wire.TEXT) for size in sizes)
    assert fed(wire.messages(b"{"), data, cuts) == len(sizes)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3), CUTS)
def test_frames_are_counted_and_not_messages(messages: list[list[int]], cuts: list[int]) -> None:
    """Replies of one run share a message; a hello counts too, a ping does not."""
    hello = wire.FRAME.pack(wire.HELLO, 0, 0, 2, 0) + b"{}"
    data = message(hello) + message(b"ping", wire.PING)
    data += b"".join(message(b"".join(map(stepped, steps))) for steps in messages)
    assert fed(wire.frames(ROW), data, cuts) == 1 + sum(map(len, messages))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), CUTS)
def test_responses_are_counted_however_they_arrive(sizes: list[int], cuts: list[int]) -> None:
    """Bodies of any length, and a 204 that has none."""
    data = b"".join(
        b"HTTP/1.1 200 OK\r\ndate: today\r\nContent-Length: %d\r\nx: y\r\n\r\n%s" % (size, b"\r" * size)
        for size in sizes
    )
    assert fed(wire.responses, b"HTTP/1.1 204 No Content\r\n\r\n" + data, cuts) == 1 + len(sizes)


@pytest.mark.parametrize(
    ("take", "data"),
    [
        (wire.messages(b'{"type":"step"'), message(b'{"type":"error"}', wire.TEXT)),
        (wire.messages(b"{"), message(struct.pack(">H", 1011), 0x88)),
        (wire.messages(b"{"), message(b"")),
        (wire.frames(ROW), message(stepped(1) + wire.FRAME.pack(131, 0, 0, 2, 1) + b"{}")),
        (wire.responses, b"HTTP/1.1 409 Conflict\r\ncontent-length: 2\r\n\r\n{}"),
    ],
)
def test_a_reply_that_is_an_error_counts_nothing(take: Take, data: bytes) -> None:
    """Refused steps are quick: none of them may pass for a reply."""
    with pytest.raises(RuntimeError, match="unexpected"):
        take(data)


@given(st.binary(max_size=70_000))
def test_a_mask_of_zero_leaves_the_bytes(payload: bytes) -> None:
    """What a server unmasks is what was meant."""
    data = wire.message(payload, wire.BINARY)
    assert data[0] == wire.BINARY
    assert data[1] & 128
    assert data.endswith(bytes(4) + payload)


def test_an_open_frame_names_its_session() -> None:
    """The count of a frame that carries JSON is its bytes."""
    kind, _, channel, count, _ = wire.FRAME.unpack_from(frame := wire.open_frame("s-1", 7))
    assert (kind, channel) == (wire.OPEN, 7)
    assert json.loads(frame[-count:]) == {"session": "s-1"}
