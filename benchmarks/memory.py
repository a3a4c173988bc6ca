"""What sessions cost that do nothing: bytes of a million idle ones, their drag on busy ones, what closed ones leave.

Rule: bytes are resident memory, so nothing is forgotten.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import latch, models, room
from benchmarks.latch import MODEL, Latch, rolls
from benchmarks.load import ask, connect
from benchmarks.machine import ROOT, Contender, aside, bar, describe, ratio, take_turns
from benchmarks.report import Row, at_least, at_most
from benchmarks.wire import dumps, request, responses

IDLE, BUSY = 1_000_000, 1_000
SHARE, OVERHEAD, DRAG = 1.1, 400, 0.9
CLOSED, LEFT = 10_000, 16


def run(quick: bool) -> Iterator[Row]:
    """Bytes a session, for two sizes; steps a second beside so many by those without; and what closed ones leave."""
    with models.repository(("gru",), 256) as made:
        for folder in (ROOT / "models" / MODEL / "1", made / "gru-256" / "1"):
            yield from _idle(folder, *((50_000, 2, 0.5) if quick else (IDLE, 5, 1.0)))
    yield _closed(1_000 if quick else CLOSED)


def _idle(folder: Path, idle: int, rounds: int, seconds: float) -> Iterator[Row]:
    name = folder.parent.name
    with aside() as few, aside() as many:
        few.submit(room.fill, folder, BUSY).result()
        each, raw = many.submit(room.fill, folder, idle).result()
        detail = f"of {each:,.0f} bytes a session, {raw:,} are state and kept reply"
        what = f"{idle:,} idle sessions of {name}, bytes each"
        yield at_most(round(raw * SHARE + OVERHEAD), what, "state and kept reply x 1.1 + 400", round(each), detail)
        taken = take_turns(
            {
                "alone": Contender.of(few, room.rate, BUSY, seconds),
                "busy": Contender.of(many, room.rate, BUSY, seconds),
                "any": Contender.of(many, room.rate, idle, seconds),
            },
            rounds,
        )
        waits = [pool.submit(room.leave).result() * 1000 for pool in (few, many)]
    detail = f"{describe(taken['busy'], 'steps/s')}; alone {describe(taken['alone'], 'steps/s')}; "
    detail += f"longest wait for a batch of {room.BATCH}: {waits[1]:,.0f} ms; alone {waits[0]:,.0f} ms"
    what = f"steps of {BUSY:,} sessions of {name} while {idle:,} are there"
    yield at_least(DRAG, what, f"{BUSY:,} alone", ratio(taken["busy"], taken["alone"]), detail)
    value = f"{ratio(taken['any'], taken['alone']):.2f}"
    yield Row(f"steps of any of {idle:,} sessions of {name}", f"{BUSY:,} alone", "", value, None, "beyond every cache")


def _closed(count: int) -> Row:
    """Sessions opened, stepped over a socket of their own and deleted, in three batches; the first makes room."""
    row = list(rolls(1))
    with Latch() as service, connect(service.port) as control:
        levels = []
        for batch in range(3):
            for i in bar(range(count), f"batch {batch + 1} of 3"):
                address = f"/v1/sessions/c-{batch}-{i}"
                ask(control, request("PUT", address, dumps({"model": MODEL})), responses)
                line = latch.websocket_json(service.port, f"c-{batch}-{i}", row)
                line.once()
                ask(control, request("DELETE", address), responses)
            levels.append(service.memory())
    left = (levels[2] - levels[0]) / (2 * count)
    detail = "resident after each batch: " + ", ".join(f"{level / 2**20:.1f} MiB" for level in levels)
    return at_most(LEFT, f"{count:,} sessions opened, stepped and closed, twice", "bytes left of each", left, detail)
