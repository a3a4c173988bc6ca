"""The binary codec beside a client's own packer and parser: round trips, bad frames, and the page that tells of it."""

import json
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ChannelNotOpen, InvalidInput, LatchError, Malformed, PayloadTooLarge
from service.wire import StepReply, StepRequest, frames
from service.wire.frames import Frame, Kind
from service.wire.rows import Field, RowFormat
from tests.service import peer

FIELDS = [Field("float32", (3,)), Field("int64", ()), Field("float32", (2, 3)), Field("int64", (1,))]
FORMATS = [RowFormat(field, {"y": field}) for field in FIELDS]
TOY = FORMATS[0]


def read(message: bytes, rows: RowFormat = TOY) -> list[Frame]:
    """All frames of a message; every channel is open."""
    return list(frames.read(message, lambda _: rows.input_bytes))


def row(*values: float) -> bytes:
    """A packed row of three."""
    return np.array(values, np.float32).tobytes()


class Sent(NamedTuple):
    """A STEP of a client."""

    channel: int
    steps: int
    first: int
    payload: bytes

    @property
    def bytes(self) -> bytes:
        """As it travels."""
        return peer.frame(peer.STEP, self.channel, self.steps, self.first, self.payload)


@st.composite
def sent(
    draw: Callable[..., Any], rows: RowFormat, steps: st.SearchStrategy[int], first: st.SearchStrategy[int]
) -> Sent:
    """A STEP of any channel, its payload as long as it should be."""
    count = draw(steps)
    size = count * rows.input_bytes
    return Sent(draw(st.integers(0, 2**16 - 1)), count, draw(first), draw(st.binary(min_size=size, max_size=size)))


FIRST = st.integers(0, 3) | st.integers(0, 2**64 - 1) | st.sampled_from([2**63 - 1, 2**63])


@given(data=st.data(), rows=st.sampled_from(FORMATS))
def test_frames_come_out_as_they_were_packed(data: st.DataObject, rows: RowFormat) -> None:
    """STEP, OPEN and CLOSE of any channel, many in a message, are read one after another as the client meant them."""
    message, expected = b"", []
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from([Kind.STEP, Kind.OPEN, Kind.CLOSE]))
        step = data.draw(sent(rows, st.integers(0, 4), FIRST))
        if kind == Kind.OPEN:
            step = step._replace(steps=len(step.payload))
        elif kind == Kind.CLOSE:
            step = step._replace(steps=0, payload=b"")
        message += peer.frame(kind, *step)
        expected.append(Frame(kind, *step))
    assert read(message, rows) == expected


@given(
    outputs=st.lists(st.binary(min_size=8, max_size=8), max_size=3),
    channel=st.integers(0, 2**16 - 1),
    first=st.integers(1, 2**40),
    replayed=st.booleans(),
    kept=st.booleans(),
)
def test_replies_are_what_a_client_reads(
    outputs: list[bytes], channel: int, first: int, replayed: bool, kept: bool
) -> None:
    """STEPPED has channel, T, first step and rows; a duplicate is flagged, and has no rows where none are kept."""
    kept = kept or not replayed
    data, last = b"".join(outputs) if kept else None, first + len(outputs) - 1
    message = frames.stepped(channel, StepReply(("y",), data, first, last, replayed))
    flags = (peer.REPLAYED if replayed else 0) | (0 if kept else peer.ALREADY_APPLIED)
    [reply] = peer.replies(message, lambda _: 8)
    assert reply == (peer.STEPPED, flags, channel, len(outputs), first, data or b"")


@given(replies=st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(1, 2**63), st.binary(min_size=6, max_size=6))))
def test_a_block_of_replies_is_the_replies(replies: list[tuple[int, int, bytes]]) -> None:
    """N replies packed together are byte for byte N replies packed alone."""
    channels, firsts, data = ([reply[i] for reply in replies] for i in range(3))
    alone = [frames.stepped(channel, StepReply(("y",), rows, first, first + 2)) for channel, first, rows in replies]
    assert frames.stepped_block(channels, 3, firsts, data) == b"".join(alone)


def test_a_hello_and_an_error_are_json_with_their_length() -> None:
    """The payload is one JSON document, its bytes are counted, and an error names the step that it refuses."""
    for kind in (Kind.HELLO, Kind.ERROR):
        [reply] = peer.replies(frames.notice(kind, 513, {"error": "é"}, 7), lambda _: 0)
        assert (reply.kind, reply.flags, reply.channel, reply.first) == (kind, 0, 513, 7)
        assert reply.document == {"error": "é"}


