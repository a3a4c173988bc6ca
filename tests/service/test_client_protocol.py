"""What the clients do, without I/O: a service and a network in memory, which lose what a test tells them to."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.client.effects import Answer, Call, Dial, Exchange, Later, Retry, Sleep, Work
from service.client.errors import LostSteps, NotLatch, OutputsNotKept, PatienceExhausted, refusal
from service.client.protocol import PACKED, ClientLogic, Reply, SessionLogic
from service.client.requests import INPUT_BYTES, MAX_STEPS, REPLY_BYTES
from service.client.streams import StreamLogic
from service.errors import (
    Draining,
    InvalidInput,
    LatchError,
    Malformed,
    Overloaded,
    SessionExists,
    SessionNotFound,
    StepConflict,
    StoreUnavailable,
)
from service.settings import Settings
from service.slab import Kept
from service.steps import Decision, decide
from service.wire import StepReply, StepRequest, frames
from service.wire.frames import Kind

MODEL = {
    "input": {"name": "x", "dtype": "float32", "shape": [1]},
    "outputs": [{"name": "y", "dtype": "float32", "shape": [1]}],
    "state": [{"name": "h", "dtype": "int64", "shape": [2]}],
    "more": 1,
}
FATES = ("fine", "unsent", "unanswered", "twice", "overloaded", "store_unavailable", "going_away")


def performed(work: Work[Any], perform: Callable[[Any], Any]) -> Any:
    """What comes of a client's work where its effects are done by `perform`."""
    try:
        effect = next(work)
        while True:
            try:
                outcome = perform(effect)
            except Later as later:
                effect = work.throw(later)
            else:
                effect = work.send(outcome)
    except StopIteration as end:
        return end.value


