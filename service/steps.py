"""The step table: what a request that names its first step may do to a session. A pure function.

Rule: a step is applied exactly once. The table is consulted when a request reaches the head of its session's queue,
when everything before it is committed or has failed, so that pipelined and retried requests meet the same rule.
"""

from enum import Enum, auto

from service.errors import StepConflict
from service.slab import Kept


class Decision(Enum):
    """What to do with a request."""

    RUN = auto()
    REPLAY = auto()


def decide(step: int, kept: Kept | None, first_step: int | None, digest: bytes) -> Decision:
    """Applies the table to a session that has committed `step` steps.

    Args:
        step: steps committed, n.
        kept: the last committed request.
        first_step: where the request says it starts; None runs next in order.
        digest: what the request asks for, as a hash of its inputs and output names.

    Returns:
        RUN for n + 1 or no number; REPLAY for the last committed request again.

    Raises:
        StepConflict: stale, a gap, or another input under the number of the last request; tells `expected_step`.
    """
    expected = step + 1
    if first_step is None or first_step == expected:
        return Decision.RUN
    if kept is not None and first_step == kept.first_step:
        if digest == kept.digest:
            return Decision.REPLAY
        problem = f"step {first_step} was committed with other inputs or outputs"
    elif first_step <= step:
        problem = f"step {first_step} is stale: the session is at step {step}"
    else:
        problem = f"step {first_step} leaves a gap: the session is at step {step}"
    raise StepConflict(f"{problem}; the next is {expected}", expected_step=expected)