STEP = peer.step(1, [row(1, 2, 3)])
BAD: dict[str, tuple[bytes, str]] = {
    "half a header": (STEP[:15], "15 bytes are left, a header has 16"),
    "half a payload": (STEP[:-1], "count 1 means 12 bytes of payload, 11 are left"),
    "a count beyond the message": (peer.frame(1, 9, 2**32 - 1), "channel 9: count 4294967295"),
    "half an OPEN": (peer.frame(2, 0, 5, payload=b"{}"), "count 5 means 5 bytes of payload, 2 are left"),
    "half a CLOSE": (peer.frame(3, 0, 5, payload=b"{}"), "count 5 means 5 bytes of payload, 2 are left"),
    "an unknown type": (peer.frame(4), "type 4; a client sends 1, 2 or 3"),
    "type 0": (peer.frame(0), "type 0"),
    "a frame of the server": (peer.frame(129), "type 129"),
    "flags": (peer.frame(1, flags=2), "flags 2, a client's are 0"),
}


@pytest.mark.parametrize(("message", "words"), BAD.values(), ids=BAD)
def test_a_frame_that_cannot_be_read_ends_the_message(message: bytes, words: str) -> None:
    """The frames before it count; the error says which frame it is, where it begins and what is wrong."""
    for index in range(3):
        reader = frames.read(index * STEP + message, lambda _: 12)
        assert [next(reader).channel for _ in range(index)] == [1] * index
        with pytest.raises(Malformed, match=f"^frame {index}\\b.*{words}") as caught:
            next(reader)
        assert caught.value.extras["frame"] == index


def test_an_empty_message_is_malformed() -> None:
    """Not a frame, and nothing that could be answered."""
    with pytest.raises(Malformed, match="frame 0 at byte 0: 0 bytes are left"):
        read(b"")


def test_a_step_of_a_channel_that_is_not_open_ends_the_message() -> None:
    """Nobody knows its size, so nobody knows where the next frame begins; what came before it counts."""
    message = peer.step(1, [row(1, 2, 3)]) + peer.step(2, [row(1, 2, 3)], 5) + peer.step(1, [row(1, 2, 3)])
    reader = frames.read(message, {1: 12}.get)
    assert next(reader).channel == 1
    with pytest.raises(ChannelNotOpen, match="frame 1 at byte 28: channel 2 is not open") as caught:
        next(reader)
    assert caught.value.extras == {"frame": 1, "channel": 2, "first_step": 5}


def test_what_binds_a_channel_in_a_message_counts_for_the_frames_after_it() -> None:
    """Sizes are asked for frame by frame: an OPEN and the first STEP of its channel may share a message."""
    open_channels: dict[int, int] = {}
    reader = frames.read(peer.opens(7, "a") + peer.step(7, [row(1, 2, 3)]), open_channels.get)
    assert next(reader).kind == Kind.OPEN
    open_channels[7] = 12
    assert (frame := next(reader)).kind == Kind.STEP
    assert frame.payload == row(1, 2, 3)


def request(count: int, first: int = 0, limit: int = 10) -> StepRequest:
    """What a STEP of `count` rows asks for."""
    [frame] = read(peer.frame(peer.STEP, 0, count, first, bytes(12 * count)))
    return frames.step_request(frame, ("y",), limit)


def test_a_step_asks_for_its_rows() -> None:
    """Its bytes as they came; step 0 is the next in order, and numbers have 63 bits."""
    assert request(2) == StepRequest(bytes(24), 2, ("y",), None)
    assert request(2, 7).first_step == 7
    assert request(1, 2**63 - 1).first_step == 2**63 - 1


@pytest.mark.parametrize(
    ("count", "first", "kind", "path"),
    [
        (0, 0, InvalidInput, "count"),
        (0, 5, InvalidInput, "count"),
        (11, 0, PayloadTooLarge, "count"),
        (1, 2**63, InvalidInput, "first_step"),
        (1, 2**64 - 1, InvalidInput, "first_step"),
    ],
)
def test_a_step_that_cannot_be_asked_for_is_named(count: int, first: int, kind: type[LatchError], path: str) -> None:
    """No step, more of them than the limit, or a number that no session can reach."""
    with pytest.raises(kind) as caught:
        request(count, first)
    assert caught.value.extras["path"] == path
    if kind is PayloadTooLarge:
        assert caught.value.extras["limit"] == 10


