"""What a step is once it is off the wire: every door decodes to `StepRequest` and encodes a `StepReply`.

Rule: bytes to values and back; no I/O, no session, no clock. Inside, rows stay packed bytes (see `rows.py`): they are
what binary doors receive and send, what a digest is taken of, what is kept for a duplicate, and a batch is their join.
"""

from functools import lru_cache

import msgspec
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from service.manifest import Array


class StepRequest(msgspec.Struct, frozen=True):
    """T steps of one session.

    Attributes:
        data: T packed rows of the model's input; a batch looks whether they are finite.
        steps: T.
        outputs: public names of the outputs to return.
        first_step: number of the first step, counted from 1; None runs next in order.
    """

    data: bytes
    steps: int
    outputs: tuple[str, ...]
    first_step: int | None = None

    @property
    def digest(self) -> bytes:
        """16 bytes that tell this request from any other of the same step number."""
        return xxh3_128_digest(self.data, _seed(self.outputs))


class StepReply(msgspec.Struct, frozen=True):
    """The answer to a `StepRequest`.

    Attributes:
        outputs: the names that were asked for.
        data: T packed rows of them; None where the request was applied before and its reply was too large to keep.
        first_step: number of the first of the T steps.
        step: steps that the session has committed with this request.
        replayed: True when a duplicate was answered and nothing ran.
        queue_seconds: from submit to the first run.
        compute_seconds: inside the runtime.
        store_seconds: from the end of the run until it was saved; 0 where nothing is stored.
    """

    outputs: tuple[str, ...]
    data: bytes | None
    first_step: int
    step: int
    replayed: bool = False
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    store_seconds: float = 0.0


class Block(msgspec.Struct, frozen=True):
    """The same for n sessions in one go: T steps of each, as arrays.

    Attributes:
        inputs: [n, T, *input.shape] of the model's input, each session's T rows without a gap.
        outputs: public names of the outputs to return.
        first_steps: n numbers; 0 runs next in order.
    """

    inputs: Array
    outputs: tuple[str, ...]
    first_steps: Array

    def request(self, index: int) -> StepRequest:
        """What one of the sessions is asked."""
        return StepRequest(
            self.inputs[index].tobytes(),
            self.inputs.shape[1],
            self.outputs,
            int(self.first_steps[index]) or None,
        )

    def digests(self) -> list[bytes]:
        """Those of the n requests."""
        seed = _seed(self.outputs)
        return [xxh3_128_digest(rows, seed) for rows in self.inputs]


@lru_cache(maxsize=1024)
def _seed(outputs: tuple[str, ...]) -> int:
    return xxh3_64_intdigest("\0".join(outputs).encode())
