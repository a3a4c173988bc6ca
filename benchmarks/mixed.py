"""Another shape of load: sockets that come and go and are cut in mid-flight, all doors, chunks of mixed sizes.

Rule: it proves as much as it measures. Every row of every reply has the bits of a bare loop over the same graph, and no
step is lost or made twice, whatever was cut.
"""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from benchmarks import bare
from benchmarks.latch import MODEL, NOTES, ROW, Array, Latch, rolls
from benchmarks.machine import ROOT, bar, pinned
from benchmarks.report import Row
from benchmarks.wire import FRAME, JSON, OCTETS, STEP, STEPPED, dumps, request, responses

CHUNKS, WEIGHTS = (1, 2, 8, 50, 400), (60, 20, 12, 6, 2)
SESSIONS, BURST, PAUSE, CUT, REPEAT, KEPT = 200, 8, 0.1, 0.15, 0.3, 1 << 16
SOCKETS = ("latch.json", "latch.binary")
DOORS = (*SOCKETS, JSON, OCTETS)
MUSIC = rolls(1, 4096)[0]


@dataclass
class Stream:
    """A session: where it is, its latest requests by the step that they end at, and what came back."""

    name: str
    offset: int
    rng: random.Random
    step: int = 0
    lost: bool = False  # after a cut, until a hello says what was applied
    sent: dict[int, int] = field(default_factory=dict)
    replies: list[tuple[int, Array]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cuts: int = 0
    repeats: int = 0
    missing: int = 0  # steps that were acknowledged and that a hello does not know

    def inputs(self, first: int, count: int) -> Array:
        """The rows of some steps."""
        steps = np.arange(first, first + count) + self.offset
        return np.take(MUSIC, steps % len(MUSIC), axis=0)

    def plan(self) -> list[tuple[int, int]]:
        """First step and length of the next few requests; sometimes the last one that was applied comes again."""
        count = self.step + 1 - self.sent.get(self.step, self.step + 1)
        plan = [(self.step + 1 - count, count)] if 0 < count * ROW < KEPT and self.rng.random() < REPEAT else []
        self.repeats += len(plan)
        at = self.step
        for count in self.rng.choices(CHUNKS, WEIGHTS, k=self.rng.randint(1, BURST)):
            plan.append((at + 1, count))
            at += count
        self.sent = {first + count - 1: first for first, count in plan}
        return plan

    def took(self, first: int, rows: Array, seconds: float) -> None:
        """A reply."""
        self.replies.append((first, rows))
        self.step = first + len(rows) - 1
        self.seconds.append(seconds)


def run(quick: bool) -> Iterator[Row]:
    """Rows whose bits are not the loop's, and steps that were lost: none. How long requests took meanwhile."""
    seconds = 4.0 if quick else 20.0
    with Latch() as service, pinned():
        names = service.create(SESSIONS)
        streams = [Stream(name, 37 * i, random.Random(i)) for i, name in enumerate(names)]  # noqa: S311 - no secret
        uvloop.run(_play(service.port, streams, seconds))
    wrong = sum(wrong_rows(stream) + stream.missing for stream in bar(streams, "comparing bits"))
    steps, cuts, repeats = (sum(getattr(one, name) for one in streams) for name in ("step", "cuts", "repeats"))
    times = np.concatenate([stream.seconds for stream in streams]) * 1e3
    detail = (
        f"{steps:,} steps, {len(times):,} replies over {len(DOORS)} doors, {cuts} sockets cut, {repeats} requests sent "
        f"again; p50 {np.percentile(times, 50):.2f} ms, p99 {np.percentile(times, 99):.2f} ms"
    )
    what = f"{SESSIONS} sessions, chunks of 1 to {max(CHUNKS)}, sockets that come and go: wrong rows, lost steps"
    yield Row(what, "`bare.py`, a step a run, bit for bit", "0", f"{wrong}", wrong == 0, detail)


async def _play(port: int, streams: Sequence[Stream], seconds: float) -> None:
    end = time.perf_counter() + seconds
    await asyncio.gather(*(_live(port, stream, end) for stream in streams))


async def _live(port: int, stream: Stream, end: float) -> None:
    """Visit after visit; the last is a single step, so that every session has final outputs to compare."""
    while time.perf_counter() < end:
        await asyncio.sleep(stream.rng.expovariate(1 / PAUSE))
        door = stream.rng.choice(SOCKETS if stream.lost else DOORS)
        await (_visit if door in SOCKETS else _post)(port, stream, door, None)
    await _visit(port, stream, SOCKETS[0], [])
    await _post(port, stream, JSON, [(stream.step + 1, 1)])


async def _visit(port: int, stream: Stream, door: str, plan: list[tuple[int, int]] | None) -> None:
    """Requests over a socket at random moments, however late the replies are; some sockets are cut."""
    binary, due = door == "latch.binary", deque[float]()
    address = f"ws://127.0.0.1:{port}/v1/sessions/{stream.name}/stream"
    async with connect(address, subprotocols=[Subprotocol(door)], compression=None, max_size=None) as socket:
        hello: Any = await socket.recv()
        told = json.loads(hello[FRAME.size :] if binary else hello)["step"]
        stream.missing += max(0, stream.step - told)
        stream.step, stream.lost = told, False
        plan = stream.plan() if plan is None else plan

        async def read() -> None:
            with suppress(ConnectionClosed):
                owed = len(plan)
                while owed:
                    reply: Any = await socket.recv()
                    for first, rows in _unframe(reply) if binary else [_parse(reply)]:
                        stream.took(first, rows, time.perf_counter() - due.popleft())
                        owed -= 1

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            for first, count in plan:
                rows = stream.inputs(first, count)
                due.append(time.perf_counter())
                frame = FRAME.pack(STEP, 0, 0, count, first) + rows.tobytes()
                await socket.send(frame if binary else dumps({"inputs": rows.tolist(), "step": first}).decode())
                await asyncio.sleep(stream.rng.expovariate(2 / PAUSE))
            if plan and stream.rng.random() < CUT:
                socket.transport.abort()
                stream.lost = True
                stream.cuts += 1


async def _post(port: int, stream: Stream, door: str, plan: list[tuple[int, int]] | None) -> None:
    """The same over HTTP, one after another."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for first, count in stream.plan() if plan is None else plan:
        rows, path, start = stream.inputs(first, count), f"/v1/sessions/{stream.name}/steps", time.perf_counter()
        if door == OCTETS:
            writer.write(request("POST", f"{path}?step={first}", rows.tobytes(), OCTETS))
        else:
            writer.write(request("POST", path, dumps({"inputs": rows.tolist(), "step": first})))
        data = b""
        while not responses(data)[1]:
            if not (more := await reader.read(1 << 16)):
                raise RuntimeError(f"the service closed a connection after {data[-400:]!r}")
            data += more
        body = data.partition(b"\r\n\r\n")[2]
        if door == JSON:
            first, rows = _parse(body)
        else:
            rows = np.frombuffer(body, np.float32).reshape(-1, NOTES)
        stream.took(first, rows, time.perf_counter() - start)
    writer.close()


def _parse(reply: str | bytes) -> tuple[int, Array]:
    document = json.loads(reply)
    if "outputs" not in document:
        raise RuntimeError(f"an unexpected reply: {document}")
    rows = np.array(document["outputs"]["y"], np.float32)
    return document["step"] - len(rows) + 1, rows


def _unframe(reply: bytes) -> Iterator[tuple[int, Array]]:
    """One message, of one frame or more."""
    at = 0
    while at < len(reply):
        kind, _, _, count, first = FRAME.unpack_from(reply, at)
        if kind != STEPPED:
            raise RuntimeError(f"an unexpected frame: {reply[at : at + 400]!r}")
        at += FRAME.size + count * ROW
        yield first, np.frombuffer(reply[at - count * ROW : at], np.float32).reshape(count, NOTES)


def wrong_rows(stream: Stream) -> int:
    """Rows that differ from the loop's, and a final step that is not the last one."""
    expected = bare.unrolled(ROOT / "models" / MODEL / "1", stream.inputs(1, stream.step))
    differ = sum(
        int(np.any(rows.view(np.uint32) != expected[first - 1 : first - 1 + len(rows)].view(np.uint32), axis=1).sum())
        for first, rows in stream.replies
    )
    return differ + (stream.replies[-1][0] != stream.step)
