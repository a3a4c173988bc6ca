"""How long a reply takes at half the peak load: messages come when they come, beside an echo at the same rate."""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from benchmarks import latch
from benchmarks.doors import CONNECTIONS, VARIANTS, loading
from benchmarks.latch import Latch, rolls
from benchmarks.load import Latencies, Line, open_loop
from benchmarks.machine import UNSURE, Contender, Program, Round, doubts, pinned, take_turns
from benchmarks.report import Row, at_most

GOAL = 2.0
# A generator that sends later than this, at its 99th percentile, adds to what it measures.
LATE = 100e-6


def run(quick: bool) -> Iterator[Row]:
    """The 99th percentile of the time from when a message was due to its reply, by that of the echo."""
    rounds, seconds = (2, 1.0) if quick else (5, 2.0)
    rows = list(rolls(VARIANTS))
    with Latch() as service, Program("benchmarks.echo", "websocket-binary") as echo:
        ours = [latch.websocket_binary(service.port, session, rows) for session in service.create(CONNECTIONS)]
        theirs = [latch.websocket_binary(echo.port, None, rows) for _ in range(CONNECTIONS)]
        loading(echo, theirs, seconds)
        peaks = take_turns({"latch": loading(service, ours, seconds / 2)}, 3)["latch"]
        rate = median(one.value for one in peaks) / 2

        def arriving(program: Program, lines: Sequence[Line]) -> Contender[Latencies]:
            def measure() -> Latencies:
                with pinned():
                    return open_loop(lines, rate, seconds)

            return Contender(measure, (program.pid,))

        taken = take_turns({"latch": arriving(service, ours), "echo": arriving(echo, theirs)}, rounds)
    p99 = {name: _percentile(one, 99) for name, one in taken.items()}
    late = max(one.value.late for each in taken.values() for one in each)
    detail = "; ".join(
        f"{name}: p50 {_percentile(one, 50) * 1e6:,.0f}, p99 {p99[name] * 1e6:,.0f} us, "
        f"{median(each.server for each in one):.0%} busy{doubts(one)}"
        for name, one in taken.items()
    )
    detail += f"; sent late, p99: {late * 1e6:,.0f} us" + (f" ({UNSURE})" if late > LATE else "")
    what = f"p99 at half the peak, {rate:,.0f} messages/s, {CONNECTIONS} connections"
    yield at_most(GOAL, what, "echo.py websocket-binary", p99["latch"] / p99["echo"], detail)


def _percentile(rounds: Sequence[Round[Latencies]], which: float) -> float:
    """The median over rounds."""
    return median(float(np.percentile(one.value.replies, which)) for one in rounds)