class Latch:
    """One session whose output is the sum of its inputs so far, on a network with a fate for each message.

    Attributes:
        applied: the inputs, in order: the truth that no client may see doubled or thinned.
        fates: what happens to the next messages; fine when there is none left.
    """

    def __init__(self, keep_bytes: int = REPLY_BYTES) -> None:
        self.applied: list[float] = []
        self.kept: Kept | None = None
        self.fates: deque[str] = deque()
        self.answers: deque[Answer] = deque()
        self.calls: list[Call] = []
        self.naps: list[float] = []
        self.created_at = datetime(2026, 11, 28, tzinfo=UTC)
        self.dials: list[str] = []
        self.now = 0.0
        self.is_dialled = False
        self._keep_bytes = keep_bytes
        self._outputs: tuple[str, ...] = ("y",)
        self._frames: deque[bytes] = deque()
        self.logic = ClientLogic(Retry(60.0, 10.0, lambda: self.now, lambda _, most: most))

    def run(self, work: Work[Any]) -> Any:
        """Performs as a shell does."""
        return performed(work, self._perform)

    def session(self) -> SessionLogic:
        """The session, found."""
        found = self.run(self.logic.session("s", "sum", None, None, None, None))
        assert isinstance(found, SessionLogic)
        return found

    def stream(self, session: SessionLogic, items: list[Any], window: int = 1, outputs: Any = None) -> Iterator[Reply]:
        """What a shell's `stream` does."""
        logic = StreamLogic(session, outputs, window)
        for start in range(0, len(items), window):
            for request in logic.requests.cut(items[start : start + window]):
                yield from self.run(logic.exchange(request))

    def info(self) -> dict[str, Any]:
        """The session's page."""
        return {
            "id": "s",
            "model": "sum",
            "version": "1",
            "step": len(self.applied),
            "created_at": self.created_at.isoformat(),
            "idle_ttl_ms": 900_000,
            "metadata": {},
        }

    def apply(self, first: int, data: bytes, outputs: tuple[str, ...]) -> StepReply:
        """As the service: the step table, then the step. Raises StepConflict."""
        rows = np.frombuffer(data, "<f4").tolist()
        digest = StepRequest(data, len(rows), outputs).digest
        if decide(len(self.applied), self.kept, first, digest) is Decision.REPLAY:
            assert self.kept is not None
            return StepReply(outputs, self.kept.reply, first, first + len(rows) - 1, replayed=True)
        parts = []
        total = sum(self.applied)
        for row in rows:
            self.applied.append(row)
            total += row
            part = {"y": np.float32([total]).tobytes(), "h": np.array([total, 0], "<i8").tobytes()}
            parts.append(b"".join(part[name] for name in outputs))
        reply = b"".join(parts)
        self.kept = Kept(first, digest, reply if len(reply) <= self._keep_bytes else None)
        return StepReply(outputs, reply, first, first + len(rows) - 1)

    def _perform(self, effect: Any) -> Any:
        if isinstance(effect, Sleep):
            self.naps.append(effect.seconds)
            self.now += effect.seconds
            return None
        if isinstance(effect, Call):
            self.calls.append(effect)
            return self._call(effect)
        fate = self.fates.popleft() if self.fates else "fine"
        if fate == "unsent":
            self.is_dialled = False
            raise Later(ConnectionResetError("cut"))
        if isinstance(effect, Dial):
            self.is_dialled = True
            self.dials.append(effect.path)
            self._outputs = ("y",)
            self._frames = deque()
            if effect.path != "/v1/stream":
                self._frames.append(frames.notice(Kind.HELLO, 0, self.info()))
            return None
        assert isinstance(effect, Exchange)
        assert self.is_dialled, "a message on a socket that broke"
        if effect.message is not None:
            self._take(effect.message, fate)
        if fate == "unanswered" or not self._frames:
            self.is_dialled = False
            raise Later(ConnectionResetError("cut"))
        return self._frames.popleft()

    def _take(self, message: bytes, fate: str) -> None:
        kind, _, _, _, first = frames.HEADER.unpack_from(message)
        payload = message[frames.HEADER.size :]
        if kind == Kind.OPEN:
            self._outputs = tuple(json.loads(payload)["outputs"])
            self._frames.append(frames.notice(Kind.HELLO, 0, self.info()))
            return
        try:
            if fate in ("overloaded", "store_unavailable"):
                if fate == "store_unavailable":  # which may mean that it is applied
                    self.apply(first, payload, self._outputs)
                raise Overloaded("full") if fate == "overloaded" else StoreUnavailable("gone", retry_after_ms=100)
            reply = self.apply(first, payload, self._outputs)
            if fate == "twice":  # the network, or a proxy of the client's, has sent it before
                reply = self.apply(first, payload, self._outputs)
        except LatchError as error:
            self._frames.append(frames.notice(Kind.ERROR, 0, error.to_dict(), first))
            return
        leaving = frames.HEADER.pack(132, 0, 0, 2, 0) + b"{}"
        if fate == "going_away":
            self._frames.append(leaving)
        self._frames.append(frames.stepped(0, reply) + leaving)

    def _call(self, call: Call) -> Answer:
        fate = self.fates.popleft() if self.fates else "fine"
        if fate == "unsent":
            raise Later(ConnectionRefusedError("nobody there"))
        if self.answers:
            return self.answers.popleft()
        url = urlsplit(call.url)
        try:
            if fate == "overloaded":
                raise Overloaded("full", retry_after_ms=300)
            if url.path.endswith("/steps"):
                query = parse_qs(url.query)
                names = tuple(query["outputs"][0].split(","))
                assert call.headers == {"content-type": PACKED}
                reply = self.apply(int(query["step"][0]), call.content, names)
                if fate == "twice":
                    reply = self.apply(int(query["step"][0]), call.content, names)
                headers = {"latch-step": str(reply.step)}
                headers |= {"latch-replayed": "true"} if reply.replayed else {}
                headers |= {"latch-already-applied": "true"} if reply.data is None else {}
                answer = Answer(200, headers, reply.data or b"")
            elif url.path.startswith("/v1/models"):
                answer = Answer(200, {}, json.dumps(MODEL).encode())
            elif call.method == "DELETE":
                answer = Answer(204, {}, b"")
            else:
                answer = Answer(200, {}, json.dumps(self.info()).encode())
            if fate == "store_unavailable":
                raise StoreUnavailable("gone")
        except LatchError as error:
            return Answer(error.http_status, {}, json.dumps(error.to_dict()).encode())
        if fate == "unanswered":
            raise Later(ConnectionResetError("cut"))
        return answer


