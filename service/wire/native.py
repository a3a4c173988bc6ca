"""The JSON of the native doors: HTTP bodies and WebSocket messages <-> `StepRequest` / `StepReply`.

Rule: msgspec reads (typed, it names the path of a bad value), orjson writes (arrays as they are, shortest float32).
Both round-trip every finite float32 exactly, so bit-exactness survives JSON.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
import orjson

from service.errors import InvalidInput, LatchError, Malformed, PayloadTooLarge
from service.wire import StepReply, StepRequest
from service.wire.rows import RowFormat

Values = TypeVar("Values")
_FLOAT32_OVERFLOW = 2.0**128 - 2.0**103  # from here on a number rounds to infinity in float32
_LARGE = 2**16  # bytes of a body, above which it is looked at for what no request has before any of it is read
_EXPLAINED = 2**20  # bytes, beyond which a second look takes too long: 16 MiB a quarter of a second
_LONGEST_ID = 128
_MOST_COLONS = 256  # five fields and a session's id have fewer
_PART = 2**13  # values that are written in one go: 8,192 take half a millisecond
_NO_OUTPUTS = b'"outputs":{}'
_WRITE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z


class _Step(msgspec.Struct, Generic[Values], forbid_unknown_fields=True):
    inputs: Values
    step: int | None = None
    outputs: list[str] | None = None


class _NamedStep(_Step[Values], Generic[Values], forbid_unknown_fields=True):
    session: str | None = None
    type: Literal["step"] = "step"


class _Predict(msgspec.Struct, Generic[Values], forbid_unknown_fields=True):
    sequences: list[Values]
    outputs: list[str] | None = None


class Envelope(msgspec.Struct):
    """What a message on a socket of many sessions says before its model is known."""

    session: Annotated[str, msgspec.Meta(max_length=_LONGEST_ID)]
    type: str = "step"


class _Open(msgspec.Struct, forbid_unknown_fields=True):
    session: str
    type: str


_ENVELOPE, _OPEN = msgspec.json.Decoder(Envelope), msgspec.json.Decoder(_Open)


class NativeCodec:
    """Reads and writes the JSON of one model.

    Args:
        rows: the shape and dtype of a step and of what may be asked for.
        max_steps: steps that one request may carry.
    """

    def __init__(self, rows: RowFormat, *, max_steps: int) -> None:
        self._format = rows
        self._dtype, self._shape = rows.input
        self._max_steps = max_steps
        values: Any = list[nested(self._dtype, self._shape)]  # type: ignore[misc]  # a type that is made here
        self._step = msgspec.json.Decoder(_Step[values])
        self._named_step = msgspec.json.Decoder(_NamedStep[values])
        self._predict = msgspec.json.Decoder(_Predict[values])
        # A request has so many lists and numbers at most, each with a comma of its own, and at most a list a sequence.
        self._most_lists = max_steps * (1 + sum(math.prod(self._shape[:i]) for i in range(len(self._shape)))) + 8
        self._most_commas = max_steps * (1 + math.prod(self._shape)) + len(rows.outputs) + 8
        # The common row is flat: struct packs it in half of numpy's time, and refuses a wrong length and an overflow.
        self._pack_row: Callable[..., bytes] | None = None
        if len(self._shape) == 1:
            self._pack_row = struct.Struct(f"<{self._shape[0]}{'q' if self._dtype == 'int64' else 'f'}").pack

    def decode_step(self, body: bytes | str, *, named: bool = False) -> StepRequest:
        """Reads `{"inputs": [T rows], "step"?: first step, "outputs"?: [names]}`; `named` allows for a `session` in it.

        Raises:
            Malformed: not JSON.
            InvalidInput: another shape, type or range; `path` names the first bad value.
            PayloadTooLarge: more than `max_steps` rows.
        """
        message = self._decode(self._named_step if named else self._step, body)
        if message.step is not None and message.step < 1:
            raise InvalidInput(f"step {message.step} at $.step: steps count from 1", path="$.step")
        names = self._format.names(message.outputs, "$.outputs")
        return StepRequest(self._pack(message.inputs, "$.inputs"), len(message.inputs), names, message.step)

    def decode_predict(self, body: bytes) -> list[StepRequest]:
        """Reads `{"sequences": [[T rows], ...], "outputs"?: [names]}`, sequences of any lengths.

        Raises:
            Malformed, InvalidInput, PayloadTooLarge: as `decode_step`; the limit counts all sequences together.
        """
        message = self._decode(self._predict, body)
        if not message.sequences:
            raise InvalidInput("no sequence at $.sequences: send at least one", path="$.sequences")
        total = sum(map(len, message.sequences))
        if total > self._max_steps:
            raise self._too_many(total, "$.sequences")
        names = self._format.names(message.outputs, "$.outputs")
        return [
            StepRequest(self._pack(sequence, f"$.sequences[{i}]"), len(sequence), names)
            for i, sequence in enumerate(message.sequences)
        ]

    def encode_reply(self, reply: StepReply, expires_at: float, **extras: Any) -> bytes:
        """Writes `{"outputs": {...}, "step": n, "expires_at": ...}`; flags a duplicate with `replayed`.

        Args:
            reply: what the session answered.
            expires_at: wall-clock seconds since the epoch.
            extras: further fields, first in the object.
        """
        outputs = None if reply.data is None else self._format.unpack(reply.data, reply.outputs)
        body = extras | {"outputs": outputs, "step": reply.step, "expires_at": timestamp(expires_at)}
        if reply.replayed:
            body["replayed"] = True
        if outputs is None:
            body["already_applied"] = True
        return orjson.dumps(body, option=_WRITE)

    def parts_of_reply(self, reply: StepReply, expires_at: float) -> Iterator[bytes]:
        """The same in parts of some thousand values."""
        rest = self.encode_reply(msgspec.structs.replace(reply, data=b"", outputs=()), expires_at)
        before, after = rest.split(_NO_OUTPUTS, 1)
        yield before
        yield from self._parts_of_outputs(reply)
        yield after

    def parts_of_predictions(self, replies: list[StepReply]) -> Iterator[bytes]:
        """Writes `{"sequences": [{"outputs": {...}}, ...]}` in the order of the request, in such parts."""
        yield b'{"sequences":['
        for i, reply in enumerate(replies):
            yield b"," * (i > 0) + b"{"
            yield from self._parts_of_outputs(reply)
            yield b"}"
        yield b"]}"

    def _parts_of_outputs(self, reply: StepReply) -> Iterator[bytes]:
        yield b'"outputs":{'
        for i, (name, rows) in enumerate(self._format.unpack(reply.data or b"", reply.outputs).items()):
            yield b"," * (i > 0) + orjson.dumps(name) + b":["
            at_once = max(1, _PART * len(rows) // max(1, rows.size))
            for start in range(0, len(rows), at_once):
                yield b"," * (start > 0) + orjson.dumps(rows[start : start + at_once], option=_WRITE)[1:-1]
            yield b"]"
        yield b"}"

    def _pack(self, values: list[Any], path: str) -> bytes:
        """T packed rows from nested lists."""
        if not values:
            raise InvalidInput(f"no step at {path}: send at least one row", path=path)
        if len(values) > self._max_steps:
            raise self._too_many(len(values), path)
        try:
            if self._pack_row is not None:
                return b"".join([self._pack_row(*row) for row in values])
            with np.errstate(over="ignore"):
                rows = np.array(values, self._dtype)
            if rows.shape[1:] == self._shape and np.isfinite(rows).all():
                return rows.tobytes()
        except (struct.error, ValueError, OverflowError):  # another length, or a number beyond the dtype
            pass
        problem = None
        if self._pack_row is None:
            problem = self._problem(values, (None, *self._shape), path)
        elif (i := next((i for i, row in enumerate(values) if not self._packs(row)), None)) is not None:
            problem = self._problem(values[i], self._shape, f"{path}[{i}]")
        raise problem or InvalidInput(f"{path} is no [T, {self._shape}] of {self._dtype}", path=path)

    def _decode(self, decoder: msgspec.json.Decoder[Any], body: bytes | str) -> Any:
        """The fast typed read; where it fails, a slow one finds the exact path of the first bad value."""
        if len(body) > _LARGE:
            self._check_counts(body)
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at ")
            where = path.strip("`") or "$"
            raise self._explain(body) or InvalidInput(f"{message} at {where}", path=where) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # NaN and Infinity are no JSON, yet many writers emit them: they are bad values, not bad syntax.
            raise self._explain(body) or Malformed(f"the body is not JSON: {error}") from error

    def _check_counts(self, body: bytes | str) -> None:
        """Raises PayloadTooLarge for more than any request has: a body of millions of lists takes seconds to read."""
        for what, count, limit in (
            ("lists", _lists_in(body), self._most_lists),
            ("values", _count(body, ","), self._most_commas),
            ("names", _count(body, ":"), _MOST_COLONS),
        ):
            if count > limit:
                raise PayloadTooLarge(
                    f"{count} {what}: one request may carry {self._max_steps} steps, which have at most {limit}; "
                    "send them in parts",
                    path="$",
                    limit=self._max_steps,
                )

    def _explain(self, body: bytes | str) -> LatchError | None:
        if len(body) > _EXPLAINED:
            return None
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        key = "inputs" if "inputs" in document else "sequences"
        values, path, shape = document.get(key, []), f"$.{key}", (None, *self._shape)
        parts = [values] if key == "inputs" or not isinstance(values, list) else values
        total = sum(len(part) for part in parts if isinstance(part, list))
        if total > self._max_steps:  # before the search, which is slow
            return self._too_many(total, path)
        return self._problem(values, shape if key == "inputs" else (None, *shape), path)

    def _problem(self, value: Any, shape: tuple[int | None, ...], path: str) -> LatchError | None:
        """The first place where `value` is not nested lists of numbers of `shape` (None: any length)."""
        if not shape:
            return (
                None
                if _fits(value, self._dtype)
                else InvalidInput(
                    f"the value at {path} is {_show(value)}: the model takes a finite {self._dtype}", path=path
                )
            )
        if not isinstance(value, list):
            return InvalidInput(f"the value at {path} is {_show(value)}: the model takes a list there", path=path)
        if shape[0] is not None and len(value) != shape[0]:
            return InvalidInput(f"{len(value)} values at {path}: the model takes {shape[0]}", path=path)
        if len(shape) == 1 and self._is_row(value):
            return None
        found = (self._problem(child, shape[1:], f"{path}[{i}]") for i, child in enumerate(value))
        return next((problem for problem in found if problem), None)

    def _is_row(self, values: list[Any]) -> bool:
        """Whether a flat row is right: told in a tenth of the time that its values take one by one."""
        return (
            {*map(type, values)} <= ({int} if self._dtype == "int64" else {int, float})
            and self._packs(values)
            and math.isfinite(sum(values))
        )

    def _packs(self, values: list[Any]) -> bool:
        """Whether a flat row of numbers has the right length, and none of them is out of range."""
        try:
            return self._pack_row is not None and bool(self._pack_row(*values))
        except (struct.error, OverflowError):
            return False

    def _too_many(self, count: int, path: str) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"{count} steps at {path}: one request may carry {self._max_steps}; send them in parts",
            path=path,
            limit=self._max_steps,
        )


def nested(dtype: str, shape: tuple[int, ...]) -> Any:
    """The type of a value in JSON: no bool or text passes for a number, and no fraction for a whole one."""
    values: Any = int if dtype == "int64" else float
    for _ in shape:
        values = list[values]
    return values


def read_envelope(text: str) -> Envelope:
    """Which session a message of `/v1/stream` is for.

    Raises:
        Malformed: not JSON.
        InvalidInput: not an object, or it names no session.
    """
    try:
        return _ENVELOPE.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        with suppress(ValueError, RecursionError):  # NaN is no JSON: where it is, the model's codec says
            is_short = _lists_in(text) < _LARGE and _count(text, ":") <= _MOST_COLONS
            document = json.loads(text) if is_short else None
            name = document.get("session") if isinstance(document, dict) else None
            if isinstance(name, str) and 0 < len(name.encode()) <= _LONGEST_ID:
                return Envelope(name)
        if isinstance(error, msgspec.ValidationError):
            problem, _, path = str(error).partition(" - at ")
            raise InvalidInput(
                f'the message names no session: {problem}; send {{"session": id, ...}}', path=path.strip("`") or "$"
            ) from error
        raise Malformed(f"the message is not JSON: {error}") from error


def check_open(text: str) -> None:
    """Raises InvalidInput where a message that opens a session has more to say: it would not be heard."""
    try:
        _OPEN.decode(text)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{error}: an open has type and session alone", path="$") from error


def _count(body: bytes | str, character: str) -> int:
    return body.count(character.encode()) if isinstance(body, bytes) else body.count(character)


def _lists_in(body: bytes | str) -> int:
    """How many lists and objects JSON has, at most."""
    return _count(body, "[") + _count(body, "{")


def encode(document: dict[str, Any]) -> bytes:
    """Writes any other message: an error's `to_dict()`, a hello."""
    return orjson.dumps(document, option=_WRITE)


def timestamp(seconds: float) -> datetime:
    """Wall-clock seconds as what both JSON writers print as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def _fits(value: Any, dtype: str) -> bool:
    if dtype == "int64":
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) in (int, float) and abs(value) < _FLOAT32_OVERFLOW


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
