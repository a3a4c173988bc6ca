"""What the clients do, without doing it: which request goes out, what an answer means, when to try again.

Rule: no I/O, no sleep, no lock. An operation is a generator (`Work`): it yields what it wants done, is sent what came
of it, or is thrown `Later` where the connection failed. `blocking.py` and `asynchronous.py` only perform.

How a step is applied once: a session has one request under way at a time. It carries the number of its first step, and
every try sends the same number and bytes. The service answers a try of what it has applied already with the reply that
it kept, so that nothing is applied twice and no reply is missed, wherever the connection broke.
"""

import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, urlencode
from uuid import uuid4

import msgspec
import numpy as np

from service.client.errors import LostSteps, NotLatch, OutputsNotKept, PatienceExhausted, refusal
from service.errors import (
    InvalidInput,
    LatchError,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    StepConflict,
)
from service.manifest import Array
from service.wire import frames, native
from service.wire.frames import Kind
from service.wire.rows import Field, RowFormat

JSON, PACKED = "application/json", "application/octet-stream"
FIRST_DELAY, LONGEST_DELAY = 0.05, 5.0  # seconds, of the back-off
# A request of a stream is no larger than this, so that the service keeps its reply (`LATCH_KEEP_REPLY_BYTES`) and takes
# it (`LATCH_MAX_STEPS`) where these are as they come.
REPLY_BYTES, INPUT_BYTES, MAX_STEPS = 2**16, 2**20, 2**14

T = TypeVar("T")
Result = TypeVar("Result")


class Call(NamedTuple):
    """An HTTP request to send; what came of it is an `Answer`."""

    method: str
    path: str
    body: bytes
    kind: str
    timeout: float


class Answer(NamedTuple):
    """An HTTP reply; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Dial(NamedTuple):
    """A WebSocket to open, in place of the one there was."""

    path: str
    timeout: float


class Exchange(NamedTuple):
    """A message to send, if any, over the WebSocket; what came of it is the next message."""

    message: bytes | None
    timeout: float


class Sleep(NamedTuple):
    """Time to let pass."""

    seconds: float


Effect: TypeAlias = Call | Dial | Exchange | Sleep
Work: TypeAlias = Generator[Effect, Any, Result]


class Later(Exception):
    """A try failed in a way that another may not: the `problem`, and the seconds to wait at least."""

    def __init__(self, problem: Exception, after: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.after = problem, after


@dataclass(frozen=True)
class Retry:
    """How long and how often a client tries.

    Attributes:
        patience: seconds that one operation may take with all its tries.
        timeout: seconds that one try may take.
        clock: monotonic seconds.
        jitter: gives a number between two others: the back-off is between 0 and a bound that doubles.
    """

    patience: float = 60.0
    timeout: float = 10.0
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[float, float], float] = random.uniform

    def until_done(self, attempt: Callable[[float], Work[T]], steps: range = range(0)) -> Work[T]:
        """Tries until it works or is refused for good.

        Args:
            attempt: starts one try, which may take so many seconds.
            steps: what stays unacknowledged when patience ends.

        Raises:
            PatienceExhausted: another try would come too late.
            LatchError: refused for good.
        """
        deadline = self.clock() + self.patience
        bound = FIRST_DELAY
        while True:
            try:
                return (yield from attempt(max(0.001, min(self.timeout, deadline - self.clock()))))
            except Later as later:
                delay = max(later.after, self.jitter(0.0, bound))
                if self.clock() + delay >= deadline:
                    unsure = f"; step {steps[0]} to {steps[-1]} may or may not be applied" if steps else ""
                    raise PatienceExhausted(
                        f"no success in {self.patience:g} s{unsure}; the last problem: {later.problem}", steps
                    ) from later.problem
            yield Sleep(delay)
            bound = min(2 * bound, LONGEST_DELAY)


class Info(msgspec.Struct, frozen=True):
    """What the service says of a session; it says more."""

    id: str
    model: str
    version: str
    step: int


class _Hello(msgspec.Struct):
    step: int


class _Tensor(msgspec.Struct):
    name: str
    dtype: str
    shape: tuple[int, ...]


class _Model(msgspec.Struct):
    input: _Tensor
    outputs: list[_Tensor]
    state: list[_Tensor]


class _Prediction(msgspec.Struct):
    outputs: dict[str, list[Any]]


class _Predictions(msgspec.Struct):
    sequences: list[_Prediction]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to T rows; `reply["y"]` is the output `y`, [T, *shape].

    Attributes:
        outputs: float32 or int64 arrays by name; None where the steps were applied but their outputs are lost.
        first_step: number of the first row, counted from 1.
        step: steps that the session has committed with these rows.
        replayed: whether an earlier try had applied them already.
    """

    outputs: Mapping[str, Array] | None
    first_step: int
    step: int
    replayed: bool = False

    def __getitem__(self, name: str) -> Array:
        if self.outputs is None:
            raise OutputsNotKept(
                f"steps {self.first_step} to {self.step} are applied; their outputs were lost with the connection, "
                "and the reply was too large for the service to keep: send fewer rows at a time"
            )
        return self.outputs[name]


