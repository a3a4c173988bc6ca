"""`/v1/models` over real HTTP."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.service import toys
from tests.service.conftest import Server
from tests.service.servers import until

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
        ("toy", {"sequences": [[ROW]], "version": "1"}, 422, "invalid_input"),
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


def test_predict_has_no_version_to_choose(server: Server) -> None:
    """Whoever names one in the query would be answered by another without a word."""
    reply = server.http.post("/v1/models/toy/predict?version=1", json={"sequences": [[ROW]]})
    assert (reply.status_code, reply.json()["path"]) == (422, "query")


def test_a_version_that_arrives_while_serving_is_picked_up(start: Callable[..., Server], tmp_path: Path) -> None:
    """Without a call and without a restart; sessions keep stepping on the version they began on."""
    models = tmp_path / "models"
    toys.save_leaky(models)
    server = start(models=models, reload_ms=20)
    old = server.create()
    toys.save_leaky(tmp_path / "elsewhere", version="2", seed=1).rename(models / "toy" / "2")
    until(lambda: server.http.get("/v1/models/toy").json()["version"] == "2")
    page = server.http.get("/v1/models/toy").json()
    assert (page["versions"], page["status"], page["sessions"]) == (["1", "2"], "live", 0)
    assert server.http.get(f"/v1/sessions/{old}").json()["version"] == "1"
    assert server.http.post(f"/v1/sessions/{old}/steps", json={"inputs": [ROW]}).json()["step"] == 1
    assert server.http.get(f"/v1/sessions/{server.create()}").json()["version"] == "2"


def test_a_version_is_removed_and_loaded_by_calls(start: Callable[..., Server], tmp_path: Path) -> None:
    """204 where it is gone; 409 where it has sessions; 202 where it drains for them; 200 where it loads."""
    toys.save_leaky(tmp_path)
    toys.save_counter(tmp_path)
    server = start(models=tmp_path, reload_ms=0)
    url = "/v1/models/toy/versions/1"
    assert server.http.delete(url).status_code == 204
    assert (server.http.delete(url).status_code, server.http.get(url).status_code) == (404, 404)
    assert [model["name"] for model in server.http.get("/v1/models").json()["models"]] == ["counter"]
    loaded = server.http.post(url + "/load")
    assert (loaded.status_code, loaded.json()["status"]) == (200, "live")
    session = server.create()
    refused = server.http.delete(url)
    assert (refused.status_code, refused.json()["code"], refused.json()["sessions"]) == (409, "model_in_use", 1)
    for _ in range(2):
        drained = server.http.delete(url, params={"drain": "true"})
        page = drained.json()
        assert (drained.status_code, page["status"], page["sessions"], page["versions"]) == (202, "draining", 1, [])
    assert server.http.get(url).json() == page
    late = server.http.post("/v1/sessions", json={"model": "toy"})
    assert (late.status_code, late.json()["code"]) == (409, "model_draining")
    again = server.http.put(f"/v1/sessions/{session}", json={"model": "toy"})
    assert (again.status_code, again.json()["id"]) == (200, session)
    assert server.http.put(f"/v1/sessions/{session}", json={"model": "nope"}).status_code == 409
    assert server.http.post(f"/v1/sessions/{session}/steps", json={"inputs": [ROW]}).json()["step"] == 1
    server.http.delete(f"/v1/sessions/{session}")
    until(lambda: server.http.get(url).status_code == 404)
    assert server.http.post("/v1/models/toy/versions/9/load").json()["code"] == "model_not_found"
    assert server.http.get("/v1/models/toy").status_code == 404


def test_a_version_that_a_call_cannot_load_says_why(start: Callable[..., Server], tmp_path: Path) -> None:
    """503 model_broken with the reason, and the good version serves on."""
    toys.save_leaky(tmp_path)
    server = start(models=tmp_path, reload_ms=0)
    toys.rewrite_golden(toys.save_leaky(tmp_path, version="2"), output__z=None)
    reply = server.http.post("/v1/models/toy/versions/2/load")
    assert (reply.status_code, reply.json()["code"], reply.json()["reason"]) == (503, "model_broken", "golden_mismatch")
    assert server.http.get("/v1/models/toy").json()["version"] == "1"


def test_versions_come_and_go_under_load(start: Callable[..., Server], tmp_path: Path) -> None:
    """A good version, a bad one, a removal: beside them a session steps on, and gets the bits that it gets alone."""
    models = tmp_path / "models"
    toys.save_leaky(models)
    server = start(models=models, reload_ms=20)
    steps = 400
    alone = server.http.post(f"/v1/sessions/{server.create()}/steps", json={"inputs": [ROW] * steps}).json()
    session, rows = server.create(), []

    def stream() -> None:
        with server.socket(session) as socket:
            socket.recv()
            while len(rows) < steps and not ended.is_set():
                socket.send(json.dumps({"inputs": [ROW], "step": len(rows) + 1}))
                rows.append(json.loads(socket.recv())["outputs"]["y"][0])
                halfway.release()

    ended, halfway = threading.Event(), threading.Semaphore(0)
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream)
        try:
            for version, spoiled in (("2", False), ("3", True)):
                for _ in range(50):
                    assert halfway.acquire(timeout=20)
                folder = toys.save_leaky(tmp_path / "elsewhere", version=version, seed=int(version))
                if spoiled:
                    toys.rewrite_golden(folder, output__z=None)
                folder.rename(models / "toy" / version)
                until(partial(settled, server, version))
            assert server.http.get("/v1/models/toy").json()["version"] == "2"
            assert server.http.delete("/v1/models/toy/versions/2").status_code == 204
            assert server.http.get("/v1/models/toy").json()["version"] == "1"
            streaming.result(60)
        finally:
            ended.set()
    assert rows == alone["outputs"]["y"]
    assert list(server.http.get("/health/ready").json()["broken"]) == ["toy/3"]


def settled(server: Server, version: str) -> bool:
    """Whether a version of `toy` is live, or known to be broken."""
    ready = server.http.get("/health/ready").json()
    return version in ready["models"]["toy"] or f"toy/{version}" in ready["broken"]
