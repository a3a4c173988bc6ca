"""Every way a call can fail, as one tree of typed errors.

Rule: an error says what was wrong, names the bad value and tells what to do; a door only translates it.
This module knows no web framework: `http_status` and `ws_close` are plain numbers.
"""

from typing import Any, ClassVar


class LatchError(Exception):
    """The root. Subclasses fix `code` and the statuses; an instance adds the sentence and its typed extras.

    Attributes:
        code: stable machine-readable name, the same on every door.
        http_status: status of an HTTP reply.
        ws_close: close code where the error ends a session's own WebSocket; None where the socket stays open.
        retryable: True when the same call may succeed later, unchanged.
        extras: further JSON fields, such as `expected_step` or `path`.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    ws_close: ClassVar[int | None] = None
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **extras: Any) -> None:
        super().__init__(message)
        self.extras = extras

    def to_dict(self) -> dict[str, Any]:
        """The one JSON shape of an error on every door."""
        return {"error": str(self), "code": self.code, "retryable": self.retryable, **self.extras}


def by_code() -> dict[str, type[LatchError]]:
    """Every error of this module, by its code."""
    return {kind.code: kind for kind in LatchError.__subclasses__() if kind.__module__ == __name__}


class Internal(LatchError):
    """A fault of the service itself; the log has its traceback."""

    ws_close = 1011


class InferenceFailed(LatchError):
    """The runtime refused the step; the state did not move."""

    code = "inference_failed"


class Malformed(LatchError):
    """The bytes are not what they claim to be (not JSON, say)."""

    code = "malformed"
    http_status = 400


class InvalidInput(LatchError):
    """Readable, but of the wrong shape, type or range; `path` names the bad value."""

    code = "invalid_input"
    http_status = 422


class PayloadTooLarge(LatchError):
    """More bytes or steps than one request, or its reply, may have; `limit` says how many it may."""

    code = "payload_too_large"
    http_status = 413


class NotFound(LatchError):
    """No such address."""

    code = "not_found"
    http_status = 404
    ws_close = 4404


class ForeignOrigin(LatchError):
    """A web page of another host sent this, or opened the socket; `LATCH_ORIGINS` names those that may."""

    code = "foreign_origin"
    http_status = 403


class ChannelNotOpen(LatchError):
    """A frame for a channel that no session is bound to; open it first."""

    code = "channel_not_open"
    http_status = 404


class MethodNotAllowed(LatchError):
    """The address exists, but not for this method."""

    code = "method_not_allowed"
    http_status = 405


class UnsupportedMediaType(LatchError):
    """The body is of a type that this call does not read."""

    code = "unsupported_media_type"
    http_status = 415


class ModelNotFound(LatchError):
    """No model of that name, or no such version of it."""

    code = "model_not_found"
    http_status = 404


class ModelBroken(LatchError):
    """The model is in the repository but cannot be served; readiness says why."""

    code = "model_broken"
    http_status = 503


class ModelDraining(LatchError):
    """The version is being removed: it goes on for the sessions that it has, and takes no new ones."""

    code = "model_draining"
    http_status = 409


class ModelInUse(LatchError):
    """The version has live sessions, `sessions` of them; `?drain=true` removes it when the last one ends."""

    code = "model_in_use"
    http_status = 409


class ModelChanged(LatchError):
    """The files of a version are not those it was loaded from; it goes on as it was. New files take a new number."""

    code = "model_changed"
    http_status = 409


class SessionNotFound(LatchError):
    """No session of that id: never made, deleted, or forgotten long after it expired."""

    code = "session_not_found"
    http_status = 404
    ws_close = 4404


class SessionExpired(LatchError):
    """The session was idle for longer than its `idle_ttl` and is gone."""

    code = "session_expired"
    http_status = 410
    ws_close = 4410


class SessionExists(LatchError):
    """The id is taken by a session of another model or version."""

    code = "session_exists"
    http_status = 409


class StepConflict(LatchError):
    """The step cannot run now: stale, a gap, or different from what was committed; `expected_step` says what can."""

    code = "step_conflict"
    http_status = 409


class CapacityExceeded(LatchError):
    """Every slot holds a live session."""

    code = "capacity_exceeded"
    http_status = 429
    retryable = True


class Overloaded(LatchError):
    """A queue is full."""

    code = "overloaded"
    http_status = 429
    retryable = True


class StepNotKept(LatchError):
    """No snapshot of that step is kept; `kept_steps` says of which there is one."""

    code = "step_not_kept"
    http_status = 409


class SnapshotInvalid(LatchError):
    """The bytes are not a whole snapshot: damaged, cut short, or of a format this version does not know."""

    code = "snapshot_invalid"
    http_status = 422


class SnapshotMismatch(LatchError):
    """A snapshot of another model, or of another version of it; both hashes are in the message."""

    code = "snapshot_mismatch"
    http_status = 409


class SessionCorrupt(LatchError):
    """What the store has of the session cannot be read; it is left as it is."""

    code = "session_corrupt"
    ws_close = 1011


class StoreUnavailable(LatchError):
    """The session store cannot be asked. What was not answered may or may not be applied: send it again, numbered."""

    code = "store_unavailable"
    http_status = 503
    retryable = True


class SlowReader(LatchError):
    """The client has not read its replies for too long; it connects again and goes on from the hello's step."""

    code = "slow_reader"
    http_status = 408
    ws_close = 4408
    retryable = True


class Draining(LatchError):
    """The service is stopping and takes no more work."""

    code = "draining"
    http_status = 503
    ws_close = 1012
    retryable = True

    def __init__(self, message: str = "the service is stopping", **extras: Any) -> None:
        super().__init__(message, **({"retry_after_ms": 100} | extras))


class SettingsInvalid(LatchError):
    """A setting has a value, or a name, that the service does not know. Raised at start only."""

    code = "settings_invalid"


class StoreInvalid(LatchError):
    """What the store's URL leads to is not, or no longer, a store of this version. Raised at start only."""

    code = "store_invalid"


class ManifestInvalid(LatchError):
    """A model's files break the contract of `models/manifest.schema.json`. Raised at load only."""

    code = "manifest_invalid"


class ModelUnloadable(LatchError):
    """The runtime cannot load the graph, or it does not fit its manifest. Raised at load only."""

    code = "model_unloadable"


class GoldenMismatch(LatchError):
    """The model does not reproduce its golden vectors. Raised at load only."""

    code = "golden_mismatch"
