"""Operations: liveness, readiness, metrics, and a first page that says where to look."""

import asyncio
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.registry import Collector
from pydantic import BaseModel

from service.routers import Manager

router = APIRouter(tags=["operations"])


class _One(Collector):
    """A registry of one metric."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        return (self._family,)


class Readiness(BaseModel):
    """`ready`: every model loaded; `degraded`: some did; `unavailable` (503): none did, or the session store cannot be
    asked (`store` says why); `draining` (503): the service stops. `broken` says why; of the models, what is `draining`
    takes no new sessions and goes when its last one ends.
    """

    status: str
    models: dict[str, list[str]]
    draining: list[str]
    broken: dict[str, dict[str, Any]]
    store: dict[str, Any] | None


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", responses={503: {"model": Readiness}})
async def ready(response: Response, manager: Manager) -> Readiness:
    """Whether models can be served, and which cannot."""
    engines = manager.engines
    models = {name: [engine.key.version for engine in engines.live(name)] for name in engines.names()}
    draining = [str(engine.key) for engine in engines.draining()]
    broken = {str(key): error.to_dict() for key, error in engines.broken.items()}
    status = "degraded" if broken else "ready"
    if manager.is_draining:
        response.status_code, status = 503, "draining"
    elif manager.store_error is not None or not (models or draining):  # the sessions of a draining version need it
        response.status_code, status = 503, "unavailable"
    store = None if manager.store_error is None else manager.store_error.to_dict()
    return Readiness(status=status, models=models, draining=draining, broken=broken, store=store)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    written: list[bytes] = []
    for family in request.app.state.metrics.registry.collect():
        written.append(generate_latest(_One(family)))
        await asyncio.sleep(0)  # a histogram of all models takes a millisecond or two, and there are many
    return Response(b"".join(written), media_type=CONTENT_TYPE_LATEST)


@router.get("/")
async def index() -> dict[str, str]:
    """Where to look."""
    return {
        "service": "latch",
        "models": "/v1/models",
        "sessions": "/v1/sessions",
        "docs": "/docs",
        "ready": "/health/ready",
        "metrics": "/metrics",
    }