fates = st.lists(st.sampled_from(FATES), max_size=8)


class Faults(RuleBasedStateMachine):
    """Any operations under any faults: what a client has been told is what the service has applied."""

    def __init__(self) -> None:
        super().__init__()
        self.latch = Latch()
        self.client = self.latch.session()
        self.sent: list[float] = []
        self.moved = 0  # steps that were done (above 0) or undone (below 0) behind the client's back

    def rows(self, count: int) -> np.ndarray:
        """Rows that are like no others."""
        return np.arange(1, count + 1, dtype=np.float32)[:, None] + 10 * len(self.sent)

    def told(self, rows: np.ndarray, reply: Reply) -> None:
        """A reply is the one of these rows."""
        assert (reply.first_step, reply.step) == (len(self.sent) + 1, len(self.sent) + len(rows))
        self.sent += rows[:, 0].tolist()
        sums = np.cumsum(self.sent)[-len(rows) :]
        assert reply["y"][:, 0].tolist() == sums.tolist()

    def fails(self, work: Work[Any], fates: list[str]) -> None:
        """Behind the client's back the session has moved: it says which way, until it is told to go on."""
        self.latch.fates = deque(fates)
        with pytest.raises(StepConflict if self.moved > 0 else LostSteps):
            self.latch.run(work)
        self.latch.fates.clear()
        self.latch.run(self.client.refresh())
        self.sent, self.moved = [*self.latch.applied], 0

    @rule(count=st.integers(1, 4), fates=fates)
    def step(self, count: int, fates: list[str]) -> None:
        """Steps over HTTP."""
        rows = self.rows(count)
        if self.moved:
            self.fails(self.client.step(rows, None), fates)
            return
        self.latch.fates = deque(fates)
        self.told(rows, self.latch.run(self.client.step(rows, None)))

    @rule(counts=st.lists(st.integers(1, 3), min_size=1, max_size=6), window=st.integers(1, 4), fates=fates)
    def stream(self, counts: list[int], window: int, fates: list[str]) -> None:
        """Steps over a socket."""
        rows = self.rows(sum(counts))
        items = np.split(rows, np.cumsum(counts)[:-1])
        if self.moved:
            logic = StreamLogic(self.client, None)
            self.fails(logic.exchange(next(logic.requests.cut(items))), fates)
            return
        self.latch.fates = deque(fates)
        replies = list(self.latch.stream(self.client, items, window))
        for item, reply in zip(items, replies, strict=True):
            self.told(item, reply)

    @precondition(lambda self: not self.moved)
    @rule(count=st.integers(1, 3))
    def give_up(self, count: int) -> None:
        """Whatever patience ended on, the same call again is what was meant."""
        rows = self.rows(count)
        self.latch.fates = deque(["unanswered"] + ["unsent"] * 1000)
        with pytest.raises(PatienceExhausted) as caught:
            self.latch.run(self.client.step(rows, None))
        assert caught.value.unacknowledged == range(len(self.sent) + 1, len(self.sent) + 1 + count)
        self.latch.fates.clear()
        self.told(rows, self.latch.run(self.client.step(rows, None)))

    @precondition(lambda self: self.latch.applied and not self.moved)
    @rule()
    def lose(self) -> None:
        """The store loses a step."""
        del self.latch.applied[-1]
        self.latch.kept = None
        self.moved = -1

    @precondition(lambda self: not self.moved)
    @rule(count=st.integers(1, 2))
    def meddle(self, count: int) -> None:
        """Another client steps, by more than one request."""
        for row in range(count + 1):
            self.latch.apply(len(self.latch.applied) + 1, np.float32([-1 - row]).tobytes(), ("y",))
        self.moved = count + 1

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        """What the client was told is what was applied."""
        if not self.moved:
            assert self.latch.applied == self.sent
            assert self.client.at == len(self.sent)


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_a_reply_that_was_lost_is_the_kept_one() -> None:
    """The request goes out again to the letter, and the answer says that nothing ran twice."""
    latch = Latch()
    session = latch.session()
    latch.calls.clear()
    latch.fates.append("unanswered")
    reply = latch.run(session.step([[1.0], [2.0]], None))
    assert latch.calls[0] == latch.calls[1]
    assert (reply.replayed, reply["y"].tolist(), latch.applied) == (True, [[1.0], [3.0]], [1.0, 2.0])


