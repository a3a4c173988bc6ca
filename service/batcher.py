"""`Batcher`: advances all sessions of one model together: collect, run, commit, answer.

Rule: one task, no timers, no waiting window. When a run ends, the next takes whatever is ready. A request is applied
whole or not at all: a chunk that takes several runs works on copied state and commits once, at its end.
It knows slots, not session ids, and never who asked.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from service.errors import Draining, InferenceFailed, LatchError, Overloaded, SessionNotFound, StepConflict
from service.manifest import Array
from service.metrics import Metrics
from service.slab import Commit, Kept, Slot, StateSlab
from service.steps import Decision, decide
from service.wire import StepReply, StepRequest

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the batcher needs of a runtime; see `runtime.OrtRunner`."""

    def run(
        self, inputs: Array, state: Sequence[Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Advances B sessions by T steps: [B, T, ...] in, [B, T, ...] and the new state out."""

    def is_short(self, rows: int, steps: int) -> bool:
        """Whether the run belongs on the event loop's own thread."""


class _Waiter:
    """Somebody's place in the queue of a session. By itself it needs no run: it is answered when its turn comes."""

    __slots__ = ("future", "resets", "slot", "submitted")

    def __init__(self, slot: Slot, *, resets: bool = False) -> None:
        self.slot = slot
        self.resets = resets
        self.future: asyncio.Future[StepReply] = asyncio.get_running_loop().create_future()
        self.submitted = time.perf_counter()

    def settle(self, outcome: StepReply | LatchError) -> None:
        """Answers, unless the caller has gone or was answered."""
        if self.future.done():
            return
        if isinstance(outcome, LatchError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class _Chunk(_Waiter):
    """A request to step, and how far it got."""

    __slots__ = ("compute_seconds", "done", "first_step", "outputs", "queue_seconds", "request", "started", "state")

    def __init__(self, slot: Slot, request: StepRequest) -> None:
        super().__init__(slot)
        self.request = request
        self.started = False
        self.first_step = 0
        self.done = 0
        self.state: list[Array] | None = None
        self.outputs: list[dict[str, Array]] = []
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0

    @property
    def remaining(self) -> int:
        return len(self.request.inputs) - self.done


class Batcher:
    """The queue of one model and the task that serves it.

    Args:
        runner: advances a batch.
        slab: holds the states.
        max_batch_size: sessions in a run.
        max_run_steps: steps of one session in a run, so that nobody waits long behind a chunk.
        max_queue: requests waiting for this model.
        max_session_queue: requests waiting for one session.
        keep_reply_bytes: largest reply kept for a duplicate.
        metrics, key: where and under which model and version to count.
    """

    def __init__(
        self,
        runner: Runner,
        slab: StateSlab,
        *,
        max_batch_size: int,
        max_run_steps: int,
        max_queue: int,
        max_session_queue: int,
        keep_reply_bytes: int,
        metrics: Metrics,
        key: tuple[str, str],
    ) -> None:
        self._runner = runner
        self._slab = slab
        self._max_batch_size = max_batch_size
        self._max_run_steps = max_run_steps
        self._max_queue = max_queue
        self._max_session_queue = max_session_queue
        self._keep_reply_bytes = keep_reply_bytes
        self._queues: dict[Slot, deque[_Waiter]] = {}
        self._ready: deque[Slot] = deque()  # slots with work that are in no run, oldest first
        self._depth = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._steps = metrics.steps.labels(*key)
        self._replays = metrics.replays.labels(*key)
        self._batch_size = metrics.batch_size.labels(*key)
        self._run_steps = metrics.run_steps.labels(*key)
        self._queue_seconds = metrics.queue_seconds.labels(*key)
        self._compute_seconds = metrics.compute_seconds.labels(*key)
        metrics.queue_depth.labels(*key).set_function(lambda: self._depth)

    def submit(self, slot: Slot, request: StepRequest) -> asyncio.Future[StepReply]:
        """Puts a request behind what its session has waiting.

        Returns:
            A future of the reply. Cancelling it drops the request if no run has finished it, and harms nobody else.

        Raises:
            Overloaded: a queue is full.
            Draining: the service is stopping.
        """
        self._check_room(slot)
        return self._enqueue(_Chunk(slot, request))

    def reset(self, slot: Slot) -> asyncio.Future[StepReply]:
        """Returns the session to its initial state and step 0, after what it has waiting. Raises as `submit`."""
        self._check_room(slot)
        return self._enqueue(_Waiter(slot, resets=True))

    def turn(self, slot: Slot) -> asyncio.Future[StepReply]:
        """A future of where the session stands once everything that it has waiting is applied or has failed."""
        return self._enqueue(_Waiter(slot))

    def pending(self, slot: Slot) -> int:
        """Requests of this slot that wait or run."""
        return len(self._queues.get(slot, ()))

    def release(self, slot: Slot) -> None:
        """Gives the slot back; everybody who still waits for it is told that the session is gone."""
        self._slab.release(slot)
        for waiter in self._queues.get(slot, ()):
            waiter.settle(SessionNotFound("the session was deleted while this request was waiting"))

    async def serve(self) -> None:
        """The loop; runs until cancelled."""
        try:
            while True:
                await self._wake.wait()
                batch = self._collect()
                if not batch:
                    self._wake.clear()
                    continue
                try:
                    await self._advance(batch)
                except Exception:
                    log.exception("a batch of %d failed outside the runtime", len(batch))
                    for chunk in batch:
                        chunk.settle(InferenceFailed("the batch failed; the state did not move"))
                finally:
                    for chunk in batch:
                        self._requeue(chunk.slot)
                # Inline runs never wait for anything: let the doors read and write before the next.
                await asyncio.sleep(0)
        finally:
            self._closed = True
            for queue in self._queues.values():
                for waiter in queue:
                    waiter.settle(Draining("the service is stopping"))

    def _check_room(self, slot: Slot) -> None:
        for waiting, limit, what in (
            (self._depth, self._max_queue, "model"),
            (self.pending(slot), self._max_session_queue, "session"),
        ):
            if waiting >= limit:
                raise Overloaded(
                    f"{waiting} requests wait for this {what}: send again later", limit=limit, retry_after_ms=100
                )

    def _enqueue(self, waiter: _Waiter) -> asyncio.Future[StepReply]:
        if self._closed:
            raise Draining("the service is stopping")
        if not self._slab.is_live(waiter.slot):
            raise SessionNotFound("the session was deleted")
        queue = self._queues.get(waiter.slot)
        if queue is None:
            self._queues[waiter.slot] = deque([waiter])
            self._ready.append(waiter.slot)
        else:
            queue.append(waiter)
        self._depth += 1
        self._wake.set()
        return waiter.future

    def _collect(self) -> list[_Chunk]:
        """The head of every queue that needs a run, oldest first, up to `max_batch_size`."""
        batch: list[_Chunk] = []
        for _ in range(len(self._ready)):
            if len(batch) == self._max_batch_size:
                break
            slot = self._ready.popleft()
            chunk = self._head(slot)
            if chunk is None:
                self._requeue(slot)
            else:
                batch.append(chunk)
        return batch

    def _head(self, slot: Slot) -> _Chunk | None:
        """The first request of the queue that needs a run; answers those before it that do not."""
        queue = self._queues[slot]
        while queue:
            waiter = queue[0]
            if not waiter.future.done():
                if not isinstance(waiter, _Chunk):
                    if waiter.resets:
                        self._slab.commit([Commit(slot, 0, None)], self._slab.initial(1))
                    waiter.settle(StepReply({}, self._slab.step(slot)))
                elif waiter.started or self._begin(waiter):
                    return waiter
            queue.popleft()
            self._depth -= 1
        return None

    def _begin(self, chunk: _Chunk) -> bool:
        """Consults the step table. True when the chunk needs a run, False when it is answered."""
        step, kept = self._slab.step(chunk.slot), self._slab.kept(chunk.slot)
        try:
            decision = decide(step, kept, chunk.request.first_step, chunk.request.digest)
        except StepConflict as error:
            chunk.settle(error)
            return False
        if decision is Decision.REPLAY:
            self._replays.inc()
            chunk.settle(StepReply(kept.outputs if kept else None, step, replayed=True))
            return False
        chunk.started = True
        chunk.first_step = step + 1
        chunk.queue_seconds = time.perf_counter() - chunk.submitted
        self._queue_seconds.observe(chunk.queue_seconds)
        return True

    async def _advance(self, batch: list[_Chunk]) -> None:
        """One run: everybody in `batch` moves on by the same number of steps."""
        steps = min(self._max_run_steps, *(chunk.remaining for chunk in batch))
        names = tuple(dict.fromkeys(name for chunk in batch for name in chunk.request.outputs))
        inputs = np.stack([chunk.request.inputs[chunk.done : chunk.done + steps] for chunk in batch])
        state = self._slab.gather([chunk.slot for chunk in batch])
        for b, chunk in enumerate(batch):
            if chunk.state is not None:
                for rows, own in zip(state, chunk.state, strict=True):
                    rows[b] = own
        start = time.perf_counter()
        try:
            outputs, state = await self._run(inputs, state, names)
        except InferenceFailed as error:
            if len(batch) == 1:
                batch[0].settle(error)
            else:  # one bad row fails the whole run: alone, each meets its own fate, with the same bits
                for chunk in batch:
                    await self._advance([chunk])
            return
        seconds = time.perf_counter() - start
        self._compute_seconds.observe(seconds)
        self._batch_size.observe(len(batch))
        self._run_steps.observe(steps)
        finite = {name: _finite_rows(rows) for name, rows in outputs.items()}
        sound = np.logical_and.reduce([_finite_rows(rows) for rows in state])
        finished: list[int] = []
        for b, chunk in enumerate(batch):
            chunk.compute_seconds += seconds
            # Judged by its own outputs only: what a batch-mate asked for must not matter.
            if not (sound[b] and all(finite[name][b] for name in chunk.request.outputs)):
                chunk.settle(InferenceFailed("the step gave a value that is not finite; the state did not move"))
                continue
            chunk.done += steps
            # Copies: a kept reply must not hold the arrays of the whole batch.
            chunk.outputs.append({name: outputs[name][b].copy() for name in chunk.request.outputs})
            if chunk.remaining:
                chunk.state = [rows[b].copy() for rows in state]
            else:
                finished.append(b)
        self._commit([batch[b] for b in finished], [rows[finished] for rows in state])

    async def _run(
        self, inputs: Array, state: list[Array], names: tuple[str, ...]
    ) -> tuple[dict[str, Array], list[Array]]:
        if self._runner.is_short(*inputs.shape[:2]):
            return self._runner.run(inputs, state, names)
        return await asyncio.to_thread(self._runner.run, inputs, state, names)

    def _commit(self, chunks: list[_Chunk], state: list[Array]) -> None:
        """Moves the slots of finished chunks, then answers."""
        replies: list[StepReply] = []
        commits: list[Commit] = []
        for chunk in chunks:
            outputs = _join(chunk.outputs)
            step = chunk.first_step + chunk.done - 1
            small = sum(array.nbytes for array in outputs.values()) <= self._keep_reply_bytes
            kept = Kept(chunk.first_step, chunk.request.digest, outputs if small else None)
            commits.append(Commit(chunk.slot, step, kept))
            replies.append(StepReply(outputs, step, False, chunk.queue_seconds, chunk.compute_seconds))
        for chunk, reply, live in zip(chunks, replies, self._slab.commit(commits, state), strict=True):
            if live:
                self._steps.inc(chunk.done)
            chunk.settle(reply if live else SessionNotFound("the session was deleted while this step ran"))

    def _requeue(self, slot: Slot) -> None:
        """Drops what is answered and, where more waits, puts the slot at the back of the line."""
        queue = self._queues[slot]
        while queue and queue[0].future.done():
            queue.popleft()
            self._depth -= 1
        if queue:
            self._ready.append(slot)
            self._wake.set()
        else:
            del self._queues[slot]


def _finite_rows(rows: Array) -> Array:
    """[B] of bool: whether row b is finite."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))


def _join(parts: list[dict[str, Array]]) -> dict[str, Array]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
