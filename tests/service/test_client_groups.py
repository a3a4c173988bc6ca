"""Groups, without I/O: a service of many sessions in memory, on a network that loses what a test tells it to."""

import json
import pickle
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.client.effects import Dial, Exchange, Later, Retry, Sleep, Work
from service.client.errors import LostSteps, NotAllStepped, NotLatch, PatienceExhausted
from service.client.groups import MAX_CHANNELS, SESSIONS_AT_ONCE, GroupLogic, replies_of
from service.client.protocol import ClientLogic, Info, Reply, SessionLogic, Standing
from service.client.requests import INPUT_BYTES, REPLY_BYTES
from service.errors import (
    Draining,
    InvalidInput,
    LatchError,
    Overloaded,
    SessionNotFound,
    StepConflict,
    StoreUnavailable,
)
from service.slab import Kept
from service.steps import Decision, decide
from service.wire import StepReply, StepRequest, frames
from service.wire.frames import HEADER, Kind
from service.wire.rows import Field, RowFormat
from tests.service.test_client_protocol import performed

ROW = RowFormat(Field("float32", (1,)), {"y": Field("float32", (1,)), "h": Field("float32", (1,))})
MADE = datetime(2026, 11, 28, tzinfo=UTC)
REFUSALS = {
    "overloaded": Overloaded("full", retry_after_ms=100),
    "store_unavailable": StoreUnavailable("gone"),
    "gone": SessionNotFound("no such session"),
}


class Sum:
    """A session of the service: its output is the sum of its inputs so far."""

    def __init__(self) -> None:
        self.applied: list[float] = []
        self.kept: Kept | None = None

    def apply(self, first: int, data: bytes, outputs: tuple[str, ...]) -> StepReply:
        """As the service: the step table, then the step. Raises StepConflict."""
        rows = np.frombuffer(data, "<f4")
        last, digest = first + len(rows) - 1, StepRequest(data, len(rows), outputs).digest
        if decide(len(self.applied), self.kept, first, digest) is Decision.REPLAY:
            assert self.kept is not None
            return StepReply(outputs, self.kept.reply, first, last, replayed=True)
        self.applied += rows.tolist()
        sums = np.cumsum(self.applied, dtype=np.float32)[-len(rows) :]
        reply = np.repeat(sums, len(outputs)).tobytes()
        self.kept = Kept(first, digest, reply)
        return StepReply(outputs, reply, first, last)