def test_a_reply_too_large_to_keep_is_lost_and_says_so() -> None:
    """The steps count, over HTTP and over a socket; whoever asks for the outputs is told why there are none."""
    latch = Latch(keep_bytes=4)
    session = latch.session()
    latch.fates.append("unanswered")
    replies = [latch.run(session.step([[1.0], [2.0]], None))]
    latch.fates += ["fine", "fine", "unanswered"]
    replies += latch.stream(session, [[[3.0], [4.0]], [5.0]])
    assert [(reply.outputs is None, reply.step) for reply in replies] == [(True, 2), (True, 4), (False, 5)]
    with pytest.raises(OutputsNotKept, match="steps 3 to 4 are applied"):
        replies[1]["y"]
    assert latch.applied == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("window", [1, 2, 7, 100])
def test_a_window_changes_the_requests_and_not_the_replies(window: int) -> None:
    """One reply an item, in order, of the rows of that item, however they travel."""
    latch = Latch()
    items: list[Any] = [[1.0], [[2.0], [3.0]], [4.0], [[5.0]], [6.0], [7.0], [8.0]]
    replies = list(latch.stream(latch.session(), items, window))
    assert [reply["y"][:, 0].tolist() for reply in replies] == [[1], [3, 6], [10], [15], [21], [28], [36]]
    assert [(reply.first_step, reply.step) for reply in replies] == [
        (1, 1), (2, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8),
    ]  # fmt: skip


