"""The baselines: servers that only send back what they are sent, on the uvicorn settings of the service.

Rule: each is the fastest ASGI app of its door; `-calls` has it by plain calls, beneath ASGI, as the service has it. The
settings are those of `latch serve`, taken from the same function.
"""

import sys
from collections.abc import Callable
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.wire import JSON, OCTETS
from service.server import calm_collector, configure, listen
from service.settings import load_settings


async def websocket_binary(scope: Any, receive: Any, send: Any) -> None:
    """Bytes over a WebSocket."""
    await receive()
    await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][0]})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message["bytes"]})


async def websocket_json(scope: Any, receive: Any, send: Any) -> None:
    """JSON over a WebSocket, read and written."""
    await receive()
    await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][0]})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": orjson.dumps(orjson.loads(message["text"])).decode()})


def _by_calls(change: Callable[[Any], bytes], *, text: bool) -> Any:
    """A WebSocket whose messages come and go by `server.py`'s plain calls."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][0]})
        wire = scope["extensions"]["latch.wire"]
        wire.on_message = lambda message: wire.write(change(message), text=text)
        await receive()

    return app


def _http(change: Callable[[bytes], bytes] | None, content_type: str) -> Any:
    kind = (b"content-type", content_type.encode())

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message["body"]
        if message["more_body"]:
            parts = [body]
            while message["more_body"]:
                message = await receive()
                parts.append(message["body"])
            body = b"".join(parts)
        if change is not None:
            body = change(body)
        headers = [kind, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


class Steps(BaseModel):
    """A request to step, as pydantic reads and writes it."""

    inputs: list[list[float]]


fastapi = FastAPI()


@fastapi.post("/")
async def echo(body: Steps) -> Steps:
    """What most people would write."""
    return body


ECHOES: dict[str, Any] = {
    "websocket-binary": websocket_binary,
    "websocket-json": websocket_json,
    "websocket-binary-calls": _by_calls(bytes, text=False),
    "websocket-json-calls": _by_calls(lambda message: orjson.dumps(orjson.loads(message)), text=True),
    "http-binary": _http(None, OCTETS),
    "http-json": _http(lambda body: orjson.dumps(orjson.loads(body)), JSON),
    "http-fastapi": fastapi,
}


def main(name: str) -> None:
    """Serves one of the echoes on a free port until it is told to stop."""
    listener = listen("127.0.0.1", 0)
    limit = load_settings().max_body_bytes
    config = configure(ECHOES[name], host="127.0.0.1", port=0, max_message_bytes=limit)
    config.lifespan = "off"
    config.timeout_graceful_shutdown = 5
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)  # noqa: T201 - the address is its output
    calm_collector()
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
