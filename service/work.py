"""What a batcher works on: a `Chunk` of one session or a `BlockWork` of many, and what a run made of them.

Rule: each request is answered once, whatever becomes of it: applied, refused, or overtaken and run again.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from service.errors import LatchError
from service.manifest import Array
from service.metrics import ModelMetrics
from service.queues import Answer, Group, Queues, Ticket, deleted, deliver
from service.slab import Commits, Slot
from service.wire import Block, StepReply, StepRequest


class Chunk(Ticket, kw_only=True):
    """A request to step, and how far it got."""

    request: StepRequest
    first_step: int = 0
    done: int = 0
    state: list[Array] | None = None
    parts: list[bytes] = msgspec.field(default_factory=list)
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    is_fresh: bool = False

    def restart(self) -> None:
        """Forgets how far it got: its session was brought up to date, and has moved."""
        self.done, self.state, self.parts, self.is_fresh = 0, None, [], True


def new_chunk(slot: Slot, answer: Answer, submitted: float, request: StepRequest) -> Chunk:
    """A request that counts for itself."""
    return Chunk(slot, answer, submitted, requests=1, size=len(request.data), request=request)


class BlockReply(NamedTuple):
    """What became of the requests of a block, one entry a session: packed rows, where the request was applied with the
    block. The others are answered by themselves.
    """

    first_steps: list[int]
    replies: list[bytes]
    applied: list[bool]


class BlockWork(Group):
    """Requests of many sessions that came together and run together, and go through as arrays.

    `answer` is called when it ran; what of it cannot go with the rest is answered by `answers(index)` instead.
    """

    def __init__(
        self, slots: list[Slot], block: Block, answer: Callable[[BlockReply], Any], answers: Callable[[int], Answer]
    ) -> None:
        self.slots = slots
        self.block = block
        self.size = block.inputs.nbytes
        self.answer = answer
        self.answers = answers
        self.submitted = time.perf_counter()

    def chunk(self, index: int) -> Chunk:
        """One of the requests, alone."""
        return new_chunk(self.slots[index], self.answers(index), self.submitted, self.block.request(index))

    def refuse(self, error: LatchError) -> None:
        """Answers every request."""
        for i in range(len(self.slots)):
            deliver(self.answers(i), error)


class ChunksRun:
    """Chunks that a run finished (an `Arrival`)."""

    def __init__(
        self, chunks: list[Chunk], state: list[Array], ended: float, keep_reply_bytes: int, metrics: ModelMetrics
    ) -> None:
        self.state = state
        self.commits = Commits([], [], [], [], [])
        self._chunks = chunks
        self._ended = ended
        self._metrics = metrics
        self._replies: list[bytes] = []
        for chunk in chunks:
            request, first = chunk.request, chunk.first_step
            data = chunk.parts[0] if len(chunk.parts) == 1 else b"".join(chunk.parts)
            self._replies.append(data)
            self.commits.slots.append(chunk.slot)
            self.commits.steps.append(first + request.steps - 1)
            self.commits.first_steps.append(first)
            self.commits.digests.append(request.digest)
            self.commits.replies.append(data if len(data) <= keep_reply_bytes else None)

    def settle(self, rows: Sequence[int], live: Sequence[bool], store_seconds: float) -> None:
        """See `Arrival`."""
        moved, chunks = 0, [self._chunks[b] for b in rows]
        for b, is_live in zip(rows, live, strict=True):
            chunk = self._chunks[b]
            moved += chunk.request.steps * is_live
            chunk.settle(
                StepReply(
                    chunk.request.outputs,
                    self._replies[b],
                    chunk.first_step,
                    self.commits.steps[b],
                    False,
                    chunk.queue_seconds,
                    chunk.compute_seconds,
                    store_seconds,
                )
                if is_live
                else deleted()
            )
        now = time.perf_counter()
        self._metrics.steps.inc(moved)
        overhead = [now - chunk.submitted - chunk.compute_seconds for chunk in chunks]
        self._metrics.observe_answers(now - self._ended, overhead)

    def refuse(self, error: LatchError) -> None:
        """See `Arrival`."""
        for chunk in self._chunks:
            chunk.settle(error)

    def again(self, row: int) -> None:
        """See `Arrival`."""
        self._chunks[row].restart()


class BlockRun:
    """A block that was run (an `Arrival`)."""

    def __init__(
        self,
        work: BlockWork,
        state: list[Array],
        replies: list[bytes],
        before: list[int],
        times: tuple[float, float],
        queues: Queues[BlockWork],
        keep_reply_bytes: int,
        metrics: ModelMetrics,
    ) -> None:
        steps = work.block.inputs.shape[1]
        self.state = state
        self.commits = Commits(
            work.slots,
            [step + steps for step in before],
            [step + 1 for step in before],
            work.block.digests(),
            [*replies] if len(replies[0]) <= keep_reply_bytes else [None] * len(replies),
        )
        self._work = work
        self._replies = replies
        self._compute, self._ended = times
        self._queues = queues
        self._metrics = metrics

    def settle(self, rows: Sequence[int], live: Sequence[bool], _store_seconds: float) -> None:
        """See `Arrival`."""
        work, applied = self._work, [False] * len(self._replies)
        for b, is_live in zip(rows, live, strict=True):
            applied[b] = is_live
            if not is_live:
                deliver(work.answers(b), deleted())
        deliver(work.answer, BlockReply(self.commits.first_steps, self._replies, applied))
        now = time.perf_counter()
        self._metrics.steps.inc(work.block.inputs.shape[1] * sum(applied))
        self._metrics.observe_answers(now - self._ended, [now - work.submitted - self._compute] * len(rows))

    def refuse(self, error: LatchError) -> None:
        """See `Arrival`."""
        self._work.refuse(error)

    def again(self, row: int) -> None:
        """See `Arrival`."""
        chunk = self._work.chunk(row)
        chunk.restart()
        self._queues.put_first(chunk)
