"""`Batcher`: advances all sessions of one model together: collect, run, commit, answer.

Rule: one task, no timers, no waiting window. When a run ends, the next takes whatever is ready. A request is applied
whole or not at all: a chunk that takes several runs works on copied state and commits once, at its end. Where sessions
are stored, a session's commit waits for its save, and the runs of all others go on.
It knows slots, not session ids, and never who asked: an answer is a call of what came with the request.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np

from service.commits import Arrival, Committer
from service.errors import (
    Draining,
    InferenceFailed,
    InvalidInput,
    LatchError,
    PayloadTooLarge,
    SessionNotFound,
    StepConflict,
)
from service.ledger import Ledger, StoredSlot
from service.manifest import Array
from service.metrics import ModelMetrics
from service.queues import Answer, Queues, Ticket, deleted
from service.slab import Slot, StateSlab
from service.snapshot import Snapshot, SnapshotCodec
from service.steps import decide
from service.wire import Block, StepReply, StepRequest
from service.wire.rows import RowFormat
from service.work import BlockReply, BlockRun, BlockWork, Chunk, ChunksRun, new_chunk

log = logging.getLogger(__name__)

_WORKER_STEPS = 8
_QUIET_SECONDS = 1.0  # without anybody who asked for little, after which runs may be longer


class Runner(Protocol):
    """What the batcher needs of a runtime; see `runtime.OrtRunner`."""

    def run(
        self, inputs: Array, state: Sequence[Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Advances B sessions by T steps: [B, T, ...] in, [B, T, ...] and the new state out."""

    def is_short(self, rows: int, steps: int) -> bool:
        """Whether the run belongs on the event loop's own thread."""

    def is_long(self, rows: int, steps: int) -> bool:
        """Whether nobody should have to wait for the end of the run."""


