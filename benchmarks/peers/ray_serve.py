"""Ray Serve: one replica with all states behind its proxy; a FastAPI ingress with a WebSocket and a POST."""

import argparse

import numpy as np
import orjson
import ray
from cell import Cell
from fastapi import FastAPI, Request, Response, WebSocket
from ray import serve

app = FastAPI()


def dumps(y: np.ndarray) -> bytes:
    """JSON of 88 numbers."""
    return orjson.dumps(y, option=orjson.OPT_SERIALIZE_NUMPY)


# One replica: the machine lends the server one core, and all states are then in one place.
@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
@serve.ingress(app)
class Gru:
    """The replica; `max_ongoing_requests` counts open sockets too."""

    def __init__(self) -> None:
        self._cell = Cell()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0)
    async def _step(self, steps: list[tuple[object, np.ndarray]]) -> list[np.ndarray]:
        sessions, frames = zip(*steps, strict=True)
        return list(self._cell.step(sessions, np.stack(frames)))

    @app.get("/ready")
    async def ready(self) -> str:
        """Up."""
        return "ready"

    @app.post("/sessions/{session}/step")
    async def post(self, session: str, request: Request) -> Response:
        """A step over HTTP; the body is the 88 numbers."""
        x = np.array(orjson.loads(await request.body()), np.float32)
        return Response(dumps(await self._step((session, x))), media_type="application/json")

    @app.websocket("/stream")
    async def stream(self, websocket: WebSocket) -> None:
        """A session for as long as its socket; text is answered with JSON, bytes with packed floats."""
        await websocket.accept()
        session = object()
        while (received := await websocket.receive())["type"] != "websocket.disconnect":
            if text := received.get("text"):
                y = await self._step((session, np.array(orjson.loads(text), np.float32)))
                await websocket.send_text(dumps(y).decode())
            else:
                y = await self._step((session, np.frombuffer(received["bytes"], np.float32)))
                await websocket.send_bytes(y.tobytes())


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True)
    options = parser.parse_args()
    ray.init(num_cpus=options.cpus, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(Gru.bind(), blocking=True)


if __name__ == "__main__":
    main()
