"""`docker compose --profile scale up --scale service=3`, for real: sessions belong to no replica."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from tests.packaging.deployments import DOCKER, Deployment, deployment, run

REPLICAS = 3
SCALE = ("--scale", f"service={REPLICAS}")
ROWS = np.random.default_rng(7).normal(20, 5, (24, 12, 5)).round(3)  # [session, T, I]

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def latch(engine: None) -> Iterator[Deployment]:
    """Three replicas behind HAProxy, with Redis; taken down again whatever happens."""
    latch = deployment("scale", "--profile", "scale")
    try:
        latch.compose("up", "--detach", "--build", *SCALE)
        for container in latch.containers("service"):
            latch.wait_until_healthy(container)
        yield latch
    finally:
        latch.compose("down", "--timeout", "2", "--volumes")


@pytest.fixture
def client(latch: Deployment) -> Iterator[httpx.Client]:
    """HTTP through HAProxy's published port."""
    with httpx.Client(base_url=f"http://127.0.0.1:{latch.port}", timeout=30, trust_env=False) as http:
        yield http


def call(client: httpx.Client, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An answered call, sent again for as long as it may be."""
    deadline = time.monotonic() + 60
    while True:
        try:
            answer = client.request(method, path, json=body)
        except httpx.TransportError as error:
            problem = repr(error)
        else:
            if answer.is_success:
                return answer.json()
            problem = answer.text
            assert answer.json()["retryable"], problem
        assert time.monotonic() < deadline, problem
        time.sleep(0.1)


def advance(client: httpx.Client, sessions: list[str], first: int, last: int) -> None:
    """Steps `first` to `last` of every session, one numbered request a step."""
    for step in range(first, last + 1):
        for session, rows in zip(sessions, ROWS, strict=True):
            body = {"inputs": [rows[step - 1].tolist()], "step": step}
            assert call(client, "POST", f"/v1/sessions/{session}/steps", body)["step"] == step


def steps_of(container: str) -> float:
    """Steps that a replica has committed since it started, as its own /metrics say."""
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    text = run(DOCKER, "exec", container, "python", "-c", ask)
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("latch_steps_total"))


def uninterrupted(client: httpx.Client, rows: np.ndarray[Any, Any]) -> list[list[float]]:
    """The outputs of a new session that gets all rows in one request."""
    session = call(client, "POST", "/v1/sessions", {"model": "sensors"})["id"]
    return call(client, "POST", f"/v1/sessions/{session}/steps", {"inputs": rows.tolist()})["outputs"]["y"]


def assert_whole(client: httpx.Client, sessions: list[str]) -> None:
    """The last step of each session gives what it gives uninterrupted, bit for bit."""
    for session, rows in zip(sessions, ROWS, strict=True):
        body = {"inputs": [rows[-1].tolist()], "step": len(rows)}
        last = call(client, "POST", f"/v1/sessions/{session}/steps", body)
        assert last["outputs"]["y"][0] == uninterrupted(client, rows)[-1], session


@pytest.fixture
def sessions(client: httpx.Client) -> list[str]:
    """New ones, an id for each of `ROWS`."""
    return [call(client, "POST", "/v1/sessions", {"model": "sensors"})["id"] for _ in ROWS]


def test_sessions_survive_the_kill_of_a_replica(latch: Deployment, client: httpx.Client, sessions: list[str]) -> None:
    """The steps of a killed replica's sessions go on at the others, by number and bit for bit."""
    advance(client, sessions, 1, 5)
    replicas = latch.containers("service")
    assert len(replicas) == REPLICAS
    assert all(steps_of(container) > 0 for container in replicas)
    run(DOCKER, "kill", replicas[0])
    try:
        advance(client, sessions, 6, len(ROWS[0]) - 1)
        assert_whole(client, sessions)
    finally:
        run(DOCKER, "start", replicas[0])
        latch.wait_until_healthy(replicas[0])


def test_a_socket_of_a_killed_replica_goes_on_at_another(
    latch: Deployment, client: httpx.Client, sessions: list[str]
) -> None:
    """The socket breaks; connected again, the hello tells the step that was last answered."""
    url = f"ws://127.0.0.1:{latch.port}/v1/sessions/{sessions[0]}/stream"
    replicas = latch.containers("service")
    before = {container: steps_of(container) for container in replicas}
    with connect(url, proxy=None) as stream:
        assert json.loads(stream.recv(timeout=30))["step"] == 0
        for row in ROWS[0, :4].tolist():
            stream.send(json.dumps({"inputs": [row]}))
            stream.recv(timeout=30)
        (busy,) = [container for container in replicas if steps_of(container) > before[container]]
        run(DOCKER, "kill", busy)
        with pytest.raises(ConnectionClosedError):
            stream.recv(timeout=30)
    try:
        with connect(url, proxy=None, open_timeout=60) as stream:
            assert json.loads(stream.recv(timeout=30))["step"] == 4
            stream.send(json.dumps({"inputs": ROWS[0, 4:].tolist(), "step": 5}))
            rest = json.loads(stream.recv(timeout=30))
    finally:
        run(DOCKER, "start", busy)
        latch.wait_until_healthy(busy)
    assert rest["outputs"]["y"] == uninterrupted(client, ROWS[0])[4:]


def test_random_routing_gives_the_same_bits(latch: Deployment, client: httpx.Client, sessions: list[str]) -> None:
    """ROUTING=random: a session's steps go to any replica, and nothing but the time that they take changes."""
    at_random = replace(latch, environment=latch.environment | {"ROUTING": "random"})
    at_random.compose("up", "--detach", *SCALE, "haproxy")
    try:
        before = [steps_of(container) for container in latch.containers("service")]
        advance(client, sessions, 1, len(ROWS[0]) - 1)
        assert_whole(client, sessions)
        after = [steps_of(container) for container in latch.containers("service")]
        assert all(late > early for early, late in zip(before, after, strict=True))
    finally:
        latch.compose("up", "--detach", *SCALE, "haproxy")


def test_sessions_survive_the_kill_of_everything(latch: Deployment, client: httpx.Client, sessions: list[str]) -> None:
    """Every container killed at once, Redis too: started again, each session goes on after its last answered step."""
    advance(client, sessions, 1, len(ROWS[0]) - 1)
    latch.compose("kill")
    latch.compose("up", "--detach", *SCALE)
    assert_whole(client, sessions)
