"""The JSON of the native doors: HTTP bodies and WebSocket messages <-> `StepRequest` / `StepReply`.

Rule: msgspec reads (typed, it names the path of a bad value), orjson writes (arrays as they are, shortest float32).
Both round-trip every finite float32 exactly, so bit-exactness survives JSON.
"""

import json
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import orjson

from service.errors import InvalidInput, LatchError, Malformed, PayloadTooLarge
from service.manifest import Array, Manifest
from service.wire import StepReply, StepRequest

Values = TypeVar("Values")
_FLOAT32_OVERFLOW = 2.0**128 - 2.0**103  # from here on a number rounds to infinity in float32
_WRITE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z


class _Step(msgspec.Struct, Generic[Values], forbid_unknown_fields=True):
    inputs: Values
    step: int | None = None
    outputs: list[str] | None = None


class _Predict(msgspec.Struct, Generic[Values], forbid_unknown_fields=True):
    sequences: list[Values]
    outputs: list[str] | None = None


class NativeCodec:
    """Reads and checks the bodies for one model.

    Args:
        manifest: gives the shape and dtype of a step and the names of the outputs.
        max_steps: steps that one request may carry.
    """

    def __init__(self, manifest: Manifest, *, max_steps: int) -> None:
        self._tensor = manifest.input
        self._names = tuple(manifest.replies)
        self._max_steps = max_steps
        values: Any = int if manifest.input.dtype == "int64" else float
        for _ in range(len(manifest.input.shape) + 1):
            values = list[values]
        self._step = msgspec.json.Decoder(_Step[values])
        self._predict = msgspec.json.Decoder(_Predict[values])

    def decode_step(self, body: bytes | str) -> StepRequest:
        """Reads `{"inputs": [T rows], "step"?: first step, "outputs"?: [names]}`.

        Raises:
            Malformed: not JSON.
            InvalidInput: another shape, type or range; `path` names the first bad value.
            PayloadTooLarge: more than `max_steps` rows.
        """
        message = self._decode(self._step, body)
        if message.step is not None and message.step < 1:
            raise InvalidInput(f"step {message.step} at $.step: steps count from 1", path="$.step")
        return StepRequest(self._rows(message.inputs, "$.inputs"), self._outputs(message.outputs), message.step)

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
        names = self._outputs(message.outputs)
        return [
            StepRequest(self._rows(sequence, f"$.sequences[{i}]"), names)
            for i, sequence in enumerate(message.sequences)
        ]

    def _rows(self, values: list[Any], path: str) -> Array:
        """[T, *shape] from nested lists."""
        if not values:
            raise InvalidInput(f"no step at {path}: send at least one row", path=path)
        if len(values) > self._max_steps:
            raise self._too_many(len(values), path)
        try:
            with np.errstate(over="ignore"):
                rows = np.array(values, self._tensor.dtype)
            if rows.shape[1:] == self._tensor.shape and np.isfinite(rows).all():
                return rows
        except (ValueError, OverflowError):  # rows of different lengths, or an integer beyond 64 bits
            pass
        problem = self._problem(values, (None, *self._tensor.shape), path)
        raise problem or InvalidInput(f"{path} is no [T, {self._tensor.shape}] of {self._tensor.dtype}", path=path)

    def _decode(self, decoder: msgspec.json.Decoder[Any], body: bytes | str) -> Any:
        """The fast typed read; where it fails, a slow one finds the exact path of the first bad value."""
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at ")
            where = path.strip("`") or "$"
            raise self._explain(body) or InvalidInput(f"{message} at {where}", path=where) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # NaN and Infinity are no JSON, yet many writers emit them: they are bad values, not bad syntax.
            raise self._explain(body) or Malformed(f"the body is not JSON: {error}") from error

    def _explain(self, body: bytes | str) -> LatchError | None:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        key = "inputs" if "inputs" in document else "sequences"
        values, path, shape = document.get(key, []), f"$.{key}", (None, *self._tensor.shape)
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
                if _fits(value, self._tensor.dtype)
                else InvalidInput(
                    f"the value at {path} is {_show(value)}: the model takes a finite {self._tensor.dtype}", path=path
                )
            )
        if not isinstance(value, list):
            return InvalidInput(f"the value at {path} is {_show(value)}: the model takes a list there", path=path)
        if shape[0] is not None and len(value) != shape[0]:
            return InvalidInput(f"{len(value)} values at {path}: the model takes {shape[0]}", path=path)
        found = (self._problem(child, shape[1:], f"{path}[{i}]") for i, child in enumerate(value))
        return next((problem for problem in found if problem), None)

    def _too_many(self, count: int, path: str) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"{count} steps at {path}: one request may carry {self._max_steps}; send them in parts",
            path=path,
            limit=self._max_steps,
        )

    def _outputs(self, names: list[str] | None) -> tuple[str, ...]:
        if names is None:
            return self._names[:1]
        for i, name in enumerate(names):
            if name not in self._names:
                raise InvalidInput(
                    f"{name!r} at $.outputs[{i}] is no output of this model: it has {', '.join(self._names)}",
                    path=f"$.outputs[{i}]",
                )
        return tuple(dict.fromkeys(names))


def encode_reply(reply: StepReply, expires_at: float, **extras: Any) -> bytes:
    """Writes `{"outputs": {...}, "step": n, "expires_at": ...}`; flags a duplicate with `replayed`.

    Args:
        reply: what the session answered.
        expires_at: wall-clock seconds since the epoch.
        extras: further fields, first in the object.
    """
    body = extras | {"outputs": reply.outputs, "step": reply.step, "expires_at": timestamp(expires_at)}
    if reply.replayed:
        body["replayed"] = True
    if reply.outputs is None:
        body["already_applied"] = True
    return orjson.dumps(body, option=_WRITE)


def encode_outputs(replies: list[StepReply]) -> bytes:
    """Writes `{"sequences": [{"outputs": {...}}, ...]}` in the order of the request."""
    return orjson.dumps({"sequences": [{"outputs": reply.outputs} for reply in replies]}, option=_WRITE)


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
