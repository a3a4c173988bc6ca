"""What the clients do, without doing it: which call goes out, and what an answer means.

Rule: no I/O, no sleep, no lock; an operation is a generator of effects (see `effects.py`).

How a step is applied once: a session has one request under way at a time. It carries the number of its first step, and
every try sends the same number and bytes. The service answers a try of what it has applied already with the reply that
it kept, so that nothing is applied twice and no reply is missed, wherever the connection broke.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlencode
from uuid import uuid4

import msgspec
import numpy as np

from service.client.effects import Answer, Call, Later, Retry, Work
from service.client.errors import LostSteps, NotLatch, OutputsNotKept, refusal
from service.errors import InvalidInput, LatchError, SessionExists, SessionExpired, SessionNotFound, StepConflict
from service.manifest import Array
from service.wire import native
from service.wire.rows import Field, RowFormat

JSON, PACKED = "application/json", "application/octet-stream"

T = TypeVar("T")


class Info(msgspec.Struct, frozen=True):
    """What the service says of a session; it says more."""

    id: str
    model: str
    version: str
    step: int
    created_at: datetime
    idle_ttl_ms: int


class Hello(msgspec.Struct):
    """What a HELLO says of a session; it says more."""

    model: str
    version: str
    step: int
    created_at: datetime


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


class Standing:
    """What a session is, and how far it got."""

    _logic: "SessionLogic"

    @property
    def id(self) -> str:
        """Its id."""
        return self._logic.info.id

    @property
    def model(self) -> str:
        """The name of its model."""
        return self._logic.info.model

    @property
    def version(self) -> str:
        """The version of its model."""
        return self._logic.info.version

    @property
    def idle_ttl(self) -> float:
        """Seconds without a step after which it is gone, as the service has it."""
        return self._logic.info.idle_ttl_ms / 1000

    @property
    def at(self) -> int:
        """Steps that the service has acknowledged; the next one is this plus 1."""
        return self._logic.at


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
            answer: Answer = yield Call(method, path, body, {"content-type": kind} if body else {}, timeout)
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
            if state is not None:
                if not isinstance(state, Mapping):
                    raise InvalidInput(f"state is {type(state).__name__}: it is arrays or lists by name", path="state")
                state = {name: _plain(value, f"state.{name}") for name, value in state.items()}
            body = _json(
                model=model, version=version, idle_ttl_ms=_milliseconds(idle_ttl), metadata=metadata, state=state
            )
            # With an id of our own, a second try finds what the first one made.
            answer = yield from self.call("PUT", _path(_own(session_id)), body)
        return (yield from self.opened(read(answer.body, Info)))

    def restore(self, snapshot: bytes, session_id: str | None, idle_ttl: float | None) -> "Work[SessionLogic]":
        """Makes a session of a snapshot, or has one stand there."""
        if not isinstance(snapshot, bytes | bytearray | memoryview):
            raise InvalidInput(f"a snapshot is bytes, not {type(snapshot).__name__}", path="snapshot")
        ttl = "" if idle_ttl is None else f"?idle_ttl_ms={_milliseconds(idle_ttl)}"
        path = f"{_path(_own(session_id))}/state{ttl}"
        answer = yield from self.call("PUT", path, bytes(snapshot), PACKED)
        return (yield from self.opened(read(answer.body, Info)))

    def predict(
        self, model: str, sequences: Iterable[Any], outputs: Iterable[str] | None
    ) -> Work[list[dict[str, Array]]]:
        """Whole sequences, without a session."""
        names = None if outputs is None else list(outputs)
        try:
            arrays = [_plain(np.asanyarray(each), f"sequences[{i}]") for i, each in enumerate(sequences)]
        except ValueError as error:
            raise InvalidInput(f"a sequence is no array: {error}", path="sequences") from error
        body = _json(sequences=arrays, outputs=names)
        answer = yield from self.call("POST", f"/v1/models/{quote(model, safe='')}/predict", body)
        predictions = read(answer.body, _Predictions).sequences
        return [{name: _array(values) for name, values in each.outputs.items()} for each in predictions]

    def opened(self, info: Info) -> "Work[SessionLogic]":
        """A session that the service has told of; the rows of its model are asked for once."""
        key = info.model, info.version
        if key not in self._formats:
            model, version = (quote(part, safe="") for part in key)
            answer = yield from self.call("GET", f"/v1/models/{model}/versions/{version}")
            page = read(answer.body, _Model)
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
        if answer.headers.get("latch-step") != str(steps[-1]):
            raise NotLatch(
                f"{answer.status}, and not the answer to steps {steps[0]} to {steps[-1]}: {answer.body[:80]!r}"
            )
        kept = "latch-already-applied" not in answer.headers
        outcome = self.unpack(answer.body, names, count) if kept else None
        self.at = steps[-1]  # now that it is sure that the service has said so
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
        branch = _own(session_id)
        body = _json(id=branch, idle_ttl_ms=_milliseconds(idle_ttl), metadata=metadata)
        try:
            answer = yield from self.client.call("POST", f"{self.path}/fork", body)
        except SessionExists:
            if session_id is not None:
                raise
            answer = yield from self.client.call("GET", _path(branch))  # nobody else knows the id: an earlier try
        return (yield from self.client.opened(read(answer.body, Info)))

    def snapshot(self) -> Work[bytes]:
        """The session as bytes."""
        answer = yield from self.client.call("GET", f"{self.path}/state")
        if answer.headers.get("content-type") != PACKED:
            raise NotLatch(f"{answer.status}, and no snapshot: {answer.body[:80]!r}")
        return answer.body

    def delete(self) -> Work[None]:
        """Ends the session; one that is gone is no error."""
        try:
            answer = yield from self.client.call("DELETE", self.path)
        except (SessionNotFound, SessionExpired):
            return
        if answer.status != 204:
            raise NotLatch(f"{answer.status}, and not in Latch's words: {answer.body[:80]!r}")

    def pack(self, rows: Any) -> tuple[bytes, int]:
        """One row, or T of them, as packed rows and T. Raises InvalidInput for another shape or kind of number."""
        dtype, shape = self.rows.input
        if np.ma.is_masked(rows):
            raise InvalidInput("some of the rows' values are masked: fill them first", path="inputs")
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

    def greeted(self, hello: Hello) -> datetime:
        """When the session was made. Raises SessionNotFound where it is another one, and LostSteps as `check`."""
        self.check_model(hello)
        if hello.created_at != self.info.created_at:
            raise SessionNotFound(
                f"session {self.info.id!r} was deleted, and made anew at {hello.created_at}: refresh() goes on with it"
            )
        self.check(hello.step)
        return hello.created_at

    def check_model(self, found: Info | Hello) -> None:
        """Raises SessionNotFound where the id is of another model's session now."""
        if (found.model, found.version) != (self.info.model, self.info.version):
            raise SessionNotFound(
                f"session {self.info.id!r} was deleted, and made anew on {found.model}/{found.version}: open it again"
            )

    def conflict(self, error: StepConflict) -> StepConflict:
        """The conflict, which is another client's doing. Raises LostSteps where it is not."""
        expected = error.extras.get("expected_step")
        if isinstance(expected, int):
            self.check(expected - 1)
        return error

    def _moved(self, call: Work[Answer]) -> Work[None]:
        answer = yield from call
        info = read(answer.body, Info)
        self.check_model(info)
        self.info, self.at = info, info.step


