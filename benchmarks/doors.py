"""One step a message over 64 connections, through every door, beside a server that only echoes the same bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from benchmarks import latch
from benchmarks.latch import Array, Latch, rolls
from benchmarks.load import Line, closed_loop
from benchmarks.machine import Contender, Program, describe, pinned, ratio, take_turns
from benchmarks.report import Row, at_least

CONNECTIONS, VARIANTS, WARM = 64, 8, 0.3
Door = Callable[[int, str | None, Sequence[Array]], Line]

DOORS: tuple[tuple[str, Door, dict[str, float | None]], ...] = (
    ("websocket-binary", latch.websocket_binary, {"websocket-binary": 0.70, "websocket-binary-calls": None}),
    ("websocket-json", latch.websocket_json, {"websocket-json": 0.60, "websocket-json-calls": None}),
    ("http-json", latch.http_json, {"http-json": 0.55, "http-fastapi": 2.5}),
    ("http-binary", latch.http_binary, {"http-binary": 0.50}),
)


def run(quick: bool) -> Iterator[Row]:
    """For every door, messages a second by those of its echo; of JSON over HTTP also by those of plain FastAPI."""
    rounds, seconds = (2, 0.5) if quick else (5, 1.0)
    for name, door, goals in DOORS:
        for kind, rows in _bodies(name).items():
            with ExitStack() as stack:
                service = stack.enter_context(Latch())
                lines = [door(service.port, session, rows) for session in service.create(CONNECTIONS)]
                contenders = {"latch": loading(service, lines, seconds)}
                for rival in goals:
                    echo = stack.enter_context(Program("benchmarks.echo", rival))
                    lines = [door(echo.port, None, rows) for _ in range(CONNECTIONS)]
                    contenders[rival] = loading(echo, lines, seconds)
                taken = take_turns(contenders, rounds)
            ours = taken.pop("latch")
            for rival, theirs in taken.items():
                detail = f"{describe(ours, 'messages/s')}; echo {describe(theirs, 'messages/s')}"
                yield at_least(goals[rival], f"{name}, {kind}", f"echo.py {rival}", ratio(ours, theirs), detail)


def loading(program: Program, lines: Sequence[Line], seconds: float) -> Contender[float]:
    """A warm server under all the load that it takes."""

    def measure() -> float:
        with pinned():
            return closed_loop(lines, seconds)

    with pinned():
        closed_loop(lines, WARM)
    return Contender(measure, (program.pid,))


def _bodies(name: str) -> dict[str, list[Array]]:
    """What is sent: chords; in JSON also numbers of full length, which take both sides longer."""
    bodies = {"chords": list(rolls(VARIANTS))}
    if name.endswith("json"):
        bodies["long numbers"] = list(np.random.default_rng(0).random((VARIANTS, 1, latch.NOTES), np.float32))
    return bodies
