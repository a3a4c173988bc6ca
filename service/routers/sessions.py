"""`/v1/sessions`: create, list, inspect, step and delete over HTTP. Where a session stands is moved in `states.py`."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.routers import BYTES, JSON, LOCATION, PACKED, ROW, ControlRoute, Manager, SessionId
from service.sessions import Session, SessionManager
from service.stores import Stored
from service.wire import native

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=ControlRoute)
# Reads its body itself: the front door calls the same `StepDoor` without the way through here.
steps = APIRouter()


Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=256)]]


class CreateSession(BaseModel):
    """Which model the session runs, and for how long it may be idle."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"model": "sensors", "idle_ttl_ms": 86_400_000}]},
    )

    model: str
    version: str | None = Field(None, description="The default version when absent")
    idle_ttl_ms: int | None = Field(None, ge=1, le=10**12, description="The service's default when absent")
    metadata: Metadata = Field({}, max_length=16, description="Your own names and values, returned with the session")
    state: dict[Annotated[str, Field(max_length=256)], Any] | None = Field(
        None, description="Initial state by name, nested lists; else the model's own"
    )


class SessionInfo(BaseModel):
    """A session as it is now; `step` counts the steps it has committed."""

    id: str
    model: str
    version: str
    step: int
    idle_ttl_ms: int
    created_at: datetime
    expires_at: datetime
    metadata: dict[str, Any]


class SessionPage(BaseModel):
    """Sessions in order of id; ask again with `cursor` for the rest, until it is null."""

    sessions: list[SessionInfo]
    cursor: str | None


_STEP_BODY = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "examples": [{"inputs": [ROW], "step": 1}],
    "properties": {
        "inputs": {"type": "array", "items": {}, "description": "T rows, each of the shape of the model's input"},
        "step": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of the first row; makes the request exactly-once",
        },
        "outputs": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Outputs, gates and states to return; the prediction when absent",
        },
    },
}
STEP_CALL = {
    "requestBody": {"required": True, "content": {JSON: {"schema": _STEP_BODY}, PACKED: {"schema": BYTES}}},
    "parameters": [
        {"name": name, "in": "query", "schema": {"type": kind}, "description": f"{what}; with packed rows only"}
        for name, kind, what in (
            ("step", "integer", "Number of the first row"),
            ("outputs", "string", "Names with commas"),
        )
    ],
}


@router.post("", status_code=201, responses={201: {"headers": LOCATION}})
async def create_session(body: CreateSession, response: Response, manager: Manager) -> SessionInfo:
    """A new session with an id of the server's."""
    session, _ = await _create(manager, body, None)
    response.headers["Location"] = f"/v1/sessions/{session.id}"
    return session_info(manager, session)


@router.put("/{session_id}", responses={201: {"model": SessionInfo, "description": "The session is new"}})
async def put_session(session_id: SessionId, body: CreateSession, response: Response, manager: Manager) -> SessionInfo:
    """A session with an id of the client's own; asking again for the same one changes nothing."""
    session, created = await _create(manager, body, session_id)
    response.status_code = 201 if created else 200
    return session_info(manager, session)


@router.get("")
async def list_sessions(
    manager: Manager,
    model: str | None = None,
    cursor: str = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> SessionPage:
    """Live sessions, of one model or of all."""
    sessions, after = await manager.page(model, cursor, limit)
    return SessionPage(sessions=[session_info(manager, session) for session in sessions], cursor=after)


@router.get("/{session_id}")
async def get_session(session_id: SessionId, manager: Manager) -> SessionInfo:
    """One session. Looking at it does not count as use."""
    return session_info(manager, await manager.inspect(session_id))


@router.delete("/{session_id}", status_code=204, response_class=Response)
async def delete_session(session_id: SessionId, manager: Manager) -> None:
    """Ends a session."""
    await manager.delete(session_id)


class Steps(BaseModel):
    """Outputs of every row by name, and the steps that the session has committed with this request."""

    outputs: dict[str, list[Any]] | None
    step: int
    expires_at: datetime
    replayed: bool = Field(False, description="A duplicate: nothing ran")
    already_applied: bool = Field(False, description="A duplicate whose reply was too large to keep: outputs is null")


_PACKED_REPLY: dict[str, Any] = {
    "content": {PACKED: {"schema": BYTES}},
    "headers": {
        "Latch-Step": {"schema": {"type": "integer"}, "description": "Of packed rows: the session's step"},
        "Latch-Replayed": {"schema": {"type": "boolean"}, "description": "Of packed rows: a duplicate, nothing ran"},
        "Latch-Already-Applied": {"schema": {"type": "boolean"}, "description": "Of packed rows: and none follow"},
    },
}


@steps.post(
    "/v1/sessions/{session_id}/steps",
    response_model=Steps,
    openapi_extra=STEP_CALL,
    responses={200: _PACKED_REPLY},
    tags=["sessions"],
)
async def step(session_id: SessionId, request: Request) -> Response:
    """Advances a session by T >= 1 steps; all of them are applied, or none. In JSON, or in packed rows: bytes of
    T rows in little-endian, as the model's page describes one, answered by rows of the outputs with the step in
    `Latch-Step` (and `Latch-Replayed`, `Latch-Already-Applied`).
    """
    answer = await request.app.state.steps.answer(session_id, request.scope, request.receive)
    return Response(answer.body, headers={name.decode(): value.decode() for name, value in answer.headers})


async def _create(manager: SessionManager, body: CreateSession, session_id: str | None) -> tuple[Session, bool]:
    return await manager.create(
        body.model,
        body.version,
        session_id=session_id,
        idle_ttl=None if body.idle_ttl_ms is None else body.idle_ttl_ms / 1000,
        metadata=body.metadata,
        state=body.state,
    )


def session_info(manager: SessionManager, session: Session | Stored) -> SessionInfo:
    """What a session is, and where it stands."""
    return SessionInfo(
        id=session.id,
        model=session.model,
        version=session.version,
        step=session.step,
        idle_ttl_ms=round(session.idle_ttl * 1000),
        created_at=native.timestamp(session.created_at),
        expires_at=native.timestamp(manager.expires_at(session)),
        metadata=dict(session.metadata),
    )
