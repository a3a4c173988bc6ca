"""`RowFormat`: how one model's values are packed: little-endian, C order, no padding, one row a step.

Rule: the only place that knows how a row is laid out, for every door and for the batch. A row of several outputs holds
them one after another, in the order asked for.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from service.errors import InvalidInput
from service.manifest import Array, Manifest


class Field(NamedTuple):
    """One value of one step: its dtype and its shape, without batch and time."""

    dtype: str
    shape: tuple[int, ...]


class RowFormat:
    """Packs and unpacks the rows of one model.

    Args:
        inputs: the input of a step.
        outputs: public name -> what a client may ask for; the first is the default.
    """

    def __init__(self, inputs: Field, outputs: Mapping[str, Field]) -> None:
        self.input = inputs
        self.outputs = outputs
        self.default = tuple(outputs)[:1]
        self._base = _little_endian(inputs.dtype)
        self.input_bytes = self._base.itemsize * math.prod(inputs.shape)
        self._layout = lru_cache(maxsize=256)(self._make_layout)  # names come in any order

    @classmethod
    def of(cls, manifest: Manifest) -> "RowFormat":
        """The format of a manifest's tensors."""
        tensors = {t.name: t for t in manifest.outputs} | {pair.name: pair for pair in manifest.state}
        return cls(
            Field(manifest.input.dtype, manifest.input.shape),
            {name: Field(tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        )

    def names(self, wanted: Sequence[str] | None, path: str) -> tuple[str, ...]:
        """The outputs to return: those of `wanted`, each once, or the default. Raises InvalidInput where unknown."""
        if wanted is None:
            return self.default
        names = tuple(dict.fromkeys(wanted))
        for name in names:
            if name not in self.outputs:
                where = f"{path}[{wanted.index(name)}]"
                raise InvalidInput(
                    f"{name!r} at {where} is no output of this model: it has {', '.join(self.outputs)}", path=where
                )
        return names

    def output_bytes(self, names: tuple[str, ...]) -> int:
        """Bytes of one row of these outputs."""
        return int(self._layout(names).itemsize)

    def batch(self, parts: Sequence[bytes | memoryview], steps: int) -> Array:
        """[B, T, *shape] from the T packed input rows of each of B sessions."""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return np.frombuffer(data, self._base).reshape(len(parts), steps, *self.input.shape)

    def pack(self, outputs: Mapping[str, Array], names: tuple[str, ...]) -> bytes:
        """The rows of B sessions, one after another, from [B, T, *shape] a name."""
        if len(names) == 1:
            return outputs[names[0]].tobytes()
        if not names:
            return b""
        records = np.empty(outputs[names[0]].shape[:2], self._layout(names))
        for name in names:
            records[name] = outputs[name]
        return records.tobytes()

    def unpack(self, data: bytes, names: tuple[str, ...]) -> dict[str, Array]:
        """[T, *shape] a name, from T packed rows."""
        if len(names) == 1:  # nearly always
            field = self.outputs[names[0]]
            return {names[0]: np.frombuffer(data, _little_endian(field.dtype)).reshape(-1, *field.shape)}
        if not names:
            return {}
        records = np.frombuffer(data, self._layout(names))
        return {name: np.ascontiguousarray(records[name]) for name in names}

    def check_finite(self, data: bytes | memoryview, first: int = 0) -> None:
        """Raises InvalidInput for the first value of packed input rows that is not finite; rows count from `first`."""
        rows = np.frombuffer(data, self._base).reshape(-1, *self.input.shape)
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            where = tuple(bad[0].tolist())
            path = f"$.inputs[{first + where[0]}]" + "".join(f"[{i}]" for i in where[1:])
            raise InvalidInput(
                f"the value at {path} is {rows[where]}: the model takes a finite {self.input.dtype}", path=path
            )

    def _make_layout(self, names: tuple[str, ...]) -> Any:
        return np.dtype([(name, _little_endian(self.outputs[name].dtype), self.outputs[name].shape) for name in names])


@cache
def _little_endian(dtype: str) -> Any:
    return np.dtype(dtype).newbyteorder("<")
