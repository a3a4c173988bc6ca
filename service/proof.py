"""What a model must show before it serves: that it gives its golden outputs, and the same bits alone and in a batch.

Rule: a wrong answer is found here or never; nothing is served that did not go through both. It knows no session.
"""

from itertools import pairwise

import numpy as np

from service.errors import GoldenMismatch, InferenceFailed
from service.manifest import Array, initial_state
from service.registry import ModelFiles
from service.runtime import OrtRunner

# Sessions in a batch: with and without what is left over when rows are taken by the vector.
BATCHES = (1, 2, 3, 5, 8, 17, 64)


def replay_golden(runner: OrtRunner, files: ModelFiles) -> float:
    """Runs the golden sequences from the initial state and compares every output and the last state.

    Returns:
        The largest |got - expected| / max(1, |expected|).

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
        error = float(np.max(np.abs(value - expected) / np.maximum(1.0, np.abs(expected)), initial=0.0))
        if not error <= manifest.golden.tolerance:
            raise GoldenMismatch(
                f"{key} differs from golden.npz by {error:.3g}, the manifest allows {manifest.golden.tolerance:g}: "
                f"this runtime does not compute what was exported"
            )
        worst = max(worst, error)
    return worst


def prove_bits(runner: OrtRunner, files: ModelFiles) -> bool:
    """Runs the golden sequences alone and in batches of many sizes, one by one and in chunks, and compares the bits.

    Where a chunk in one run fails or gives other bits than its steps, the runner is told to take a simpler form.

    Returns:
        Whether a session gets the same bits alone and among others. So for the CPU provider and our own graphs; an
        operator may round a row by its place in the batch (ONNX Runtime's Elu does), and a GPU may choose another
        kernel for another size. Told on the model's page.

    Raises:
        GoldenMismatch: the golden input is missing or misshapen.
        InferenceFailed: the runtime refuses it.
    """
    manifest = files.manifest
    names = [tensor.name for tensor in manifest.outputs]
    steps = manifest.golden.steps
    once = _golden_array(
        files, f"input.{manifest.input.name}", (manifest.golden.sequences, steps, *manifest.input.shape)
    )
    inputs = np.concatenate([once.astype(manifest.input.dtype)] * 3, axis=1)

    def run(rows: Array, chunk: int) -> list[Array]:
        """A third one by one, so that the state is not the initial one, and the rest in chunks."""
        state, parts = initial_state(manifest.state, len(rows)), []
        for start, end in pairwise([*range(steps), *range(steps, 3 * steps, chunk), 3 * steps]):
            outputs, state = runner.run(inputs[rows, start:end], state, names)
            parts.append(list(outputs.values()))
        return [np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)] + state

    each = [run(np.array([b]), 1) for b in range(len(inputs))]
    alone = [np.concatenate(rows) for rows in zip(*each, strict=True)]
    batches = [np.arange(size) % len(inputs) for size in BATCHES]
    one_by_one = [run(rows, 1) for rows in batches]

    def fault() -> str:
        """What is wrong with chunks in one run."""
        try:
            chunks = (run(rows, 2 * steps) for rows in batches)
            sound = all(_same(chunk, single) for chunk, single in zip(chunks, one_by_one, strict=True))
        except InferenceFailed as error:
            return str(error)
        return "" if sound else "in one run a chunk gives other bits than its steps"

    while runner.in_one_run and (reason := fault()):
        runner.simplify(reason)
    return all(_same(got, [value[rows] for value in alone]) for got, rows in zip(one_by_one, batches, strict=True))


def _same(got: list[Array], want: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def _golden_array(files: ModelFiles, key: str, shape: tuple[int, ...]) -> Array:
    array = files.golden.get(key)
    if array is None or array.shape != shape:
        found = "is missing" if array is None else f"has shape {array.shape}"
        raise GoldenMismatch(f"golden.npz: {key} {found}, the manifest asks for {shape}")
    return array
