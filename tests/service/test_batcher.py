"""The batcher's invariants, with a runner whose every move the test decides."""

import asyncio
import itertools
from contextlib import suppress

import numpy as np
import pytest

from service.errors import (
    Draining,
    InferenceFailed,
    InvalidInput,
    Overloaded,
    PayloadTooLarge,
    SessionNotFound,
    StepConflict,
)
from service.metrics import Metrics
from service.slab import Slot
from service.wire import StepReply, StepRequest
from tests.service.bench import Bench, last, serving

pytestmark = pytest.mark.anyio


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
    assert bench.runner.runs == [(1, 1), (2, 1)]
    assert isinstance(results[0], InferenceFailed)
    assert (bench.state(big), bench.slab.step(big)) == (1e308, 1)
    assert (bench.state(fine), bench.slab.step(fine)) == (1, 1)


async def test_a_state_that_leaves_the_numbers_is_refused_whatever_the_outputs_say(metrics: Metrics) -> None:
    """Outputs that look well do not let an infinite state in."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        await bench.step(slot, 1e308)
        with pytest.raises(InferenceFailed, match="not finite"):
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
    bench = Bench(metrics, capacity=1)
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


async def test_a_reply_has_its_limit(metrics: Metrics) -> None:
    """Who asks for more in one request is told how much it would be, and nothing is queued; one step always goes."""
    bench = Bench(metrics, max_reply_bytes=20)
    slot = bench.acquire()
    async with serving(bench):
        with pytest.raises(PayloadTooLarge, match=r"4 steps of y are 32 bytes: a reply has 20 at most") as caught:
            bench.batcher.submit(slot, StepRequest(np.ones(4).tobytes(), 4, ("y",)), lambda _: None)
        assert caught.value.extras == {"limit": 20}
        assert bench.batcher.is_idle
        assert last(await bench.step(slot, 1, 2)) == 12
        assert (await bench.step(slot, 3, outputs=("y", "inverse", "nothing"))).step == 3


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


async def test_what_waits_is_bounded_in_bytes(metrics: Metrics) -> None:
    """Few requests may be many bytes: the one after the limit is refused, and what was served makes room again."""
    bench = Bench(metrics, max_queue_bytes=160)
    slots = [bench.acquire() for _ in range(4)]
    bench.turn(slots[3])  # weighs nothing
    waiting = [bench.step(slot, *[1.0] * 10) for slot in slots[:2]]
    with pytest.raises(Overloaded, match="160 bytes of inputs wait for this model") as caught:
        bench.step(slots[2], 1)
    assert (caught.value.extras["limit"], caught.value.retryable) == (160, True)
    bench.turn(slots[2])
    async with serving(bench):
        await asyncio.gather(*waiting)
        for _ in range(5):
            await bench.step(slots[2], *[1.0] * 3)
            bench.step(slots[3], *[1.0] * 20).cancel()
            await bench.turn(slots[3])
    assert (bench.value("queue_depth"), bench.batcher._queues._bytes) == (0, 0)


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


async def test_more_turns_than_a_run_has_room_for_are_all_answered(metrics: Metrics) -> None:
    """Requests that need no run (turns, duplicates, conflicts) of many sessions at once: none is left lying."""
    bench = Bench(metrics, max_batch_size=3)
    slots = [bench.acquire() for _ in range(10)]
    async with serving(bench), asyncio.timeout(10):
        assert [(await turn).step for turn in [bench.turn(slot) for slot in slots]] == [0] * 10
        await asyncio.gather(*[bench.step(slot, 7, first=1) for slot in slots])
        replies = await asyncio.gather(*[bench.step(slot, 7, first=1) for slot in slots])
        assert all(reply.replayed for reply in replies)
        results = await asyncio.gather(*[bench.step(slot, 7, first=5) for slot in slots], return_exceptions=True)
        assert all(isinstance(result, StepConflict) for result in results)
    assert bench.value("queue_depth") == 0


async def test_whatever_a_session_asks_is_answered_in_order(metrics: Metrics) -> None:
    """Steps, chunks, turns, a reset and an error in the same queue: each meets what those before it left."""
    bench = Bench(metrics, max_run_steps=2)
    slot = bench.acquire()
    order: list[int] = []
    bad = InvalidInput("this one was bad from the start")

    async with serving(bench):
        asked = [
            bench.step(slot, 1),
            bench.turn(slot),
            bench.step(slot, 2, 3, 4, 5, 6),
            bench.ask(lambda answer: bench.batcher.refuse(slot, bad, answer)),
            bench.step(slot, 9, first=3),
            bench.reset(slot),
            bench.step(slot, 7),
            bench.turn(slot),
        ]
        for i, each in enumerate(asked):
            each.add_done_callback(lambda _, i=i: order.append(i))
        results = await asyncio.gather(*asked, return_exceptions=True)
    assert order == list(range(8))
    steps = [result.step if isinstance(result, StepReply) else type(result) for result in results]
    assert steps == [1, 1, 6, InvalidInput, StepConflict, 0, 1, 1]
    assert (bench.state(slot), bench.value("queue_depth")) == (7, 0)


async def test_an_input_that_is_no_number_is_refused_alone(metrics: Metrics) -> None:
    """NaN in one of five rows: that request gets its path and no run, which might hide it; the others run together."""
    bench = Bench(metrics)
    bench.runner.blind = True
    slots = [bench.acquire() for _ in range(5)]
    async with serving(bench):
        asked = [bench.step(slot, float("nan") if i == 2 else i, first=1) for i, slot in enumerate(slots)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(results[2], InvalidInput)
        assert results[2].extras["path"] == "$.inputs[0][0]"
        assert [last(results[i]) for i in (0, 1, 3, 4)] == [0, 1, 3, 4]
        assert bench.runner.runs == [(4, 1)]
        assert (bench.state(slots[2]), bench.slab.step(slots[2])) == (0, 0)
        assert last(await bench.step(slots[2], 8, first=1)) == 8
    assert bench.value("queue_depth") == 0


async def test_a_chunk_with_an_input_that_is_no_number_changes_nothing(metrics: Metrics) -> None:
    """NaN in row 5 of a chunk that runs two rows at a time: what ran is forgotten; paths count from the first row."""
    bench = Bench(metrics, max_run_steps=2)
    slot, mate = bench.acquire(), bench.acquire()
    async with serving(bench):
        bad, good = bench.step(slot, 1, 2, 3, 4, 5, np.inf, 7, first=1), bench.step(mate, *range(1, 8))
        with pytest.raises(InvalidInput) as caught:
            await bad
        assert caught.value.extras["path"] == "$.inputs[5][0]"
        assert last(await good) == 1234567
        assert (bench.state(slot), bench.slab.step(slot), bench.slab.kept(slot)) == (0, 0, None)
        assert last(await bench.step(slot, 9, first=1)) == 9
    assert bench.value("queue_depth") == 0


@pytest.mark.parametrize(("short", "rows", "most"), [(20, 1, 20), (20, 2, 20), (64, 3, 64), (0, 1, 8), (0, 5, 40)])
async def test_a_run_of_chunks_is_kept_short(metrics: Metrics, short: int, rows: int, most: int) -> None:
    """Where others step, a run takes as many steps as keep it on the loop's thread, or eight where no more could."""
    bench = Bench(metrics, max_run_steps=256)
    bench.runner.short = short
    slots = [bench.acquire() for _ in range(rows)]
    async with serving(bench):
        await bench.step(bench.acquire(), 1)
        bench.runner.runs.clear()
        await asyncio.gather(*[bench.step(slot, *[0.0] * 100) for slot in slots])
    assert sum(steps for _, steps in bench.runner.runs) == 100
    assert {size for size, _ in bench.runner.runs} == {rows}
    assert max(rows * steps for _, steps in bench.runner.runs) <= most
    assert min(steps for _, steps in bench.runner.runs[:-1]) >= max(8, 3 * (most // rows) // 4)


@pytest.mark.parametrize("little", ["a step", "a short chunk", "a block"])
async def test_runs_are_longer_where_nobody_asks_for_little(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch, little: str
) -> None:
    """They grow to what is not long, are short once somebody has asked for little, and grow again later."""
    bench = Bench(metrics, max_run_steps=256)
    bench.runner.short = 20
    backfill, other = bench.acquire(), bench.acquire()

    async def longest() -> int:
        bench.runner.runs.clear()
        await bench.step(backfill, *[0.0] * 200)
        return max(steps for _, steps in bench.runner.runs)

    async with serving(bench):
        assert 60 <= await longest() <= 80
        if little == "a block":
            await bench.block([other], [[0.0] * 8])
        else:
            await bench.step(other, *[0.0] * (1 if little == "a step" else 20))
        assert await longest() <= 20
        monkeypatch.setattr("service.batcher._QUIET_SECONDS", 0.0)
        assert 60 <= await longest() <= 80


async def test_a_door_that_cannot_deliver_harms_nobody(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    """An answer that raises is logged; the step counts, the others of the run get theirs, and the loop lives."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(3)]

    def broken(_: object) -> None:
        raise ZeroDivisionError("a door with a bug")

    async with serving(bench):
        mates = [bench.step(slot, 4) for slot in slots[:2]]
        bench.batcher.submit(slots[2], StepRequest(np.array([5.0]).tobytes(), 1, ("y",)), broken)
        bench.batcher.refuse(slots[2], InvalidInput("bad"), broken)
        assert [last(reply) for reply in await asyncio.gather(*mates)] == [4, 4]
        assert last(await bench.step(slots[2], 6, first=2)) == 56
    assert "a door with a bug" in caplog.text
    assert (bench.runner.runs, bench.value("queue_depth")) == ([(3, 1), (1, 1)], 0)


async def test_waiting_computing_and_the_rest_are_the_whole_time(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that ticks when it is read, overhead and compute of a request are its time from submit to answer."""
    ticks = itertools.count()
    monkeypatch.setattr("service.batcher.time.perf_counter", lambda: float(next(ticks)))
    bench = Bench(metrics, max_run_steps=2)
    slot = bench.acquire()
    async with serving(bench):
        submitted = next(ticks) + 1
        reply = await bench.step(slot, 1, 2, 3, 4, 5)
    whole = next(ticks) - 1 - submitted  # the last look at the clock is the one after the answer
    assert (bench.value("compute_seconds_count"), bench.value("run_steps_sum")) == (3, 5)
    assert reply.compute_seconds == bench.value("compute_seconds_sum") == 3
    assert reply.queue_seconds == bench.value("queue_seconds_sum") == 1
    assert bench.value("overhead_seconds_sum") == whole - reply.compute_seconds
    assert bench.value("overhead_seconds_count") == bench.value("queue_seconds_count") == 1
    assert bench.value("steps_total") == 5


async def test_who_waits_outside_a_full_queue_takes_no_room_in_it(metrics: Metrics) -> None:
    """Many more callers than the queue has room for: each waits for room, all get through, and none spins."""
    bench = Bench(metrics, max_queue=4, max_batch_size=2)
    slots = [bench.acquire() for _ in range(30)]
    tries = 0

    async def call(slot: Slot) -> None:
        nonlocal tries
        for _ in range(5):
            while True:
                tries += 1
                try:
                    waiting = bench.step(slot, 1)
                except Overloaded:
                    await bench.batcher.room(slot)
                else:
                    await waiting
                    break

    async with serving(bench):
        await asyncio.gather(*[call(slot) for slot in slots])
    assert [bench.state(slot) for slot in slots] == [11111] * 30
    assert tries < 30 * 5 * 10


async def test_room_is_waited_for_in_bytes_too(metrics: Metrics) -> None:
    """Who was refused for what the waiting inputs weigh is let in when there is less of it, and does not spin."""
    bench = Bench(metrics, max_queue_bytes=16)
    entered, go = bench.hold()
    slots = [bench.acquire() for _ in range(2)]
    async with serving(bench):
        first = bench.step(slots[0], 1, 2)
        await asyncio.to_thread(entered.wait, 10)
        with pytest.raises(Overloaded):
            bench.step(slots[1], 3)
        outside = asyncio.ensure_future(bench.batcher.room(slots[1]))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not outside.done()
        go.set()
        await first
        await asyncio.wait_for(outside, 5)
        assert last(await bench.step(slots[1], 3)) == 3


async def test_who_was_let_in_and_has_gone_keeps_nobody_out(metrics: Metrics) -> None:
    """Room that its finder leaves is offered to the next."""
    bench = Bench(metrics, max_queue=1)
    slots = [bench.acquire() for _ in range(5)]
    waiting = bench.step(slots[0], 1)
    outside = [asyncio.ensure_future(bench.batcher.room(slot)) for slot in slots[1:]]
    await asyncio.sleep(0)
    async with serving(bench):
        await waiting
        outside[0].cancel()
        await asyncio.wait_for(asyncio.gather(*outside[1:]), 5)


async def test_stopping_lets_in_who_waits_outside(metrics: Metrics) -> None:
    """They try again and are told that the service is stopping."""
    bench = Bench(metrics, max_queue=1)
    slots = [bench.acquire() for _ in range(2)]
    bench.step(slots[0], 1)
    with pytest.raises(Overloaded):
        bench.step(slots[1], 1)
    outside = asyncio.ensure_future(bench.batcher.room(slots[1]))
    await asyncio.sleep(0)
    task = asyncio.create_task(bench.batcher.serve())
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await outside
    with pytest.raises(Draining):
        bench.step(slots[1], 1)


async def test_after_the_stop_a_queue_that_was_full_says_so_no_more(metrics: Metrics) -> None:
    """What is refused then is refused because the service stops; nobody is sent outside to wait."""
    bench = Bench(metrics, max_queue=1)
    slots = [bench.acquire() for _ in range(2)]
    bench.step(slots[0], 1)
    task = asyncio.create_task(bench.batcher.serve())
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    with pytest.raises(Draining):
        bench.step(slots[1], 1)
    with pytest.raises(Draining):
        await bench.batcher.room(slots[1])


@pytest.mark.parametrize(("steps", "is_kept"), [(125, True), (126, False)])
async def test_a_reply_is_kept_up_to_the_limit(metrics: Metrics, steps: int, is_kept: bool) -> None:
    """Of 1,000 bytes here; clients cut their requests by it, to the byte."""
    bench = Bench(metrics)
    slot = bench.acquire()
    async with serving(bench):
        replies = [await bench.step(slot, *[0] * steps, first=1) for _ in range(2)]
    assert [reply.replayed for reply in replies] == [False, True]
    assert replies[1].data == (replies[0].data if is_kept else None)
