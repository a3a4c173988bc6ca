"""The batcher's invariants, with a runner whose every move the test decides."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

from service.batcher import Answer, Batcher, Outcome, Ticket
from service.errors import Draining, InferenceFailed, LatchError, Overloaded, SessionNotFound, StepConflict
from service.manifest import StatePair
from service.metrics import Metrics
from service.slab import Slot, StateSlab
from service.wire import StepReply, StepRequest
from service.wire.rows import Field, RowFormat

pytestmark = pytest.mark.anyio

PAIR = StatePair(name="h", input="h", output="h2", dtype="float64", shape=(1,), batch_axis=0)


class Folding:
    """h' = 10 h + x: a state that spells the inputs in order, so that a lost or doubled one shows.

    Outputs: y = h', inverse = 1 / y, nothing = 0.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.poison: float | None = None
        self.before_run: Callable[[], None] = lambda: None
        self.short = True

    def run(self, inputs: Any, state: Sequence[Any], outputs: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
        """As a step graph would; fails when it meets `poison`."""
        self.runs.append(inputs.shape[:2])
        self.before_run()
        if self.poison is not None and (inputs == self.poison).any():
            raise InferenceFailed("poison")
        columns, h = [], state[0]
        for t in range(inputs.shape[1]):
            h = 10 * h + inputs[:, t]
            columns.append(h)
        stacked = np.stack(columns, axis=1)
        with np.errstate(divide="ignore"):
            named = {"y": stacked, "inverse": 1 / stacked, "nothing": 0 * inputs}
        return {name: named[name] for name in outputs}, [h]

    def is_short(self, rows: int, steps: int) -> bool:
        """On the loop's thread, unless the test wants a worker."""
        return self.short


class Waiting(asyncio.Future[StepReply]):
    """An answer to wait for; cancelling it is what a caller does who leaves."""

    ticket: Ticket

    @classmethod
    def on(cls, ask: Callable[[Answer], Ticket]) -> "Waiting":
        """Asks, and has the answer end the wait."""
        future = cls()

        def answer(outcome: Outcome) -> None:
            assert not future.done(), "answered twice"
            if isinstance(outcome, LatchError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        future.ticket = ask(answer)
        return future

    def cancel(self, msg: Any = None) -> bool:
        """Leaves."""
        self.ticket.cancel()
        return super().cancel(msg)


ROWS = RowFormat(Field("float64", (1,)), {name: Field("float64", (1,)) for name in ("y", "inverse", "nothing")})


class Bench:
    """A batcher with its runner and slab."""

    def __init__(self, metrics: Metrics, **limits: Any) -> None:
        self.runner = Folding()
        self.slab = StateSlab([PAIR], 1000, time.monotonic)
        defaults = {
            "max_batch_size": 64,
            "max_run_steps": 8,
            "max_queue": 100,
            "max_session_queue": 10,
            "keep_reply_bytes": 1000,
        }
        self.batcher = Batcher(
            self.runner, self.slab, ROWS, metrics=metrics.model("m", "1", self.slab.__len__), **(defaults | limits)
        )

    def acquire(self) -> Slot:
        """A new session's slot."""
        slot = Slot()
        self.slab.acquire(slot)
        return slot

    def step(self, slot: Slot, *digits: float, first: int | None = None, outputs: tuple[str, ...] = ("y",)) -> Waiting:
        """Submits a chunk of digits."""
        request = StepRequest(np.array(digits, float).tobytes(), len(digits), outputs, first)
        return Waiting.on(lambda answer: self.batcher.submit(slot, request, answer))

    def turn(self, slot: Slot) -> Waiting:
        """Asks for the step that the slot is at, in turn."""
        action = lambda: StepReply((), b"", 0, self.slab.step(slot))  # noqa: E731
        return Waiting.on(lambda answer: self.batcher.at_turn(slot, action, answer))

    def reset(self, slot: Slot) -> Waiting:
        """Resets the slot, in turn."""

        def reset() -> StepReply:
            self.slab.reset(slot)
            return StepReply((), b"", 0, self.slab.step(slot))

        return Waiting.on(lambda answer: self.batcher.at_turn(slot, reset, answer))

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


@asynccontextmanager
async def serving(bench: Bench) -> AsyncIterator[Bench]:
    """Runs the batcher's task."""
    task = asyncio.create_task(bench.batcher.serve())
    try:
        yield bench
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def last(reply: StepReply) -> float:
    """The last output of a reply."""
    assert reply.data is not None
    return float(ROWS.unpack(reply.data, ("y",))["y"][-1, 0])


async def test_what_is_ready_together_runs_together(metrics: Metrics) -> None:
    """Fifty sessions submitted before the loop turns are one run; nobody waits for a window."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(50)]
    async with serving(bench):
        replies = await asyncio.gather(*[bench.step(slot, i % 10) for i, slot in enumerate(slots)])
    assert bench.runner.runs == [(50, 1)]
    assert [last(reply) for reply in replies] == [i % 10 for i in range(50)]
    assert [reply.step for reply in replies] == [1] * 50


async def test_a_batch_has_a_bound_and_serves_the_oldest_first(metrics: Metrics) -> None:
    """Seven sessions with room for three are runs of 3, 3 and 1, in order of arrival."""
    bench = Bench(metrics, max_batch_size=3)
    slots = [bench.acquire() for _ in range(7)]
    order: list[int] = []
    async with serving(bench):
        futures = [bench.step(slot, 1) for slot in slots]
        for i, future in enumerate(futures):
            future.add_done_callback(lambda _, i=i: order.append(i))
        await asyncio.gather(*futures)
    assert [rows for rows, _ in bench.runner.runs] == [3, 3, 1]
    assert order == list(range(7))


async def test_requests_of_one_session_run_in_order(metrics: Metrics) -> None:
    """Pipelined requests are applied one after the other, none lost and none doubled."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        replies = await asyncio.gather(*[bench.step(slot, digit) for digit in (1, 2, 3, 4)])
    assert [last(reply) for reply in replies] == [1, 12, 123, 1234]
    assert [reply.step for reply in replies] == [1, 2, 3, 4]


async def test_a_long_chunk_starves_nobody(metrics: Metrics) -> None:
    """Beside single steps a chunk moves one step a run; a single step waits for one run at most."""
    bench = Bench(metrics, max_session_queue=100)
    long, short = bench.acquire(), bench.acquire()
    async with serving(bench):
        chunk = bench.step(long, *[1.0] * 20)
        for i in range(5):
            runs = len(bench.runner.runs)
            reply = await bench.step(short, i)
            assert len(bench.runner.runs) <= runs + 2
            assert reply.step == i + 1
        assert not chunk.done()
        await chunk
    assert bench.slab.step(long) == 20


async def test_only_long_chunks_grow_to_the_cap(metrics: Metrics) -> None:
    """With nothing but chunks waiting, T is the shortest remaining one, up to the cap."""
    bench = Bench(metrics, max_run_steps=8)
    a, b = bench.acquire(), bench.acquire()
    async with serving(bench):
        await asyncio.gather(bench.step(a, *[1.0] * 20), bench.step(b, *[2.0] * 11))
    assert bench.runner.runs == [(2, 8), (2, 3), (1, 8), (1, 1)]


async def test_a_chunk_is_applied_whole_or_not_at_all(metrics: Metrics) -> None:
    """A chunk that fails in its second run leaves the session as it was before the first."""
    bench = Bench(metrics, max_run_steps=2)
    slot = bench.acquire()
    async with serving(bench):
        await bench.step(slot, 7)
        bench.runner.poison = 4
        with pytest.raises(InferenceFailed):
            await bench.step(slot, 1, 2, 3, 4)
        assert (bench.state(slot), bench.slab.step(slot)) == (7, 1)
        assert last(await bench.step(slot, 5, first=2)) == 75


async def test_a_caller_cancelled_before_the_run_leaves_no_trace(metrics: Metrics) -> None:
    """The cancelled request is skipped, its batch-mates and its successors run, its step can be sent again."""
    bench = Bench(metrics)
    slot, other = bench.acquire(), bench.acquire()
    async with serving(bench):
        gone, mate = bench.step(slot, 1, first=1), bench.step(other, 9)
        gone.cancel()
        assert last(await mate) == 9
        assert (bench.state(slot), bench.slab.step(slot)) == (0, 0)
        assert last(await bench.step(slot, 2, first=1)) == 2


async def test_a_caller_cancelled_during_the_run_harms_nobody_and_may_ask_again(metrics: Metrics) -> None:
    """The run commits; the mates get their replies; the same step sent again is answered from the kept reply."""
    bench = Bench(metrics)
    entered, go = bench.hold()
    slot, other = bench.acquire(), bench.acquire()
    async with serving(bench):
        gone, mate = bench.step(slot, 1, first=1), bench.step(other, 9, first=1)
        await asyncio.to_thread(entered.wait, 10)
        gone.cancel()
        go.set()
        assert last(await mate) == 9
        assert (bench.state(slot), bench.slab.step(slot)) == (1, 1)
        again = await bench.step(slot, 1, first=1)
        assert (again.replayed, last(again), bench.state(slot)) == (True, 1, 1)


async def test_a_bad_row_harms_no_other_row(metrics: Metrics) -> None:
    """One request that the runtime refuses fails alone; the others of the batch get the answer they would have had."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(5)]
    bench.runner.poison = 3
    async with serving(bench):
        results = await asyncio.gather(*[bench.step(slot, i) for i, slot in enumerate(slots)], return_exceptions=True)
        assert isinstance(results[3], InferenceFailed)
        assert [last(r) for i, r in enumerate(results) if i != 3 and isinstance(r, StepReply)] == [0, 1, 2, 4]
        assert [bench.slab.step(slot) for slot in slots] == [1, 1, 1, 0, 1]


@pytest.mark.filterwarnings("ignore:.*overflow.*:RuntimeWarning")  # the overflow is what is tested
async def test_a_row_that_leaves_the_numbers_fails_alone(metrics: Metrics) -> None:
    """An infinite result is refused and the state does not move; the batch-mate's does."""
    bench = Bench(metrics)
    big, fine = bench.acquire(), bench.acquire()
    async with serving(bench):
        await bench.step(big, 1e308)
        results = await asyncio.gather(bench.step(big, 1), bench.step(fine, 1), return_exceptions=True)
    assert isinstance(results[0], InferenceFailed)
    assert (bench.state(big), bench.slab.step(big)) == (1e308, 1)
    assert (bench.state(fine), bench.slab.step(fine)) == (1, 1)


async def test_a_state_that_leaves_the_numbers_is_refused_whatever_the_outputs_say(metrics: Metrics) -> None:
    """Outputs that look well do not let an infinite state in."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        await bench.step(slot, 1e308)
        with np.errstate(over="ignore"), pytest.raises(InferenceFailed):
            await bench.step(slot, 1, outputs=("nothing",))
    assert (bench.state(slot), bench.slab.step(slot)) == (1e308, 1)


async def test_what_a_batch_mate_asks_for_does_not_matter(metrics: Metrics) -> None:
    """An output that is infinite for a row fails those who asked for it, and not the one beside them."""
    bench = Bench(metrics)
    asked, other = bench.acquire(), bench.acquire()
    async with serving(bench):
        results = await asyncio.gather(
            bench.step(asked, 0, outputs=("inverse",)), bench.step(other, 0), return_exceptions=True
        )
    assert bench.runner.runs == [(2, 1)]
    assert isinstance(results[0], InferenceFailed)
    assert isinstance(results[1], StepReply)
    assert [bench.slab.step(slot) for slot in (asked, other)] == [0, 1]


async def test_a_failing_batch_answers_everybody_and_the_loop_lives(metrics: Metrics) -> None:
    """When the runner itself breaks, every waiter gets an error, no state moves, and the next step works."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(4)]

    def broken() -> None:
        raise ZeroDivisionError("a fault nobody foresaw")

    async with serving(bench):
        bench.runner.before_run = broken
        results = await asyncio.gather(*[bench.step(slot, 1) for slot in slots], return_exceptions=True)
        assert all(isinstance(result, InferenceFailed) for result in results)
        assert [bench.slab.step(slot) for slot in slots] == [0] * 4
        bench.runner.before_run = lambda: None
        assert last(await bench.step(slots[0], 5, first=1)) == 5


async def test_a_slot_released_in_flight_never_leaks_into_its_next_owner(metrics: Metrics) -> None:
    """Deleted during its run and the row taken again at once: the old step is refused, the new owner starts at zero."""
    bench = Bench(metrics)
    bench.slab = bench.batcher._slab = StateSlab([PAIR], 1, time.monotonic)
    entered, go = bench.hold()
    old = bench.acquire()
    async with serving(bench):
        running, queued = bench.step(old, 8), bench.step(old, 9)
        await asyncio.to_thread(entered.wait, 10)
        row = old.row
        bench.batcher.release(old)
        new = bench.acquire()
        assert new.row == row
        go.set()
        for future in (running, queued):
            with pytest.raises(SessionNotFound):
                await future
        assert last(await bench.step(new, 3)) == 3
        assert (bench.state(new), bench.slab.step(new)) == (3, 1)
        with pytest.raises(SessionNotFound):
            bench.step(old, 1)


async def test_a_duplicate_is_answered_without_a_run(metrics: Metrics) -> None:
    """The kept reply comes back with the same arrays, flagged; another input under that number is a conflict."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        first = await bench.step(slot, 1, 2, first=1)
        runs = len(bench.runner.runs)
        again = await bench.step(slot, 1, 2, first=1)
        assert len(bench.runner.runs) == runs
        assert again.replayed
        assert first.data
        assert again.data == first.data
        with pytest.raises(StepConflict) as caught:
            await bench.step(slot, 1, 3, first=1)
        assert caught.value.extras["expected_step"] == 3
        assert bench.state(slot) == 12


async def test_a_duplicate_still_in_the_queue_waits_and_is_replayed(metrics: Metrics) -> None:
    """The same step submitted twice before the first has run is applied once."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        first, second = await asyncio.gather(bench.step(slot, 4, first=1), bench.step(slot, 4, first=1))
    assert (first.replayed, second.replayed, bench.state(slot)) == (False, True, 4)


async def test_a_reply_too_large_to_keep_is_already_applied(metrics: Metrics) -> None:
    """Beyond the keep limit a duplicate learns that it was applied, without outputs."""
    bench = Bench(metrics, keep_reply_bytes=8)
    slot = bench.acquire()
    async with serving(bench):
        await bench.step(slot, 1, 2, first=1)
        again = await bench.step(slot, 1, 2, first=1)
    assert (again.replayed, again.data, again.step) == (True, None, 2)


async def test_a_reset_takes_its_turn(metrics: Metrics) -> None:
    """What was sent before a reset is applied before it; what comes after starts at step 1 from the initial state."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        before, reset, after = bench.step(slot, 5), bench.reset(slot), bench.step(slot, 6, first=1)
        assert (last(await before), (await reset).step) == (5, 0)
        assert (last(await after), bench.state(slot), bench.slab.step(slot)) == (6, 6, 1)


async def test_a_reset_forgets_the_kept_reply(metrics: Metrics) -> None:
    """The same first step after a reset runs again; nothing from before it is replayed."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        await bench.step(slot, 5, first=1)
        await bench.reset(slot)
        again = await bench.step(slot, 5, first=1)
    assert (again.replayed, again.step, bench.state(slot)) == (False, 1, 5)


async def test_a_turn_comes_after_what_is_waiting(metrics: Metrics) -> None:
    """Asking where a session stands waits for its chunks, even those that take many runs, and moves nothing."""
    bench = Bench(metrics, max_run_steps=2)
    slot = bench.acquire()
    async with serving(bench):
        bench.step(slot, *[1.0] * 9)
        assert (await bench.turn(slot)).step == 9
        assert (await bench.turn(slot)).step == 9
    assert bench.state(slot) == 111111111


async def test_full_queues_refuse_and_say_when_to_come_again(metrics: Metrics) -> None:
    """Both the session's and the model's queue are bounded; what was refused left no trace."""
    bench = Bench(metrics, max_queue=5, max_session_queue=3)
    slots = [bench.acquire() for _ in range(2)]
    waiting = [bench.step(slots[0], 1) for _ in range(3)]
    with pytest.raises(Overloaded, match="session") as caught:
        bench.step(slots[0], 1)
    assert caught.value.extras["limit"] == 3
    assert caught.value.extras["retry_after_ms"] > 0
    waiting += [bench.step(slots[1], 1) for _ in range(2)]
    with pytest.raises(Overloaded, match="model"):
        bench.step(bench.acquire(), 1)
    async with serving(bench):
        await asyncio.gather(*waiting)
        assert last(await bench.step(slots[0], 2)) == 1112
        assert not bench.batcher.is_busy(slots[0])


async def test_a_kept_reply_does_not_hold_the_batch(metrics: Metrics) -> None:
    """What is kept is a copy: a session does not pin the outputs of all its batch-mates."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(3)]
    async with serving(bench):
        await asyncio.gather(*[bench.step(slot, 1) for slot in slots])
    kept = bench.slab.kept(slots[0])
    assert kept is not None
    assert kept.reply is not None
    assert type(kept.reply) is bytes
    assert len(kept.reply) == 8


async def test_stopping_answers_whoever_still_waits(metrics: Metrics) -> None:
    """When the task ends, waiting callers get an error that says come again, and new ones too."""
    bench = Bench(metrics)
    entered, go = bench.hold()
    slot = bench.acquire()
    async with serving(bench):
        running, queued = bench.step(slot, 1), bench.step(slot, 2)
        await asyncio.to_thread(entered.wait, 10)
    go.set()
    for future in (running, queued):
        with pytest.raises(Draining):
            await future
    assert bench.slab.step(slot) == 0
    with pytest.raises(Draining):
        bench.step(slot, 3)


async def test_random_traffic_is_folded_exactly(metrics: Metrics) -> None:
    """Random chunks, cancellations and duplicates over many sessions: each state spells its acknowledged digits."""
    rng = np.random.default_rng(0)
    bench = Bench(metrics, max_batch_size=4, max_run_steps=3, max_queue=10_000, max_session_queue=10_000)
    slots = [bench.acquire() for _ in range(8)]
    seen = dict.fromkeys(slots, 0.0)

    async def client(slot: Slot) -> None:
        step = 1
        for turn in range(40):
            if turn % 8 == 7:  # before the digits outgrow a float64
                await bench.reset(slot)
                seen[slot], step = 0.0, 1
            digits = rng.integers(0, 2, rng.integers(1, 3)).astype(float)
            if rng.random() < 0.3:
                bench.step(slot, *digits, first=step).cancel()
            future = bench.step(slot, *digits, first=step)
            if rng.random() < 0.3:
                assert (await bench.step(slot, *digits, first=step)).replayed
            reply = await future
            step = reply.step + 1
            for digit in digits:
                seen[slot] = 10 * seen[slot] + digit
            await asyncio.sleep(0)

    async with serving(bench):
        await asyncio.gather(*[client(slot) for slot in slots])
    for slot in slots:
        assert bench.state(slot) == seen[slot]
