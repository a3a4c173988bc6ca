"""`latch.binary`: the frames of the WebSocket doors, bytes <-> values. No I/O.

A message holds one or more frames, one after another. All numbers are little-endian:

    offset  size  field
         0     1  type
         1     1  flags
         2     2  channel      the session: 0 on /v1/sessions/{id}/stream, the client's choice on /v1/stream
         4     4  count        T, the steps of a STEP or STEPPED; the payload's bytes for the other types
         8     8  first step   number of the first step, counted from 1; 0 where there is none
        16        payload

    type             from    payload
      1  STEP        client  T packed input rows; first step 0 runs next in order
      2  OPEN        client  JSON {"session": id, "outputs"?: [names]}: binds the channel, or binds it anew
      3  CLOSE       client  none: unbinds the channel; the session lives on
    129  STEPPED     server  T packed output rows, of the outputs that the channel was opened with
                             flags, bit 0: replayed, a duplicate, nothing ran; bit 1, beside it: already applied, a
                             duplicate whose reply was too large to keep: no rows follow
    130  HELLO       server  JSON {"session", "model", "version", "step", "created_at", "idle_ttl_ms", "expires_at"}:
                             the channel is bound
    131  ERROR       server  JSON {"error", "code", "retryable", ...}; first step: that of the refused STEP
    132  GOING_AWAY  server  JSON {"reason", "retry_after_ms"}, on channel 0: the last frame, the service stops

A packed row is one step's values of the model's page in C order, float32 or int64, without padding; of several outputs
one after another. A client's flags are 0. Frames of one session run in order and are answered in order; OPEN and CLOSE
wait until what was sent on their channel is answered. A refused OPEN leaves its channel unbound, whatever it was bound
to. Replies are not grouped as the messages were: read on until every frame has its answer. A frame that is not
answered before GOING_AWAY was not read, unless the service ran out of time: send it again on another connection, with
its number.

Rule: a message is read frame by frame. One that cannot be told apart from the next (unknown type or channel, cut
short) ends the message: the frames before it count, it and the rest are refused in one ERROR, whose JSON says which
`message` it was (from 0) and which `frame` of it. So wait for the HELLO before other sessions' frames come behind.
"""

import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from service.errors import ChannelNotOpen, InvalidInput, Malformed, PayloadTooLarge
from service.wire import Block, StepReply, StepRequest
from service.wire.native import encode
from service.wire.rows import Field, RowFormat

HEADER = struct.Struct("<BBHIQ")
MAX_STEP = 2**63 - 1
REPLAYED, ALREADY_APPLIED = 1, 2


class Kind(IntEnum):
    """Types of frames."""

    STEP = 1
    OPEN = 2
    CLOSE = 3
    STEPPED = 129
    HELLO = 130
    ERROR = 131
    GOING_AWAY = 132


_STEP, _STEPPED = int(Kind.STEP), int(Kind.STEPPED)  # an enum's member compares several times slower


class Frame(msgspec.Struct, frozen=True):
    """A frame of a client."""

    kind: int
    channel: int
    count: int
    first_step: int
    payload: bytes


class Answer(msgspec.Struct, frozen=True):
    """A frame of the server."""

    kind: int
    flags: int
    channel: int
    count: int
    first_step: int
    payload: bytes


class Open(msgspec.Struct, forbid_unknown_fields=True):
    """The payload of an OPEN."""

    session: str
    outputs: list[str] | None = None


_OPEN = msgspec.json.Decoder(Open)


def read(message: bytes, row_bytes: Callable[[int], int | None]) -> Iterator[Frame]:
    """The frames of a message.

    Args:
        message: as it was received.
        row_bytes: the bytes of an input row by channel; None where the channel is not open.

    Raises:
        Malformed: cut short, an unknown type, or flags that are not 0.
        ChannelNotOpen: a STEP whose size nobody knows.
    """
    start = index = 0
    while start < len(message) or not index:
        if len(message) - start < HEADER.size:
            raise Malformed(
                f"frame {index} at byte {start}: {len(message) - start} bytes are left, a header has {HEADER.size}",
                frame=index,
            )
        kind, flags, channel, count, first_step = HEADER.unpack_from(message, start)
        if kind not in (Kind.STEP, Kind.OPEN, Kind.CLOSE) or flags:
            what = f"flags {flags}, a client's are 0" if flags else f"type {kind}; a client sends 1, 2 or 3"
            raise Malformed(f"frame {index} at byte {start}: {what}", frame=index, channel=channel)
        size = row_bytes(channel) if kind == Kind.STEP else 1
        if size is None:
            raise ChannelNotOpen(
                f"frame {index} at byte {start}: channel {channel} is not open; send OPEN with its session first",
                frame=index,
                channel=channel,
                first_step=first_step,
            )
        start += HEADER.size
        end = start + size * count
        if end > len(message):
            raise Malformed(
                f"frame {index}, channel {channel}: count {count} means {end - start} bytes of payload, "
                f"{len(message) - start} are left",
                frame=index,
                channel=channel,
                first_step=first_step,
            )
        yield Frame(kind, channel, count, first_step, message[start:end])
        start, index = end, index + 1