def test_a_large_chunk_travels_in_parts_whose_replies_are_kept() -> None:
    """Every reply of a stream can be replayed, and the item is answered as one."""
    latch = Latch()
    rows = np.ones((2 * REPLY_BYTES // 4 + 1, 1), np.float32)
    session = latch.session()
    latch.fates += ["fine"] * 2 + ["unanswered"] + ["fine"] * 3 + ["unanswered"]
    (reply,) = latch.stream(session, [rows])
    assert reply["y"][:, 0].tolist() == list(range(1, len(rows) + 1))
    assert (reply.first_step, reply.step, reply.replayed, len(latch.dials)) == (1, len(rows), True, 3)


def test_other_outputs_come_over_a_channel_of_their_own() -> None:
    """A socket of one session gives the prediction; asked for more, the client opens a channel, again after a cut."""
    latch = Latch()
    session = latch.session()
    latch.fates += ["fine", "fine", "unanswered"]
    replies = list(latch.stream(session, [[1.0], [2.0]], outputs=["h", "y"]))
    assert [reply["h"].tolist() for reply in replies] == [[[1, 0]], [[3, 0]]]
    assert (replies[1]["y"].tolist(), latch.dials) == ([[3.0]], ["/v1/stream"] * 2)


def test_pauses_grow_to_a_bound_and_are_what_the_service_asks_for() -> None:
    """Full jitter under a bound that doubles; a `retry_after_ms` or `Retry-After` that is longer counts."""
    latch = Latch()
    session = latch.session()
    latch.fates += ["unsent"] * 9
    latch.run(session.step([1.0], None))
    assert latch.naps == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    latch.naps.clear()
    latch.fates.append("overloaded")
    latch.run(session.step([1.0], None))
    latch.answers.append(Answer(503, {"retry-after": "7"}, b"<html>"))
    latch.run(session.step([1.0], None))
    assert latch.naps == [0.3, 7.0]


def test_patience_is_a_bound_and_the_error_says_what_was_last() -> None:
    """No pause goes beyond it, no try takes longer than what is left, and the problem is the cause."""
    latch = Latch()
    session = latch.session()
    latch.fates += ["unsent"] * 100
    with pytest.raises(PatienceExhausted, match=r"steps 1 to 2 may or may not be applied.*nobody there") as caught:
        latch.run(session.step([[1.0], [1.0]], None))
    assert 50 < latch.now < 60
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert latch.calls[-1].timeout == pytest.approx(60 - latch.now)
    latch.fates.clear()
    latch.answers.append(Answer(429, {"retry-after": "61"}, b""))
    with pytest.raises(PatienceExhausted):
        latch.run(session.step([1.0], None))


@pytest.mark.parametrize("rows", [[1.0, 2.0], [[1.0, 2.0]], [], [[]], [["a"]], [[1.0], [1.0, 2.0]], None, 1.0, [[1j]]])
def test_rows_that_are_none_of_the_model_are_refused_before_they_are_sent(rows: Any) -> None:
    """Another shape, another kind of number, no number: the session stays where it is."""
    latch = Latch()
    session = latch.session()
    sent = len(latch.calls)
    with pytest.raises(InvalidInput):
        latch.run(session.step(rows, None))
    assert (len(latch.calls), session.at) == (sent, 0)


def refused(error: LatchError) -> Answer:
    """An error over HTTP."""
    return Answer(error.http_status, {}, json.dumps(error.to_dict()).encode())


def test_a_fork_that_an_earlier_try_made_is_found() -> None:
    """Its id was made up by the client, so nobody else can have it; an id of the caller's own is a conflict."""
    latch = Latch()
    session = latch.session()
    latch.answers.append(refused(SessionExists("taken")))
    assert latch.run(session.fork(None, 1.5, {"a": "b"})).info.id == "s"
    asked = json.loads(latch.calls[-2].content)
    assert asked == {"id": latch.calls[-1].url.rpartition("/")[2], "idle_ttl_ms": 1500, "metadata": {"a": "b"}}
    latch.answers.append(refused(SessionExists("taken")))
    with pytest.raises(SessionExists):
        latch.run(session.fork("mine", None, None))


def test_a_session_that_is_gone_is_deleted() -> None:
    """An earlier try may have done it."""
    latch = Latch()
    session = latch.session()
    latch.answers.append(refused(SessionNotFound("gone")))
    latch.run(session.delete())
    assert latch.calls[-1].method == "DELETE"


@pytest.mark.parametrize(
    "answer", [Answer(200, {}, b"<html>"), Answer(200, {}, b"{}"), Answer(404, {}, b"nginx"), Answer(302, {}, b"")]
)
def test_what_is_not_latch_is_told(answer: Answer) -> None:
    """A page of something else is no session, and is not asked again."""
    latch = Latch()
    latch.answers.append(answer)
    with pytest.raises(NotLatch):
        latch.session()
    assert len(latch.calls) == 1


def test_a_reply_of_another_length_is_not_taken_for_rows() -> None:
    """Two values are not three rows."""
    latch = Latch()
    session = latch.session()
    latch.answers.append(Answer(200, {"latch-step": "3"}, bytes(8)))
    with pytest.raises(NotLatch, match="8 bytes came for 3 rows"):
        latch.run(session.step([[1.0]] * 3, None))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("{}", NotLatch),
        (b"\x81", Malformed),
        (frames.stepped(0, StepReply(("y",), bytes(4), 2, 2)), NotLatch),
        (frames.stepped(0, StepReply(("y",), bytes(8), 1, 2)), NotLatch),
    ],
    ids=["text", "cut short", "another step", "two steps"],
)
def test_a_message_that_is_no_answer_is_none(message: bytes | str, error: type[LatchError]) -> None:
    """Whatever else comes over the socket is refused, and the session stays where it is."""
    latch = Latch()
    session = latch.session()
    logic = StreamLogic(session, None)
    work = logic.exchange(next(logic.requests.cut([[1.0]])))
    assert isinstance(next(work), Dial)
    work.send(None)
    work.send(frames.notice(Kind.HELLO, 0, latch.info()))
    with pytest.raises(error):
        work.send(message)
    assert session.at == 0