class ClientLogic:
    """Everything but the steps of a session.

    Args:
        retry: how long and how often to try.
    """

    def __init__(self, retry: Retry) -> None:
        self.retry = retry
        self._formats: dict[tuple[str, str], RowFormat] = {}

    def call(
        self, method: str, path: str, body: bytes = b"", kind: str = JSON, steps: range = range(0)
    ) -> Work[Answer]:
        """An HTTP call, until it is answered with success. Raises as `Retry.until_done`."""

        def attempt(timeout: float) -> Work[Answer]:
            answer: Answer = yield Call(method, path, body, kind, timeout)
            if not 200 <= answer.status < 300:
                raise _problem(answer)
            return answer

        return self.retry.until_done(attempt, steps)

    def session(
        self,
        session_id: str | None,
        model: str | None,
        version: str | None,
        idle_ttl: float | None,
        metadata: Mapping[str, str] | None,
        state: Mapping[str, Any] | None,
    ) -> "Work[SessionLogic]":
        """Creates or finds a session; without a model it must exist."""
        if model is None:
            if session_id is None:
                raise InvalidInput("a session needs a model, or the id of one that exists", path="model")
            answer = yield from self.call("GET", _path(session_id))
        else:
            ttl = None if idle_ttl is None else round(idle_ttl * 1000)
            body = _json(model=model, version=version, idle_ttl_ms=ttl, metadata=metadata, state=state)
            # With an id of our own, a second try finds what the first one made.
            answer = yield from self.call("PUT", _path(session_id or uuid4().hex), body)
        return (yield from self.opened(_read(answer.body, Info)))

    def restore(self, snapshot: bytes, session_id: str | None) -> "Work[SessionLogic]":
        """Makes a session of a snapshot."""
        path = _path(session_id or uuid4().hex) + "/state"
        answer = yield from self.call("PUT", path, snapshot, PACKED)
        return (yield from self.opened(_read(answer.body, Info)))

    def predict(
        self, model: str, sequences: Iterable[Any], outputs: Iterable[str] | None
    ) -> Work[list[dict[str, Array]]]:
        """Whole sequences, without a session."""
        names = None if outputs is None else list(outputs)
        try:
            arrays = [np.ascontiguousarray(sequence) for sequence in sequences]
        except ValueError as error:
            raise InvalidInput(f"a sequence is no array: {error}", path="sequences") from error
        body = _json(sequences=arrays, outputs=names)
        answer = yield from self.call("POST", f"/v1/models/{quote(model, safe='')}/predict", body)
        predictions = _read(answer.body, _Predictions).sequences
        return [{name: _array(values) for name, values in each.outputs.items()} for each in predictions]

    def opened(self, info: Info) -> "Work[SessionLogic]":
        """A session that the service has told of; the rows of its model are asked for once."""
        key = info.model, info.version
        if key not in self._formats:
            model, version = (quote(part, safe="") for part in key)
            answer = yield from self.call("GET", f"/v1/models/{model}/versions/{version}")
            page = _read(answer.body, _Model)
            fields = {tensor.name: Field(tensor.dtype, tensor.shape) for tensor in (*page.outputs, *page.state)}
            self._formats[key] = RowFormat(Field(page.input.dtype, page.input.shape), fields)
        return SessionLogic(self, info, self._formats[key])


