"""`/v1/models`: what can be served, prediction without a session, and versions that come and go by a call."""

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.engine import Engine
from service.errors import InvalidInput
from service.routers import JSON, ROW, Body, BoundedRoute, Manager, Models, documented, in_turns
from service.sessions import SessionManager

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=BoundedRoute)


class TensorInfo(BaseModel):
    """A tensor of a step; `shape` is without batch and time."""

    name: str
    dtype: str
    shape: list[int]
    features: list[dict[str, str]] = []
    role: str | None = None


class ModelInfo(BaseModel):
    """One version of a model: what to send, what comes back, what it is and where it comes from. A `draining` one takes
    no new sessions; `versions` are those that do, and `sessions` the live ones of this version.
    """

    name: str
    version: str
    versions: list[str]
    status: Literal["live", "draining"]
    sessions: int
    description: str
    task: str
    head: str
    input: TensorInfo
    outputs: list[TensorInfo]
    state: list[TensorInfo]
    state_bytes: int
    unit: dict[str, Any] | None
    parameters: int | None
    normalisation: dict[str, Any]
    feedback: dict[str, str] | None
    metrics: list[dict[str, Any]]
    data: dict[str, Any] | None
    training: dict[str, Any]
    libraries: dict[str, str]
    device: str
    golden_error: float
    bit_exact: bool
    chunks: str
    sha256: str


class ModelList(BaseModel):
    """The default version of every live model."""

    models: list[ModelInfo]


@router.get("")
async def list_models(manager: Manager) -> ModelList:
    """Every model, at its default version."""
    return ModelList(models=[_info(manager, manager.engines.get(name)) for name in manager.engines.names()])


@router.get("/{model}")
async def get_model(model: str, manager: Manager) -> ModelInfo:
    """A model at its default version: the highest that loads."""
    return _info(manager, manager.engines.get(model))


@router.get("/{model}/versions/{version}")
async def get_version(model: str, version: str, manager: Manager) -> ModelInfo:
    """One version of a model."""
    return _info(manager, manager.engines.serving(model, version))


@router.post("/{model}/versions/{version}/load")
async def load_version(model: str, version: str, manager: Manager, models: Models) -> ModelInfo:
    """Loads a version from the repository, if it is not live already; it takes new sessions from then on."""
    return _info(manager, await models.load(model, version))


@router.delete(
    "/{model}/versions/{version}",
    status_code=204,
    response_model=None,
    responses={202: {"model": ModelInfo, "description": "It goes when its last session ends"}},
)
async def unload_version(
    model: str, version: str, response: Response, manager: Manager, models: Models, drain: bool = False
) -> ModelInfo | Response:
    """Stops serving a version; its files stay, and `load` brings it back. One that has sessions is only removed with
    `drain=true`, when the last of them ends; until then it takes no new ones.
    """
    engine = await models.unload(model, version, drain=drain)
    if engine is None:
        return Response(status_code=204)
    response.status_code = 202
    return _info(manager, engine)


class Outputs(BaseModel):
    """Outputs of every row of one sequence, by name."""

    outputs: dict[str, list[Any]]


class Predictions(BaseModel):
    """One a sequence, in the order of the request."""

    sequences: list[Outputs]


@router.post(
    "/{model}/predict",
    response_model=Predictions,
    openapi_extra=documented(
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["sequences"],
            "examples": [{"sequences": [[ROW, ROW], [ROW]]}],
            "properties": {
                "sequences": {
                    "type": "array",
                    "items": {"type": "array"},
                    "description": "[[T rows], ...], any lengths",
                },
                "outputs": {"type": "array", "items": {"type": "string"}},
            },
        }
    ),
)
async def predict(model: str, body: Body, manager: Manager, request: Request) -> Response:
    """Runs whole sequences from the initial state and keeps nothing: `{"sequences": [{"outputs": {...}}, ...]}`. By the
    model's default version; sessions may name another.
    """
    if request.url.query:
        raise InvalidInput("predict takes `sequences` and `outputs` in its body, nothing in the query", path="query")
    engine = manager.engines.get(model)
    replies = await manager.predict(engine, engine.codec.decode_predict(body))
    return Response(await in_turns(engine.codec.parts_of_predictions(replies)), media_type=JSON)


def _info(manager: SessionManager, engine: Engine) -> ModelInfo:
    manifest = engine.manifest
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        versions=[other.key.version for other in manager.engines.live(manifest.name)],
        status="live" if manager.engines.is_live(engine) else "draining",
        sessions=engine.sessions,
        description=manifest.description,
        task=manifest.task,
        head=manifest.head,
        input=_tensor(manifest.input, None),
        outputs=[_tensor(tensor, tensor.role) for tensor in manifest.outputs],
        state=[_tensor(pair, "state") for pair in manifest.state],
        state_bytes=manifest.state_bytes,
        unit=manifest.unit,
        parameters=manifest.parameters,
        normalisation=manifest.normalisation,
        feedback=manifest.feedback,
        metrics=list(manifest.metrics),
        data=manifest.data,
        training=manifest.training,
        libraries=manifest.libraries,
        device=engine.device,
        golden_error=engine.golden_error,
        bit_exact=engine.bit_exact,
        chunks=engine.chunks,
        sha256=manifest.files["model.onnx"],
    )


def _tensor(tensor: Any, role: str | None) -> TensorInfo:
    features = [{"name": f.name, "unit": f.unit} for f in getattr(tensor, "features", ())]
    return TensorInfo(name=tensor.name, dtype=tensor.dtype, shape=list(tensor.shape), features=features, role=role)
