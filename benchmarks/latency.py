"""How long a reply takes at half the peak load: messages arrive when they arrive, beside an echo at the same rate."""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from benchmarks import latch
from benchmarks.doors import CONNECTIONS, VARIANTS, loading
from benchmarks.latch import Latch, rolls
from benchmarks.load import Latencies, Line, open_loop
from benchmarks.machine import Program, bar, pinned
from benchmarks.report import Row, at_most

GOAL = 2.0
# A generator that sends later than this, at its 99th percentile, adds to what it measures: then it measures again.
LATE, ATTEMPTS = 100e-6, 5


def run(quick: bool) -> Iterator[Row]:
    """The 99th percentile of the time from when a message was due to its reply, by that of the echo."""
    rounds, seconds = (2, 1.0) if quick else (5, 2.0)
    rows = list(rolls(VARIANTS))
    with Latch() as service, Program("benchmarks.echo", "websocket-binary") as echo:
        lines = {
            "latch": [latch.websocket_binary(service.port, session, rows) for session in service.create(CONNECTIONS)],
            "echo": [latch.websocket_binary(echo.port, None, rows) for _ in range(CONNECTIONS)],
        }
        loading(echo, lines["echo"], 0.0)
        peak = median(loading(service, lines["latch"], seconds).measure() for _ in range(3))
        taken: dict[str, list[Latencies]] = {name: [] for name in lines}
        for turn in bar(range(rounds), "latency"):
            for name, one in taken.items():
                one.append(_in_time(lines[name], peak / 2, seconds, turn))
    p50, p99 = ({name: _percentile(one, which) for name, one in taken.items()} for which in (50, 99))
    late = max(one.late for each in taken.values() for one in each)
    detail = "; ".join(f"{name}: p50 {p50[name] * 1e6:,.0f}, p99 {p99[name] * 1e6:,.0f} us" for name in taken)
    detail += f"; sent late, p99: {late * 1e6:,.0f} us" + (" (TOO LATE)" if late > LATE else "")
    what = f"p99 at half the peak, {peak / 2:,.0f} messages/s, {CONNECTIONS} connections"
    yield at_most(GOAL, what, "echo.py websocket-binary", p99["latch"] / p99["echo"], detail)


def _in_time(lines: Sequence[Line], rate: float, seconds: float, seed: int) -> Latencies:
    """The round whose messages were sent in time; failing that, the one that came closest."""
    rounds: list[Latencies] = []
    while len(rounds) < ATTEMPTS and all(one.late > LATE for one in rounds):
        with pinned():
            rounds.append(open_loop(lines, rate, seconds, seed))
    return min(rounds, key=lambda one: one.late)


def _percentile(rounds: Sequence[Latencies], which: float) -> float:
    """The median over rounds."""
    return median(float(np.percentile(one.replies, which)) for one in rounds)
