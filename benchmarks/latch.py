"""The service as a contender: `latch serve` in a process of its own, sessions in it, and lines to its doors.

Rule: it is reached as any client reaches it, and everything about a session is on the wire.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Line, ask, connect, websocket
from benchmarks.machine import ROOT, Program
from benchmarks.wire import (
    BINARY,
    OCTETS,
    TEXT,
    dumps,
    frames,
    message,
    messages,
    open_frame,
    request,
    responses,
    step_frame,
)

MODEL = "chorales-gru"
NOTES = 88
ROW = 4 * NOTES
Array = NDArray[Any]


def rolls(count: int, steps: int = 1, seed: int = 0) -> Array:
    """[count, steps, 88] float32 of chords: four notes of 88, as a chorale has."""
    x = np.zeros((count * steps, NOTES), np.float32)
    rng = np.random.default_rng(seed)
    for row in x:
        row[rng.choice(NOTES, 4, replace=False)] = 1
    return x.reshape(count, steps, NOTES)


class Latch(Program):
    """A running service; settings as `LATCH_...` without the prefix."""

    def __init__(self, models: Path = ROOT / "models", **settings: Any) -> None:
        environment = {f"LATCH_{name.upper()}": str(value) for name, value in settings.items()}
        environment.setdefault("LATCH_LOG_LEVEL", "warning")
        super().__init__("service", "serve", "--port", "0", "--models", str(models), **environment)

    def create(self, count: int, model: str = MODEL, prefix: str = "s") -> list[str]:
        """New sessions; their ids."""
        ids = [f"{prefix}-{i}" for i in range(count)]
        with connect(self.port) as connection:
            for session in ids:
                ask(connection, request("PUT", f"/v1/sessions/{session}", dumps({"model": model})), responses)
        return ids


def websocket_binary(port: int, session: str | None, rows: Sequence[Array]) -> Line:
    """Binary steps of one session over a socket of its own; without a session, to an echo."""
    requests = [message(step_frame(row.tobytes(), len(row)), BINARY) for row in rows]
    return Line(_stream(port, session, "latch.binary"), requests, frames(ROW) if session else messages(b"\1"))


def websocket_json(port: int, session: str | None, rows: Sequence[Array]) -> Line:
    """The same in JSON."""
    requests = [message(dumps({"inputs": row.tolist()}), TEXT) for row in rows]
    return Line(
        _stream(port, session, "latch.json"), requests, messages(b'{"type":"step"' if session else b'{"inputs"')
    )


def http_binary(port: int, session: str | None, rows: Sequence[Array]) -> Line:
    """Binary steps of one session over a kept HTTP connection."""
    path = f"/v1/sessions/{session}/steps" if session else "/"
    return Line(partial(connect, port), [request("POST", path, row.tobytes(), OCTETS) for row in rows], responses)


def http_json(port: int, session: str | None, rows: Sequence[Array]) -> Line:
    """The same in JSON."""
    path = f"/v1/sessions/{session}/steps" if session else "/"
    bodies = [dumps({"inputs": row.tolist()}) for row in rows]
    return Line(partial(connect, port), [request("POST", path, body) for body in bodies], responses)


def many(port: int, sessions: Sequence[str] | None, chunks: Array, *, window: int) -> Line:
    """All sessions over one socket: each message carries a chunk of every session, [sessions, T, 88]."""

    def dial() -> socket:
        connection = websocket(port, "/v1/stream", "latch.binary", greets=False)
        if sessions is not None:
            hellos = b"".join(open_frame(session, channel) for channel, session in enumerate(sessions))
            ask(connection, message(hellos, BINARY), frames(ROW), len(sessions))
        return connection

    steps = chunks.shape[1]
    body = b"".join(step_frame(chunk.tobytes(), steps, channel) for channel, chunk in enumerate(chunks))
    take, replies = (messages(b"\1"), 1) if sessions is None else (frames(ROW), len(sessions))
    return Line(dial, [message(body, BINARY)], take, replies=replies, window=window)


def _stream(port: int, session: str | None, subprotocol: str) -> Callable[[], socket]:
    path = f"/v1/sessions/{session}/stream" if session else "/"
    return partial(websocket, port, path, subprotocol, greets=bool(session))
