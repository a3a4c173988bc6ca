"""The app as a whole: one shape for every error, and an OpenAPI page that knows every call."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service import app
from service.app import create_app
from service.errors import InferenceFailed, ManifestInvalid, SettingsInvalid
from service.settings import load_settings
from tests.service.conftest import Server, serving


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/sessions/a/b/c", 404, "not_found"),
        ("PUT", "/health/live", 405, "method_not_allowed"),
        ("POST", "/v1/sessions/", 404, "not_found"),
        ("GET", "/v1/sessions?limit=0", 422, "invalid_input"),
        ("GET", "/v1/sessions?limit=many", 422, "invalid_input"),
    ],
)
def test_the_framework_errors_have_our_shape(server: Server, method: str, path: str, status: int, code: str) -> None:
    """FastAPI's own 404, 405 and 422 are overridden."""
    reply = server.http.request(method, path)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert set(reply.json()) >= {"error", "code", "retryable"}
    assert isinstance(reply.json()["error"], str)
    assert ("allow" in reply.headers) == (status == 405)


def test_stopping_answers_who_still_waits(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that outlasts the patience of a stopping service is told 503 draining, in JSON, without a traceback."""
    server = start(drain_ms=100)
    session = server.create()
    entered, go = threading.Event(), threading.Event()
    runner = server.app.state.manager.engines.get("toy")._runner

    def hold(*_: Any) -> Any:
        entered.set()
        go.wait(20)
        raise InferenceFailed("too late")

    monkeypatch.setattr(runner, "is_short", lambda rows, steps: False)
    monkeypatch.setattr(runner, "run", hold)
    with ThreadPoolExecutor() as pool:
        body = {"inputs": [[1, 2, 3]]}
        waiting = pool.submit(server.http.post, f"/v1/sessions/{session}/steps", json=body)
        assert entered.wait(20)
        server.uvicorn.should_exit = True
        reply = waiting.result(20)
        go.set()
    assert (reply.status_code, reply.json()["code"], reply.json()["retryable"]) == (503, "draining", True)
    assert "Traceback" not in caplog.text


@pytest.mark.anyio
async def test_a_store_that_does_not_answer_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for it was told; the process ends."""
    monkeypatch.setattr(app, "_CLOSE_SECONDS", 0.01)
    never = asyncio.Event()
    await app._in_time(never.wait)  # type: ignore[arg-type]


def test_a_fault_of_ours_is_500_without_its_inside(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets the shape, the log gets the traceback."""
    server = start()
    monkeypatch.setattr(server.app.state.manager, "page", None)
    reply = server.http.get("/v1/sessions")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal")
    assert "NoneType" not in reply.text
    assert "NoneType" in caplog.text


def test_openapi_documents_every_call(server: Server) -> None:
    """All routes are in it, and those that decode their own bytes document their bodies."""
    paths = server.http.get("/openapi.json").json()["paths"]
    assert set(paths) >= {
        "/v1/models", "/v1/models/{model}", "/v1/models/{model}/versions/{version}", "/v1/models/{model}/predict",
        "/v1/sessions", "/v1/sessions/{session_id}", "/v1/sessions/{session_id}/steps",
        "/v1/sessions/{session_id}/reset", "/health/live", "/health/ready", "/metrics",
    }  # fmt: skip
    for path in ("/v1/sessions/{session_id}/steps", "/v1/models/{model}/predict"):
        assert "application/json" in paths[path]["post"]["requestBody"]["content"]
        assert "$ref" in paths[path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    for methods in paths.values():
        for call in methods.values():
            assert call.get("description"), call
            assert call["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorInfo")
            assert "422" not in call["responses"]
    assert "/v1/sessions/{id}/stream" in server.http.get("/openapi.json").json()["info"]["description"]


def test_the_examples_in_openapi_can_be_sent_as_they_are() -> None:
    """Every call that takes JSON has one, for the shipped models: what the page of all calls begins with."""
    with serving(Path(__file__).parents[2] / "models") as server:
        calls = [
            (method, path, call["requestBody"]["content"]["application/json"]["schema"])
            for path, methods in server.http.get("/openapi.json").json()["paths"].items()
            for method, call in methods.items()
            if "application/json" in call.get("requestBody", {}).get("content", {})
        ]
        schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
        order = ("put", "steps", "rollback")  # the session is made, and then moved
        calls.sort(key=lambda call: next((i for i, word in enumerate(order) if word in call[0] + call[1]), len(order)))
        assert len(calls) == 6
        for method, path, schema in calls:
            named = schema.get("$ref") or schema.get("anyOf", [{}])[0].get("$ref")
            body = (schemas[named.rpartition("/")[2]] if named else schema)["examples"][0]
            path = path.format(session_id="motor-7", model="sensors")
            reply = server.http.request(method, path, json=body)
            assert reply.status_code in (200, 201), (path, reply.text)


def test_what_cannot_start_says_why(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown store, a missing repository and a missing device are typed errors, before anything listens."""
    with pytest.raises(SettingsInvalid, match="postgres"):
        create_app(load_settings(models=tmp_path, store_url="postgres://x"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SettingsInvalid, match="no CUDA provider"):
        create_app(load_settings(models=repository, device="cuda"))
    url = f"sqlite:///{tmp_path}/sessions.db"
    for _ in range(2):  # and hold nothing: the second is told the same
        with pytest.raises(ManifestInvalid, match="not a folder"):
            create_app(load_settings(models=tmp_path / "nope", store_url=url))
