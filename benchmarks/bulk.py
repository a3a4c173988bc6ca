"""Many steps a message: 64 sessions over one socket, and a backfill in one request, beside ONNX Runtime alone."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks import bare, latch, models
from benchmarks.latch import MODEL, Latch, rolls
from benchmarks.load import Line, closed_loop
from benchmarks.machine import ROOT, Contender, Program, aside, describe, pinned, ratio, take_turns
from benchmarks.report import Row, at_least

SESSIONS, STEPS, WINDOW = 64, 8, 2
BACKFILL, CALLS = 10_000, (32, 1_000, 10_000)
GOAL = 0.85


def run(quick: bool) -> Iterator[Row]:
    """Steps a second through the service by those of a bare loop over the same graph, for a small and a large unit."""
    rounds, seconds = (2, 0.5) if quick else (5, 1.0)
    with models.repository(("gru",), 256) as made, aside() as pool:
        for folder in (ROOT / "models" / MODEL / "1", made / "gru-256" / "1"):
            yield _many(folder, pool, rounds, seconds)
            yield _backfill(folder, pool, rounds, seconds)


def stepping(program: Program, line: Line, steps: int, seconds: float) -> Contender[float]:
    """A line whose every reply stands for so many steps."""

    def measure() -> float:
        with pinned():
            return steps * closed_loop([line], seconds)

    measure()
    return Contender(measure, (program.pid,))


def _many(folder: Path, pool: ProcessPoolExecutor, rounds: int, seconds: float) -> Row:
    name, chunks = folder.parent.name, rolls(SESSIONS, STEPS)
    with Latch(folder.parents[1]) as service, Program("benchmarks.echo", "websocket-binary") as echo:
        line = latch.many(service.port, service.create(SESSIONS, name), chunks, window=WINDOW)
        echoed = latch.many(echo.port, None, chunks, window=WINDOW)
        contenders = {
            "latch": stepping(service, line, STEPS, seconds),
            "bare": bare.quickest(pool, folder, SESSIONS, (STEPS,), seconds),
            "echo": stepping(echo, echoed, SESSIONS * STEPS, seconds),
        }
        return _contest(f"one socket, {SESSIONS} sessions x {STEPS} steps a message, {name}", contenders, rounds)


def _backfill(folder: Path, pool: ProcessPoolExecutor, rounds: int, seconds: float) -> Row:
    name, rows = folder.parent.name, list(rolls(1, BACKFILL))
    with Latch(folder.parents[1]) as service, Program("benchmarks.echo", "http-binary") as echo:
        line = latch.http_binary(service.port, service.create(1, name)[0], rows)
        contenders = {
            "latch": stepping(service, line, BACKFILL, seconds),
            "bare": bare.quickest(pool, folder, 1, CALLS, seconds),
            "echo": stepping(echo, latch.http_binary(echo.port, None, rows), BACKFILL, seconds),
        }
        return _contest(f"backfill of {BACKFILL:,} steps in one request, {name}", contenders, rounds)


def _contest(what: str, contenders: dict[str, Contender[float]], rounds: int) -> Row:
    """The service by the bare loop; and what it could reach if it cost nothing but an echo of the same bytes."""
    taken = take_turns(contenders, rounds)
    said = {name: describe(one, "steps/s") for name, one in taken.items()}
    bare_rate, echo_rate = (median(one.value for one in taken[name]) for name in ("bare", "echo"))
    detail = (
        f"{said['latch']}; bare {said['bare']} ({contenders['bare'].title}); echo of the same bytes {said['echo']}, "
        f"so one core that does both can reach {echo_rate / (bare_rate + echo_rate):.2f}"
    )
    return at_least(GOAL, what, "`bare.py`", ratio(taken["latch"], taken["bare"]), detail)