def test_the_rows_of_a_model_are_asked_for_once() -> None:
    """A second session of the same version makes one call less."""
    latch = Latch()
    latch.session()
    latch.session()
    assert [call.url for call in latch.calls] == ["/v1/sessions/s", "/v1/models/sum/versions/1", "/v1/sessions/s"]


def test_a_refusal_is_of_the_class_of_its_code() -> None:
    """With its extras; a code that this version does not know keeps its name."""
    error = refusal({"type": "error"} | StepConflict("stale", expected_step=4).to_dict())
    assert (type(error), str(error), error.extras) == (StepConflict, "stale", {"expected_step": 4})
    assert type(refusal(Draining("bye").to_dict())) is Draining
    unknown = refusal({"error": "new", "code": "from_the_future", "retryable": False})
    assert (type(unknown), unknown.to_dict()["code"]) == (LatchError, "from_the_future")


def test_a_hello_below_what_was_acknowledged_ends_the_stream_before_anything_is_sent() -> None:
    """A store that lost steps is found out when the connection is made again."""
    latch = Latch()
    session = latch.session()
    latch.run(session.step([[1.0], [2.0]], None))
    logic = StreamLogic(session, None)
    work = logic.exchange(next(logic.requests.cut([[3.0]])))
    assert isinstance(next(work), Dial)
    assert work.send(None).message is None
    with pytest.raises(LostSteps) as caught:
        work.send(frames.notice(Kind.HELLO, 0, latch.info() | {"step": 1}))
    assert (caught.value.acknowledged, caught.value.found) == (2, 1)


def test_requests_of_a_stream_fit_a_service_as_it_comes() -> None:
    """Their replies are kept, and none is refused for its size."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert defaults["keep_reply_bytes"] >= REPLY_BYTES
    assert defaults["max_steps"] >= MAX_STEPS
    assert defaults["max_body_bytes"] >= INPUT_BYTES + frames.HEADER.size


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 20), st.integers(1, 64))
def test_requests_are_the_rows_of_the_items_cut_at_the_limit(counts: list[int], window: int, limit: int) -> None:
    """Nothing is left out, nothing comes twice, and no request is larger than it may be."""
    latch = Latch()
    logic = StreamLogic(latch.session(), None, window)
    logic.requests._limit = limit
    rows = np.arange(sum(counts), dtype=np.float32)[:, None]
    requests = list(logic.requests.cut(np.split(rows, np.cumsum(counts)[:-1])))
    assert b"".join(piece.data for request in requests for piece in request) == rows.tobytes()
    assert all(0 < sum(piece.steps for piece in request) <= limit for request in requests)
    assert sum(piece.is_last for request in requests for piece in request) == len(counts)
    assert len(requests) == -(-len(rows) // limit)


def test_a_hello_of_another_model_ends_the_stream_before_anything_is_sent() -> None:
    """The rows are none of that model's, though they may have their size."""
    latch = Latch()
    session = latch.session()
    logic = StreamLogic(session, None)
    work = logic.exchange(next(logic.requests.cut([[3.0]])))
    assert isinstance(next(work), Dial)
    assert work.send(None).message is None
    with pytest.raises(SessionNotFound, match="made anew on other/1"):
        work.send(frames.notice(Kind.HELLO, 0, latch.info() | {"model": "other", "version": "1"}))


