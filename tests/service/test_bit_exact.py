"""Bit-exactness: whatever the load, the chunking and the door, a session's outputs are the bits of a lonely loop.

Every shipped model is held to it, against a loop over ONNX Runtime that shares no code with the service.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.sync.client import connect as sync_connect

from service.registry import load
from service.runtime import OrtRunner
from tests.service import peer, toys
from tests.service.conftest import Server, serving
from tests.service.peer import Peer

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/1"))
SEQUENCES, STEPS = 6, 40


def sequences(name: str) -> tuple[np.ndarray, Any, Path]:
    """Inputs like the golden ones, shuffled into new sequences; with the manifest and the folder."""
    folder = MODELS / name / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    with np.load(folder / "golden.npz") as golden:
        rows = golden[f"input.{manifest['input']['name']}"]
    pool = rows.reshape(-1, *rows.shape[2:])
    picks = np.random.default_rng(0).integers(0, len(pool), (SEQUENCES, STEPS))
    return pool[picks], manifest, folder


def expected(name: str) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Inputs, what the lonely loop makes of them, and the names of all outputs."""
    inputs, manifest, folder = sequences(name)
    return inputs, toys.unrolled(folder, manifest, inputs), [t["name"] for t in manifest["outputs"]]


def test_every_unit_is_shipped() -> None:
    """The ten chorale models and the sensors are there, so the tests below are about all of them."""
    units = ["gru", "gru1", "gru2", "gru3", "mgu", "mgu1", "mgu2", "mgu3", "lstm", "rnn"]
    assert {*SHIPPED} >= {*[f"chorales-{unit}" for unit in units], "sensors"}


@pytest.mark.parametrize("name", SHIPPED)
def test_alone_in_batches_and_in_chunks(name: str) -> None:
    """Batches of 1 to 33 and of 128, in runs of 1, 7 and all steps, give the loop's bits, gates included."""
    inputs, loop, names = expected(name)
    files = load(MODELS / name / "1")
    runner = OrtRunner(files.manifest, files.graph)
    for size in (*range(1, 34), 128):
        for run in (1, 7, STEPS) if size in (1, 2, 5, 32) else (STEPS,):
            picks = np.arange(size) % SEQUENCES
            state: Any = [np.stack([pair.initial_value()] * size) for pair in files.manifest.state]
            parts = []
            for start in range(0, STEPS, run):
                part, state = runner.run(inputs[picks, start : start + run], state, names)
                parts.append(part)
            for output in names:
                got = np.concatenate([part[output] for part in parts], axis=1)
                np.testing.assert_array_equal(got, loop[f"output.{output}"][picks], f"{output} at batch {size}")
            for pair, rows in zip(files.manifest.state, state, strict=True):
                np.testing.assert_array_equal(rows, loop[f"state.{pair.name}"][picks], f"{pair.name} at batch {size}")


@pytest.mark.parametrize("name", SHIPPED)
def test_asking_for_fewer_outputs_changes_no_bit(name: str) -> None:
    """The prediction alone, or a gate alone, has the bits it has beside all the others."""
    inputs, loop, names = expected(name)
    files = load(MODELS / name / "1")
    runner = OrtRunner(files.manifest, files.graph)
    initial = [np.stack([pair.initial_value()] * SEQUENCES) for pair in files.manifest.state]
    for output in names:
        got, _ = runner.run(inputs, initial, [output])
        np.testing.assert_array_equal(got[output], loop[f"output.{output}"])


@pytest.fixture(scope="module")
def shipped() -> Iterator[Server]:
    """The service with the shipped models."""
    with serving(MODELS) as running:
        yield running