@pytest.mark.parametrize(
    ("payload", "kind", "words"),
    [
        (b"", Malformed, "not JSON"),
        (b"{", Malformed, "not JSON"),
        (b"\xff\xfe", Malformed, "not JSON"),
        (b"[" * 20_000, LatchError, "OPEN of channel 3"),
        (b"[]", InvalidInput, "array"),
        (b"{}", InvalidInput, "session"),
        (b'{"session": 5}', InvalidInput, "$.session"),
        (b'{"session": "a", "outputs": "y"}', InvalidInput, "$.outputs"),
        (b'{"session": "a", "outputs": [1]}', InvalidInput, "$.outputs[0]"),
        (b'{"session": "a", "output": []}', InvalidInput, "unknown field `output`"),
    ],
)
def test_a_bad_open_is_named(payload: bytes, kind: type[LatchError], words: str) -> None:
    """Not JSON, not the fields that an OPEN has, or unknown ones."""
    [frame] = read(peer.frame(peer.OPEN, 3, len(payload), payload=payload))
    with pytest.raises(kind) as caught:
        frames.open_request(frame)
    assert words in str(caught.value)
    assert "channel 3" in str(caught.value)


def test_an_open_names_a_session_and_perhaps_outputs() -> None:
    """Without outputs, the default is meant; an empty list means none."""
    for outputs in (None, [], ["y", "z"]):
        [frame] = read(peer.opens(3, "a", outputs))
        opened = frames.open_request(frame)
        assert (opened.session, opened.outputs) == ("a", outputs)


def test_a_message_of_one_step_is_read_at_once() -> None:
    """A lone STEP is found without looking for more, whatever its payload; anything else is left to be taken apart."""
    step = peer.step(513, [row(1, 2, 3)], 7)
    assert frames.read_single(step) == Frame(Kind.STEP, 513, 1, 7, row(1, 2, 3))
    assert frames.read_single(step + step) == Frame(Kind.STEP, 513, 1, 7, row(1, 2, 3) + step)
    for other in (b"", step[:16], peer.opens(0, "a"), peer.closes(0), peer.frame(1, flags=1, payload=b"x")):
        assert frames.read_single(other) is None


@given(data=st.data(), rows=st.sampled_from(FORMATS), steps=st.integers(1, 4))
def test_a_block_asks_for_what_its_frames_ask_for(data: st.DataObject, rows: RowFormat, steps: int) -> None:
    """Equal steps for many channels, read as arrays, are the requests of the same message read frame by frame."""
    first = st.integers(0, 2**63 - 1)
    sends = data.draw(
        st.lists(sent(rows, st.just(steps), first), min_size=1, max_size=6, unique_by=lambda s: s.channel)
    )
    found = frames.read_block(b"".join(each.bytes for each in sends), rows, ("y", "z"))
    assert found is not None
    assert_same(found, sends, rows)


def assert_same(found: Any, sends: list[Sent], rows: RowFormat) -> None:
    """A block holds the requests that reading frame by frame gives."""
    channels, block = found
    read_apart = read(b"".join(each.bytes for each in sends), rows)
    requests = [frames.step_request(frame, block.outputs, 100) for frame in read_apart]
    assert channels == [frame.channel for frame in read_apart]
    assert [block.request(i) for i in range(len(channels))] == requests
    assert block.digests() == [each.digest for each in requests]
    assert block.inputs.shape == (len(sends), requests[0].steps, *rows.input.shape)


