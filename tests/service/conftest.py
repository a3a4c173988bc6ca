"""What the service's tests share: toy models on disk, and a real server on a free port."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from websockets.sync.client import ClientConnection, connect

from service.__main__ import build
from service.app import engine_options
from service.metrics import Metrics
from service.settings import load_settings
from tests.service import toys

OPTIONS = engine_options(load_settings())


@pytest.fixture
def anyio_backend() -> str:
    """The service runs on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of toys; tests that break models make their own."""
    root = tmp_path_factory.mktemp("models")
    toys.save_leaky(root)
    toys.save_counter(root)
    toys.save_exploding(root)
    return root


@pytest.fixture
def metrics() -> Metrics:
    """Instruments on a registry of their own."""
    return Metrics(CollectorRegistry())


@dataclass
class Server:
    """A running service: its address, a client, and the parts inside."""

    url: str
    http: httpx.Client
    app: Any
    uvicorn: Any

    def socket(self, session: str, **options: Any) -> ClientConnection:
        """A WebSocket on a session, its hello not yet read."""
        address = self.url.replace("http", "ws") + f"/v1/sessions/{session}/stream"
        return connect(address, **({"subprotocols": ["latch.json"]} | options))

    def create(self, model: str = "toy", **body: Any) -> str:
        """A new session's id."""
        reply = self.http.post("/v1/sessions", json={"model": model, **body})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])


@contextmanager
def serving(models: Path, **settings: Any) -> Iterator[Server]:
    """Runs `latch serve` in a thread, on a free port, with real sockets."""
    server = build(load_settings(models=models, port=0, **settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended before it started"
        time.sleep(0.005)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Server(url, client, server.config.app.app, server)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    """One service with the toys for a whole module."""
    with serving(repository) as running:
        yield running


@pytest.fixture
def start(repository: Path) -> Iterator[Callable[..., Server]]:
    """Starts services with settings of the test's own."""
    with ExitStack() as stack:
        yield lambda models=repository, **settings: stack.enter_context(serving(models, **settings))
