"""`Client`, `Session`, `Group`: for plain Python. Threads may share them; calls of one session take turns.

Rule: it performs what `protocol.py` asks for, and decides nothing.
"""

import socket
import struct
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any, Self, TypeVar

import httpx
from websockets.sync.client import ClientConnection, connect

from service.client.effects import Answer, Call, Dial, Effect, Exchange, Retry, Sleep, Work
from service.client.groups import GroupLogic, replies_of
from service.client.protocol import ClientLogic, Reply, SessionLogic, Standing
from service.client.streams import StreamLogic
from service.client.transport import FAILURES, Process, Target, failure
from service.manifest import Array

T = TypeVar("T")


class Client:
    """A client of the service at `url`. Close it, or use it in a `with` block.

    Every call is tried again, after growing pauses, while the service is away, has no room or does not answer.

    Args:
        url: base address, http:// or https://.
        patience: seconds that one call, or one request of a stream, may take with all its tries.
        timeout: seconds that one try may take; longer than the longest request that you send. Over HTTP it is one for
            the way there and each part of the answer's head, and one for the rest of the answer.
        headers: sent with every call and WebSocket.

    Raises (every method):
        LatchError: what the service refused, as the class of its code in `service.errors`.
        PatienceExhausted: the service was away, or had no room, for too long.
    """

    def __init__(
        self, url: str, *, patience: float = 60.0, timeout: float = 10.0, headers: Mapping[str, str] | None = None
    ) -> None:
        target = Target(url, headers or {})
        self._http = httpx.Client(**target.http())
        self._line = _Line(self._http, target)
        self._logic = ClientLogic(Retry(patience, timeout))

    def session(
        self,
        session_id: str | None = None,
        *,
        model: str | None = None,
        version: str | None = None,
        idle_ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> "Session":
        """Creates a session, or finds the one of this id and goes on from its step.

        Args:
            session_id: yours to choose; None makes one up.
            model: what to create it with, at step 0, where there is none (any more); None only finds.
            version: of the model; the service's default when None.
            idle_ttl: seconds without a step after which it is gone, where it is made now; the service's default when
                None. One that is there keeps its own, which `Session.idle_ttl` tells.
            metadata: names and values of your own.
            state: arrays or nested lists by name, where a new one does not begin in the model's initial state.
        """
        work = self._logic.session(session_id, model, version, idle_ttl, metadata, state)
        return Session(self._line, self._line.run(work))

    def restore(self, snapshot: bytes, session_id: str | None = None, idle_ttl: float | None = None) -> "Session":
        """A session from the bytes that `Session.snapshot` gave, with `idle_ttl` as in `session`; one that has this id
        already is moved there.
        """
        return Session(self._line, self._line.run(self._logic.restore(snapshot, session_id, idle_ttl)))

    def predict(
        self, model: str, sequences: Iterable[Any], outputs: Iterable[str] | None = None
    ) -> list[dict[str, Array]]:
        """Runs whole sequences of rows, [T, *shape] each, from the initial state; nothing is kept."""
        return self._line.run(self._logic.predict(model, sequences, outputs))

    def group(self, outputs: Iterable[str] | None = None) -> "Group":
        """Steps many sessions together over one WebSocket; close it, or use it in a `with` block.

        Args:
            outputs: names of what comes back for each row; None: each model's prediction.
        """
        return Group(self._line.another(), GroupLogic(self._logic, outputs))

    def close(self) -> None:
        """Lets go of the connections; sessions live on."""
        if self._line.process.is_this:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session(Standing):
    """A session of the service, as `Client.session` gives it.

    Steps are numbered from what the service last acknowledged (`at`), so a call that was interrupted or whose patience
    ended may be repeated: whatever of it was applied is not applied again.

    Raises (every step):
        StepConflict: another client has moved the session; `refresh()` goes on from where it is.
        LostSteps: the session is at a lower step than was acknowledged.
        InvalidInput: rows that the model does not take. Nothing has changed.
    """

    def __init__(self, line: "_Line", logic: SessionLogic) -> None:
        self._line = line
        self._logic = logic
        self._lock = threading.RLock()  # which only its owner can let go of: see `_let_go`

    def step(self, rows: Any, outputs: Iterable[str] | None = None) -> Reply:
        """Advances by one row or by T of them, [T, *shape]: all are applied, or none.

        Args:
            rows: what the model takes.
            outputs: names of what comes back for each row; None: the prediction.

        It goes over HTTP, where a session that somebody deleted and made anew is not told from it if it is at the same
        step; over a WebSocket, by a stream or a group, it is.

        Returns:
            The outputs, [T, *shape] each. Without them where the connection broke and the reply was larger than the
            service keeps (64 KiB unless it is set otherwise): `stream` cuts what it sends so that this cannot be.
        """
        return self._run(self._logic.step(rows, outputs))

    def stream(
        self, readings: Iterable[Any], *, window: int = 1, outputs: Iterable[str] | None = None
    ) -> Generator[Reply]:
        """Sends what `readings` gives over one WebSocket: one reply for each item, in order, whatever breaks.

        After an error go on from the row that comes after step `at`. Outputs are lost (None) only where a row of them
        has over 64 KiB, or the service is set to keep less than that, and the connection broke before they arrived.

        Args:
            readings: rows, or arrays of rows [T, *shape].
            window: items that are taken from `readings` before they travel in one request. 1 answers each before the
                next is asked for, which is right for what is happening now. More is quicker by as much where the
                readings are there already; their replies come together, and a row that is refused refuses them all.
                One request is under way at a time: the service keeps one reply, so with more of them a broken
                connection would lose those before the last.
            outputs: names of what comes back for each row; None: the prediction.
        """
        stream = StreamLogic(self._logic, outputs, window)
        line = self._line.another()
        try:
            items = iter(readings)
            while batch := list(islice(items, window)):
                for request in stream.requests.cut(batch):
                    yield from self._run(stream.exchange(request), line)
        finally:
            line.hang_up()

    def refresh(self) -> None:
        """Goes on from the step at which the service says that the session is."""
        self._run(self._logic.refresh())

    def reset(self) -> None:
        """Back to the initial state and step 0."""
        self._run(self._logic.reset())

    def rollback(self, step: int) -> None:
        """Back to a step that the service keeps. Raises StepNotKept, which says of which it does."""
        self._run(self._logic.rollback(step))

    def fork(
        self,
        session_id: str | None = None,
        *,
        idle_ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> "Session":
        """Another session that goes on from here; this one stays as it is. Raises SessionExists where the id is taken,
        perhaps by an earlier try of this call whose answer was lost: `Client.session` finds it.
        """
        return Session(self._line, self._run(self._logic.fork(session_id, idle_ttl, metadata)))

    def snapshot(self) -> bytes:
        """The session as safetensors; `Client.restore` makes a session of it."""
        return self._run(self._logic.snapshot())

    def delete(self) -> None:
        """Ends the session; one that is gone is no error."""
        self._run(self._logic.delete())

    def _run(self, work: Work[T], line: "_Line | None" = None) -> T:
        self._line.process.check()  # before the lock, which somebody may have held as this process was forked
        with self._lock:
            return (line or self._line).run(work)


class Group:
    """Many sessions over one WebSocket, as `Client.group` gives it. They may be of different models, come and go, and
    be stepped by themselves between two steps of the group.
    """

    def __init__(self, line: "_Line", logic: GroupLogic) -> None:
        self._line = line
        self._logic = logic
        self._lock = threading.Lock()

    def step(self, rows: Mapping[Session, Any]) -> dict[Session, Reply]:
        """Advances each session by its own row, or T of them, [T, *shape]. They run together in the service; each is
        applied or refused by itself, whatever breaks.

        A step that was interrupted may be repeated, and so may the rows of the sessions in `errors`: what of it was
        applied is not applied again. But where one session has more rows than the service keeps a reply of (64 KiB),
        they travel in parts: go on from the row that comes after its step `at`.

        Args:
            rows: what each session's model takes; at most 65,535 sessions. They travel 256 at a time, and each part is
                answered before the next is sent. `patience` is the time in which nobody gets an answer.

        Raises:
            NotAllStepped: some were refused, or nobody knows; it has the replies of all others.
            InvalidInput: rows whose shape or kind a model does not take, or two objects of one session. Nothing was
                sent, for any session.
        """
        self._line.process.check()  # as in `Session._run`
        with self._lock:
            locks = [session._lock for session in sorted(rows, key=id)]  # two groups must not wait for each other
            try:
                for lock in locks:
                    lock.acquire()
                outcomes = self._line.run(self._logic.step([(session._logic, row) for session, row in rows.items()]))
                return replies_of(rows, outcomes)
            finally:
                _let_go(locks)

    def close(self) -> None:
        """Closes the WebSocket, after a step that is under way; another would open it again. The sessions live on."""
        if not self._line.process.is_this:
            return
        with self._lock:
            self._logic.hung_up()
            self._line.hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _let_go(locks: list[Any]) -> None:
    """Releases what of them was taken, whatever interrupts that."""
    try:
        while locks:
            with suppress(RuntimeError):  # it was not: the interrupt came before
                locks[-1].release()
            locks.pop()
    finally:
        if locks:
            _let_go(locks)


class _Line:
    """Performs effects, over HTTP and over a WebSocket of its own."""

    def __init__(self, http: httpx.Client, target: Target) -> None:
        self._http = http
        self._target = target
        self.process = Process()
        self._dialled = ExitStack()
        self._socket: ClientConnection | None = None

    def another(self) -> "_Line":
        """One with a WebSocket of its own."""
        return _Line(self._http, self._target)

    def run(self, work: Work[T]) -> T:
        """Does what the work asks for until it has its result."""
        self.process.check()
        try:
            effect = next(work)
            while True:
                try:
                    outcome = self._perform(effect)
                except FAILURES as error:
                    if isinstance(effect, Sleep):  # of the caller's own, in the handler of a signal say
                        raise
                    effect = work.throw(failure(error))
                else:
                    effect = work.send(outcome)
        except StopIteration as end:
            result: T = end.value
            return result

    def hang_up(self) -> None:
        """Closes the WebSocket, if there is one and it is this process's own."""
        self._socket = None
        if self.process.is_this and not sys.is_finalizing():  # else what reads it is gone, and closing waits for that
            self._dialled.close()
        else:
            self._dialled.pop_all()

    def _perform(self, effect: Effect) -> Any:
        match effect:
            case Sleep(seconds):
                time.sleep(seconds)
            case Call():
                with self._http.stream(**effect._asdict()) as reply:
                    end, body = time.monotonic() + effect.timeout, []  # httpx's own limit is one for each read
                    for part in reply.iter_bytes():
                        body.append(part)
                        if time.monotonic() > end:
                            raise TimeoutError(f"the answer is not whole after {effect.timeout:g} s")
                    return Answer(reply.status_code, reply.headers, b"".join(body))
            case Dial(path, timeout):
                self.hang_up()
                self._socket = self._dialled.enter_context(connect(**self._target.socket(path, timeout)))
                if sys.platform != "win32":  # websockets' `send` has no time limit: one to who hangs would never end
                    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
                    self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            case Exchange(message, timeout) if self._socket is not None:
                if message is not None:
                    self._socket.send(message)
                return self._socket.recv(timeout)
        return None