def _own(session_id: str | None) -> str:
    """An id that is the client's own, made up where none is given."""
    return uuid4().hex if session_id is None else session_id


def _path(session_id: str) -> str:
    """Raises InvalidInput for what is no text, and for no id at all or dots, which would be another address."""
    try:
        if session_id.strip("."):
            return f"/v1/sessions/{quote(session_id, safe='')}"
    except (AttributeError, ValueError):  # as where a part of a character is left alone
        pass
    raise InvalidInput(f"{session_id!r} is no session's id (None has one made up)", path="session_id")


def _milliseconds(seconds: float | None) -> int | None:
    try:
        return None if seconds is None else round(seconds * 1000)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"idle_ttl {seconds!r}: it is a number of seconds", path="idle_ttl") from error


def _plain(value: Any, path: str) -> Any:
    """An array as JSON can say it; anything else as it is. Raises InvalidInput for what is no number."""
    if not isinstance(value, np.ndarray):
        return value
    if np.ma.is_masked(value):
        raise InvalidInput(f"some values of {path} are masked: fill them first", path=path)
    kind = {"b": "u1", "f": "f4" if value.itemsize <= 4 else "f8"}.get(value.dtype.kind, value.dtype.newbyteorder("="))
    array = np.asarray(value, kind, order="C")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        place = "".join(f"[{i}]" for i in np.argwhere(~np.isfinite(array))[0])
        raise InvalidInput(f"the value at {path}{place} is not finite", path=f"{path}{place}")
    return array if array.ndim else array.item()


def _json(**fields: Any) -> bytes:
    """Those that are not None. Raises InvalidInput for what JSON cannot say."""
    try:
        return native.encode({name: value for name, value in fields.items() if value is not None})
    except TypeError as error:
        raise InvalidInput(f"this is no JSON: {error}") from error


def read(body: bytes, kind: type[T]) -> T:
    """A JSON body or payload as what it must be. Raises NotLatch."""
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
        return refused(document)
    error = NotLatch(f"{answer.status}, and not in Latch's words: {answer.body[:80]!r}")
    # A proxy that has lost the service, or the service on its way out.
    return Later(error, _seconds(answer)) if answer.status >= 500 or answer.status in (408, 429) else error


def refused(document: dict[str, Any]) -> LatchError | Later:
    """What a refusal means: try again, or never."""
    error: LatchError = refusal(document)
    after = document.get("retry_after_ms", 0)
    return Later(error, after / 1000 if isinstance(after, int) else 0.0) if document.get("retryable") is True else error


def _seconds(answer: Answer) -> float:
    after = answer.headers.get("retry-after", "")
    return float(after) if after.isdecimal() else 0.0
