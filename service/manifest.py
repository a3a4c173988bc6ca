"""The model contract as types: what `models/manifest.schema.json` says, after it was checked.

Rule: a `Manifest` exists only if its JSON satisfied the schema and its parts agree with each other; so nobody
downstream checks again. It knows tensors and names, not ONNX Runtime and not where the files are.
"""

import json
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
from numpy.typing import NDArray

from service.errors import ManifestInvalid

Array = NDArray[Any]

_DEEPEST = 64  # lists and objects in one another: what writes the pages of models gives up at some hundreds


class Feature(msgspec.Struct, frozen=True):
    """One value along a tensor's last axis: its name and its unit."""

    name: str
    unit: str = ""


class _Batched(msgspec.Struct, frozen=True):
    """A tensor of the step graph. `shape` excludes the batch axis, which sits at `batch_axis`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    batch_axis: int

    @property
    def nbytes(self) -> int:
        """Bytes of one session's value."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Tensor(_Batched, frozen=True):
    """The input or an output of a step; `features` name the values along the last axis."""

    features: tuple[Feature, ...] = ()
    role: str = "prediction"


class StatePair(_Batched, frozen=True, kw_only=True):
    """A state tensor: the graph takes it as `input` and returns the next one as `output`."""

    input: str
    output: str
    initial: tuple[int | float, ...] | None = None

    def initial_value(self) -> Array:
        """The state of a session that has seen nothing, shape `shape`: zeros unless the manifest gives h_0."""
        if self.initial is None:
            return np.zeros(self.shape, self.dtype)
        return np.array(self.initial, self.dtype).reshape(self.shape)


def initial_state(pairs: Sequence[StatePair], count: int) -> list[Array]:
    """The state of `count` sessions that have seen nothing: one read-only [count, *shape] a pair."""
    return [np.broadcast_to(pair.initial_value(), (count, *pair.shape)) for pair in pairs]


class Constant(msgspec.Struct, frozen=True):
    """An input that never changes (a sample rate, say); `value` is flattened in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: tuple[int | float | bool, ...]

    def array(self) -> Array:
        """The value as the graph takes it, shape `shape`."""
        return np.array(self.value, self.dtype).reshape(self.shape)


class Golden(msgspec.Struct, frozen=True):
    """What golden.npz holds and how closely it must be reproduced."""

    sequences: int
    steps: int
    tolerance: float


class Manifest(msgspec.Struct, frozen=True):
    """One version of one model. Fields are those of the schema; the free-form ones stay plain JSON."""

    name: str
    version: str
    description: str
    task: str
    head: str
    input: Tensor
    outputs: tuple[Tensor, ...]
    state: tuple[StatePair, ...]
    constants: tuple[Constant, ...]
    normalisation: dict[str, Any]
    feedback: dict[str, str] | None
    unit: dict[str, Any] | None
    parameters: int | None
    files: dict[str, str]
    golden: Golden
    data: dict[str, Any] | None
    training: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    libraries: dict[str, str]

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's state."""
        return sum(pair.nbytes for pair in self.state)

    @property
    def replies(self) -> dict[str, str]:
        """What a client may ask for: public name -> tensor of the graph, the first being the default."""
        return {t.name: t.name for t in self.outputs} | {pair.name: pair.output for pair in self.state}


@cache
def schema() -> Any:
    """The JSON schema that both sides of the contract check against."""
    # Not by the package's name: where this runs, there may be another folder `models`.
    return json.loads((Path(__file__).parents[1] / "models" / "manifest.schema.json").read_text("utf-8"))


def parse_manifest(text: bytes) -> Manifest:
    """Reads a manifest.

    Raises:
        ManifestInvalid: not JSON, against the schema, or names and axes that contradict each other.
    """
    try:
        document = json.loads(text, parse_constant=_refuse)
        json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate could never be told to anybody
        if (depth := _depth(document)) > _DEEPEST:
            raise ValueError(f"it is nested {depth} deep, more than {_DEEPEST}")
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"manifest.json is not JSON: {error}") from error
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if problem is not None:
        raise ManifestInvalid(f"manifest.json at {problem.json_path}: {problem.message}", path=problem.json_path)
    manifest = msgspec.convert(document, Manifest)
    _check_consistency(manifest)
    return manifest


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _check_consistency(manifest: Manifest) -> None:
    """What the schema language cannot say."""
    names = [t.name for t in manifest.outputs] + [pair.name for pair in manifest.state]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ManifestInvalid(f"manifest.json names {', '.join(twice)} twice among outputs and state")
    batched: list[_Batched] = [manifest.input, *manifest.outputs, *manifest.state]
    for tensor in batched:
        if tensor.batch_axis > len(tensor.shape):
            raise ManifestInvalid(
                f"manifest.json: batch_axis {tensor.batch_axis} of {tensor.name} does not fit its shape {tensor.shape}"
            )
    values = [(pair.name, pair.shape, pair.initial) for pair in manifest.state if pair.initial is not None]
    for name, shape, value in [*values, *((c.name, c.shape, c.value) for c in manifest.constants)]:
        if len(value) != prod(shape):
            raise ManifestInvalid(
                f"manifest.json: {name} has {len(value)} values where its shape {shape} needs {prod(shape)}"
            )
