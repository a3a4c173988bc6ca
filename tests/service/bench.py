"""A batcher whose runner the test moves, and whose states spell what was applied to them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from service.batcher import Batcher
from service.errors import InferenceFailed, InvalidInput, LatchError
from service.ledger import Ledger
from service.manifest import StatePair
from service.metrics import Metrics
from service.queues import Answer, Outcome, Ticket
from service.slab import Slot, StateSlab
from service.snapshot import SnapshotCodec
from service.wire import Block, StepReply, StepRequest
from service.wire.rows import Field, RowFormat
from service.work import BlockReply

PAIR = StatePair(name="h", input="h", output="h2", dtype="float64", shape=(1,), batch_axis=0)


class Folding:
    """h' = 10 h + x: a state that spells the inputs in order, so that a lost or doubled one shows.

    Outputs: y = h', inverse = 1 / y, nothing = 0.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.poison: float | None = None
        self.blind = False
        self.before_run: Callable[[], None] = lambda: None
        self.short: bool | int = True

    def run(self, inputs: Any, state: Sequence[Any], outputs: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
        """As a step graph would; fails when it meets `poison`, and takes NaN for zero when it is `blind`."""
        inputs = np.nan_to_num(inputs) if self.blind else inputs
        self.runs.append(inputs.shape[:2])
        self.before_run()
        if self.poison is not None and (inputs == self.poison).any():
            raise InferenceFailed("poison")
        columns, h = [], state[0]
        with np.errstate(divide="ignore", over="ignore"):  # a caller's own is not that of the batcher's task
            for t in range(inputs.shape[1]):
                h = 10 * h + inputs[:, t]
                columns.append(h)
            stacked = np.stack(columns, axis=1)
            named = {"y": stacked, "inverse": 1 / stacked, "nothing": 0 * inputs}
        return {name: named[name] for name in outputs}, [h]

    def is_short(self, rows: int, steps: int) -> bool:
        """On the loop's thread, unless the test wants a worker; or up to so many rows times steps."""
        return self.short if isinstance(self.short, bool) else rows * steps <= self.short

    def is_long(self, rows: int, steps: int) -> bool:
        """More than four times what is short, or what is not short at all."""
        return not self.short if isinstance(self.short, bool) else rows * steps > 4 * self.short


class Waiting(asyncio.Future[StepReply]):
    """An answer to wait for; cancelling it is what a caller does who leaves."""

    ticket: Ticket

    def __init__(self, ask: Callable[[Answer], Ticket]) -> None:
        super().__init__()
        self.answers = 0
        self.ticket = ask(self._answer)

    def _answer(self, outcome: Outcome) -> None:
        self.answers += 1
        if isinstance(outcome, LatchError):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)

    def cancel(self, msg: Any = None) -> bool:
        """Leaves."""
        self.ticket.cancel()
        return super().cancel(msg)


class Together:
    """A block that was offered; `taken` says whether it was accepted. Awaited, it gives each row's fate: the last
    value of its reply, or the kind of its error.
    """

    def __init__(
        self,
        batcher: Batcher,
        slots: Sequence[Slot],
        rows: Sequence[Sequence[float]],
        first: Sequence[int] | None = None,
        outputs: tuple[str, ...] = ("y",),
    ) -> None:
        self.answers = [0] * len(slots)
        self.errors: dict[int, LatchError] = {}
        self._fates: list[Any] = [None] * len(slots)
        self._outputs, self._steps = outputs, len(rows[0])
        self._settled = asyncio.Event()
        numbers = np.array([0] * len(slots) if first is None else first, np.uint64)
        block = Block(np.array(rows, float)[..., None], outputs, numbers)
        self.taken = batcher.submit_block([*slots], block, self._answer, lambda i: partial(self._answer_one, i))

    def __await__(self) -> Generator[Any, None, list[Any]]:
        yield from self._settled.wait().__await__()
        return self._fates

    def _answer(self, reply: BlockReply) -> None:
        for i, (first, data, is_applied) in enumerate(zip(*reply, strict=True)):
            if is_applied:
                self._answer_one(i, StepReply(self._outputs, data, first, first + self._steps - 1))

    def _answer_one(self, i: int, outcome: Outcome) -> None:
        self.answers[i] += 1
        if isinstance(outcome, LatchError):
            self.errors[i], self._fates[i] = outcome, type(outcome)
        else:
            self._fates[i] = last(outcome, self._outputs[0]) if self._outputs else outcome.step
        if all(self.answers):
            self._settled.set()


