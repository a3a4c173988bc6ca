"""`StreamLogic`: steps of a session over a WebSocket that is dialled again whenever it breaks.

Rule: as `protocol.py`.
"""

from collections.abc import Iterable
from datetime import datetime
from functools import partial
from typing import Any

from service.client.effects import Dial, Exchange, Later, Work
from service.client.errors import NotLatch
from service.client.protocol import Hello, Reply, SessionLogic, read, refused
from service.client.requests import Request, Requests
from service.errors import InvalidInput, StepConflict
from service.wire import frames
from service.wire.frames import Kind


class StreamLogic:
    """Has the requests of a session answered.

    Args:
        session: whose steps.
        outputs: names of what comes back; None: the prediction.
        window: items that the shell hands over at a time.
    """

    def __init__(self, session: SessionLogic, outputs: Iterable[str] | None, window: int = 1) -> None:
        if window < 1:
            raise InvalidInput(f"a window of {window}: it holds at least one item", path="window")
        self._session, self._retry = session, session.client.retry
        self.requests = Requests(session, outputs)
        self._greeted: datetime | None = None  # when that session was made which the socket is of
        # A socket of one session gives the prediction; for anything else a channel is opened on the other kind.
        self._path, self._opening = f"{session.path}/stream", None
        if self.requests.names != session.rows.default:
            self._path, self._opening = "/v1/stream", opening(self.requests)

    def exchange(self, request: Request) -> Work[list[Reply]]:
        """Has the rows applied; gives the replies of the items that are whole with them."""
        attempt = partial(self._attempt, self.requests.frame(request))
        try:
            answer = yield from self._retry.until_done(attempt, self.requests.steps(request))
        except StepConflict as error:
            raise self._session.conflict(error) from error
        replies = self.requests.replies(request, answer)
        self.requests.note()
        return replies

    def _attempt(self, message: bytes, timeout: float) -> Work[frames.Answer]:
        end = self._retry.clock() + timeout
        try:
            if self._greeted != self._session.info.created_at:
                yield Dial(self._path, timeout)
                hello = yield from self._answer(self._opening, Kind.HELLO, end)
                self._greeted = self._session.greeted(read(hello.payload, Hello))
            return (yield from self._answer(message, Kind.STEPPED, end))
        except Later:
            self._greeted = None
            raise

    def _answer(self, message: bytes | None, kind: Kind, end: float) -> Work[frames.Answer]:
        """Sends a message and waits for a frame of a kind; others that are no error (going away, say) pass by."""
        while True:
            received: bytes | str | None = yield Exchange(message, self._retry.left(end))
            if not isinstance(received, bytes):
                raise NotLatch(f"a message that is no frame: {received!r:.80}")
            for answer in frames.read_answers(received, lambda _: self.requests.out_bytes):
                if answer.kind == Kind.ERROR:
                    raise refused(read(answer.payload, dict[str, Any]))
                if answer.kind == kind:
                    return answer
            message = None


def opening(requests: Requests, channel: int = 0) -> bytes:
    """The OPEN of a session's channel."""
    return frames.notice(Kind.OPEN, channel, {"session": requests.session.info.id, "outputs": requests.names})