class Hub:
    """Sessions by id, and one socket.

    Attributes:
        fates: what happens to the next effects; fine when there is none left: `unsent`, `unanswered`, `half` (its
            answers are cut in the middle), `going_away`.
        refusals: what the next steps of a session are refused with, by id; fine when there is none left.
        messages: what was sent, as (type, channel) of each frame.
        models: of those that are not `sum`.
        takes: seconds that an exchange takes.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}
        self.fates: deque[str] = deque()
        self.refusals: dict[str, deque[str]] = {}
        self.messages: list[list[tuple[int, int]]] = []
        self.models: dict[str, str] = {}
        self.dials = 0
        self.made = MADE
        self.now = self.takes = 0.0
        self.client = ClientLogic(Retry(60.0, 10.0, lambda: self.now, lambda _, most: most))
        self._bound: dict[int, tuple[str, tuple[str, ...]]] = {}
        self._ready: deque[bytes] = deque()
        self._is_open = self._is_silent = False

    def session(self, name: str) -> SessionLogic:
        """One that is there now, as a client finds it."""
        found = self.sums.setdefault(name, Sum())
        return SessionLogic(self.client, Info(name, "sum", "1", len(found.applied), self.made, 900_000), ROW)

    def run(self, work: Work[Any]) -> Any:
        """Performs as a shell does."""
        return performed(work, self._perform)

    def _cut(self) -> Later:
        self._is_open = False
        return Later(ConnectionResetError("cut"))

    def _perform(self, effect: Any) -> Any:
        if isinstance(effect, Sleep):
            self.now += effect.seconds
            return None
        fate = self.fates.popleft() if self.fates else "fine"
        if fate == "unsent":
            raise self._cut()
        if isinstance(effect, Dial):
            self.dials += 1
            self._bound, self._ready, self._is_open = {}, deque(), True
            return None
        assert isinstance(effect, Exchange)
        self.now += self.takes
        assert self._is_open, "a message on a socket that broke"
        if effect.message is not None:
            assert not self._ready, "a message before the answers to the last"
            self._take(effect.message)
        if fate == "half":
            self._ready = deque([*self._ready][: len(self._ready) // 2])
        if self._is_silent and not self._ready:
            self._is_silent = False
            self._cut()
            raise Later(TimeoutError())
        if fate == "unanswered" or not self._ready:
            raise self._cut()
        return self._ready.popleft() + (
            frames.notice(Kind.GOING_AWAY, 0, {"reason": "stopping"}) if fate == "going_away" else b""
        )

    def _take(self, message: bytes) -> None:
        """Reads as the service does, and answers every frame in a message of its own."""
        sent = []
        for frame in frames.read(message, lambda channel: 4 if channel in self._bound else None):
            sent.append((frame.kind, frame.channel))
            if frame.kind == Kind.OPEN:
                opened = json.loads(frame.payload)
                self._ready.append(self._open(frame.channel, opened["session"], tuple(opened["outputs"])))
            elif answer := self._step(frame):
                self._ready.append(answer)
        self.messages.append(sent)

    def _open(self, channel: int, name: str, outputs: tuple[str, ...]) -> bytes:
        if name not in self.sums:
            return frames.notice(Kind.ERROR, channel, SessionNotFound("no such session").to_dict())
        self._bound[channel] = name, outputs
        model, step = self.models.get(name, "sum"), len(self.sums[name].applied)
        facts = {"session": name, "model": model, "version": "1", "step": step, "created_at": self.made.isoformat()}
        return frames.notice(Kind.HELLO, channel, facts)

    def _step(self, frame: frames.Frame) -> bytes:
        name, outputs = self._bound[frame.channel]
        waiting = self.refusals.get(name)
        fate = waiting.popleft() if waiting else "fine"
        if fate == "silent":
            self._is_silent = True
            return b""
        try:
            if fate != "fine":
                if fate == "store_unavailable":  # which may mean that it is applied
                    self.sums[name].apply(frame.first_step, frame.payload, outputs)
                raise REFUSALS[fate]
            if name not in self.sums:
                raise SessionNotFound("no such session")
            return frames.stepped(frame.channel, self.sums[name].apply(frame.first_step, frame.payload, outputs))
        except LatchError as error:
            return frames.notice(Kind.ERROR, frame.channel, error.to_dict(), frame.first_step)


class Named(Standing):
    """What a shell has of a session."""

    def __init__(self, logic: SessionLogic) -> None:
        self._logic = logic


def stepped(hub: Hub, group: GroupLogic, rows: dict[SessionLogic, Any]) -> list[Reply | LatchError]:
    """What a shell's `step` gets."""
    outcomes = hub.run(group.step([*rows.items()]))
    assert isinstance(outcomes, list)
    return outcomes


fates = st.lists(st.sampled_from(["fine", "unsent", "unanswered", "half", "going_away"]), max_size=8)
refusals = st.dictionaries(
    st.sampled_from("abcde"), st.lists(st.sampled_from(["overloaded", "store_unavailable"]), max_size=3)
)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 3), min_size=1), fates, refusals), max_size=8
    )
)
def test_what_a_client_was_told_is_what_was_applied(rounds: list[Any]) -> None:
    """Any sessions, any number of rows, any faults: every row is applied once and its reply is the one of that row."""
    hub = Hub()
    sessions = {name: hub.session(name) for name in "abcde"}
    group = GroupLogic(hub.client, None)
    sent: dict[str, list[float]] = {name: [] for name in "abcde"}
    for counts, hub.fates, hub.refusals in (
        (counts, deque(fates), {name: deque(each) for name, each in refusals.items()})
        for counts, fates, refusals in rounds
    ):
        rows = {
            name: np.arange(1, n + 1, dtype=np.float32)[:, None] + 10 * len(sent[name]) for name, n in counts.items()
        }
        outcomes = stepped(hub, group, {sessions[name]: each for name, each in rows.items()})
        for (name, each), reply in zip(rows.items(), outcomes, strict=True):
            assert isinstance(reply, Reply)
            assert (reply.first_step, reply.step) == (len(sent[name]) + 1, len(sent[name]) + len(each))
            sent[name] += each[:, 0].tolist()
            assert reply["y"][:, 0].tolist() == np.cumsum(sent[name])[-len(each) :].tolist()
        assert {name: hub.sums[name].applied for name in sent} == sent
        assert all(sessions[name].at == len(sent[name]) for name in sent)


