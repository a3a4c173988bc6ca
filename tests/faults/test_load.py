"""The clients of the fault tests, before a server that does what is rare."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.faults.history import Model
from tests.faults.load import Doors, LostAnswerError, Reply, http_client
from tests.service import peer

FAREWELL = {"json_socket": '{"type": "going_away"}', "binary_socket": peer.frame(peer.GOING_AWAY)}
HELLO = {"json_socket": '{"type": "hello"}', "binary_socket": peer.frame(peer.HELLO, count=2, payload=b"{}")}


@pytest.mark.parametrize("kind", HELLO)
def test_a_farewell_is_no_answer(runner: asyncio.Runner, models: Path, kind: str) -> None:
    """A request that crosses `going_away` is lost, and the next one goes over a new socket."""
    model = Model(models / "toy" / "1")
    rows = model.rows(0, 2)
    output = model.fold(rows)[0]
    outputs = {"y": np.frombuffer(output, np.float32).reshape(2, -1).tolist()}
    answers = {
        "json_socket": json.dumps({"type": "step", "step": 2, "outputs": outputs}),
        "binary_socket": peer.frame(peer.STEPPED, count=2, first=1, payload=output),
    }
    sockets = 0

    async def answer(socket: ServerConnection) -> None:
        nonlocal sockets
        sockets += 1
        await socket.send(HELLO[kind])
        await socket.recv()
        if sockets == 1:
            await socket.send(FAREWELL[kind])
            await socket.close(1012)
        else:
            await socket.send(answers[kind])
            await socket.wait_closed()

    async def scenario() -> None:
        async with (
            http_client() as http,
            serve(answer, "127.0.0.1", 0, subprotocols=["latch.json", "latch.binary"]) as server,
        ):
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            doors = Doors("s", model, http)
            with pytest.raises(LostAnswerError):
                await getattr(doors, kind)(url, rows, 1)
            assert await getattr(doors, kind)(url, rows, 1) == Reply(2, output)
            await doors.close()

    runner.run(scenario())
    assert sockets == 2