@given(data=st.data(), rows=st.sampled_from(FORMATS))
def test_whatever_is_read_as_a_block_is_one(data: st.DataObject, rows: RowFormat) -> None:
    """Of messages that are almost blocks, or none, those that are read as arrays mean the same frame by frame."""
    sends = data.draw(st.lists(sent(rows, st.integers(0, 2), FIRST), min_size=1, max_size=4))
    message = bytearray(b"".join(each.bytes for each in sends))
    for _ in range(data.draw(st.integers(0, 2))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    found = frames.read_block(bytes(message), rows, ("y",))
    if found is not None:
        read_apart = [Sent(f.channel, f.count, f.first_step, f.payload) for f in read(bytes(message), rows)]
        assert_same(found, read_apart, rows)


IRREGULAR = {
    "another type": peer.step(0, [row(1, 2, 3)]) + peer.frame(2, 1, 1, payload=row(1, 2, 3)),
    "flags": peer.step(0, [row(1, 2, 3)]) + peer.frame(1, 1, 1, payload=row(1, 2, 3), flags=1),
    "a channel twice": STEP + STEP,
    "another T": peer.step(0, [row(1, 2, 3)]) + peer.frame(1, 1, 2, payload=row(1, 2, 3)),
    "T = 0": peer.frame(1, 1) + peer.frame(1, 2),
    "a number of 64 bits": peer.step(0, [row(1, 2, 3)]) + peer.step(1, [row(1, 2, 3)], 2**63),
    "bytes left over": peer.step(0, [row(1, 2, 3)]) + STEP + b"\0",
    "a count beyond any message": peer.frame(1, 1, 2**32 - 1, payload=bytes(100)),
    "no header": b"\1\0",
    "nothing": b"",
}


@pytest.mark.parametrize("message", IRREGULAR.values(), ids=IRREGULAR)
def test_an_irregular_message_is_no_block(message: bytes) -> None:
    """What is not all STEP, all of one T and each channel once is left to be taken apart."""
    assert frames.read_block(message, TOY, ("y",)) is None


@given(
    message=st.binary(max_size=80)
    | st.tuples(st.sampled_from([1, 2, 3]), st.binary(max_size=60)).map(lambda t: bytes([t[0], 0, 1, 0]) + t[1]),
    size=st.sampled_from([None, 0, 1, 12]),
)
def test_no_bytes_raise_anything_else(message: bytes, size: int | None) -> None:
    """Random bytes are frames or a typed error, never another exception, in every way of reading."""
    for rows in FORMATS:
        frames.read_block(message, rows, ("y",))
    frames.read_single(message)
    try:
        for frame in frames.read(message, lambda _: size):
            (frames.open_request if frame.kind == Kind.OPEN else lambda f: frames.step_request(f, (), 5))(frame)
    except LatchError as error:
        json.dumps(error.to_dict())


@given(payload=st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | st.just(b'{"session":"\\ud800"}'))
def test_no_open_raises_anything_else(payload: bytes) -> None:
    """Random payloads are a typed error that can be told."""
    try:
        frames.open_request(Frame(Kind.OPEN, 0, len(payload), 0, payload))
    except LatchError as error:
        json.dumps(error.to_dict(), ensure_ascii=False).encode()


def test_the_page_is_the_codec() -> None:
    """Offsets, sizes, types and flags of the protocol's page are those that are packed."""
    page = frames.__doc__ or ""
    fields = re.findall(r"^ +(\d+) +(\d+)  (type|flags|channel|count|first step)\b", page, re.MULTILINE)
    sizes = [struct.calcsize("<" + code) for code in frames.HEADER.format.removeprefix("<")]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    assert [(int(offset), int(size)) for offset, size, _ in fields] == list(zip(offsets, sizes, strict=True))
    assert [name for *_, name in fields] == ["type", "flags", "channel", "count", "first step"]
    assert re.findall(r"^ +(\d+) +payload", page, re.MULTILINE) == [str(frames.HEADER.size)]
    kinds = re.findall(r"^ +(\d+)  ([A-Z_]+) +(client|server)  ", page, re.MULTILINE)
    assert {name: int(number) for number, name, _ in kinds} == {kind.name: kind.value for kind in Kind}
    assert {name for number, name, side in kinds if side == "client"} == {"STEP", "OPEN", "CLOSE"}
    bits = dict(re.findall(r"bit (\d)[a-z, ]*: (replayed|already applied)", page))
    assert {2 ** int(number): name for number, name in bits.items()} == {
        frames.REPLAYED: "replayed", frames.ALREADY_APPLIED: "already applied",
    }  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from([peer.STEPPED, peer.HELLO, peer.ERROR, 132, 255]),
            st.integers(0, 3),
            st.integers(0, 2**16 - 1),
            st.integers(0, 4),
            st.integers(0, 2**64 - 1),
        ),
        max_size=6,
    ),
    st.integers(1, 3),
)
def test_a_client_reads_what_another_reads(heads: list[tuple[int, int, int, int, int]], row_bytes: int) -> None:
    """Frames of a server, of known types and of later ones, beside the parser that shares no code with ours; cut
    anywhere, the frames before the cut are there and the rest is refused.
    """
    messages = []
    for kind, flags, channel, count, first in heads:
        size = count * row_bytes if kind == peer.STEPPED else count
        size = 0 if kind == peer.STEPPED and flags & peer.ALREADY_APPLIED else size
        messages.append(peer.frame(kind, channel, count, first, bytes(range(size)), flags))
    message = b"".join(messages)
    answers = [
        (a.kind, a.flags, a.channel, a.count, a.first_step, a.payload)
        for a in frames.read_answers(message, lambda _: row_bytes)
    ]
    assert answers == [tuple(reply) for reply in peer.replies(message, lambda _: row_bytes)]
    if message:
        read_again = frames.read_answers(message[:-1], lambda _: row_bytes)
        assert [next(read_again).kind for _ in messages[:-1]] == [answer[0] for answer in answers[:-1]]
        with pytest.raises(Malformed):
            next(read_again)


def test_a_step_of_ours_is_a_step_of_the_page() -> None:
    """What the client packs is what the page says."""
    rows = np.ones((2, 3), np.float32)
    assert frames.step(7, rows.tobytes(), 2, 9) == peer.step(7, rows, 9)
