"""`/v1/models` over real HTTP."""

import json
from typing import Any

import pytest

from tests.service.conftest import Server

ROW = [1.0, 2.0, 3.0]


def test_models_tell_what_to_send_and_what_comes_back(server: Server) -> None:
    """Tensors, state bytes and where the model runs, in the list and alone, by default and by version."""
    models = {m["name"]: m for m in server.http.get("/v1/models").json()["models"]}
    assert set(models) == {"toy", "counter", "exploding"}
    toy = models["toy"]
    assert toy["input"]["shape"] == [3]
    assert [(t["name"], t["role"]) for t in toy["outputs"]] == [("y", "prediction"), ("z", "gate")]
    assert (toy["state"][0]["name"], toy["state_bytes"], toy["device"]) == ("h", 16, "cpu")
    assert (toy["bit_exact"], toy["chunks"]) == (True, "scan")
    assert server.http.get("/v1/models/toy").json() == toy
    assert server.http.get("/v1/models/toy/versions/1").json() == toy


@pytest.mark.parametrize("path", ["/nope", "/nope/versions/1", "/toy/versions/9"])
def test_an_unknown_model_is_404(server: Server, path: str) -> None:
    """With the names that there are."""
    reply = server.http.get("/v1/models" + path)
    assert (reply.status_code, reply.json()["code"]) == (404, "model_not_found")
    assert "counter" in reply.json()["error"]


def test_predict_equals_a_session(server: Server) -> None:
    """Sequences of different lengths give the bits of a session's steps."""
    session = server.create()
    url = f"/v1/sessions/{session}/steps"
    rows = [server.http.post(url, json={"inputs": [ROW]}).json()["outputs"]["y"][0] for _ in range(3)]
    body = {"sequences": [[ROW] * 3, [ROW]], "outputs": ["y", "z"]}
    reply = server.http.post("/v1/models/toy/predict", json=body)
    assert reply.status_code == 200
    long, short = reply.json()["sequences"]
    assert long["outputs"]["y"] == rows
    assert short["outputs"]["y"] == rows[:1]
    assert len(long["outputs"]["z"]) == 3


@pytest.mark.parametrize(
    ("model", "body", "status", "code"),
    [
        ("nope", {"sequences": [[ROW]]}, 404, "model_not_found"),
        ("toy", {}, 422, "invalid_input"),
        ("toy", {"sequences": []}, 422, "invalid_input"),
        ("toy", {"sequences": [[ROW], [[1, 2]]]}, 422, "invalid_input"),
        ("toy", {"sequences": [[ROW] * 10_000] * 2}, 413, "payload_too_large"),
        ("counter", {"sequences": [[1], [99]]}, 500, "inference_failed"),
    ],
)
def test_a_bad_predict_is_typed(server: Server, model: str, body: Any, status: int, code: str) -> None:
    """Each mistake has its code; no slot stays taken."""
    before = [len(engine.slab) for engine in server.app.state.manager.engines]
    reply = server.http.post(f"/v1/models/{model}/predict", json=json.loads(json.dumps(body)))
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert [len(engine.slab) for engine in server.app.state.manager.engines] == before