def test_what_one_session_meets_is_no_others_matter() -> None:
    """Gone, moved by somebody, fallen behind: each has its error, the others their replies, and the socket stays."""
    hub = Hub()
    fine, gone, moved, fallen = (hub.session(name) for name in ("fine", "gone", "moved", "fallen"))
    group = GroupLogic(hub.client, None)
    everybody = {session: [1.0] for session in (fine, gone, moved, fallen)}
    assert all(isinstance(outcome, Reply) for outcome in stepped(hub, group, everybody))
    del hub.sums["gone"]
    for first in (2, 3):
        hub.sums["moved"].apply(first, np.full(1, 5, np.float32).tobytes(), ("y",))
    hub.sums["fallen"] = Sum()
    outcomes = stepped(hub, group, everybody)
    assert [type(outcome) for outcome in outcomes] == [Reply, SessionNotFound, StepConflict, LostSteps]
    assert ([fine.at, gone.at, moved.at, fallen.at], hub.dials) == ([2, 1, 1, 1], 1)
    named = [Named(session) for session in everybody]
    with pytest.raises(NotAllStepped, match="3 of 4 sessions were not stepped; the first, 'gone'") as caught:
        replies_of(named, outcomes)
    assert [*caught.value.replies] == named[:1]
    assert [*caught.value.errors.values()] == outcomes[1:]
    hub.session("gone")
    outcomes = stepped(hub, group, {hub.session("gone"): [1.0], moved: [1.0]})
    assert [type(outcome) for outcome in outcomes] == [Reply, StepConflict]


def test_a_session_made_anew_is_never_gone_on_with() -> None:
    """A channel on which a session was found gone is opened again, and what is there then has fewer steps."""
    hub = Hub()
    session = hub.session("s")
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {session: [1.0]})
    hub.refusals["s"] = deque(["gone"])
    assert isinstance(stepped(hub, group, {session: [2.0]})[0], SessionNotFound)
    hub.sums["s"] = Sum()
    assert isinstance(stepped(hub, group, {session: [2.0]})[0], LostSteps)
    assert hub.sums["s"].applied == []


def test_patience_is_of_the_step_and_told_of_each_session() -> None:
    """Whoever was answered keeps the reply; of the others the error says which steps are unsure, and again is right."""
    hub = Hub()
    quick, slow = hub.session("quick"), hub.session("slow")
    group = GroupLogic(hub.client, None)
    hub.refusals["slow"] = deque(["store_unavailable"] * 1000)
    reply, error = stepped(hub, group, {quick: [1.0], slow: [[1.0], [2.0]]})
    assert isinstance(reply, Reply)
    assert isinstance(error, PatienceExhausted)
    assert (error.unacknowledged, type(error.__cause__), slow.at) == (range(1, 3), StoreUnavailable, 0)
    hub.refusals.clear()
    (reply,) = stepped(hub, group, {slow: [[1.0], [2.0]]})
    assert isinstance(reply, Reply)
    assert (reply.replayed, hub.sums["slow"].applied, hub.sums["quick"].applied) == (True, [1, 2], [1])


def test_a_refused_session_waits_and_the_socket_stays() -> None:
    """No room for one of them: it alone is sent again, as late as the service asks, over the same connection."""
    hub = Hub()
    one, other = hub.session("one"), hub.session("other")
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {one: [1.0], other: [1.0]})
    hub.messages.clear()
    hub.refusals["other"] = deque(["overloaded"])
    stepped(hub, group, {one: [1.0], other: [1.0]})
    assert hub.messages == [[(Kind.STEP, 1), (Kind.STEP, 2)], [(Kind.OPEN, 2)], [(Kind.STEP, 2)]]
    assert (hub.dials, hub.now) == (1, 0.1)


def test_a_service_that_has_lost_its_store_is_left() -> None:
    """Another connection may lead to one that reaches it."""
    hub = Hub()
    one, other = hub.session("one"), hub.session("other")
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {one: [1.0], other: [1.0]})
    hub.refusals["other"] = deque(["store_unavailable"])
    stepped(hub, group, {one: [1.0], other: [1.0]})
    assert (hub.dials, hub.sums["one"].applied, hub.sums["other"].applied) == (2, [1, 1], [1, 1])