class Batcher:
    """The queue of one model and the task that serves it.

    Args:
        runner: advances a batch.
        slab: holds the states.
        rows: how inputs and outputs are packed.
        snapshots: how a session is packed for the store.
        ledger: what sessions are stored with; None where they live in the slab alone.
        max_batch_size: sessions in a run.
        max_run_steps: steps of one session in a run, so that nobody waits long behind a chunk.
        max_queue, max_queue_bytes: requests waiting for this model, and what their inputs may weigh.
        max_session_queue: requests waiting for one session.
        max_reply_bytes: packed rows of one reply.
        keep_reply_bytes: largest reply kept for a duplicate.
        metrics: the instruments of this model and version.
    """

    def __init__(
        self,
        runner: Runner,
        slab: StateSlab,
        rows: RowFormat,
        snapshots: SnapshotCodec,
        ledger: Ledger | None,
        *,
        max_batch_size: int,
        max_run_steps: int,
        max_queue: int,
        max_queue_bytes: int,
        max_session_queue: int,
        max_reply_bytes: int,
        keep_reply_bytes: int,
        metrics: ModelMetrics,
    ) -> None:
        self._runner = runner
        self._slab = slab
        self._rows = rows
        self._max_batch_size = max_batch_size
        self._max_run_steps = max_run_steps
        self._max_reply_bytes = max_reply_bytes
        self._keep_reply_bytes = keep_reply_bytes
        self._metrics = metrics
        self._queues: Queues[BlockWork] = Queues(
            max_queue=max_queue, max_queue_bytes=max_queue_bytes, max_session_queue=max_session_queue
        )
        self._ledger = ledger
        self._committer = Committer(slab, self._queues, snapshots, ledger)
        self._is_shared = ledger is not None and ledger.store.is_shared
        self._last_short = -math.inf  # see `_saw`
        self._running: dict[Slot, None] = {}  # those that get back in line when their run has ended, oldest first
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="run")
        metrics.queue_depth.set_function(lambda: self._queues.depth)

    def submit(self, slot: Slot, request: StepRequest, answer: Answer) -> Ticket:
        """Puts a request behind what its session has waiting; `answer` is called once, from this thread.

        Raises:
            Overloaded: a queue is full.
            Draining: the service is stopping.
            SessionNotFound: the slot was released.
            PayloadTooLarge: as `check_reply`.
        """
        if request.steps > 1:
            self.check_reply(request.steps, request.outputs)
        self._queues.check(slot)
        return self._queues.put(new_chunk(slot, answer, time.perf_counter(), request))

    def check_reply(self, steps: int, outputs: tuple[str, ...]) -> None:
        """Raises PayloadTooLarge where so many steps of these outputs are more than a reply may have."""
        size = steps * self._rows.output_bytes(outputs)
        if size > self._max_reply_bytes:
            raise PayloadTooLarge(
                f"{steps} steps of {', '.join(outputs)} are {size} bytes: a reply has {self._max_reply_bytes} at most "
                "(as packed rows); send the steps in parts, or ask for less",
                limit=self._max_reply_bytes,
            )

    def submit_block(
        self, slots: list[Slot], block: Block, answer: Callable[[BlockReply], Any], answers: Callable[[int], Answer]
    ) -> bool:
        """Takes requests of many sessions as one, each slot once, behind others such. False, and nothing done, where
        they must go one by one: a session idled out or has a request alone, or they are too many or too long.
        """
        count, steps = block.inputs.shape[:2]
        return (
            count <= self._max_batch_size
            and steps * self._rows.output_bytes(block.outputs) <= self._max_reply_bytes
            and self._cap(steps, count) >= steps
            and self._slab.are_in_use(slots)
            and self._queues.put_group(BlockWork(slots, block, answer, answers))
        )

    def refuse(self, slot: Slot, error: LatchError, answer: Answer) -> Ticket:
        """Answers with an error once everything that the session has waiting is applied or has failed.

        Raises:
            Draining, SessionNotFound: as `submit`.
        """
        return self._queues.put(Ticket(slot, answer, time.perf_counter(), error))

    @asynccontextmanager
    async def hold(self, slot: Slot) -> AsyncIterator[None]:
        """Waits for the slot's turn and has everybody behind it wait; the slot is up to date, and may be moved.

        Raises:
            Draining, SessionNotFound: as `submit`.
            LatchError: the store does not know, or has the session no more.
        """
        async with self._queues.hold(slot):
            if self._is_shared and isinstance(slot, StoredSlot):
                await self._committer.refresh(slot)
            if not slot.is_live:  # its turn came, and before its caller woke it was deleted
                raise deleted()
            yield

    async def move(self, slot: Slot, snapshot: Snapshot, earlier: int = 0) -> bool:
        """Has a slot that is held stand elsewhere; see `Committer.move`."""
        return await self._committer.move(slot, snapshot, earlier)

    async def room(self, slot: Slot) -> None:
        """Waits until another try is worth while for who met `Overloaded`: the slot's turn, or room for the model.

        Raises:
            Draining, SessionNotFound: as `submit`.
        """
        await self._queues.room(slot)

    def is_busy(self, slot: Slot) -> bool:
        """Whether requests of this slot wait, run, or are being saved."""
        return slot in self._queues

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits, runs, or is being saved."""
        return not self._queues

    def unsaved_uses(self, seconds: float) -> list[StoredSlot]:
        """Slots whose use the store has not seen: that were answered without a save since this was last asked, or that
        have requests, and would be idle for too long within so many seconds.
        """
        busy = [slot for slot in self._queues.busy if self._slab.time_left(slot) < seconds]
        used = {*self._committer.take_used(), *busy}
        return [slot for slot in used if slot.is_live and isinstance(slot, StoredSlot)]

    def is_used(self, slot: StoredSlot) -> bool:
        """Whether the slot had such a use since `unsaved_uses` was last asked."""
        return self._committer.is_used(slot)

    def used(self, slot: Slot) -> None:
        """Notes such a use again: the store did not hear of it."""
        self._committer.used(slot)

    def release(self, slot: Slot) -> None:
        """Gives the slot back; everybody who still waits for it is told that the session is gone."""
        self._committer.release(slot, SessionNotFound("the session was deleted while this request was waiting"))

    async def serve(self) -> None:
        """The loop; runs until cancelled."""
        queues = self._queues
        try:
            while True:
                # Inline runs never wait for anything: let the doors write, and read what came, before the next.
                await (asyncio.sleep(0) if queues.work.is_set() else queues.work.wait())
                work = self._collect()
                if isinstance(work, BlockWork):
                    await self._serve_block(work)
                elif work:
                    await self._serve_chunks(work)
        finally:
            self._worker.shutdown(wait=False)
            queues.close(Draining(), saving=self._committer)

    async def _serve_chunks(self, batch: list[Chunk]) -> None:
        self._running = dict.fromkeys([chunk.slot for chunk in batch])
        try:
            await self._advance(batch)
        except Exception:
            log.exception("a batch of %d failed outside the runtime", len(batch))
            for chunk in batch:
                if chunk.slot in self._running:  # the others are being saved, or were
                    chunk.settle(InferenceFailed("the batch failed; the state did not move"))
        finally:
            self._resume()

    async def _serve_block(self, work: BlockWork) -> None:
        self._queues.began(work)
        self._running = dict.fromkeys(work.slots)
        try:
            if not await self._advance_block(work):
                for i, slot in enumerate(work.slots):
                    chunk = work.chunk(i)
                    self._queues.put_first(chunk)
                    if slot.row < 0:
                        chunk.settle(deleted())
        except asyncio.CancelledError:
            work.refuse(Draining())
            raise
        except Exception:
            log.exception("a block of %d failed outside the runtime", len(work.slots))
            work.refuse(InferenceFailed("the batch failed; the state did not move"))
        finally:
            self._resume()

    def _resume(self) -> None:
        running, self._running = self._running, {}  # nothing here keeps a session, and its engine, that has ended
        self._queues.resume(running)

    def _collect(self) -> list[Chunk] | BlockWork:
        """The oldest block, or the head of every queue before it that needs a run, up to `max_batch_size`."""
        taken = self._queues.take(self._max_batch_size)
        if isinstance(taken, BlockWork):
            return taken
        return [chunk for slot in taken if (chunk := self._next(slot)) is not None]

    def _next(self, slot: Slot) -> Chunk | None:
        """The first request of a slot that needs a run; answers those before it that do not."""
        while isinstance(ticket := self._queues.head(slot), Ticket):
            if not isinstance(ticket, Chunk):
                if not ticket.act():
                    return None
            elif ticket.done or self._begins(ticket):
                return ticket
            elif slot in self._committer:
                return None
        self._queues.resume([slot])
        return None

    def _begins(self, chunk: Chunk) -> bool:
        """Consults the step table. True when the chunk needs a run; else it is answered, or waits for the store: where
        other replicas move the session too, it takes more than this copy to refuse or repeat.
        """
        request, slot = chunk.request, chunk.slot
        step = self._slab.step(slot)
        if request.first_step is not None and request.first_step != step + 1:
            if self._is_shared and not chunk.is_fresh and isinstance(slot, StoredSlot):
                chunk.is_fresh = True
                self._committer.refresh_later(slot)
                return False
            self._slab.touch(slot)  # a retry is use, too
            self._committer.used(slot)
            kept = self._slab.kept(slot)
            if kept is not None and kept.first_step + request.steps - 1 != step:
                kept = None  # of a snapshot of somebody's own making, or this is no duplicate
            try:
                decide(step, kept, request.first_step, request.digest)  # what is next in order is not asked about
            except StepConflict as error:
                chunk.settle(error)
                return False
            self._metrics.replays.inc()
            reply = kept.reply if kept else None
            if reply is not None and len(reply) != request.steps * self._rows.output_bytes(request.outputs):
                reply = None  # a snapshot of somebody's own making
            chunk.settle(StepReply(request.outputs, reply, request.first_step, step, replayed=True))
            return False
        chunk.first_step = step + 1
        chunk.queue_seconds = time.perf_counter() - chunk.submitted
        return True

    async def _advance(self, batch: list[Chunk]) -> None:
        """One run: everybody in `batch` moves on by the same number of steps."""
        self._saw(min([chunk.request.steps for chunk in batch]))
        steps = min([chunk.request.steps - chunk.done for chunk in batch])
        if steps > 1:
            steps = self._cap(steps, len(batch))
        names = {chunk.request.outputs for chunk in batch}
        wanted = next(iter(names)) if len(names) == 1 else tuple({name: None for each in names for name in each})
        inputs = self._rows.batch([self._part(chunk, steps) for chunk in batch], steps)
        if not _is_finite(inputs):
            await self._advance_finite(batch, steps)
            return
        state = self._slab.gather([chunk.slot for chunk in batch])
        for b, chunk in enumerate(batch):
            if chunk.state is not None:
                for rows, own in zip(state, chunk.state, strict=True):
                    rows[b] = own
        start = time.perf_counter()
        try:
            if self._runner.is_short(len(batch), steps):
                outputs, state = self._runner.run(inputs, state, wanted)
            else:
                outputs, state = await self._run_aside(inputs, state, wanted)
        except InferenceFailed as error:
            if len(batch) == 1:
                batch[0].settle(error)
            else:  # one bad row fails the whole run: alone, each meets its own fate, with the same bits
                for chunk in batch:
                    if chunk.answer is not None:  # nobody left meanwhile, and no session was deleted
                        await self._advance([chunk])
            return
        ended = time.perf_counter()
        sound = self._sound(batch, outputs, state)
        finished: list[int] = []
        for b, (chunk, part) in enumerate(zip(batch, self._split(batch, names, outputs), strict=True)):
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
        self._metrics.observe_run(
            rows=len(batch),
            steps=steps,
            compute=ended - start,
            queue=[chunk.queue_seconds for chunk in batch if chunk.done <= steps],
        )
        self._commit(batch, state, finished, ended)

    def _commit(self, batch: list[Chunk], state: list[Array], finished: list[int], ended: float) -> None:
        """Commits the finished chunks of a run; what is stored and what is not, each on its way."""
        kinds = [finished]
        if self._ledger is not None:
            kinds = [[], []]
            for b in finished:
                kinds[isinstance(batch[b].slot, StoredSlot)].append(b)
        for rows in filter(None, kinds):
            chunks = batch
            if len(rows) < len(batch):
                chunks = [batch[b] for b in rows]
            own = state if chunks is batch else [values[rows] for values in state]
            self._pass_on(ChunksRun(chunks, own, ended, self._keep_reply_bytes, self._metrics))

    def _pass_on(self, arrival: Arrival) -> None:
        if self._committer.commit(arrival):
            for slot in arrival.commits.slots:
                del self._running[slot]

    def _cap(self, steps: int, rows: int) -> int:
        """Of the steps that a run could take, those that keep it short: whoever comes meanwhile waits for its end.
        Where nobody came lately who asked for little, it only must not be long.

        A run that is not short at `_WORKER_STEPS` goes to a worker, where fewer would cost more in hops than they save.
        """
        steps = min(steps, self._max_run_steps)
        is_quiet = time.perf_counter() - self._last_short > _QUIET_SECONDS
        while steps > _WORKER_STEPS and (
            self._runner.is_long(rows, steps) if is_quiet else not self._runner.is_short(rows, steps)
        ):
            steps = max(_WORKER_STEPS, 3 * steps // 4)
        return steps

    def _saw(self, steps: int) -> None:
        """Notes when somebody asks for no more than a short run gives: to him a long one makes a difference."""
        if steps == 1 or self._runner.is_short(1, steps):
            self._last_short = time.perf_counter()

    def _run_aside(
        self, inputs: Array, state: list[Array], wanted: tuple[str, ...]
    ) -> asyncio.Future[tuple[dict[str, Array], list[Array]]]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._worker, self._runner.run, inputs, state, wanted)

    async def _advance_block(self, work: BlockWork) -> bool:
        """One run of a block; False, and nothing has changed, where its requests must meet their fates alone."""
        slots, block = work.slots, work.block
        count, steps = block.inputs.shape[:2]
        start = time.perf_counter()
        self._saw(steps)
        began = self._slab.begin(slots, block.first_steps)
        if began is None or not _is_finite(block.inputs):
            return False
        before, state = began
        try:
            if self._runner.is_short(count, steps):
                outputs, state = self._runner.run(block.inputs, state, block.outputs)
            else:
                outputs, state = await self._run_aside(block.inputs, state, block.outputs)
        except InferenceFailed:
            return False
        ended = time.perf_counter()
        if not all(map(_is_finite, (*outputs.values(), *state))):
            return False
        self._metrics.observe_run(
            rows=count, steps=steps, compute=ended - start, queue=[start - work.submitted] * count
        )
        replies = _cut(self._rows.pack(outputs, block.outputs), count)
        self._pass_on(
            BlockRun(
                work,
                state,
                replies,
                before,
                (ended - start, ended),
                self._queues,
                self._keep_reply_bytes,
                self._metrics,
            )
        )
        return True

    async def _advance_finite(self, batch: list[Chunk], steps: int) -> None:
        """Refuses the rows whose inputs are no numbers, and runs the others."""
        for chunk in batch:
            try:
                self._rows.check_finite(self._part(chunk, steps), chunk.done)
            except InvalidInput as error:
                chunk.settle(error)
        if rest := [chunk for chunk in batch if chunk.answer is not None]:
            await self._advance(rest)

    def _split(self, batch: list[Chunk], names: set[tuple[str, ...]], outputs: dict[str, Array]) -> list[bytes]:
        """What each chunk asked for of the outputs of a run."""
        rows = {each: _cut(self._rows.pack(outputs, each), len(batch)) for each in names}
        if len(rows) == 1:
            return rows[batch[0].request.outputs]
        return [rows[chunk.request.outputs][b] for b, chunk in enumerate(batch)]

    def _part(self, chunk: Chunk, steps: int) -> bytes | memoryview:
        """The next `steps` rows of a chunk."""
        if chunk.request.steps == steps:
            return chunk.request.data
        size = self._rows.input_bytes
        return memoryview(chunk.request.data)[chunk.done * size : (chunk.done + steps) * size]

    @staticmethod
    def _sound(batch: list[Chunk], outputs: dict[str, Array], state: list[Array]) -> Sequence[bool]:
        """[B]: whether a row's state is finite, and what it asked for itself; that of batch-mates does not count."""
        if all(map(_is_finite, (*outputs.values(), *state))):
            return [True] * len(batch)
        finite = {name: _finite_rows(rows) for name, rows in outputs.items()}
        sound = np.logical_and.reduce([_finite_rows(rows) for rows in state])
        return [sound[b] and all(finite[name][b] for name in chunk.request.outputs) for b, chunk in enumerate(batch)]


def _cut(data: bytes, count: int) -> list[bytes]:
    """In so many equal parts."""
    if count == 1:
        return [data]
    size = len(data) // count
    return [data[b * size : (b + 1) * size] for b in range(count)]


def _is_finite(values: Array) -> bool:
    """Whether all of them are; bytes are searched in a third of the time that numpy's `all` takes."""
    return 0 not in np.isfinite(values).tobytes()


def _finite_rows(rows: Array) -> Array:
    """[B] of bool: whether row b is finite."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
