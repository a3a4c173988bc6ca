"""`create_app(settings)`: the composition root, where settings become parts and parts become an app.

Rule: everything is put together here and nowhere else; one handler turns every error into the one JSON shape.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import fields
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.drain import Drain
from service.engine import EngineOptions, load_engine, load_engines
from service.errors import (
    Internal,
    InvalidInput,
    LatchError,
    Malformed,
    MethodNotAllowed,
    NotFound,
    StoreUnavailable,
    by_code,
)
from service.ledger import Ledger
from service.metrics import Metrics
from service.registry import load_all, stamps
from service.repository import Repository
from service.routers import ERRORS, error_response, models, ops, sessions, states, stream
from service.routers.front import FrontDoor
from service.routers.sockets import Shared
from service.routers.steps import StepDoor
from service.routers.stream import StreamDoor
from service.sessions import IdleLimits, SessionManager
from service.settings import Settings
from service.stores import open_store
from service.wire import frames

log = logging.getLogger(__name__)

DESCRIPTION = f"""
Beside these calls there are WebSockets, which OpenAPI cannot describe:

```text
{stream.__doc__}```

```text
{frames.__doc__}```
"""

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_CLOSE_SECONDS = 2.0


def create_app(settings: Settings) -> FrontDoor:
    """Loads the models and puts the service together; its tasks start with the app's lifespan.

    Raises:
        SettingsInvalid: no such store or device.
        ManifestInvalid: the model repository is not a folder. A single broken model is only reported, in readiness.
    """
    metrics = Metrics(_registry())
    seen, found = stamps(settings.models), load_all(settings.models)  # no folder: told before the store is held
    store = open_store(settings.store_url, keep_steps=settings.keep_steps, max_expired_ids=settings.max_expired_ids)
    ledger = Ledger(store, metrics) if store.is_durable or settings.keep_steps else None
    options = engine_options(settings)
    engines = load_engines(found.found, found.broken, options, metrics, ledger=ledger)
    for engine in engines:
        log.info("model %s on %s", engine.key, engine.device)
    for code in by_code():
        metrics.errors.labels(code)  # from 0 on: a counter that begins at 1 shows no increase
    for key, error in engines.broken.items():
        log.error("model %s is not served: %s", key, error)
    repository = Repository(
        settings.models,
        engines,
        seen,
        partial(load_engine, options=options, metrics=metrics, ledger=ledger),
        metrics,
        interval=settings.reload_ms / 1000,
    )
    manager = SessionManager(
        engines,
        store,
        ledger=ledger,
        idle=IdleLimits(settings.idle_ttl_ms / 1000, settings.min_idle_ttl_ms / 1000, settings.max_idle_ttl_ms / 1000),
        metrics=metrics,
        sweep_interval=settings.sweep_interval_ms / 1000,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_in_time, store.close)
            if ledger is not None:
                stack.push_async_callback(_in_time, ledger.close)
                ledger.start()
            repository.start()
            stack.push_async_callback(repository.close)
            stack.push_async_callback(_in_time, manager.tell_uses)
            sweeper = asyncio.create_task(manager.serve(), name="sweeper")
            stack.push_async_callback(_ended, sweeper)
            yield

    app = FastAPI(
        title="Latch",
        summary="Serving models that remember: one hidden state per session.",
        description=DESCRIPTION,
        version=version("latch"),
        lifespan=lifespan,
        redirect_slashes=False,
        responses=ERRORS,
    )
    app.state.manager = manager
    app.state.repository = repository
    app.state.metrics = metrics
    app.state.max_body_bytes = settings.max_body_bytes
    app.state.steps = StepDoor(manager, metrics, max_body_bytes=settings.max_body_bytes, max_steps=settings.max_steps)
    for router in (models.router, sessions.router, sessions.steps, states.router, states.snapshots, ops.router):
        app.include_router(router)
    for kind in (LatchError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    sockets = Shared(
        manager,
        metrics,
        max_waiting=settings.max_session_queue,
        max_waiting_many=settings.max_socket_queue,
        max_unsent_bytes=settings.max_body_bytes,
        max_steps=settings.max_steps,
        slow_reader=settings.slow_reader_ms / 1000,
    )
    origins = {origin.strip().rstrip("/") for origin in settings.origins.split(",")} - {""}
    front = FrontDoor(app, app.state.steps, StreamDoor(sockets), origins)
    app.state.drain = Drain(manager, sockets, front)
    return front


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancels it, and waits until it has put back what it could not finish."""
    task.cancel()
    await asyncio.wait([task])


async def _in_time(close: Callable[[], Awaitable[None]]) -> None:
    """Whoever waited for a store that does not answer was told; the process does not wait for it, too."""
    with suppress(TimeoutError, StoreUnavailable):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await close()


async def _on_error(request: Request, error: Exception) -> Response:
    """Every failure of an HTTP call, as the one shape that all doors share."""
    typed = _typed(request, error)
    request.app.state.metrics.errors.labels(typed.code).inc()
    response = error_response(typed)
    if isinstance(typed, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(filter(partial(_takes, request), METHODS))
    return response


def _takes(request: Request, method: str) -> bool:
    """Whether a route at the address takes that method; the framework's own 405 names those of the first one."""
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


def _typed(request: Request, error: Exception) -> LatchError:
    if isinstance(error, LatchError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return Malformed(f"the body is not JSON: {first['ctx']['error']}")
        where, *rest = first["loc"]
        path = ("$" if where == "body" else str(where)) + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest
        )
        return InvalidInput(f"{first['msg']} at {path}", path=path)
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            return MethodNotAllowed(f"{what}: this address takes other methods; see /docs")
        if error.status_code == 404:
            return NotFound(f"{what}: no such address; see /docs")
        if error.status_code < 500:
            return Malformed(str(error.detail))
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return Internal("the service failed on this call; its log says why")


def engine_options(settings: Settings) -> EngineOptions:
    """The part of the settings that every engine is made with."""
    return EngineOptions(**settings.model_dump(include={field.name for field in fields(EngineOptions)}))


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