def test_many_sessions_travel_in_messages_that_a_run_takes() -> None:
    """As many frames as a run has sessions, and no message that the service would refuse for its size."""
    hub = Hub()
    sessions = [hub.session(str(i)) for i in range(2 * SESSIONS_AT_ONCE + 1)]
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {session: [1.0] for session in sessions})
    assert [len(message) for message in hub.messages] == [SESSIONS_AT_ONCE, SESSIONS_AT_ONCE, 1] * 2
    hub.messages.clear()
    rows = np.ones((INPUT_BYTES // 4 // 20, 1), np.float32)
    stepped(hub, group, dict.fromkeys(sessions[:30], rows))
    assert [len(message) for message in hub.messages] == [21, 9]


def test_more_rows_than_a_reply_is_kept_of_travel_in_parts() -> None:
    """Each of them is applied once, and the item is answered as one."""
    hub = Hub()
    long, short = hub.session("long"), hub.session("short")
    rows = np.ones((2 * REPLY_BYTES // 4 + 1, 1), np.float32)
    hub.fates += ["fine"] * 3 + ["unanswered"]
    outcomes = stepped(hub, GroupLogic(hub.client, None), {long: rows, short: [1.0]})
    reply, other = (outcome for outcome in outcomes if isinstance(outcome, Reply))
    assert (reply.first_step, reply.step, reply.replayed, other.step) == (1, len(rows), True, 1)
    assert reply["y"][:, 0].tolist() == list(range(1, len(rows) + 1))


def test_an_item_that_failed_half_way_leaves_nothing_behind() -> None:
    """Its first part is applied, and what comes next is answered by itself."""
    hub = Hub()
    session = hub.session("s")
    group = GroupLogic(hub.client, None)
    rows = np.ones((REPLY_BYTES // 4 + 1, 1), np.float32)
    hub.refusals["s"] = deque(["fine", "gone"])
    assert isinstance(stepped(hub, group, {session: rows})[0], SessionNotFound)
    assert session.at == len(rows) - 1
    (reply,) = stepped(hub, group, {session: [1.0]})
    assert isinstance(reply, Reply)
    assert (reply.first_step, reply["y"].tolist()) == (len(rows), [[len(rows)]])


def test_other_outputs_are_what_the_channels_are_opened_with() -> None:
    """Of every session of the group."""
    hub = Hub()
    session = hub.session("s")
    (reply,) = stepped(hub, GroupLogic(hub.client, ["h", "y"]), {session: [2.0]})
    assert isinstance(reply, Reply)
    assert (reply["h"].tolist(), reply["y"].tolist()) == ([[2.0]], [[2.0]])
    with pytest.raises(InvalidInput, match="'nope'"):
        stepped(hub, GroupLogic(hub.client, ["nope"]), {session: [2.0]})


@pytest.mark.parametrize("bad", ["shape", "twice"])
def test_what_is_wrong_with_the_rows_is_found_before_anything_is_sent(bad: str) -> None:
    """With the name of the session."""
    hub = Hub()
    one, other = hub.session("one"), hub.session("one" if bad == "twice" else "other")
    rows: dict[SessionLogic, Any] = {one: [1.0], other: [1.0] if bad == "twice" else [1.0, 2.0]}
    with pytest.raises(InvalidInput, match="twice" if bad == "twice" else "session 'other': rows of shape"):
        stepped(hub, GroupLogic(hub.client, None), rows)
    assert hub.dials == 0


def test_no_session_is_no_step() -> None:
    """An empty step asks nobody."""
    hub = Hub()
    assert stepped(hub, GroupLogic(hub.client, None), {}) == []
    assert hub.dials == 0


def test_channels_are_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sessions over time than a socket has channels; more of them at once are refused."""
    monkeypatch.setattr("service.client.groups.MAX_CHANNELS", 3)
    assert HEADER.pack(Kind.STEP, 0, MAX_CHANNELS, 0, 0)
    hub = Hub()
    group = GroupLogic(hub.client, None)
    sessions = [hub.session(str(i)) for i in range(4)]
    for part in (sessions[:2], sessions[2:], sessions[1:]):
        for reply in stepped(hub, group, {session: [1.0] for session in part}):
            assert isinstance(reply, Reply)
    assert [len(hub.sums[str(i)].applied) for i in range(4)] == [1, 2, 2, 2]
    assert max(channel for message in hub.messages for _, channel in message) == 3
    with pytest.raises(InvalidInput, match="4 sessions: a socket carries 3"):
        stepped(hub, group, {session: [1.0] for session in sessions})


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("{}", NotLatch),
        (frames.stepped(1, StepReply(("y",), bytes(4), 1, 1)), NotLatch),
        (frames.notice(Kind.HELLO, 2, {"step": 0}), NotLatch),
        (frames.notice(Kind.ERROR, 0, InvalidInput("what?").to_dict()), InvalidInput),
    ],
    ids=["text", "a step before the hello", "a channel of nobody", "the socket's own error"],
)
def test_what_is_wrong_with_the_connection_is_told_of_who_has_no_answer(message: Any, error: type[Exception]) -> None:
    """Whoever has one keeps it, and the next step makes another connection."""
    hub = Hub()
    session = hub.session("s")
    group = GroupLogic(hub.client, None)
    work = group.step([(session, [1.0])])
    assert isinstance(next(work), Dial)
    work.send(None)
    with pytest.raises(StopIteration) as end:
        work.send(message)
    assert [type(outcome) for outcome in end.value.value] == [error]
    assert session.at == 0
    stepped(hub, group, {session: [1.0]})
    assert (hub.dials, session.at) == (1, 1)


def test_a_step_that_was_interrupted_may_be_repeated() -> None:
    """Those that were answered before it are answered again, with the replies that they had."""
    hub = Hub()
    sessions = [hub.session(str(i)) for i in range(SESSIONS_AT_ONCE + 1)]
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {session: [1.0] for session in sessions})
    rows = {session: [2.0] for session in sessions}
    interrupted = group.step([*rows.items()])
    effect = next(interrupted)
    for _ in range(SESSIONS_AT_ONCE):
        effect = interrupted.send(hub._perform(effect))
    del interrupted
    assert [len(each.applied) for each in hub.sums.values()] == [2] * SESSIONS_AT_ONCE + [1]
    assert {session.at for session in sessions} == {1}
    replies = [reply for reply in stepped(hub, group, rows) if isinstance(reply, Reply)]
    assert [(reply.step, reply["y"].tolist()) for reply in replies] == [(2, [[3.0]])] * (SESSIONS_AT_ONCE + 1)
    assert {len(each.applied) for each in hub.sums.values()} == {2}


def test_a_step_in_parts_that_was_interrupted_says_how_far_it_got() -> None:
    """`at` is where the last part that was answered ends, and the rows behind it go on from there."""
    hub = Hub()
    session = hub.session("s")
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {session: [0.0]})
    rows = np.ones((REPLY_BYTES // 4 + 1, 1), np.float32)
    interrupted = group.step([(session, rows)])
    interrupted.send(hub._perform(next(interrupted)))
    del interrupted
    assert session.at == len(hub.sums["s"].applied) == len(rows)
    (reply,) = stepped(hub, group, {session: rows[-1:]})
    assert isinstance(reply, Reply)
    assert (reply.step, reply["y"].tolist()) == (len(rows) + 1, [[len(rows)]])


def test_a_session_of_another_model_is_not_stepped() -> None:
    """Its rows may have another size, and then the frames behind its own would be taken for its rows."""
    hub = Hub()
    sessions = [hub.session(name) for name in "abc"]
    hub.models["b"] = "product"
    outcomes = stepped(hub, GroupLogic(hub.client, None), {session: [1.0] for session in sessions})
    assert [type(outcome) for outcome in outcomes] == [Reply, SessionNotFound, Reply]
    assert "made anew on product/1" in str(outcomes[1])
    assert [session.at for session in sessions] == [1, 0, 1]


def test_nobody_waits_for_a_session_that_does_not_answer() -> None:
    """After a try that it has spoilt it comes last, alone: the others are all stepped, whatever it does."""
    hub = Hub()
    sessions = [hub.session(str(i)) for i in range(2 * SESSIONS_AT_ONCE)]
    group = GroupLogic(hub.client, None)
    hub.refusals["3"] = deque(["silent"] * 1000)
    hub.takes = 0.01
    outcomes = stepped(hub, group, {session: [1.0] for session in sessions})
    assert [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Reply)] == [3]
    assert isinstance(outcomes[3], PatienceExhausted)
    assert outcomes[3].unacknowledged == range(1, 2)


def test_nobody_waits_for_a_message_full_of_sessions_that_do_not_answer() -> None:
    """What they have spoilt once, they spoil no more for the one behind them."""
    hub = Hub()
    sessions = [hub.session(str(i)) for i in range(SESSIONS_AT_ONCE + 1)]
    hub.refusals = {session.info.id: deque(["silent"] * 1000) for session in sessions[:-1]}
    hub.takes = 0.01
    outcomes = stepped(hub, GroupLogic(hub.client, None), {session: [1.0] for session in sessions})
    assert {type(outcome) for outcome in outcomes[:-1]} == {PatienceExhausted}
    assert isinstance(outcomes[-1], Reply)


def test_patience_is_the_time_without_an_answer() -> None:
    """A step of many takes as long as it takes, and a break in the middle of it costs time only."""
    hub = Hub()
    sessions = [hub.session(str(i)) for i in range(4 * SESSIONS_AT_ONCE)]
    hub.takes = 25 / SESSIONS_AT_ONCE
    hub.fates += ["fine"] * 6 * SESSIONS_AT_ONCE + ["unanswered"]
    outcomes = stepped(hub, GroupLogic(hub.client, None), {session: [1.0] for session in sessions})
    assert {type(outcome) for outcome in outcomes} == {Reply}
    assert hub.now > 100
    assert {len(each.applied) for each in hub.sums.values()} == {1}


def test_errors_survive_the_way_to_another_process() -> None:
    """A pool of processes would break of one that does not; sessions are named by their ids there."""
    hub = Hub()
    one, other = hub.session("one"), hub.session("other")
    patience = PatienceExhausted("too long", range(3, 5))
    for error in (patience, LostSteps("one", 5, 3)):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - of our own making
        assert (str(again), vars(again)) == (str(error), vars(error))
    reply = stepped(hub, GroupLogic(hub.client, None), {one: [1.0]})[0]
    with pytest.raises(NotAllStepped) as caught:
        replies_of([Named(one), Named(other)], [reply, patience])
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - likewise
    assert str(again) == str(caught.value)
    assert (again.replies["one"].step, again.errors["other"].unacknowledged) == (1, range(3, 5))


def test_a_step_that_was_interrupted_leaves_no_answers_to_be_taken_for_the_next_ones() -> None:
    """Whoever is cancelled between a message and its answers dials again."""
    hub = Hub()
    session = hub.session("s")
    group = GroupLogic(hub.client, None)
    stepped(hub, group, {session: [1.0]})
    interrupted = group.step([(session, [2.0])])
    next(interrupted)
    del interrupted
    (reply,) = stepped(hub, group, {session: [2.0]})
    assert isinstance(reply, Reply)
    assert (reply.step, hub.dials) == (2, 2)


def test_the_sockets_own_refusal_may_pass() -> None:
    """A service on its way out says so on channel 0: the step is tried again elsewhere."""
    hub = Hub()
    session = hub.session("s")
    work = GroupLogic(hub.client, None).step([(session, [1.0])])
    next(work)
    work.send(None)
    assert isinstance(work.send(frames.notice(Kind.ERROR, 0, Draining("stopping").to_dict())), Sleep)


def test_the_answers_to_one_message_share_its_time() -> None:
    """However many of them there are: a service that answers one every now and then is given up."""
    hub = Hub()
    group = GroupLogic(hub.client, None)
    hub.run(group.step([(hub.session(name), [1.0]) for name in "abc"]))  # opens the channels
    hub.takes, timeouts = 2.0, []

    def perform(effect: Any) -> Any:
        timeouts.append(effect.timeout)
        return hub._perform(effect)

    performed(group.step([(hub.session(name), [1.0]) for name in "abc"]), perform)
    assert timeouts == [10.0, pytest.approx(8.0), pytest.approx(6.0)]


@pytest.mark.parametrize("way", ["refreshed", "opened"])
def test_a_session_made_anew_is_bound_anew(way: str) -> None:
    """The channel is of the one before; by whichever object its user goes on, the first step is the new one's."""
    hub = Hub()
    group = GroupLogic(hub.client, None)
    old = hub.session("a")
    hub.run(group.step([(old, [1.0])]))
    hub.sums["a"] = Sum()
    hub.made = MADE + timedelta(seconds=1)
    if way == "refreshed":
        old.info, old.at = hub.session("a").info, 0
    session = old if way == "refreshed" else hub.session("a")
    [reply] = hub.run(group.step([(session, [5.0])]))
    assert isinstance(reply, Reply)
    assert (reply.step, reply["y"].tolist(), hub.messages[-2:]) == (1, [[5.0]], [[(Kind.OPEN, 1)], [(Kind.STEP, 1)]])
