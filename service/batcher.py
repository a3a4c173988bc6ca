"""`Batcher`: advances all sessions of one model together: collect, run, commit, answer.

Rule: one task, no timers, no waiting window. When a run ends, the next takes whatever is ready. A request is applied
whole or not at all: a chunk that takes several runs works on copied state and commits once, at its end.
It knows slots, not session ids, and never who asked: an answer is a call of what came with the request.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from service.errors import (
    Draining,
    InferenceFailed,
    Internal,
    InvalidInput,
    LatchError,
    Overloaded,
    SessionNotFound,
    StepConflict,
)
from service.manifest import Array
from service.metrics import ModelMetrics
from service.slab import Commits, Slot, StateSlab
from service.steps import Decision, decide
from service.wire import Block, StepReply, StepRequest
from service.wire.rows import RowFormat

log = logging.getLogger(__name__)

_WORKER_STEPS = 8

Outcome = StepReply | LatchError
Answer = Callable[[Outcome], Any]


class Runner(Protocol):
    """What the batcher needs of a runtime; see `runtime.OrtRunner`."""

    def run(
        self, inputs: Array, state: Sequence[Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Advances B sessions by T steps: [B, T, ...] in, [B, T, ...] and the new state out."""

    def is_short(self, rows: int, steps: int) -> bool:
        """Whether the run belongs on the event loop's own thread."""


