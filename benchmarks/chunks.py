"""What a chunk in one run (ONNX `Scan`) costs beside the same steps one by one: ratios from one process, one thread."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from service.manifest import initial_state
from service.registry import load
from service.runtime import OrtRunner

MODELS = Path(__file__).parents[1] / "models"
STEPS, ROUNDS = 32, 60


def best(call: Callable[[], object]) -> float:
    """Seconds of the quickest of `ROUNDS` calls: the one that the rest of the machine disturbed least."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """A row a model: time of a chunk of 32 steps by the time of 32 steps, for 1, 8 and 64 sessions."""
    print(f"one run of {STEPS} steps / {STEPS} runs of one step, by sessions")  # noqa: T201 - the report
    for folder in sorted(MODELS.glob("*/1")):
        files = load(folder)
        chunks, steps = (OrtRunner(files.manifest, files.graph) for _ in range(2))
        steps.step_by_step("the baseline")
        ratios = []
        for sessions in (1, 8, 64):
            shape = (sessions, STEPS, *files.manifest.input.shape)
            inputs = np.random.default_rng(0).random(shape).astype(files.manifest.input.dtype)
            state = initial_state(files.manifest.state, sessions)
            once, many = (best(lambda r=runner: r.run(inputs, state, ["y"])) for runner in (chunks, steps))  # noqa: B023
            ratios.append(f"{sessions}: {once / many:.2f}")
        print(f"{files.manifest.name:<14} {'   '.join(ratios)}")  # noqa: T201


if __name__ == "__main__":
    main()
