"""What a model must show before it serves: that it gives its golden outputs, and the same bits alone and in a batch.

Rule: a wrong answer is found here or never; nothing is served that did not go through both. It knows no session.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from service.errors import GoldenMismatch, InferenceFailed
from service.manifest import Array, initial_state
from service.registry import ModelFiles
from service.runtime import OrtRunner

# Sessions of a batch, with all that may be left over when rows are taken by the dozen, and of a chunk.
BATCHES = (*range(2, 18), 32, 64)
CHUNKS = (1, 2, 5, 17, 64)

# Steps of a sequence that the proof takes at least, so that states are far from the initial one.
STEPS = 24


def replay_golden(runner: OrtRunner, files: ModelFiles) -> float:
    """Runs the golden sequences from the initial state and compares every output and the last state.

    Returns:
        The largest error, as `_error` has it.

    Raises:
        GoldenMismatch: an array is missing or misshapen, or that error is over the manifest's tolerance.
    """
    manifest = files.manifest
    names = [tensor.name for tensor in manifest.outputs]
    shape = (manifest.golden.sequences, manifest.golden.steps)
    inputs = _golden_array(files, f"input.{manifest.input.name}", (*shape, *manifest.input.shape))
    state = initial_state(manifest.state, shape[0])
    outputs, last = runner.run(inputs.astype(manifest.input.dtype), state, names)
    worst = 0.0
    got = [(f"output.{t.name}", outputs[t.name]) for t in manifest.outputs]
    got += [(f"state.{pair.name}", rows) for pair, rows in zip(manifest.state, last, strict=True)]
    for key, value in got:
        expected = _golden_array(files, key, value.shape)
        error = _error(value, expected)
        if not error <= manifest.golden.tolerance:
            raise GoldenMismatch(
                f"{key} differs from golden.npz by {error:.3g}, the manifest allows {manifest.golden.tolerance:g}: "
                f"this runtime does not compute what was exported"
            )
        worst = max(worst, error)
    return worst


def prove_bits(runner: OrtRunner, files: ModelFiles) -> bool:
    """Steps the golden sequences alone, then in batches of many sizes and in chunks, and compares the bits.

    A batch takes steps of all sequences, from their beginning to their end, and needs one run a size: if every step is
    the same alone and in a batch, so is every sequence of them. Where a chunk in one run fails or gives other bits
    than its steps, the runner is told to take a simpler form; on a GPU, which promises no bits, other values than the
    manifest's tolerance allows.

    Returns:
        Whether a session gets the same bits alone and among others. So for the CPU provider and our own graphs; an
        operator may round a row by its place in the batch (ONNX Runtime's Elu does), and a GPU may choose another
        kernel for another size. Told on the model's page.

    Raises:
        GoldenMismatch: the golden input is missing or misshapen.
        InferenceFailed: the runtime refuses it.
    """
    manifest = files.manifest
    shape = (manifest.golden.sequences, manifest.golden.steps, *manifest.input.shape)
    golden = _golden_array(files, f"input.{manifest.input.name}", shape).astype(manifest.input.dtype)
    inputs = np.concatenate([golden] * ceil(STEPS / shape[1]), axis=1)
    names = [tensor.name for tensor in manifest.outputs]

    def step_by_step(inputs: Array, state: Sequence[Array]) -> _Steps:
        before, after = [], []
        for t in range(inputs.shape[1]):
            before.append(state)
            outputs, state = runner.run(inputs[:, t : t + 1], state, names)
            after.append([*(outputs[name][:, 0] for name in names), *state])
        return _Steps(_stack(before), _stack(after))

    each = [step_by_step(rows[None], initial_state(manifest.state, 1)) for rows in inputs]
    alone = _Steps(*([np.concatenate(rows) for rows in zip(*part, strict=True)] for part in zip(*each, strict=True)))

    def one_batch(size: int) -> bool:
        at = np.unravel_index(np.arange(size) * 7 % prod(inputs.shape[:2]), inputs.shape[:2])
        got = step_by_step(inputs[at][:, None], [rows[at] for rows in alone.before])
        return _same(got.after, [rows[at][:, None] for rows in alone.after])

    exact = all(one_batch(size) for size in BATCHES)

    def alike(got: Sequence[Array], want: Sequence[Array]) -> bool:
        if runner.device == "cpu":
            return _same(got, want)
        return all(_error(a, b) <= manifest.golden.tolerance for a, b in zip(got, want, strict=True))

    def fault(size: int) -> str:
        """What is wrong with a chunk of so many sessions in one run, from the middle of their sequences to the end."""
        rows, start = np.arange(size) % len(inputs), inputs.shape[1] // 3
        chunk, state = inputs[rows, start:], [value[rows, start] for value in alone.before]
        try:
            outputs, last = runner.run(chunk, state, names)
        except InferenceFailed as error:
            return str(error)
        want = [value[rows, start:] for value in alone.after] if exact else step_by_step(chunk, state).after
        want[len(names) :] = [value[:, -1] for value in want[len(names) :]]
        return (
            "" if alike([outputs[name] for name in names] + last, want) else "in one run a chunk differs from its steps"
        )

    while runner.in_one_run and (reason := next(filter(None, map(fault, CHUNKS)), "")):
        runner.simplify(reason)
    return exact


class _Steps(NamedTuple):
    """Sequences step by step: [B, T, ...] of each state before the step, and of each output and state after it."""

    before: list[Array]
    after: list[Array]


def _stack(steps: Sequence[Sequence[Array]]) -> list[Array]:
    return [np.stack(values, axis=1) for values in zip(*steps, strict=True)]


def _same(got: Sequence[Array], want: Sequence[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def _error(got: Array, want: Array) -> float:
    """The largest |got - want|, each over the largest |want| of its last axis' element, where that is over 1. By this
    the manifest gives its tolerance: of values in large units those near zero are as exact as the others.
    """
    largest = np.abs(want).max(axis=tuple(range(want.ndim - 1)), initial=0.0)
    return float(np.max(np.abs(got - want) / np.maximum(1.0, largest), initial=0.0))


def _golden_array(files: ModelFiles, key: str, shape: tuple[int, ...]) -> Array:
    array = files.golden.get(key)
    if array is None or array.shape != shape:
        found = "is missing" if array is None else f"has shape {array.shape}"
        raise GoldenMismatch(f"golden.npz: {key} {found}, the manifest asks for {shape}")
    return array