def read_single(message: bytes) -> Frame | None:
    """The message as one STEP, where it is nothing else; its payload may be of any size."""
    if len(message) > HEADER.size:
        kind, flags, channel, count, first_step = HEADER.unpack_from(message)
        if kind == _STEP and not flags:
            return Frame(kind, channel, count, first_step, message[HEADER.size :])
    return None


def read_block(message: bytes, rows: RowFormat, outputs: tuple[str, ...]) -> tuple[list[int], Block] | None:
    """The channels of a message that is nothing but STEP frames of equal T, each channel once, and all as arrays; None
    where `read` must take it apart. `rows` and `outputs` are those of the first channel.
    """
    if len(message) < HEADER.size:
        return None
    steps = HEADER.unpack_from(message)[3]
    if not 0 < steps * rows.input_bytes <= len(message):  # before numpy is asked for a layout of any size
        return None
    layout = _records(rows.input, steps)
    if len(message) % layout.itemsize:
        return None
    records = np.frombuffer(message, layout)
    channels = records["channel"].tolist()
    if (
        (records["kind"] != _STEP).any()
        or (records["count"] != steps).any()
        or len(set(channels)) < len(channels)
        or records["first_step"].max() > MAX_STEP
    ):
        return None
    return channels, Block(records["rows"], outputs, records["first_step"])


@lru_cache(maxsize=256)
def _records(row: Field, steps: int) -> Any:
    # Type and flags are read as one number: that of a STEP, whose flags are 0.
    head = [("kind", "<u2"), ("channel", "<u2"), ("count", "<u4"), ("first_step", "<u8")]
    return np.dtype([*head, ("rows", np.dtype(row.dtype).newbyteorder("<"), (steps, *row.shape))])


def step_request(frame: Frame, outputs: tuple[str, ...], max_steps: int) -> StepRequest:
    """What a STEP asks for.

    Raises:
        InvalidInput: no step.
        PayloadTooLarge: more than `max_steps` rows.
    """
    return packed_request(frame.payload, frame.count, outputs, frame.first_step or None, max_steps)


def packed_request(
    data: bytes, steps: int, outputs: tuple[str, ...], first_step: int | None, max_steps: int
) -> StepRequest:
    """The request that T packed rows are. Raises as `step_request`."""
    if not steps:
        raise InvalidInput("no step: send at least one row", path="count")
    if steps > max_steps:
        raise PayloadTooLarge(
            f"{steps} steps: one request may carry {max_steps}; send them in parts", path="count", limit=max_steps
        )
    if first_step is not None and first_step > MAX_STEP:
        raise InvalidInput(f"first step {first_step}: a step number has 63 bits", path="first_step")
    return StepRequest(data, steps, outputs, first_step)


def open_request(frame: Frame) -> Open:
    """The payload of an OPEN. Raises Malformed, InvalidInput."""
    try:
        return _OPEN.decode(frame.payload)
    except msgspec.ValidationError as error:
        raise InvalidInput(
            f'OPEN of channel {frame.channel}: {error}; send {{"session": id, "outputs"?: [...]}}'
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"OPEN of channel {frame.channel}: the payload is not JSON: {error}") from error


def stepped(channel: int, reply: StepReply) -> bytes:
    """A STEPPED frame."""
    steps = reply.step - reply.first_step + 1
    if reply.data is None:
        return HEADER.pack(Kind.STEPPED, REPLAYED | ALREADY_APPLIED, channel, steps, reply.first_step)
    return HEADER.pack(Kind.STEPPED, REPLAYED * reply.replayed, channel, steps, reply.first_step) + reply.data


def stepped_block(channels: list[int], steps: int, first_steps: list[int], replies: list[bytes]) -> bytes:
    """N STEPPED frames of T steps."""
    parts: list[bytes] = []
    for channel, first_step, rows in zip(channels, first_steps, replies, strict=True):
        parts.append(HEADER.pack(_STEPPED, 0, channel, steps, first_step))
        parts.append(rows)
    return b"".join(parts)


def notice(kind: Kind, channel: int, document: dict[str, Any], first_step: int = 0) -> bytes:
    """A HELLO, an ERROR or a GOING_AWAY."""
    payload = encode(document)
    return HEADER.pack(kind, 0, channel, len(payload), first_step) + payload


def step(channel: int, rows: bytes, steps: int, first_step: int) -> bytes:
    """A STEP frame, as a client sends it: T packed rows."""
    return HEADER.pack(Kind.STEP, 0, channel, steps, first_step) + rows


def read_answers(message: bytes, row_bytes: Callable[[int], int]) -> Iterator[Answer]:
    """The frames of a server's message, as a client reads it. Types that are not known pass for ones with JSON.

    Args:
        message: as it was received.
        row_bytes: the bytes of an output row by channel.

    Raises:
        Malformed: cut short.
    """
    start = 0
    while start < len(message):
        if len(message) - start < HEADER.size:
            raise Malformed(f"{len(message) - start} bytes at byte {start}: a header has {HEADER.size}")
        kind, flags, channel, count, first_step = HEADER.unpack_from(message, start)
        start += HEADER.size
        size = count
        if kind == Kind.STEPPED:
            size = 0 if flags & ALREADY_APPLIED else count * row_bytes(channel)
        if len(message) - start < size:
            raise Malformed(f"a payload of {size} bytes at byte {start}: {len(message) - start} are left")
        yield Answer(kind, flags, channel, count, first_step, message[start : start + size])
        start += size
