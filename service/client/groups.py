"""`GroupLogic`: one step of many sessions over one WebSocket, which is dialled again whenever it breaks.

Rule: as `protocol.py`. Every session is on a channel of its own and has one request under way at a time, so each step
is applied once whatever the others meet. A message is answered before the next is sent: neither end ever waits for the
other to read.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from service.client.effects import Dial, Exchange, Later, Sleep, Work
from service.client.errors import NotAllStepped, NotLatch, PatienceExhausted
from service.client.protocol import ClientLogic, Hello, Reply, SessionLogic, Standing, read, refused
from service.client.requests import INPUT_BYTES, Requests
from service.client.streams import opening
from service.errors import InvalidInput, LatchError, StepConflict, StoreUnavailable
from service.wire import frames
from service.wire.frames import Kind

MAX_CHANNELS = 2**16 - 1  # that a client has; what the service says of the socket itself comes on channel 0
_PACKED_AT_ONCE = 1000
SESSIONS_AT_ONCE = 256  # as many as a run of the service takes where it is set as it comes (`LATCH_MAX_BATCH_SIZE`)

_SOCKET = 0
_ANSWERS = (Kind.ERROR, Kind.HELLO, Kind.STEPPED)

S = TypeVar("S", bound=Standing)


class _Channel:
    """A session's number on the socket, and when that session was `made` which the service has bound to it."""

    __slots__ = ("made", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.made: datetime | None = None


class _Lane:
    """What one session has left to do in a step of the group."""

    __slots__ = ("channel", "is_slow", "later", "left", "outcome", "requests")

    def __init__(self, channel: _Channel, requests: Requests, rows: Any) -> None:
        self.channel = channel
        self.requests = requests
        self.left = [*requests.cut([rows])][::-1]
        self.outcome: Reply | LatchError | None = None
        self.later: Later | None = None  # why it waits for another try
        self.is_slow = False  # a try ended without its answer

    @property
    def size(self) -> int:
        """Bytes that its next request has, about."""
        return sum([len(piece.data) for piece in self.left[-1]])

    @property
    def is_ready(self) -> bool:
        """Whether it has something to send."""
        return self.outcome is None and self.later is None

    @property
    def is_bound(self) -> bool:
        """Whether the channel is of this session, and not of one before it of the same id."""
        return self.channel.made == self.requests.session.info.created_at

    def frame(self) -> bytes:
        """What it sends next."""
        if self.is_bound:
            return self.requests.frame(self.left[-1], self.channel.number)
        return opening(self.requests, self.channel.number)

    def take(self, answer: frames.Answer) -> None:
        """What came of that. Raises NotLatch where it is something else."""
        channel, session = self.channel, self.requests.session
        try:
            if answer.kind == Kind.ERROR:
                channel.made = None  # by the next time there may be another session of its id
                problem = refused(read(answer.payload, dict[str, Any]))
                raise session.conflict(problem) if isinstance(problem, StepConflict) else problem
            if answer.kind != (Kind.STEPPED if self.is_bound else Kind.HELLO):
                raise NotLatch(f"a frame of type {answer.kind} on channel {channel.number}, which waits for another")
            if self.is_bound:
                for reply in self.requests.replies(self.left.pop(), answer):
                    self.outcome = reply
                if self.left:  # of several parts, the service keeps the last one's reply only
                    self.requests.note()
            else:
                channel.made = session.greeted(read(answer.payload, Hello))
        except NotLatch:
            raise
        except Later as later:
            self.later = later
        except LatchError as error:
            self.outcome = error


class GroupLogic:
    """Has one request of each of many sessions answered.

    Args:
        client: what it tries by.
        outputs: names of what comes back of every row; None: each model's prediction.
    """

    def __init__(self, client: ClientLogic, outputs: Iterable[str] | None) -> None:
        self._client = client
        self._outputs = None if outputs is None else [*outputs]
        self._channels: dict[str, _Channel] = {}  # by the session's id
        self._is_open = False

    def step(self, rows: Sequence[tuple[SessionLogic, Any]]) -> Work[list[Reply | LatchError]]:
        """A reply, or why there is none, for each session. They have moved on when it ends, and not before: a step that
        is interrupted may be repeated.

        Raises:
            InvalidInput: rows that a model does not take, or a session twice; nothing was sent.
        """
        lanes = yield from self._lanes(rows)
        try:
            while left := _left(lanes):
                try:
                    yield from self._client.retry.until_done(partial(self._attempt, lanes))
                except PatienceExhausted:
                    if _left(lanes) == left:  # nobody got an answer in all that time
                        raise
        except LatchError as error:  # of the connection: of those that were not answered, nobody knows
            for lane in lanes:
                if lane.outcome is None:
                    lane.outcome = error
                    if isinstance(error, PatienceExhausted):
                        lane.outcome = PatienceExhausted(str(error), lane.requests.steps(lane.left[-1]))
                        lane.outcome.__cause__ = error.__cause__
        for lane in lanes:
            lane.requests.note()
        return [lane.outcome for lane in lanes if lane.outcome is not None]

    def hung_up(self) -> None:
        """The shell has closed the socket."""
        self._is_open = False

    def _lanes(self, rows: Sequence[tuple[SessionLogic, Any]]) -> Work[list[_Lane]]:
        if len({session.info.id for session, _ in rows}) < len(rows):
            raise InvalidInput("a session is there twice: it has one request under way at a time", path="rows")
        if len(rows) > MAX_CHANNELS:
            raise InvalidInput(f"{len(rows)} sessions: a socket carries {MAX_CHANNELS}", path="rows")
        if len(self._channels) + sum(session.info.id not in self._channels for session, _ in rows) > MAX_CHANNELS:
            self._channels.clear()  # a number that is opened again is another session's from then on
        lanes: list[_Lane] = []
        for session, item in rows:
            if len(lanes) % _PACKED_AT_ONCE == _PACKED_AT_ONCE - 1:
                yield Sleep(0.0)  # other tasks have their turn
            channel = self._channels.setdefault(session.info.id, _Channel(len(self._channels) + 1))
            try:
                lanes.append(_Lane(channel, Requests(session, self._outputs), item))
            except InvalidInput as error:
                raise InvalidInput(f"session {session.info.id!r}: {error}", **error.extras) from error
        return lanes

    def _attempt(self, lanes: list[_Lane], timeout: float) -> Work[None]:
        is_open, self._is_open = self._is_open, False  # until everything that was sent is answered
        if not is_open:
            yield Dial("/v1/stream", timeout)
            for channel in self._channels.values():
                channel.made = None
        for lane in lanes:
            lane.later = None
        while ready := [lane for lane in lanes if lane.is_ready]:
            for is_slow in (False, True):  # nobody waits for those that a try ended without
                for part in _parts([lane for lane in ready if lane.is_slow is is_slow]):
                    yield from self._exchange(part, timeout)
        # Another service may reach the store that this one has lost, if there are several.
        self._is_open = not any(lane.later and isinstance(lane.later.problem, StoreUnavailable) for lane in lanes)
        if waiting := [lane.later for lane in lanes if lane.later is not None]:
            raise max(waiting, key=lambda later: later.after)

    def _exchange(self, lanes: list[_Lane], timeout: float) -> Work[None]:
        owed = {lane.channel.number: lane for lane in lanes}

        def lane_of(number: int) -> _Lane:
            if number not in owed:
                raise NotLatch(f"an answer on channel {number}, on which nothing was asked")
            return owed[number]

        end = self._client.retry.clock() + timeout
        message: bytes | None = b"".join([lane.frame() for lane in lanes])
        while owed:
            try:
                received: bytes | str | None = yield Exchange(message, self._client.retry.left(end))
            except Later as later:
                for lane in owed.values():
                    lane.is_slow = isinstance(later.problem, TimeoutError)
                raise
            if not isinstance(received, bytes):
                raise NotLatch(f"a message that is no frame: {received!r:.80}")
            for answer in frames.read_answers(received, lambda number: lane_of(number).requests.out_bytes):
                if answer.kind == Kind.ERROR and answer.channel == _SOCKET:
                    raise refused(read(answer.payload, dict[str, Any]))
                if answer.kind in _ANSWERS:  # others (going away, say) pass by
                    lane_of(answer.channel).take(answer)
                    del owed[answer.channel]
            message = None


def _left(lanes: Iterable[_Lane]) -> int:
    """How many requests have no answer."""
    return sum([len(lane.left) for lane in lanes if lane.outcome is None])


def _parts(lanes: Iterable[_Lane]) -> Iterator[list[_Lane]]:
    """Those whose frames travel in one message."""
    part: list[_Lane] = []
    size = 0
    for lane in lanes:
        part.append(lane)
        size += lane.size
        if len(part) == SESSIONS_AT_ONCE or size >= INPUT_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def replies_of(sessions: Iterable[S], outcomes: Iterable[Reply | LatchError]) -> dict[S, Reply]:
    """The replies. Raises NotAllStepped where there is something else among them."""
    replies: dict[S, Reply] = {}
    errors: dict[S, LatchError] = {}
    for session, outcome in zip(sessions, outcomes, strict=True):
        if isinstance(outcome, Reply):
            replies[session] = outcome
        else:
            errors[session] = outcome
    if errors:
        raise NotAllStepped(replies, errors) from next(iter(errors.values()))
    return replies