def test_who_was_made_anew_is_told_by_when_that_was() -> None:
    """At as many steps, of the same model, it is another session: nothing is sent until the client is told to go on."""
    latch = Latch()
    session = latch.session()
    latch.created_at += timedelta(seconds=1)
    with pytest.raises(SessionNotFound, match="made anew at 2026-11-28 00:00:01"):
        next(latch.stream(session, [[3.0]]))
    assert latch.applied == []
    latch.run(session.refresh())
    assert next(latch.stream(session, [[3.0]])).step == 1


def test_a_stream_goes_on_with_a_session_made_anew_once_it_is_told_to() -> None:
    """Its socket is of the one before; it dials again."""
    latch = Latch()
    session = latch.session()
    replies = latch.stream(session, [[3.0], [4.0]])
    next(replies)
    latch.applied, latch.kept = [], None
    latch.created_at += timedelta(seconds=1)
    latch.run(session.refresh())
    reply = next(replies)
    assert (reply.step, latch.applied, len(latch.dials)) == (1, [4.0], 2)


def test_fewer_steps_of_another_session_are_not_lost_ones() -> None:
    """That it expired, and was made anew at 0, is no fault of a store."""
    latch = Latch()
    session = latch.session()
    latch.run(session.step([1.0], None))
    latch.applied, latch.kept = [], None
    latch.created_at += timedelta(seconds=1)
    with pytest.raises(SessionNotFound, match="made anew"):
        next(latch.stream(session, [[3.0]]))


def test_what_is_no_answer_to_a_step_counts_none() -> None:
    """The page of a hotel that stands between: nothing is acknowledged by it, and the same call again applies once."""
    latch = Latch()
    session = latch.session()
    page = Answer(200, {}, b"<html>please log in</html>")
    latch.answers.append(page)
    with pytest.raises(NotLatch, match=r"not the answer to steps 1 to 1.*please log in"):
        latch.run(session.step([1.0], None))
    assert (session.at, latch.applied) == (0, [])
    assert latch.run(session.step([1.0], None)).step == 1
    work = session.step([2.0], None)
    call = next(work)
    latch._call(call)  # which is applied, and its answer lost
    assert isinstance(work.throw(Later(ConnectionResetError("cut"))), Sleep)
    assert work.send(None) == call
    with pytest.raises(NotLatch):
        work.send(page)
    reply = latch.run(session.step([2.0], None))
    assert (reply.step, reply.replayed, latch.applied) == (2, True, [1.0, 2.0])


def test_what_is_no_snapshot_and_no_end_is_told() -> None:
    """Whatever answers 200 is not taken for either."""
    latch = Latch()
    session = latch.session()
    for work in (session.snapshot, session.delete):
        latch.answers.append(Answer(200, {"content-type": "text/html"}, b"<html>"))
        with pytest.raises(NotLatch):
            latch.run(work())
    latch.answers.append(Answer(200, {"content-type": PACKED}, b"bytes"))
    assert latch.run(session.snapshot()) == b"bytes"


def test_all_that_a_try_asks_for_shares_its_time() -> None:
    """A dial that takes 4 of 10 seconds leaves 6 for the hello, and what is left of these for the answer."""
    latch = Latch()
    logic = StreamLogic(latch.session(), None)
    work = logic.exchange(next(logic.requests.cut([[3.0]])))
    timeouts = [next(work).timeout]
    latch.now += 4
    timeouts.append(work.send(None).timeout)
    latch.now += 5
    timeouts.append(work.send(frames.notice(Kind.HELLO, 0, latch.info())).timeout)
    assert timeouts == [10.0, pytest.approx(6.0), pytest.approx(1.0)]


