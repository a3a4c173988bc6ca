"""Liveness, readiness, metrics."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import StoreUnavailable
from tests.service import toys
from tests.service.conftest import Server
from tests.service.servers import until


def test_live_and_ready(server: Server) -> None:
    """A whole repository is ready, with every model and version named."""
    assert server.http.get("/health/live").json() == {"status": "live"}
    for path in ("/health/live", "/health/ready"):
        assert server.http.head(path).status_code == 200
    ready = server.http.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready", "models": {"toy": ["1"], "counter": ["1"], "exploding": ["1"]}, "draining": [], "broken": {},
        "store": None,
    }  # fmt: skip


def test_readiness_names_the_broken_model_and_the_others_serve(start: Callable[..., Server], tmp_path: Path) -> None:
    """A tampered model is degraded, not down: it answers 503 model_broken, its neighbour works."""
    toys.save_leaky(tmp_path)
    folder = toys.save_counter(tmp_path)
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    server = start(models=tmp_path)
    ready = server.http.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert list(ready.json()["broken"]) == ["counter/1"]
    assert "sha256" in ready.json()["broken"]["counter/1"]["error"]
    refused = server.http.post("/v1/sessions", json={"model": "counter"})
    assert (refused.status_code, refused.json()["code"]) == (503, "model_broken")
    server.create("toy")


def test_readiness_names_what_drains_and_stays_up_for_it(start: Callable[..., Server], tmp_path: Path) -> None:
    """A service that only has sessions on a version that goes is ready for these; without any it is not."""
    toys.save_leaky(tmp_path)
    server = start(models=tmp_path, reload_ms=0)
    session = server.create()
    server.http.delete("/v1/models/toy/versions/1?drain=true")
    ready = server.http.get("/health/ready")
    assert (ready.status_code, ready.json()["models"], ready.json()["draining"]) == (200, {}, ["toy/1"])
    server.http.delete(f"/v1/sessions/{session}")
    until(lambda: server.http.get("/health/ready").status_code == 503)
    assert server.http.get("/health/ready").json()["draining"] == []


def test_readiness_tells_of_files_that_changed(start: Callable[..., Server], tmp_path: Path) -> None:
    """Degraded, with the version both live and named: it serves what it was loaded from."""
    folder = toys.save_leaky(tmp_path)
    server = start(models=tmp_path, reload_ms=20)
    toys.rewrite_golden(folder, output__z=None)
    until(lambda: server.http.get("/health/ready").json()["status"] == "degraded")
    ready = server.http.get("/health/ready").json()
    assert (ready["models"], ready["broken"]["toy/1"]["code"]) == ({"toy": ["1"]}, "model_changed")
    server.create()


def test_with_no_model_at_all_it_is_not_ready(start: Callable[..., Server], tmp_path: Path) -> None:
    """503, so that nobody sends traffic; but it lives and says why."""
    (toys.save_leaky(tmp_path) / "manifest.json").write_text(json.dumps({"manifest_version": 1}))
    server = start(models=tmp_path)
    ready = server.http.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert "toy/1" in ready.json()["broken"]
    assert server.http.get("/health/live").status_code == 200


def test_metrics_count_what_happened(start: Callable[..., Server]) -> None:
    """Steps, replays, errors by code, batch sizes and live sessions; never a session id."""
    server = start()
    session = server.create()
    url = f"/v1/sessions/{session}/steps"
    for step in (1, 1, 9):
        server.http.post(url, json={"inputs": [[1, 2, 3]] * 2, "step": step})
    text = server.http.get("/metrics").text
    for line in (
        'latch_steps_total{model="toy",version="1"} 2.0',
        'latch_replays_total{model="toy",version="1"} 1.0',
        'latch_errors_total{code="step_conflict"} 1.0',
        'latch_batch_size_count{model="toy",version="1"} 1.0',
        'latch_run_steps_sum{model="toy",version="1"} 2.0',
        'latch_sessions{model="toy",version="1"} 1.0',
        'latch_queue_depth{model="toy",version="1"} 0.0',
        'latch_sessions_expired_total{model="toy",version="1"} 0.0',
        'latch_errors_total{code="internal"} 0.0',
    ):
        assert line in text, line
    assert session not in text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) > 10
    server.http.delete(f"/v1/sessions/{session}")
    assert 'latch_sessions{model="toy",version="1"} 0.0' in server.http.get("/metrics").text


def test_the_first_page_leads_on(server: Server) -> None:
    """Every address on it answers."""
    for path in list(server.http.get("/").json().values())[1:]:
        assert server.http.get(path).status_code == 200, path


def test_a_service_without_its_store_is_not_ready(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the store cannot be asked, and no longer: a balancer sends the calls to a replica that reaches it."""
    server = start(store_url=f"sqlite:///{tmp_path}/s.db", sweep_interval_ms=10)
    assert server.http.get("/health/ready").status_code == 200

    async def cut() -> None:
        raise StoreUnavailable("the wire is cut")

    monkeypatch.setattr(server.app.state.manager._store, "ping", cut)
    until(lambda: server.http.get("/health/ready").status_code == 503)
    ready = server.http.get("/health/ready").json()
    assert (ready["status"], ready["store"]["error"]) == ("unavailable", "the wire is cut")
    assert server.http.get("/health/live").status_code == 200
    monkeypatch.undo()
    until(lambda: server.http.get("/health/ready").status_code == 200)
    assert server.http.get("/health/ready").json()["store"] is None