class Ticket(msgspec.Struct):
    """A place in the queue of a session, until `answer` was called. Without a request it needs no run: at its turn,
    when everything before it is applied or has failed, `action` gives the outcome.
    """

    slot: Slot
    answer: Answer | None
    submitted: float
    action: Callable[[], Outcome] | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Requests and bytes of inputs in the queue; what needs no run takes no room from what does."""
        return 0, 0

    def settle(self, outcome: Outcome) -> None:
        """Answers, unless that was done or the caller has gone."""
        if self.answer is not None:
            answer, self.answer = self.answer, None
            _deliver(answer, outcome)

    def cancel(self) -> None:
        """The caller has gone: drops the request if no run has finished it, and harms nobody else."""
        self.answer = None


class _Chunk(Ticket, kw_only=True):
    """A request to step, and how far it got."""

    request: StepRequest
    first_step: int = 0
    done: int = 0
    state: list[Array] | None = None
    parts: list[bytes] = []
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def counts(self) -> tuple[int, int]:
        return 1, len(self.request.data)


class BlockReply(NamedTuple):
    """What became of the requests of a block, one entry a session: packed rows, where the session was live."""

    first_steps: list[int]
    replies: list[bytes]
    live: list[bool]


class _Block(msgspec.Struct):
    """Requests of many idle sessions that came together and run together, and go through as arrays.

    `answer` is called when it ran; where it cannot run as a whole, `answers` gives the answer of each request instead.
    """

    slots: list[Slot]
    block: Block
    answer: Callable[[BlockReply], Any]
    answers: Callable[[int], Answer]
    submitted: float

    def refuse(self, error: LatchError) -> None:
        """Answers every request."""
        for i in range(len(self.slots)):
            _deliver(self.answers(i), error)


class Batcher:
    """The queue of one model and the task that serves it.

    Args:
        runner: advances a batch.
        slab: holds the states.
        rows: how inputs and outputs are packed.
        max_batch_size: sessions in a run.
        max_run_steps: steps of one session in a run, so that nobody waits long behind a chunk.
        max_queue, max_queue_bytes: requests waiting for this model, and what their inputs may weigh.
        max_session_queue: requests waiting for one session.
        keep_reply_bytes: largest reply kept for a duplicate.
        metrics: the instruments of this model and version.
    """

    def __init__(
        self,
        runner: Runner,
        slab: StateSlab,
        rows: RowFormat,
        *,
        max_batch_size: int,
        max_run_steps: int,
        max_queue: int,
        max_queue_bytes: int,
        max_session_queue: int,
        keep_reply_bytes: int,
        metrics: ModelMetrics,
    ) -> None:
        self._runner = runner
        self._slab = slab
        self._rows = rows
        self._max_batch_size = max_batch_size
        self._max_run_steps = max_run_steps
        self._max_queue = max_queue
        self._max_queue_bytes = max_queue_bytes
        self._max_session_queue = max_session_queue
        self._keep_reply_bytes = keep_reply_bytes
        self._metrics = metrics
        self._queues: dict[Slot, list[Ticket]] = {}  # of busy slots; empty where a block has the slot and nobody waits
        self._ready: deque[Slot | _Block] = deque()  # work that is in no run, oldest first
        self._depth = self._bytes = 0
        self._outside: deque[asyncio.Future[None]] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="run")
        metrics.queue_depth.set_function(lambda: self._depth)

    def submit(self, slot: Slot, request: StepRequest, answer: Answer) -> Ticket:
        """Puts a request behind what its session has waiting; `answer` is called once, from this thread.

        Raises:
            Overloaded: a queue is full.
            Draining: the service is stopping.
            SessionNotFound: the slot was released.
        """
        if self._closed:
            raise Draining("the service is stopping")
        queue = self._queues.get(slot)
        if self._is_full or (queue is not None and len(queue) >= self._max_session_queue):
            raise self._overloaded(queue or [])
        return self._enqueue(_Chunk(slot, answer, time.perf_counter(), request=request))

    def submit_block(
        self, slots: list[Slot], block: Block, answer: Callable[[BlockReply], Any], answers: Callable[[int], Answer]
    ) -> bool:
        """Takes requests of many sessions as one, each slot once. False, and nothing done, where they must go one by
        one: a session is busy, idled out or at another step, or they are too many or too long for a run.
        """
        count, steps = block.inputs.shape[:2]
        if (
            self._closed
            or count > self._max_batch_size
            or self._cap(steps, count) < steps
            or self._depth + count > self._max_queue
            or not self._queues.keys().isdisjoint(slots)
            or not self._slab.are_next(slots, block.first_steps)
        ):
            return False
        for slot in slots:
            self._queues[slot] = []
        self._depth += count
        self._ready.append(_Block(slots, block, answer, answers, time.perf_counter()))
        self._wake.set()
        return True

    def at_turn(self, slot: Slot, action: Callable[[], Outcome], answer: Answer) -> Ticket:
        """Calls `action` once everything that the session has waiting is applied or has failed, and answers with that.

        Raises:
            Draining, SessionNotFound: as `submit`.
        """
        return self._enqueue(Ticket(slot, answer, time.perf_counter(), action))

    async def room(self, slot: Slot) -> None:
        """Waits until another try is worth while for who met `Overloaded`: the slot's turn, or room for the model.

        Raises:
            Draining, SessionNotFound: as `submit`.
        """
        if self._closed:
            raise Draining("the service is stopping")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if len(self._queues.get(slot, ())) >= self._max_session_queue:
            self.at_turn(slot, lambda: StepReply((), b"", 0, 0), lambda _: _open(future))
        elif self._is_full:
            self._outside.append(future)
        else:
            return
        await future

    @property
    def _is_full(self) -> bool:
        return self._depth >= self._max_queue or self._bytes >= self._max_queue_bytes

    def _admit(self) -> None:
        """Tells those who wait outside that there is room, as many as there is room for."""
        for _ in range(min(len(self._outside), max(0, self._max_queue - self._depth))):
            _open(self._outside.popleft())

    def is_busy(self, slot: Slot) -> bool:
        """Whether requests of this slot wait or run."""
        return slot in self._queues

    def release(self, slot: Slot) -> None:
        """Gives the slot back; everybody who still waits for it is told that the session is gone."""
        self._slab.release(slot)
        for ticket in list(self._queues.get(slot, ())):
            ticket.settle(SessionNotFound("the session was deleted while this request was waiting"))

    async def serve(self) -> None:
        """The loop; runs until cancelled."""
        try:
            while True:
                await self._wake.wait()
                work = self._collect()
                if isinstance(work, _Block):
                    await self._serve_block(work)
                elif work:
                    await self._serve_chunks(work)
                elif not self._ready:
                    self._wake.clear()
                if self._outside and not self._is_full:
                    self._admit()
                # Inline runs never wait for anything: let the doors write, and read what came, before the next.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        finally:
            self._closed = True
            self._worker.shutdown(wait=False)
            for future in self._outside:
                _open(future)
            for waiting in self._ready:
                if isinstance(waiting, _Block):
                    waiting.refuse(Draining("the service is stopping"))
            for queue in self._queues.values():
                for ticket in list(queue):
                    ticket.settle(Draining("the service is stopping"))

    async def _serve_chunks(self, batch: list[_Chunk]) -> None:
        try:
            await self._advance(batch)
        except Exception:
            log.exception("a batch of %d failed outside the runtime", len(batch))
            for chunk in batch:
                chunk.settle(InferenceFailed("the batch failed; the state did not move"))
        finally:
            for chunk in batch:
                self._requeue(chunk.slot)

    async def _serve_block(self, work: _Block) -> None:
        self._depth -= len(work.slots)
        try:
            if not await self._advance_block(work):
                for i, slot in enumerate(work.slots):
                    chunk = _Chunk(slot, work.answers(i), work.submitted, request=work.block.request(i))
                    self._queues[slot].insert(0, chunk)
                    self._count(chunk, 1)
                    if slot.row < 0:
                        chunk.settle(SessionNotFound("the session was deleted while this step ran"))
        except asyncio.CancelledError:
            work.refuse(Draining("the service is stopping"))
            raise
        except Exception:
            log.exception("a block of %d failed outside the runtime", len(work.slots))
            work.refuse(InferenceFailed("the batch failed; the state did not move"))
        finally:
            for slot in work.slots:
                self._requeue(slot)

    def _overloaded(self, queue: list[Ticket]) -> Overloaded:
        checks = (
            (len(queue), self._max_session_queue, "requests wait for this session"),
            (self._depth, self._max_queue, "requests wait for this model"),
            (self._bytes, self._max_queue_bytes, "bytes of inputs wait for this model"),
        )
        waiting, limit, what = next(check for check in checks if check[0] >= check[1])
        return Overloaded(f"{waiting} {what}: send again later", limit=limit, retry_after_ms=100)

    def _enqueue(self, ticket: Ticket) -> Ticket:
        if self._closed:
            raise Draining("the service is stopping")
        slot = ticket.slot
        if slot.row < 0:
            raise SessionNotFound("the session was deleted")
        queue = self._queues.get(slot)
        if queue is None:
            self._queues[slot] = [ticket]
            self._ready.append(slot)
        else:
            queue.append(ticket)
        self._count(ticket, 1)
        self._wake.set()
        return ticket

    def _count(self, ticket: Ticket, sign: int) -> None:
        requests, size = ticket.counts
        self._depth += sign * requests
        self._bytes += sign * size

    def _drop(self, queue: list[Ticket]) -> None:
        self._count(queue.pop(0), -1)

    def _collect(self) -> list[_Chunk] | _Block:
        """The oldest block, or the head of every queue before it that needs a run, up to `max_batch_size`."""
        batch: list[_Chunk] = []
        ready = self._ready
        for _ in range(min(len(ready), self._max_batch_size)):
            slot = ready.popleft()
            if isinstance(slot, _Block):
                if not batch:
                    return slot
                ready.appendleft(slot)
                break
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
            ticket = queue[0]
            if ticket.answer is not None:
                if not isinstance(ticket, _Chunk):
                    ticket.settle(self._act(ticket))
                elif ticket.done or self._begin(ticket):
                    return ticket
            self._drop(queue)
        return None

    @staticmethod
    def _act(ticket: Ticket) -> Outcome:
        try:
            return ticket.action()  # type: ignore[misc]  # a ticket has a request or an action
        except LatchError as error:
            return error
        except Exception:
            log.exception("what a session had waiting could not be done")
            return Internal("the service failed on this call; its log says why")

    def _begin(self, chunk: _Chunk) -> bool:
        """Consults the step table. True when the chunk needs a run, False when it is answered."""
        request, step = chunk.request, self._slab.step(chunk.slot)
        if request.first_step is not None and request.first_step != step + 1:
            self._slab.touch(chunk.slot)  # a retry is use, too
            kept = self._slab.kept(chunk.slot)
            try:
                decision = decide(step, kept, request.first_step, request.digest)
            except StepConflict as error:
                chunk.settle(error)
                return False
            if decision is Decision.REPLAY:
                self._metrics.replays.inc()
                reply = kept.reply if kept else None
                chunk.settle(StepReply(request.outputs, reply, request.first_step, step, replayed=True))
                return False
        chunk.first_step = step + 1
        chunk.queue_seconds = time.perf_counter() - chunk.submitted
        return True

    async def _advance(self, batch: list[_Chunk]) -> None:
        """One run: everybody in `batch` moves on by the same number of steps."""
        steps = min([chunk.request.steps - chunk.done for chunk in batch])
        if steps > 1:
            steps = self._cap(steps, len(batch))
        names = {chunk.request.outputs for chunk in batch}
        wanted = names.pop() if len(names) == 1 else tuple({name: None for each in names for name in each})
        inputs = self._rows.batch([self._part(chunk, steps) for chunk in batch], steps)
        if not np.isfinite(inputs).all():
            await self._advance_finite(batch, steps)
            return
        state = self._slab.gather([chunk.slot for chunk in batch])
        for b, chunk in enumerate(batch):
            if chunk.state is not None:
                for rows, own in zip(state, chunk.state, strict=True):
                    rows[b] = own
        start = time.perf_counter()
        try:
            outputs, state = await self._run(inputs, state, wanted)
        except InferenceFailed as error:
            if len(batch) == 1:
                batch[0].settle(error)
            else:  # one bad row fails the whole run: alone, each meets its own fate, with the same bits
                for chunk in batch:
                    await self._advance([chunk])
            return
        ended = time.perf_counter()
        sound = self._sound(batch, outputs, state)
        finished: list[int] = []
        for b, (chunk, part) in enumerate(zip(batch, self._split(batch, outputs), strict=True)):
            chunk.compute_seconds += ended - start
            if not sound[b]:
                chunk.settle(InferenceFailed("the step gave a value that is not finite; the state did not move"))
                continue
            chunk.parts.append(part)
            chunk.done += steps
            if chunk.done == chunk.request.steps:
                finished.append(b)
            else:
                chunk.state = [rows[b].copy() for rows in state]
        chunks = batch
        if len(finished) < len(batch):
            chunks, state = [batch[b] for b in finished], [rows[finished] for rows in state]
        self._commit(chunks, state)
        now = time.perf_counter()
        self._metrics.observe_run(
            rows=len(batch),
            steps=steps,
            compute=ended - start,
            answer=now - ended,
            queue=[chunk.queue_seconds for chunk in batch if chunk.done <= steps],
            overhead=[now - chunk.submitted - chunk.compute_seconds for chunk in chunks],
        )

    def _cap(self, steps: int, rows: int) -> int:
        """Of the steps that a run could take, those that keep it short: whoever comes meanwhile waits for its end.

        A run that is not short at `_WORKER_STEPS` goes to a worker, where fewer would cost more in hops than they save.
        """
        steps = min(steps, self._max_run_steps)
        while steps > _WORKER_STEPS and not self._runner.is_short(rows, steps):
            steps = max(_WORKER_STEPS, 3 * steps // 4)
        return steps

    async def _run(
        self, inputs: Array, state: list[Array], wanted: tuple[str, ...]
    ) -> tuple[dict[str, Array], list[Array]]:
        if self._runner.is_short(*inputs.shape[:2]):
            return self._runner.run(inputs, state, wanted)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._runner.run, inputs, state, wanted)

    async def _advance_block(self, work: _Block) -> bool:
        """One run of a block; False, and nothing has changed, where its requests must meet their fates alone."""
        slots, block = work.slots, work.block
        count, steps = block.inputs.shape[:2]
        start = time.perf_counter()
        if not np.isfinite(block.inputs).all():
            return False
        try:
            outputs, state = await self._run(block.inputs, self._slab.gather(slots), block.outputs)
        except InferenceFailed:
            return False
        ended = time.perf_counter()
        if not all(np.isfinite(values).all() for values in (*outputs.values(), *state)):
            return False
        data = self._rows.pack(outputs, block.outputs)
        size = len(data) // count
        replies = [data[b * size : (b + 1) * size] for b in range(count)]
        before = self._slab.steps(slots)
        live = self._slab.commit(
            Commits(
                slots,
                [step + steps for step in before],
                [step + 1 for step in before],
                block.digests(),
                [*replies] if size <= self._keep_reply_bytes else [None] * count,
            ),
            state,
        )
        self._metrics.steps.inc(steps * sum(live))
        _deliver(work.answer, BlockReply([step + 1 for step in before], replies, live))
        now = time.perf_counter()
        self._metrics.observe_run(
            rows=count,
            steps=steps,
            compute=ended - start,
            answer=now - ended,
            queue=[start - work.submitted] * count,
            overhead=[now - work.submitted - (ended - start)] * count,
        )
        return True

    async def _advance_finite(self, batch: list[_Chunk], steps: int) -> None:
        """Refuses the rows whose inputs are no numbers, and runs the others."""
        for chunk in batch:
            try:
                self._rows.check_finite(self._part(chunk, steps), chunk.done)
            except InvalidInput as error:
                chunk.settle(error)
        if rest := [chunk for chunk in batch if chunk.answer is not None]:
            await self._advance(rest)

    def _split(self, batch: list[_Chunk], outputs: dict[str, Array]) -> list[bytes]:
        """What each chunk asked for of the outputs of a run."""
        rows: dict[tuple[str, ...], list[bytes]] = {}
        for names in {chunk.request.outputs for chunk in batch}:
            data = self._rows.pack(outputs, names)
            size = len(data) // len(batch)
            rows[names] = [data[b * size : (b + 1) * size] for b in range(len(batch))]
        if len(rows) == 1:
            return rows[batch[0].request.outputs]
        return [rows[chunk.request.outputs][b] for b, chunk in enumerate(batch)]

    def _part(self, chunk: _Chunk, steps: int) -> bytes | memoryview:
        """The next `steps` rows of a chunk."""
        if chunk.request.steps == steps:
            return chunk.request.data
        size = self._rows.input_bytes
        return memoryview(chunk.request.data)[chunk.done * size : (chunk.done + steps) * size]

    @staticmethod
    def _sound(batch: list[_Chunk], outputs: dict[str, Array], state: list[Array]) -> Sequence[bool]:
        """[B]: whether a row's state is finite, and what it asked for itself; that of batch-mates does not count."""
        if all(np.isfinite(values).all() for values in (*outputs.values(), *state)):
            return [True] * len(batch)
        finite = {name: _finite_rows(rows) for name, rows in outputs.items()}
        sound = np.logical_and.reduce([_finite_rows(rows) for rows in state])
        return [sound[b] and all(finite[name][b] for name in chunk.request.outputs) for b, chunk in enumerate(batch)]

    def _commit(self, chunks: list[_Chunk], state: list[Array]) -> None:
        """Moves the slots of finished chunks, then answers."""
        replies: list[StepReply] = []
        commits = Commits([], [], [], [], [])
        for chunk in chunks:
            request, first = chunk.request, chunk.first_step
            data = chunk.parts[0] if len(chunk.parts) == 1 else b"".join(chunk.parts)
            step = first + request.steps - 1
            replies.append(
                StepReply(request.outputs, data, first, step, False, chunk.queue_seconds, chunk.compute_seconds)
            )
            commits.slots.append(chunk.slot)
            commits.steps.append(step)
            commits.first_steps.append(first)
            commits.digests.append(request.digest)
            commits.replies.append(data if len(data) <= self._keep_reply_bytes else None)
        moved = 0
        for chunk, reply, live in zip(chunks, replies, self._slab.commit(commits, state), strict=True):
            moved += chunk.request.steps * live
            chunk.settle(reply if live else SessionNotFound("the session was deleted while this step ran"))
        self._metrics.steps.inc(moved)

    def _requeue(self, slot: Slot) -> None:
        """Drops what is answered and, where more waits, puts the slot at the back of the line."""
        queue = self._queues[slot]
        while queue and queue[0].answer is None:
            self._drop(queue)
        if queue:
            self._ready.append(slot)
            self._wake.set()
        else:
            del self._queues[slot]


def _open(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _deliver(answer: Callable[[Any], Any], outcome: Any) -> None:
    try:
        answer(outcome)
    except Exception:  # a door that fails must not take the batch with it
        log.exception("an answer could not be delivered")


def _finite_rows(rows: Array) -> Array:
    """[B] of bool: whether row b is finite."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
