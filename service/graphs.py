"""`StepGraph` and `ChunkGraph`: one ONNX Runtime session each, and how [B, T, ...] goes in and comes out.

Rule: a step graph that does not fit its manifest is refused before it runs. It knows names and axes, not devices, and
not which of the two graphs is the better one for a run.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from service import scan
from service.errors import InferenceFailed, ModelUnloadable
from service.manifest import Array, Manifest, StatePair, Tensor

Results = tuple[dict[str, Array], list[Array]]

_ORT_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


class _Plan(NamedTuple):
    """What to fetch, and where in it is each output (by its public name) and each state; with their batch axes."""

    fetch: list[str]
    outputs: list[tuple[str, int, int]]
    state: list[tuple[int, int]]


class _Graph:
    """What both have in common: states and constants go in, and a plan, made once for each set of outputs, fetches.

    Args:
        session: runs the graph.
        manifest: names its tensors.
        takes, gives: the graph's name for the state that goes in and that comes out.
        returns: the graph's name for what the manifest calls so.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        takes: Callable[[StatePair], str],
        gives: Callable[[StatePair], str],
        returns: Callable[[str], str],
    ) -> None:
        self._session = session
        self._input = manifest.input
        self._constants = {constant.name: constant.array() for constant in manifest.constants}
        self._state = [(takes(pair), pair.batch_axis) for pair in manifest.state]
        axes = {t.name: t.batch_axis for t in manifest.outputs}
        axes |= {pair.output: pair.batch_axis for pair in manifest.state}

        @lru_cache(maxsize=256)  # a client may ask for outputs in any order
        def plan(outputs: tuple[str, ...]) -> _Plan:
            names = {public: manifest.replies[public] for public in outputs}
            fetch = list(dict.fromkeys([*map(returns, names.values()), *map(gives, manifest.state)]))
            return _Plan(
                fetch,
                [(public, fetch.index(returns(name)), axes[name]) for public, name in names.items()],
                [(fetch.index(gives(pair)), pair.batch_axis) for pair in manifest.state],
            )

        self._plan = plan

    def _run(self, plan: _Plan, x: str, value: Array, state: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """What was fetched, and the new states of it with the batch in front."""
        feed = {x: value, **self._constants}
        for (name, axis), rows in zip(self._state, state, strict=True):
            feed[name] = np.moveaxis(rows, 0, axis) if axis else rows
        try:
            values = self._session.run(plan.fetch, feed)
        except Exception as error:  # the errors of the binding share no base class
            raise InferenceFailed(f"onnxruntime refused the step: {error}") from error
        return values, [np.moveaxis(values[i], axis, 0) if axis else values[i] for i, axis in plan.state]


class StepGraph(_Graph):
    """One step of B sessions.

    Raises:
        ModelUnloadable: the graph's tensors are not the manifest's.
    """

    def __init__(self, session: ort.InferenceSession, manifest: Manifest) -> None:
        super().__init__(session, manifest, lambda pair: pair.input, lambda pair: pair.output, str)
        _check_tensors(session, manifest)

    def run(self, inputs: Array, state: Sequence[Array], outputs: tuple[str, ...]) -> Results:
        """[B, 1, ...] in; [B, 1, ...] for each of `outputs` and the new state out, some of which may share memory."""
        plan, x, axis = self._plan(outputs), inputs[:, 0], self._input.batch_axis
        values, state = self._run(plan, self._input.name, np.moveaxis(x, 0, axis) if axis else x, state)
        return {
            name: (np.moveaxis(values[i], axis, 0) if axis else values[i])[:, None] for name, i, axis in plan.outputs
        }, state


class ChunkGraph(_Graph):
    """T steps of B sessions in one run of the graph that `scan` made."""

    def __init__(self, session: ort.InferenceSession, manifest: Manifest) -> None:
        super().__init__(
            session, manifest, lambda pair: scan.first(pair.input), lambda pair: scan.last(pair.input), scan.sequence
        )

    def run(self, inputs: Array, state: Sequence[Array], outputs: tuple[str, ...]) -> Results:
        """[B, T, ...] in; [B, T, ...] for each of `outputs` and the new state out."""
        plan, x = self._plan(outputs), np.moveaxis(inputs, (1, 0), (0, 1 + self._input.batch_axis))
        values, state = self._run(plan, scan.inputs(self._input.name), x, state)
        return {name: np.moveaxis(values[i], (0, 1 + axis), (1, 0)) for name, i, axis in plan.outputs}, state


def _check_tensors(session: ort.InferenceSession, manifest: Manifest) -> None:
    """The graph's inputs and outputs must be the manifest's, in name, type and shape."""
    batched: dict[str, Tensor | StatePair] = {t.name: t for t in (manifest.input, *manifest.outputs)}
    for pair in manifest.state:
        batched |= {pair.input: pair, pair.output: pair}
    expected = {manifest.input.name} | {pair.input for pair in manifest.state} | {c.name for c in manifest.constants}
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    if set(inputs) != expected:
        raise ModelUnloadable(
            f"model.onnx takes {sorted(inputs)}, the manifest says {sorted(expected)}: both must name the same"
        )
    missing = sorted(set(batched) - set(inputs) - set(outputs))
    if missing:
        raise ModelUnloadable(f"model.onnx does not return {', '.join(missing)}, which the manifest promises")
    for name, tensor in batched.items():
        node, axis = inputs.get(name) or outputs[name], tensor.batch_axis
        if node.type != _ORT_TYPES[tensor.dtype]:
            raise ModelUnloadable(f"model.onnx: {name} is {node.type}, the manifest says {tensor.dtype}")
        if len(node.shape) != len(tensor.shape) + 1:
            raise ModelUnloadable(
                f"model.onnx: {name} has {len(node.shape)} axes, the manifest says {len(tensor.shape)} and the batch"
            )
        sizes = node.shape[:axis] + node.shape[axis + 1 :]
        if any(isinstance(size, int) and size != want for size, want in zip(sizes, tensor.shape, strict=True)):
            raise ModelUnloadable(
                f"model.onnx: {name} has shape {node.shape}, the manifest says {list(tensor.shape)} "
                f"with the batch at axis {axis}"
            )
        if isinstance(node.shape[axis], int):
            raise ModelUnloadable(
                f"model.onnx: the batch axis {axis} of {name} is fixed at {node.shape[axis]}: export it dynamic"
            )