class SessionLogic:
    """One session, and how many of its steps the service has acknowledged.

    Args:
        client: what it calls through.
        info: as the service told it.
        rows: how its model's rows are packed.
    """

    def __init__(self, client: ClientLogic, info: Info, rows: RowFormat) -> None:
        self.client = client
        self.info = info
        self.rows = rows
        self.at = info.step
        self.path = _path(info.id)

    def step(self, rows: Any, outputs: Iterable[str] | None) -> Work[Reply]:
        """T rows in one request, which is applied whole or not at all."""
        data, count = self.pack(rows)
        names = self.rows.names(None if outputs is None else [*outputs], "outputs")
        steps = range(self.at + 1, self.at + 1 + count)
        query = urlencode({"step": steps[0], "outputs": ",".join(names)})
        try:
            answer = yield from self.client.call("POST", f"{self.path}/steps?{query}", data, PACKED, steps)
        except StepConflict as error:
            raise self.conflict(error) from error
        self.at = steps[-1]
        kept = "latch-already-applied" not in answer.headers
        outcome = self.unpack(answer.body, names, count) if kept else None
        return Reply(outcome, steps[0], self.at, "latch-replayed" in answer.headers)

    def refresh(self) -> Work[None]:
        """Goes on from where the service says that the session is."""
        yield from self._moved(self.client.call("GET", self.path))

    def reset(self) -> Work[None]:
        """Back to the initial state and step 0."""
        yield from self._moved(self.client.call("POST", f"{self.path}/reset"))

    def rollback(self, step: int) -> Work[None]:
        """Back to a kept step."""
        yield from self._moved(self.client.call("POST", f"{self.path}/rollback", _json(step=step)))

    def fork(
        self, session_id: str | None, idle_ttl: float | None, metadata: Mapping[str, str] | None
    ) -> "Work[SessionLogic]":
        """Another session that goes on from here."""
        branch = session_id or uuid4().hex
        ttl = None if idle_ttl is None else round(idle_ttl * 1000)
        body = _json(id=branch, idle_ttl_ms=ttl, metadata=metadata)
        try:
            answer = yield from self.client.call("POST", f"{self.path}/fork", body)
        except SessionExists:
            if session_id is not None:
                raise
            answer = yield from self.client.call("GET", _path(branch))  # nobody else knows the id: an earlier try
        return (yield from self.client.opened(_read(answer.body, Info)))

    def snapshot(self) -> Work[bytes]:
        """The session as bytes."""
        answer = yield from self.client.call("GET", f"{self.path}/state")
        return answer.body

    def delete(self) -> Work[None]:
        """Ends the session; one that is gone is no error."""
        try:
            yield from self.client.call("DELETE", self.path)
        except (SessionNotFound, SessionExpired):
            return

    def pack(self, rows: Any) -> tuple[bytes, int]:
        """One row, or T of them, as packed rows and T. Raises InvalidInput for another shape or kind of number."""
        dtype, shape = self.rows.input
        try:
            with np.errstate(over="ignore"):  # the service says which value it is
                array = np.asarray(rows).astype(dtype, order="C", casting="same_kind")
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"the rows are no {dtype}: {error}", path="inputs") from error
        if array.shape == shape:
            array = array[None]
        if array.shape[1:] != shape or array.ndim != len(shape) + 1 or not len(array):
            raise InvalidInput(f"rows of shape {array.shape}: the model takes {shape}, or [T, *{shape}]", path="inputs")
        return array.tobytes(), len(array)

    def unpack(self, data: bytes, names: tuple[str, ...], steps: int) -> dict[str, Array]:
        """Outputs of T packed rows. Raises NotLatch where there are not as many."""
        if len(data) != steps * self.rows.output_bytes(names):
            raise NotLatch(f"{len(data)} bytes came for {steps} rows of {', '.join(names) or 'nothing'}")
        return self.rows.unpack(data, names)

    def check(self, found: int) -> None:
        """Raises LostSteps where the service has fewer steps than it had acknowledged."""
        if found < self.at:
            raise LostSteps(self.info.id, self.at, found)

    def conflict(self, error: StepConflict) -> StepConflict:
        """The conflict, which is another client's doing. Raises LostSteps where it is not."""
        expected = error.extras.get("expected_step")
        if isinstance(expected, int):
            self.check(expected - 1)
        return error

    def _moved(self, call: Work[Answer]) -> Work[None]:
        answer = yield from call
        self.at = _read(answer.body, Info).step


