"""The mixed load's judgement: it must see what it says that it looks for."""

import asyncio
import json
import random

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from benchmarks import bare, mixed
from benchmarks.latch import MODEL
from benchmarks.machine import ROOT
from benchmarks.mixed import Stream


@pytest.fixture
def stream() -> Stream:
    """A session that made twelve steps, all of them right, the last one alone."""
    made = Stream("s", 5, random.Random(1))  # noqa: S311 - no secret
    rows = bare.unrolled(ROOT / "models" / MODEL / "1", made.inputs(1, 12))
    made.took(1, rows[:4].copy(), 0.0)
    made.took(5, rows[4:11].copy(), 0.0)
    made.took(12, rows[11:].copy(), 0.0)
    return made


def test_right_rows_are_right(stream: Stream) -> None:
    """Chunks of any length against a step a run."""
    assert mixed.wrong_rows(stream) == 0


def test_one_bit_is_seen(stream: Stream) -> None:
    """The smallest difference in one number of one row."""
    stream.replies[1][1].view(np.uint32)[3, 40] ^= 1
    assert mixed.wrong_rows(stream) == 1


async def _told(step: int) -> Stream:
    """A session of twelve acknowledged steps, whose next hello says another number."""

    async def greet(socket: ServerConnection) -> None:
        await socket.send(json.dumps({"step": step}))
        await socket.wait_closed()

    made = Stream("s", 5, random.Random(1), step=12)  # noqa: S311 - no secret
    async with serve(greet, "127.0.0.1", 0, subprotocols=[Subprotocol("latch.json")]) as server:
        await mixed._visit(server.sockets[0].getsockname()[1], made, "latch.json", [])
    return made


@pytest.mark.parametrize(("told", "missing"), [(12, 0), (14, 0), (4, 8)])
def test_a_hello_that_knows_fewer_steps_is_seen(told: int, missing: int) -> None:
    """What was acknowledged and is not there is lost, though the client goes on from there."""
    made = asyncio.run(_told(told))
    assert (made.missing, made.step) == (missing, told)


def test_a_lost_step_is_seen(stream: Stream) -> None:
    """Rows under another step's number are wrong."""
    first, rows = stream.replies[2]
    stream.replies[2] = (first - 1, rows)
    assert mixed.wrong_rows(stream) >= 1
