"""`StreamLogic`: steps of a session over a WebSocket that is dialled again whenever it breaks.

Rule: as `protocol.py`. One request is under way at a time, so the reply that the service keeps is always the one that
may be missing; and it is small enough to be kept.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import msgspec

from service.client.effects import Dial, Exchange, Later, Work
from service.client.errors import NotLatch
from service.client.protocol import Reply, SessionLogic, read, refused
from service.errors import InvalidInput, StepConflict
from service.wire import frames
from service.wire.frames import Kind

# A request is no larger than this, so that the service keeps its reply (`LATCH_KEEP_REPLY_BYTES`) and takes it
# (`LATCH_MAX_STEPS`) where these are as they come.
REPLY_BYTES, INPUT_BYTES, MAX_STEPS = 2**16, 2**20, 2**14


class _Hello(msgspec.Struct):
    step: int


class _Piece(NamedTuple):
    """Packed rows of an item, which may come in several."""

    data: bytes
    steps: int
    is_last: bool


Request: TypeAlias = list[_Piece]


class StreamLogic:
    """Cuts readings into requests, and has them answered.

    Args:
        session: whose steps.
        outputs: names of what comes back; None: the prediction.
        window: items that the shell hands over at a time.
    """

    def __init__(self, session: SessionLogic, outputs: Iterable[str] | None, window: int = 1) -> None:
        if window < 1:
            raise InvalidInput(f"a window of {window}: it holds at least one item", path="window")
        self._session = session
        self._names = session.rows.names(None if outputs is None else [*outputs], "outputs")
        self._out_bytes, self._in_bytes = session.rows.output_bytes(self._names), session.rows.input_bytes
        limits = REPLY_BYTES // max(1, self._out_bytes), INPUT_BYTES // max(1, self._in_bytes), MAX_STEPS
        self._limit = max(1, min(limits))
        self._is_open = False
        self._parts: list[tuple[bytes | None, int, bool]] = []
        # A socket of one session gives the prediction; for anything else a channel is opened on the other kind.
        self._path, self._opening = f"{session.path}/stream", None
        if self._names != session.rows.default:
            self._path = "/v1/stream"
            self._opening = frames.notice(Kind.OPEN, 0, {"session": session.info.id, "outputs": self._names})

    def requests(self, items: Iterable[Any]) -> Iterator[Request]:
        """Packs items (a row or T rows each) into as few requests as their size allows."""
        request: Request = []
        room = self._limit
        for item in items:
            data, steps = self._session.pack(item)
            done = 0
            while done < steps:
                if not room:
                    yield request
                    request, room = [], self._limit
                count = min(room, steps - done)
                part = data[done * self._in_bytes : (done + count) * self._in_bytes]
                done, room = done + count, room - count
                request.append(_Piece(part, count, done == steps))
        if request:
            yield request

    def exchange(self, request: Request) -> Work[list[Reply]]:
        """Has the rows applied; gives the replies of the items that are whole with them."""
        count = sum(piece.steps for piece in request)
        steps = range(self._session.at + 1, self._session.at + 1 + count)
        message = frames.step(0, b"".join(piece.data for piece in request), count, steps[0])
        attempt = partial(self._attempt, message)
        try:
            answer: frames.Answer = yield from self._session.client.retry.until_done(attempt, steps)
        except StepConflict as error:
            raise self._session.conflict(error) from error
        if (answer.first_step, answer.count) != (steps[0], count):
            raise NotLatch(f"{answer.count} steps from {answer.first_step} are the answer to {count} from {steps[0]}")
        self._session.at = steps[-1]
        return [*self._replies(request, answer)]

    def _attempt(self, message: bytes, timeout: float) -> Work[frames.Answer]:
        try:
            if not self._is_open:
                yield Dial(self._path, timeout)
                hello = yield from self._answer(self._opening, Kind.HELLO, timeout)
                self._session.check(read(hello.payload, _Hello).step)
                self._is_open = True
            return (yield from self._answer(message, Kind.STEPPED, timeout))
        except Later:
            self._is_open = False
            raise

    def _answer(self, message: bytes | None, kind: Kind, timeout: float) -> Work[frames.Answer]:
        """Sends a message and waits for a frame of a kind; others that are no error (going away, say) pass by."""
        while True:
            received: bytes | str | None = yield Exchange(message, timeout)
            if not isinstance(received, bytes):
                raise NotLatch(f"a message that is no frame: {received!r:.80}")
            for answer in frames.read_answers(received, lambda _: self._out_bytes):
                if answer.kind == Kind.ERROR:
                    raise refused(read(answer.payload, dict[str, Any]))
                if answer.kind == kind:
                    return answer
            message = None

    def _replies(self, request: Request, answer: frames.Answer) -> Iterator[Reply]:
        kept = not answer.flags & frames.ALREADY_APPLIED
        replayed = bool(answer.flags & frames.REPLAYED)
        end, step = 0, answer.first_step - 1
        for piece in request:
            start, end, step = end, end + piece.steps * self._out_bytes, step + piece.steps
            self._parts.append((answer.payload[start:end] if kept else None, piece.steps, replayed))
            if piece.is_last:
                parts, self._parts = self._parts, []
                steps = sum(part[1] for part in parts)
                packed = [part[0] for part in parts if part[0] is not None]
                whole = len(packed) == len(parts)
                outputs = self._session.unpack(b"".join(packed), self._names, steps) if whole else None
                yield Reply(outputs, step - steps + 1, step, any(part[2] for part in parts))
