"""What only a client can find out, and the service's refusals as the classes of `service/errors.py`.

Rule: whoever catches `LatchError` has caught everything that these clients raise on purpose.
"""

from collections.abc import Mapping
from typing import Any

from service.errors import LatchError, by_code


class PatienceExhausted(LatchError):
    """The service could not be reached, or had no room, for all of `patience`; the last problem is the `__cause__`.

    Attributes:
        unacknowledged: numbers of the steps of which nobody knows whether they are applied. The same call again
            applies them if they are not, and gives their reply in any case.
    """

    code = "patience_exhausted"
    http_status = 503
    retryable = True

    def __init__(self, message: str, unacknowledged: range) -> None:
        super().__init__(message)
        self.unacknowledged = unacknowledged

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that hand their errors on."""
        return type(self), (str(self), self.unacknowledged)


class OtherProcess(LatchError):
    """The client was made before this process was forked: both would write to the same connections, and read each
    other's answers. Nothing was sent. Make a client in each process.
    """

    code = "other_process"
    http_status = 500


class LostSteps(LatchError):
    """The session is at a lower step than the service had acknowledged: a store lost data, or another client reset the
    session or rolled it back. Nothing was sent. `refresh()` goes on from where the session is now.

    Attributes:
        acknowledged: steps that the service had confirmed.
        found: steps that the session has now.
    """

    code = "lost_steps"
    http_status = 409

    def __init__(self, session: str, acknowledged: int, found: int) -> None:
        super().__init__(
            f"session {session!r} is at step {found}, and {acknowledged} steps were acknowledged: the store lost some, "
            "or somebody reset the session or rolled it back; refresh() goes on from there",
        )
        self.session, self.acknowledged, self.found = session, acknowledged, found

    def __reduce__(self) -> tuple[Any, ...]:
        """As above."""
        return type(self), (self.session, self.acknowledged, self.found)


class NotAllStepped(LatchError):
    """Some sessions of a group were not stepped; what happened to one is no other's matter.

    Attributes:
        replies: of those that were stepped, as `Group.step` would have given them.
        errors: of the others, each the error that the session's own `step` would have raised. Of those whose error is
            PatienceExhausted or of the connection nobody knows; the same rows again apply them, once.

    In another process both are by the sessions' ids.
    """

    code = "not_all_stepped"
    http_status = 409

    def __init__(self, replies: Mapping[Any, Any], errors: Mapping[Any, LatchError]) -> None:
        session, error = next(iter(errors.items()))
        count = len(errors) + len(replies)
        super().__init__(f"{len(errors)} of {count} sessions were not stepped; the first, {_name(session)!r}: {error}")
        self.replies, self.errors = replies, errors

    def __reduce__(self) -> tuple[Any, ...]:
        """As above."""
        return type(self), tuple(
            {_name(session): outcome for session, outcome in each.items()} for each in (self.replies, self.errors)
        )


class OutputsNotKept(LatchError):
    """The steps are applied, but their outputs are lost: the connection broke before they arrived, and the service does
    not keep replies over `LATCH_KEEP_REPLY_BYTES`.
    """

    code = "outputs_not_kept"
    http_status = 409


class NotLatch(LatchError):
    """What answers at the address is not Latch, or is something between it and us."""

    code = "not_latch"
    http_status = 502


def _name(session: Any) -> str:
    return session if isinstance(session, str) else str(session.id)


def refusal(document: dict[str, Any]) -> LatchError:
    """The error that the service told, as the class of its `code`; one that this version does not know is a plain
    `LatchError` whose `to_dict()` still has the code.
    """
    extras = {name: value for name, value in document.items() if name not in ("error", "code", "retryable", "type")}
    message, code = str(document.get("error")), str(document.get("code"))
    kind = by_code().get(code)
    return LatchError(message, code=code, **extras) if kind is None else kind(message, **extras)
