"""What a leaner unit saves: GRU type 3 beside the full GRU at 256 units, inside the runtime and end to end."""

from collections.abc import Iterator

from benchmarks import bare, latch, models
from benchmarks.bulk import SESSIONS, STEPS, WINDOW, stepping
from benchmarks.latch import Latch, rolls
from benchmarks.machine import Contender, aside, describe, ratio, take_turns
from benchmarks.report import Row, at_most

HIDDEN, FULL, LEAN = 256, "gru-256", "gru3-256"
SHAPES = ((256, 1), (SESSIONS, STEPS))
GOAL = 0.45


def run(quick: bool) -> Iterator[Row]:
    """Time a step of `gru3` by that of `gru`."""
    rounds, seconds = (2, 0.4) if quick else (5, 1.0)
    with models.repository(("gru", "gru3"), HIDDEN) as folder, aside() as pool, Latch(folder) as service:

        def inside(name: str, batch: int, steps: int) -> Contender[float]:
            return bare.contender(pool, folder / name / "1", "runner cpu", batch, steps, seconds)

        def through(name: str) -> Contender[float]:
            ids = service.create(SESSIONS, name, prefix=name)
            return stepping(
                service, latch.many(service.port, ids, rolls(SESSIONS, STEPS), window=WINDOW), STEPS, seconds
            )

        for batch, steps in SHAPES:
            what = f"{LEAN}, {batch} sessions x {steps} steps, inside the runtime"
            yield _row(what, {name: inside(name, batch, steps) for name in (FULL, LEAN)}, rounds, GOAL)
        what = f"{LEAN}, {SESSIONS} sessions x {STEPS} steps a message, through the service"
        yield _row(what, {name: through(name) for name in (FULL, LEAN)}, rounds, 1.0)


def _row(what: str, contenders: dict[str, Contender[float]], rounds: int, goal: float) -> Row:
    taken = take_turns(contenders, rounds)
    detail = "; ".join(f"{name} {describe(one, 'steps/s')}" for name, one in taken.items())
    return at_most(goal, what, f"{FULL}, time a step", ratio(taken[FULL], taken[LEAN]), detail)
