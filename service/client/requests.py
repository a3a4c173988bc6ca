"""`Requests`: the steps of a session as requests whose replies the service keeps, and the answers to them as replies.

Rule: as `protocol.py`. A session has one request under way at a time, so the reply that the service keeps is always the
one that may be missing; and it is small enough to be kept.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from service.client.errors import NotLatch
from service.client.protocol import Reply, SessionLogic
from service.wire import frames

# A request is no larger than this, so that the service keeps its reply (`LATCH_KEEP_REPLY_BYTES`) and takes it
# (`LATCH_MAX_STEPS`) where these are as they come.
REPLY_BYTES, INPUT_BYTES, MAX_STEPS = 2**16, 2**20, 2**14


class _Piece(NamedTuple):
    """Packed rows of an item, which may come in several."""

    data: bytes
    steps: int
    is_last: bool


Request: TypeAlias = list[_Piece]


class Requests:
    """Cuts the readings of a session into requests, and their answers into replies.

    Args:
        session: whose steps.
        outputs: names of what comes back; None: the prediction.
    """

    def __init__(self, session: SessionLogic, outputs: Iterable[str] | None) -> None:
        self.session = session
        self.names = session.rows.names(None if outputs is None else [*outputs], "outputs")
        self.out_bytes, self._in_bytes = session.rows.output_bytes(self.names), session.rows.input_bytes
        limits = REPLY_BYTES // max(1, self.out_bytes), INPUT_BYTES // max(1, self._in_bytes), MAX_STEPS
        self._limit = max(1, min(limits))
        self._parts: list[tuple[bytes | None, int, bool]] = []
        self._ahead = 0  # steps that were answered and are not noted

    def cut(self, items: Iterable[Any]) -> Iterator[Request]:
        """Packs items (a row or T rows each) into as few requests as their size allows."""
        request: Request = []
        room = self._limit
        for item in items:
            data, steps = self.session.pack(item)
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

    def steps(self, request: Request) -> range:
        """The numbers of the rows of the next request."""
        first = self.session.at + self._ahead + 1
        return range(first, first + sum([piece.steps for piece in request]))

    def frame(self, request: Request, channel: int = 0) -> bytes:
        """The next request as a STEP."""
        steps = self.steps(request)
        return frames.step(channel, b"".join([piece.data for piece in request]), len(steps), steps[0])

    def replies(self, request: Request, answer: frames.Answer) -> list[Reply]:
        """The replies of the items that are whole with this one, which count once they are noted. Raises NotLatch where
        the answer is to something else.
        """
        steps = self.steps(request)
        if (answer.first_step, answer.count) != (steps[0], len(steps)):
            raise NotLatch(
                f"{answer.count} steps from {answer.first_step} are the answer to {len(steps)} from {steps[0]}"
            )
        self._ahead += len(steps)
        return [*self._replies(request, answer)]

    def note(self) -> None:
        """The session has moved on: who asked has the replies, or could not get them again."""
        self.session.at += self._ahead
        self._ahead = 0

    def _replies(self, request: Request, answer: frames.Answer) -> Iterator[Reply]:
        kept = not answer.flags & frames.ALREADY_APPLIED
        replayed = bool(answer.flags & frames.REPLAYED)
        end, step = 0, answer.first_step - 1
        for piece in request:
            start, end, step = end, end + piece.steps * self.out_bytes, step + piece.steps
            self._parts.append((answer.payload[start:end] if kept else None, piece.steps, replayed))
            if piece.is_last:
                parts, self._parts = self._parts, []
                steps = sum(part[1] for part in parts)
                packed = [part[0] for part in parts if part[0] is not None]
                whole = len(packed) == len(parts)
                outputs = self.session.unpack(b"".join(packed), self.names, steps) if whole else None
                yield Reply(outputs, step - steps + 1, step, any(part[2] for part in parts))
