"""BentoML: one worker that holds the states, with a batched HTTP API and a FastAPI WebSocket mounted beside it."""

import bentoml
import numpy as np
import orjson
from cell import Cell
from fastapi import FastAPI, WebSocket
from pydantic import BaseModel

app = FastAPI()


class Step(BaseModel):
    """A session's next input."""

    session: str
    x: list[float]


@bentoml.service(workers=1, traffic={"timeout": 30, "max_concurrency": 1000}, metrics={"enabled": False})
@bentoml.asgi_app(app, path="/ws")
class Gru:
    """The service; its only worker has all sessions."""

    def __init__(self) -> None:
        self._cell = Cell()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def step(self, steps: list[Step]) -> list[list[float]]:
        """One step of every session in the batch."""
        x = np.array([step.x for step in steps], np.float32)
        return self._cell.step([step.session for step in steps], x).tolist()

    @app.websocket("/stream")
    async def stream(self, websocket: WebSocket) -> None:
        """A session for as long as its socket; one step at a time, because adaptive batching is for APIs only."""
        await websocket.accept()
        session = object()
        while (received := await websocket.receive())["type"] != "websocket.disconnect":
            if text := received.get("text"):
                y = self._cell.step([session], np.array([orjson.loads(text)], np.float32))[0]
                await websocket.send_text(orjson.dumps(y, option=orjson.OPT_SERIALIZE_NUMPY).decode())
            else:
                y = self._cell.step([session], np.frombuffer(received["bytes"], np.float32)[None])
                await websocket.send_bytes(y.tobytes())
