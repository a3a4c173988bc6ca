"""What a step is once it is off the wire: every door decodes to `StepRequest` and encodes a `StepReply`.

Rule: bytes to values and back; no I/O, no session, no clock.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from service.manifest import Array


@dataclass(frozen=True)
class StepRequest:
    """T steps of one session.

    Attributes:
        inputs: [T, *input.shape] of the model's input dtype, finite.
        outputs: public names of the outputs to return.
        first_step: number of the first step, counted from 1; None runs next in order.
    """

    inputs: Array
    outputs: tuple[str, ...]
    first_step: int | None = None

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell this request from any other of the same step number."""
        hashed = blake2b(self.inputs.tobytes(), digest_size=16)
        hashed.update("\0".join(self.outputs).encode())
        return hashed.digest()


@dataclass(frozen=True)
class StepReply:
    """The answer to a `StepRequest`.

    Attributes:
        outputs: name -> [T, *shape]; None where the request was applied before and its reply was too large to keep.
        step: steps that the session has committed with this request.
        replayed: True when a duplicate was answered and nothing ran.
        queue_seconds: from submit to the first run.
        compute_seconds: inside the runtime.
    """

    outputs: dict[str, Array] | None
    step: int
    replayed: bool = False
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