@pytest.mark.parametrize("name", SHIPPED)
def test_over_http_and_websocket_under_load(shipped: Server, name: str) -> None:
    """Thirty-six sessions at once, over HTTP and WebSocket, in steps and in odd chunks, each give the loop's bits."""
    inputs, loop, names = expected(name)

    def parts(size: int) -> list[tuple[int, Any]]:
        return [(start + 1, slice(start, start + size)) for start in range(0, STEPS, size)]

    async def over_http(client: httpx.AsyncClient, row: int, size: int) -> Any:
        session = (await client.post("/v1/sessions", json={"model": name})).json()["id"]
        replies = []
        for first, part in parts(size):
            body = {"inputs": inputs[row, part].tolist(), "step": first, "outputs": names}
            replies.append((await client.post(f"/v1/sessions/{session}/steps", json=body)).json())
        return replies

    async def over_socket(row: int, size: int) -> Any:
        session = shipped.create(name)
        url = shipped.url.replace("http", "ws") + f"/v1/sessions/{session}/stream"
        async with connect(url) as socket:
            await socket.recv()
            for first, part in parts(size):
                await socket.send(json.dumps({"inputs": inputs[row, part].tolist(), "step": first, "outputs": names}))
            return [json.loads(await socket.recv()) for _ in parts(size)]

    async def everybody() -> Any:
        cases = [(row, size) for row in range(SEQUENCES) for size in (1, 7, STEPS)]
        async with httpx.AsyncClient(base_url=shipped.url, timeout=60) as client:
            calls = [over_http(client, *case) for case in cases] + [over_socket(*case) for case in cases]
            return zip([row for row, _ in cases] * 2, await asyncio.gather(*calls), strict=True)

    for row, replies in asyncio.run(everybody()):
        for output in names:
            got = np.concatenate([np.array(reply["outputs"][output], np.float32) for reply in replies])
            np.testing.assert_array_equal(got, loop[f"output.{output}"][row])


@pytest.mark.parametrize("name", SHIPPED)
def test_in_packed_rows_over_every_door(shipped: Server, name: str) -> None:
    """In blocks of many sessions, on a binary socket of one and over HTTP, in steps and odd chunks: the same bits."""
    inputs, loop, names = expected(name)
    _, manifest, _ = sequences(name)
    row = np.dtype([(tensor["name"], "<f4", tuple(tensor["shape"])) for tensor in manifest["outputs"]])

    def check(sequence: int, parts: list[bytes], outputs: list[str]) -> None:
        got = np.frombuffer(b"".join(parts), row[outputs])
        for output in outputs:
            np.testing.assert_array_equal(got[output], loop[f"output.{output}"][sequence])

    cases = [(sequence, size) for size in (1, 7, STEPS) for sequence in range(SEQUENCES)]
    url = shipped.url.replace("http", "ws") + "/v1/stream"
    with sync_connect(url, subprotocols=["latch.binary"], max_size=None) as socket:
        client = Peer(socket, row.itemsize)
        for channel in range(len(cases)):
            client.open(channel, shipped.create(name), names)
        parts: dict[int, list[bytes]] = {channel: [] for channel in range(len(cases))}
        for start in range(STEPS):
            for size in {size for _, size in cases if start % size == 0}:
                client.send(
                    *[
                        peer.step(channel, inputs[sequence, start : start + size], start + 1)
                        for channel, (sequence, mine) in enumerate(cases)
                        if mine == size
                    ]
                )
        for reply in client.take(sum(-(-STEPS // size) for _, size in cases)):
            parts[reply.channel].append(reply.payload)
    for channel, (sequence, _) in enumerate(cases):
        check(sequence, parts[channel], names)

    for sequence, rows in enumerate(inputs):
        with shipped.socket(shipped.create(name), subprotocols=["latch.binary"]) as socket:
            client = Peer(socket, row[names[0]].itemsize)
            client.next()
            for step in rows:
                client.send(peer.step(0, step[None]))
            replies = client.take(STEPS)
        default = np.frombuffer(b"".join(reply.payload for reply in replies), row[names[0]].base)
        np.testing.assert_array_equal(default, loop[f"output.{names[0]}"][sequence].ravel())
        session, bodies = shipped.create(name), []
        for start in range(0, STEPS, 7):
            url = f"/v1/sessions/{session}/steps?step={start + 1}&outputs={','.join(names)}"
            headers = {"Content-Type": "application/octet-stream"}
            bodies.append(shipped.http.post(url, content=rows[start : start + 7].tobytes(), headers=headers).content)
        check(sequence, bodies, names)


@pytest.mark.parametrize("name", SHIPPED)
def test_predict_gives_the_same_bits(shipped: Server, name: str) -> None:
    """Whole sequences without a session, of different lengths, give the loop's bits."""
    inputs, loop, names = expected(name)
    lengths = [STEPS, 1, 17, 3, STEPS - 1, 8]
    body = {"sequences": [rows[:n].tolist() for rows, n in zip(inputs, lengths, strict=True)], "outputs": names}
    reply = shipped.http.post(f"/v1/models/{name}/predict", json=body).json()["sequences"]
    for row, (sequence, n) in enumerate(zip(reply, lengths, strict=True)):
        for output in names:
            got = np.array(sequence["outputs"][output], np.float32)
            np.testing.assert_array_equal(got, loop[f"output.{output}"][row, :n])
