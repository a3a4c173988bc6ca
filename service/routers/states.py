"""`/v1/sessions/{id}/...`: fork, rollback, reset, and where a session stands as bytes, out and in."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.routers import BYTES, LOCATION, PACKED, Body, ControlRoute, Manager, PackedRoute, SessionId, documented
from service.routers.sessions import Metadata, SessionInfo, session_info

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["sessions"], route_class=ControlRoute)
snapshots = APIRouter(prefix="/v1/sessions/{session_id}", tags=["sessions"], route_class=PackedRoute)

NewIdleTtl = Annotated[
    int | None, Query(ge=1, le=10**12, description="Of a session that this makes; the service's default when absent")
]


class Fork(BaseModel):
    """What the new session has of its own."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"id": "motor-7-what-if"}]})

    id: str | None = Field(default=None, description="The server's choice when absent")
    idle_ttl_ms: int | None = Field(default=None, ge=1, le=10**12, description="That of the session when absent")
    metadata: Metadata | None = Field(default=None, max_length=16, description="Those of the session when absent")


class Rollback(BaseModel):
    """Where to return to."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"step": 1}]})

    step: int = Field(ge=0, description="A step that one of the last requests ended at; LATCH_KEEP_STEPS are kept")


@router.post("/fork", status_code=201, responses={201: {"headers": LOCATION}})
async def fork(session_id: SessionId, manager: Manager, response: Response, body: Fork | None = None) -> SessionInfo:
    """A new session that stands where this one does, after the requests that it has waiting."""
    wish = body or Fork()
    ttl = None if wish.idle_ttl_ms is None else wish.idle_ttl_ms / 1000
    session = await manager.fork(session_id, fork_id=wish.id, idle_ttl=ttl, metadata=wish.metadata)
    response.headers["Location"] = f"/v1/sessions/{session.id}"
    return session_info(manager, session)


@router.post("/rollback")
async def rollback(session_id: SessionId, body: Rollback, manager: Manager) -> SessionInfo:
    """Returns a session to a step that it stood at, after the requests that it has waiting."""
    return session_info(manager, await manager.rollback(session_id, body.step))


@router.post("/reset")
async def reset(session_id: SessionId, manager: Manager) -> SessionInfo:
    """Returns a session to its model's initial state and to step 0, after the requests that it has waiting."""
    return session_info(manager, await manager.reset(session_id))


@router.get("/state", response_class=Response, responses={200: {"content": {PACKED: {"schema": BYTES}}}})
async def get_state(session_id: SessionId, manager: Manager) -> Response:
    """Where a session stands, after the requests that it has waiting: a safetensors file with state, step and kept
    reply, for `PUT` here or at another service of the same model version.
    """
    return Response(await manager.state(session_id), media_type=PACKED)


@snapshots.put(
    "/state",
    openapi_extra=documented(BYTES, PACKED),
    responses={201: {"model": SessionInfo, "description": "The session is new"}},
)
async def put_state(
    session_id: SessionId, body: Body, manager: Manager, response: Response, idle_ttl_ms: NewIdleTtl = None
) -> SessionInfo:
    """Has a session stand where a snapshot does; makes the session (201) if there is none of that id."""
    session, created = await manager.restore(session_id, body, None if idle_ttl_ms is None else idle_ttl_ms / 1000)
    response.status_code = 201 if created else 200
    return session_info(manager, session)
