"""What a peer is to the driver: packages to install, a command to start, and doors to go through."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "chorales-gru" / "1" / "model.onnx"

# A command, and variables on top of ours.
Launch = tuple[Sequence[object], Mapping[str, object]]


@dataclass(frozen=True)
class Door:
    """A protocol of a peer; sessions are whole numbers from 1.

    Attributes:
        request: session, the 88 numbers, whether they are the session's first -> bytes to send.
        reply: body of the answer -> 88 numbers.
        opening: session -> requests that open it, each with an answer; a WebSocket's upgrade is the last.
        greeted: whether the server speaks first.
    """

    name: str
    request: Callable[[int, np.ndarray, bool], bytes]
    reply: Callable[[bytes], np.ndarray]
    opening: Callable[[int], Sequence[bytes]] = lambda session: ()
    greeted: bool = False


@dataclass(frozen=True)
class Place:
    """Where a server runs: its environment's folder, an empty folder to work in, a port, how many cores it has."""

    environment: Path
    folder: Path
    port: int
    cores: int

    def copy(self, ours: str, theirs: str) -> None:
        """Puts our file, under the name that the peer wants, into the working folder, and the step beside it."""
        target = self.folder / theirs
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((HERE / ours).read_text())
        target.with_name("cell.py").write_text((HERE / "cell.py").read_text())


@dataclass(frozen=True)
class Peer:
    """A server.

    Attributes:
        requirements: of its environment, pinned, its own package first; none for Latch, which is served from ours.
        launch: lays out files and says how to start.
        ready: the path that answers 200 when it is.
        settle, warm: seconds to wait after that, and of load before any counts.
    """

    name: str
    requirements: Sequence[str]
    launch: Callable[[Place], Launch]
    ready: str
    doors: Sequence[Door]
    settle: float = 0.0
    warm: float = 3.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def dumps(value: object) -> bytes:
    """JSON; float32 as the shortest number that reads back as the same bits."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def loads(data: bytes, *path: str | int) -> np.ndarray:
    """The numbers at a path of a JSON value."""
    value = orjson.loads(data)
    for key in path:
        value = value[key]
    return np.array(value, np.float32).ravel()


def floats(data: bytes) -> np.ndarray:
    """The last 88 floats of a packed reply."""
    return np.frombuffer(data[-352:], np.float32)