ROWS = RowFormat(Field("float64", (1,)), {name: Field("float64", (1,)) for name in ("y", "inverse", "nothing")})


SNAPSHOTS = SnapshotCodec("m/1", "0" * 64, [PAIR], keep_reply_bytes=2**16)


class Bench:
    """A batcher with its runner and slab, on a clock that the test moves."""

    def __init__(self, metrics: Metrics, *, capacity: int = 1000, ledger: Ledger | None = None, **limits: Any) -> None:
        self.runner = Folding()
        self.now = 1000.0
        self.slab = StateSlab([PAIR], capacity, lambda: self.now)
        self.asked: list[Waiting | Together] = []
        self._metrics = metrics
        defaults = {
            "max_batch_size": 64,
            "max_run_steps": 8,
            "max_queue": 100,
            "max_queue_bytes": 10_000,
            "max_session_queue": 10,
            "max_reply_bytes": 10_000,
            "keep_reply_bytes": 1000,
        }
        self.batcher = Batcher(
            self.runner,
            self.slab,
            ROWS,
            SNAPSHOTS,
            ledger,
            metrics=metrics.model("m", "1", self.slab.__len__),
            **(defaults | limits),
        )

    def acquire(self, idle_ttl: float = np.inf) -> Slot:
        """A new session's slot."""
        slot = Slot()
        self.slab.acquire(slot, idle_ttl)
        return slot

    def value(self, name: str) -> float:
        """What an instrument shows."""
        return self._metrics.registry.get_sample_value(f"latch_{name}", {"model": "m", "version": "1"}) or 0.0

    def ask(self, ask: Callable[[Answer], Ticket]) -> Waiting:
        """Asks, and sees to it that there is one answer in the end."""
        self.asked.append(waiting := Waiting(ask))
        return waiting

    def step(self, slot: Slot, *digits: float, first: int | None = None, outputs: tuple[str, ...] = ("y",)) -> Waiting:
        """Submits a chunk of digits."""
        request = StepRequest(np.array(digits, float).tobytes(), len(digits), outputs, first)
        return self.ask(lambda answer: self.batcher.submit(slot, request, answer))

    def block(self, slots: Sequence[Slot], rows: Sequence[Sequence[float]], **options: Any) -> Together:
        """Offers a block: a row of digits for each slot."""
        self.asked.append(block := Together(self.batcher, slots, rows, **options))
        return block

    def turn(self, slot: Slot) -> Waiting:
        """Asks for the step that the slot is at, in turn."""
        return self._in_turn(slot, lambda: None)

    def reset(self, slot: Slot) -> Waiting:
        """Resets the slot, in turn."""
        return self._in_turn(slot, lambda: self.slab.commit(*SNAPSHOTS.start({}).commits(slot)))

    def _in_turn(self, slot: Slot, action: Callable[[], Any]) -> Waiting:
        """Does something in the slot's turn, and answers with the step that it is at then."""
        turn = InvalidInput("its turn")

        def act(answer: Answer, outcome: Outcome) -> None:
            if outcome is turn:
                action()
                outcome = StepReply((), b"", 0, self.slab.step(slot))
            answer(outcome)

        return self.ask(lambda answer: self.batcher.refuse(slot, turn, partial(act, answer)))

    def hold(self) -> tuple[threading.Event, threading.Event]:
        """Stops every run in a worker: the first event says that one has begun, the second lets it go."""
        entered, go = threading.Event(), threading.Event()

        def wait() -> None:
            entered.set()
            go.wait(10)

        self.runner.short, self.runner.before_run = False, wait
        return entered, go

    def state(self, slot: Slot) -> float:
        """The digits that the slot has seen, as one number."""
        return float(self.slab.gather([slot])[0][0, 0])

    def check_answers(self) -> None:
        """Everything that was taken is answered, once; who left is not answered any more."""
        for asked in self.asked:
            if isinstance(asked, Together):
                assert asked.answers == [asked.taken] * len(asked.answers)
            else:
                assert asked.answers == (not asked.cancelled())


@asynccontextmanager
async def serving(bench: Bench) -> AsyncIterator[Bench]:
    """Runs the batcher's task; when it has stopped, everybody has an answer."""
    task = asyncio.create_task(bench.batcher.serve())
    await asyncio.sleep(0)  # it has begun: a task that never did has nobody to answer
    try:
        yield bench
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    bench.check_answers()


def last(reply: StepReply, name: str = "y") -> float:
    """The last output of a reply."""
    assert reply.data is not None
    return float(ROWS.unpack(reply.data, reply.outputs)[name][-1, 0])