@pytest.mark.parametrize("value", [0, -1, float("nan"), None, "5"])
@pytest.mark.parametrize("name", ["patience", "timeout"])
def test_times_that_are_none_are_refused(name: str, value: Any) -> None:
    """Where the client is made, and not when it first waits."""
    with pytest.raises(InvalidInput, match=name):
        Retry(**{name: value})


def test_patience_has_no_end_where_one_likes_and_a_try_has_one() -> None:
    """Clocks of the system overflow where one try may take for ever."""
    assert Retry(patience=float("inf"), timeout=np.float32(5)).patience > 1e300  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"timeout inf.*86400 at most"):
        Retry(timeout=float("inf"))


def test_a_pause_that_is_longer_than_patience_is_told() -> None:
    """It is not waited for, so the time that was spent says nothing."""
    latch = Latch()
    session = latch.session()
    latch.answers.append(Answer(503, {"retry-after": "3600"}, b""))
    with pytest.raises(PatienceExhausted, match="would have to wait 3600 s"):
        latch.run(session.step([1.0], None))


def test_an_id_that_is_none_is_not_made_up_for() -> None:
    """A device whose settings lack a name would begin anew at every start."""
    latch = Latch()
    for work in (
        latch.logic.session("", "sum", None, None, None, None),
        latch.logic.restore(b"", "", None),
        latch.logic.session("..", None, None, None, None, None),
        latch.logic.session("\ud800", None, None, None, None, None),
        latch.logic.session(5, None, None, None, None, None),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInput, match="no session's id"):
            latch.run(work)
    assert latch.calls == []


def test_what_is_of_another_kind_is_refused() -> None:
    """Before anything is sent, and as what it is."""
    latch = Latch()
    session = latch.session()
    for work, path in (
        (latch.logic.session("a", "sum", None, float("nan"), None, None), "idle_ttl"),
        (latch.logic.session("a", "sum", None, "5", None, None), "idle_ttl"),  # type: ignore[arg-type]
        (session.fork("a", float("inf"), None), "idle_ttl"),
        (latch.logic.session("a", "sum", None, None, None, [1]), "state"),  # type: ignore[arg-type]
        (latch.logic.restore("text", None, None), "snapshot"),  # type: ignore[arg-type]
        (latch.logic.restore(10**9, None, None), "snapshot"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInput, match=path):
            latch.run(work)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[1.0], [2.0]], ">f8"),
        np.array([[2.0], [1.0]], "f4")[::-1],
        np.array([[1.0], [2.0]], np.longdouble),
        np.array([[1.0], [2.0]], "f2"),
        np.array([[1], [2]], ">i2"),
        [[1.0], [2.0]],
    ],
)
def test_arrays_of_any_kind_are_sequences_and_states(values: Any) -> None:
    """Also those that JSON's writer does not take as they are."""
    latch = Latch()
    with pytest.raises(NotLatch):
        latch.run(latch.logic.predict("sum", [values], None))
    assert json.loads(latch.calls[-1].content) == {"sequences": [[[1.0], [2.0]]]}
    latch.run(latch.logic.session("s", "sum", None, None, None, {"h": values, "c": np.array(5)}))
    assert json.loads(latch.calls[-2].content)["state"] == {"h": np.asarray(values).tolist(), "c": 5}


def test_what_is_masked_or_not_finite_is_refused() -> None:
    """What lies under a mask is nobody's value."""
    latch = Latch()
    masked = np.ma.masked_array([[1.0], [2.0]], [[0], [1]])
    with pytest.raises(InvalidInput, match="masked"):
        latch.run(latch.session().step(masked, None))
    for values, word in ((masked, "masked"), ([[1.0], [float("nan")]], r"sequences\[0\]\[1\]\[0\] is not finite")):
        with pytest.raises(InvalidInput, match=word):
            latch.run(latch.logic.predict("sum", [values], None))