class _Piece(NamedTuple):
    """Packed rows of an item, which may come in several."""

    data: bytes
    steps: int
    is_last: bool


Request: TypeAlias = list[_Piece]


class StreamLogic:
    """Steps of a session over a WebSocket that is dialled again whenever it breaks.

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
        if outputs is not None:
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
        attempt = partial(self._attempt, message, steps[0])
        try:
            answer: frames.Answer = yield from self._session.client.retry.until_done(attempt, steps)
        except StepConflict as error:
            raise self._session.conflict(error) from error
        self._session.at = steps[-1]
        return [*self._replies(request, answer, steps[0])]

    def _attempt(self, message: bytes, first_step: int, timeout: float) -> Work[frames.Answer]:
        try:
            if not self._is_open:
                yield Dial(self._path, timeout)
                hello = yield from self._answer(self._opening, Kind.HELLO, timeout)
                self._session.check(_read(hello.payload, _Hello).step)
                self._is_open = True
            while True:
                answer = yield from self._answer(message, Kind.STEPPED, timeout)
                if answer.first_step == first_step:
                    return answer
        except Later:
            self._is_open = False
            raise

    def _answer(self, message: bytes | None, kind: Kind, timeout: float) -> Work[frames.Answer]:
        """Sends a message and waits for a frame of a kind; others that are no error (going away, say) pass by."""
        while True:
            received: Any = yield Exchange(message, timeout)
            for answer in frames.read_answers(received, lambda _: self._out_bytes):
                if answer.kind == Kind.ERROR:
                    raise _refused(_read(answer.payload, dict[str, Any]))
                if answer.kind == kind:
                    return answer
            message = None

    def _replies(self, request: Request, answer: frames.Answer, first_step: int) -> Iterator[Reply]:
        kept = not answer.flags & frames.ALREADY_APPLIED
        replayed = bool(answer.flags & frames.REPLAYED)
        end, step = 0, first_step - 1
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


def _path(session_id: str) -> str:
    return f"/v1/sessions/{quote(session_id, safe='')}"


def _json(**fields: Any) -> bytes:
    """Those that are not None. Raises InvalidInput for what JSON cannot say."""
    try:
        return native.encode({name: value for name, value in fields.items() if value is not None})
    except TypeError as error:
        raise InvalidInput(f"this is no JSON: {error}") from error


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotLatch(f"what answers is not Latch, or of another version: {error}") from error


def _array(values: list[Any]) -> Array:
    array: Array = np.asarray(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _problem(answer: Answer) -> Exception:
    """What an HTTP reply says that is no success."""
    try:
        document = msgspec.json.decode(answer.body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        document = {}
    if "code" in document:
        return _refused(document)
    error = NotLatch(f"{answer.status}, and not in Latch's words: {answer.body[:80]!r}")
    # A proxy that has lost the service, or the service on its way out.
    return Later(error, _seconds(answer)) if answer.status >= 500 or answer.status in (408, 429) else error


def _refused(document: dict[str, Any]) -> Exception:
    error: LatchError = refusal(document)
    after = document.get("retry_after_ms", 0)
    return Later(error, after / 1000 if isinstance(after, int) else 0.0) if document.get("retryable") is True else error


def _seconds(answer: Answer) -> float:
    after = answer.headers.get("retry-after", "")
    return float(after) if after.isdecimal() else 0.0
