"""Blocks: requests of many sessions that run as one array, and meet the fate that each would have met alone."""

import asyncio
from typing import Any

import numpy as np
import pytest

from service.errors import Draining, InferenceFailed, InvalidInput, Overloaded, SessionNotFound, StepConflict
from service.metrics import Metrics
from service.slab import Slot
from service.wire import Block
from tests.service.bench import Bench, last, serving

pytestmark = pytest.mark.anyio


async def test_a_block_of_replies_that_are_too_large_is_none(metrics: Metrics) -> None:
    """Its requests go one by one, and each is told."""
    bench = Bench(metrics, max_reply_bytes=20)
    slots = [bench.acquire() for _ in range(2)]
    async with serving(bench):
        assert not bench.block(slots, [[1, 2, 3], [4, 5, 6]]).taken
        assert await bench.block(slots, [[1, 2], [4, 5]]) == [12, 45]


def standing(bench: Bench, slots: list[Slot]) -> list[tuple[float, int]]:
    """State and step of each slot."""
    return [(bench.state(slot), bench.slab.step(slot)) for slot in slots]


async def test_a_block_runs_as_one(metrics: Metrics) -> None:
    """Two steps of each of three sessions are one run and one answer; states, steps and kept replies are each's own."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(3)]
    async with serving(bench):
        block = bench.block(slots, [[1, 2], [3, 4], [5, 6]], first=[1, 0, 1])
        assert block.taken
        assert bench.value("queue_depth") == 3
        assert await block == [12, 34, 56]
        assert (bench.runner.runs, standing(bench, slots)) == ([(3, 2)], [(12, 2), (34, 2), (56, 2)])
        again = [
            await bench.step(slot, *digits, first=1)
            for slot, digits in zip(slots, ((1, 2), (3, 4), (5, 6)), strict=True)
        ]
        assert [(reply.replayed, last(reply)) for reply in again] == [(True, 12), (True, 34), (True, 56)]
        assert len(bench.runner.runs) == 1
        with pytest.raises(StepConflict):
            await bench.step(slots[0], 1, 3, first=1)
    assert (bench.value("steps_total"), bench.value("batch_size_sum"), bench.value("queue_depth")) == (6, 3, 0)
    assert bench.value("queue_seconds_count") == bench.value("overhead_seconds_count") == 3


async def test_a_reply_of_a_block_is_kept_up_to_the_limit(metrics: Metrics) -> None:
    """Each session's own share counts; beyond the limit a duplicate learns that it was applied."""
    bench = Bench(metrics, keep_reply_bytes=8)
    slots = [bench.acquire() for _ in range(3)]
    async with serving(bench):
        await bench.block(slots, [[1], [2], [3]])
        assert last(await bench.step(slots[1], 2, first=1)) == 2
        await bench.block(slots, [[1, 1], [2, 2], [3, 3]])
        again = await bench.step(slots[1], 2, 2, first=2)
    assert (again.replayed, again.data, again.step) == (True, None, 3)


async def test_a_block_may_ask_for_nothing(metrics: Metrics) -> None:
    """Without outputs the states move all the same."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(2)]
    async with serving(bench):
        assert await bench.block(slots, [[1, 2], [3, 4]], outputs=()) == [2, 2]
    assert standing(bench, slots) == [(12, 2), (34, 2)]


@pytest.mark.parametrize(
    "why",
    ["busy", "busy behind a block", "idled out", "released", "too many", "too long", "queue full", "bytes full"],
)
async def test_a_block_that_cannot_run_as_one_is_not_taken(metrics: Metrics, why: str) -> None:
    """It says so at once and nothing is done: nobody is answered, nothing waits, and nobody has become busy."""
    bench = Bench(metrics, max_batch_size=4, max_queue=5, max_queue_bytes=16 if why == "bytes full" else 10_000)
    slots = [bench.acquire(idle_ttl=60) for _ in range(4)]
    rows = [[1.0]] * 4
    async with serving(bench):
        if why == "busy":
            bench.step(slots[2], 5)
        elif why == "busy behind a block":
            bench.block([slots[1]], [[1]])
            bench.step(slots[1], 5)
        elif why == "idled out":
            bench.now += 60
            for slot in slots[:3]:
                bench.slab.touch(slot)
        elif why == "released":
            bench.batcher.release(slots[3])
        elif why == "too many":
            slots, rows = [*slots, bench.acquire()], [[1.0]] * 5
        elif why == "too long":
            rows = [[1.0] * 9] * 4
        elif why == "bytes full":
            bench.block([bench.acquire()], [[1.0, 2.0]])
        else:
            bench.block([bench.acquire(), bench.acquire()], [[1]] * 2)
        waiting, busy = bench.value("queue_depth"), [bench.batcher.is_busy(slot) for slot in slots]
        block = bench.block(slots, rows)
        assert not block.taken
        assert (bench.value("queue_depth"), [bench.batcher.is_busy(slot) for slot in slots]) == (waiting, busy)


async def test_a_block_takes_its_place_in_the_line(metrics: Metrics) -> None:
    """What was there before it runs before it, together; it runs alone; what came after it runs after it."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(9)]
    order: list[str] = []
    bench.runner.before_run = lambda: order.append(str(bench.runner.runs[-1]))
    async with serving(bench):
        before = [bench.step(slot, 1) for slot in slots[:3]]
        block = bench.block(slots[3:5], [[2], [2]])
        other = bench.block(slots[5:6], [[3]])
        after = [bench.step(slot, 4) for slot in slots[6:]]
        await asyncio.gather(*before, *after, block, other)
    assert order == ["(3, 1)", "(2, 1)", "(1, 1)", "(3, 1)"]


async def test_what_comes_later_to_a_session_waits_behind_its_block(metrics: Metrics) -> None:
    """Steps, turns and resets of a session in a block are served in order after it, whoever else is ready."""
    bench = Bench(metrics)
    entered, go = bench.hold()
    slots = [bench.acquire() for _ in range(3)]
    async with serving(bench):
        bench.step(bench.acquire(), 9)
        await asyncio.to_thread(entered.wait, 10)
        block = bench.block(slots, [[1], [2], [3]])
        steps, turn, reset = [bench.step(slot, 5) for slot in slots[:2]], bench.turn(slots[0]), bench.reset(slots[2])
        assert all(bench.batcher.is_busy(slot) for slot in slots)
        go.set()
        assert await block == [1, 2, 3]
        assert [last(await step) for step in steps] == [15, 25]
        assert ((await turn).step, (await reset).step) == (2, 0)
    assert bench.value("queue_depth") == 0
    assert not any(bench.batcher.is_busy(slot) for slot in slots)


async def test_blocks_wait_behind_blocks(metrics: Metrics) -> None:
    """Of some of the same sessions, in any order: each runs as one when the last of its sessions is free."""
    bench = Bench(metrics)
    entered, go = bench.hold()
    slots = [bench.acquire() for _ in range(4)]
    async with serving(bench):
        blocks = [bench.block(slots[:2], [[1], [2]], first=[1, 1])]
        await asyncio.to_thread(entered.wait, 10)
        blocks.append(bench.block(slots[2:], [[3], [4]]))
        blocks.append(bench.block(slots[2:0:-1], [[5], [6]], first=[2, 2]))
        blocks.append(bench.block(slots, [[7]] * 4, first=[2, 3, 3, 2]))
        step = bench.step(slots[3], 8)
        assert bench.value("queue_depth") == 11 - 2  # one runs
        go.set()
        assert [await block for block in blocks] == [[1, 2], [3, 4], [35, 26], [17, 267, 357, 47]]
        assert last(await step) == 478
    assert bench.runner.runs == [(2, 1), (2, 1), (2, 1), (4, 1), (1, 1)]
    assert bench.value("queue_depth") == 0


async def test_a_block_waits_no_longer_than_a_session_may(metrics: Metrics) -> None:
    """Blocks that wait count as requests of each of their sessions."""
    bench = Bench(metrics, max_session_queue=2)
    entered, go = bench.hold()
    slots = [bench.acquire() for _ in range(2)]
    async with serving(bench):
        blocks = [bench.block(slots, [[1], [1]])]
        await asyncio.to_thread(entered.wait, 10)
        blocks += [bench.block(slots, [[i], [i]]) for i in (2, 3, 4)]
        go.set()
        assert [block.taken for block in blocks] == [True, True, True, False]
        assert [await block for block in blocks[:3]] == [[1, 1], [12, 12], [123, 123]]


async def test_a_block_behind_one_that_fails_meets_each_sessions_own_fate(metrics: Metrics) -> None:
    """A refused row of the first leaves a gap before the second's, and is nobody else's trouble."""
    bench = Bench(metrics)
    entered, go = bench.hold()
    slots = [bench.acquire() for _ in range(4)]
    async with serving(bench):
        busy = bench.step(bench.acquire(), 9)
        await asyncio.to_thread(entered.wait, 10)
        first = bench.block(slots, [[1], [np.nan], [3], [4]], first=[1, 1, 1, 1])
        second = bench.block(slots, [[5], [6], [7], [8]], first=[2, 2, 2, 2])
        bench.batcher.release(slots[2])
        go.set()
        await busy
        assert await first == [1, InvalidInput, SessionNotFound, 4]
        assert await second == [15, StepConflict, SessionNotFound, 48]
    assert standing(bench, [slots[0], slots[1], slots[3]]) == [(15, 2), (0, 0), (48, 2)]
    assert bench.value("queue_depth") == 0


@pytest.mark.parametrize(
    ("outputs", "rows", "poison", "fate"),
    [
        (("y",), [[1, 2], [3, 7], [5, 6]], 7, InferenceFailed),
        (("y",), [[1, 2], [3, np.nan], [5, 6]], None, InvalidInput),
        (("inverse",), [[1, 2], [0, 0], [5, 6]], None, InferenceFailed),
    ],
    ids=["the runtime refuses it", "an input is no number", "an output is not finite"],
)
async def test_a_bad_row_of_a_block_harms_no_other_row(
    metrics: Metrics, outputs: tuple[str, ...], rows: Any, poison: float | None, fate: type
) -> None:
    """The block is taken apart: each request meets its own fate, and what waited behind it goes on from there."""
    bench = Bench(metrics)
    bench.runner.poison, bench.runner.blind = poison, fate is InvalidInput
    slots = [bench.acquire() for _ in range(3)]
    async with serving(bench):
        block = bench.block(slots, rows, outputs=outputs)
        behind = [bench.step(slot, 8) for slot in slots]
        y = [12, None, 56]
        assert await block == [fate if value is None else value if outputs == ("y",) else 1 / value for value in y]
        if fate is InvalidInput:
            assert block.errors[1].extras["path"] == "$.inputs[1][0]"
        assert [last(reply) for reply in await asyncio.gather(*behind)] == [128, 8, 568]
        assert last(await bench.step(slots[0], 8, first=3)) == 128
    assert standing(bench, slots) == [(128, 3), (8, 1), (568, 3)]
    assert (bench.value("queue_depth"), bench.value("steps_total")) == (0, 7)


async def test_a_state_of_a_block_that_leaves_the_numbers_is_refused_whatever_the_outputs_say(metrics: Metrics) -> None:
    """Outputs that look well do not let an infinite state in; the block is taken apart."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(2)]
    async with serving(bench):
        await bench.block(slots, [[1e308], [1]])
        assert await bench.block(slots, [[1], [2]], outputs=("nothing",)) == [InferenceFailed, 0]
    assert standing(bench, slots) == [(1e308, 1), (12, 2)]


async def test_what_a_block_weighed_is_room_again(metrics: Metrics) -> None:
    """Whether it has run or was taken apart: its inputs count as long as they wait, once, and no less is refused."""
    bench = Bench(metrics, max_queue_bytes=32)
    bench.runner.poison = 7
    slots = [bench.acquire() for _ in range(2)]
    async with serving(bench):
        for digit, fate in ((0, 0), (7, InferenceFailed)) * 3:
            block = bench.block(slots, [[digit], [0]])
            assert block.taken
            assert await block == [fate, 0]
        _, go = bench.hold()
        waiting = [bench.step(slot, 0) for slot in (*slots, *slots)]
        with pytest.raises(Overloaded, match="32 bytes"):
            bench.step(slots[0], 0)
        go.set()
        await asyncio.gather(*waiting)


@pytest.mark.parametrize("when", ["waiting", "running", "running, then taken apart"])
async def test_a_slot_released_inside_a_block_leaks_nowhere(metrics: Metrics, when: str) -> None:
    """Its request is refused, the next owner of its row starts at zero, and the others of the block are applied."""
    bench = Bench(metrics, capacity=4)
    slots = [bench.acquire(idle_ttl=60) for _ in range(3)]
    async with serving(bench):
        await bench.block(slots, [[1], [1], [1]], first=[1, 1, 1])
        last_row = bench.acquire(idle_ttl=60)  # an index of -1 is this one's
        await bench.block([last_row], [[1]])
        await bench.step(last_row, 2, first=2)
        left = bench.slab.time_left(last_row)
        entered, go = bench.hold()
        blocker = bench.step(last_row, 3) if when == "waiting" else None
        if blocker:
            await asyncio.to_thread(entered.wait, 10)
        block = bench.block(slots, [[2], [2], [7]], first=[2, 2, 2])
        if not blocker:
            await asyncio.to_thread(entered.wait, 10)
        if when.endswith("apart"):
            bench.runner.poison = 7
        behind = bench.step(slots[0], 5)
        row = slots[0].row
        bench.batcher.release(slots[0])
        new = bench.acquire()
        assert new.row == row
        bench.now += 1
        go.set()
        assert await block == [SessionNotFound, 12, InferenceFailed if when.endswith("apart") else 17]
        with pytest.raises(SessionNotFound):
            await behind
        assert (bench.state(new), bench.slab.step(new), bench.slab.kept(new)) == (0, 0, None)
        assert bench.slab.time_left(last_row) == (60 if blocker else left - 1)
        assert last(await bench.step(new, 4)) == 4
    assert bench.value("queue_depth") == 0


async def test_stopping_answers_every_row_of_a_block(metrics: Metrics) -> None:
    """In flight or waiting, and whatever waits behind: each is told once to come again, and no state moves."""
    bench = Bench(metrics)
    entered, go = bench.hold()
    slots = [bench.acquire() for _ in range(4)]
    async with serving(bench):
        running = bench.block(slots[:2], [[1], [2]])
        await asyncio.to_thread(entered.wait, 10)
        waiting = bench.block(slots[2:], [[3], [4]])
        after = bench.block(slots[:2], [[5], [6]])
        last_of_all = bench.block(slots[1:3], [[7], [8]])  # in line only when both before it are through
        behind = [bench.step(slots[0], 5), bench.turn(slots[3])]
    go.set()
    assert await running == await waiting == await after == await last_of_all == [Draining, Draining]
    for each in behind:
        with pytest.raises(Draining):
            await each
    assert standing(bench, slots) == [(0, 0)] * 4
    assert not bench.block(slots, [[1]] * 4).taken


async def test_a_runner_that_breaks_answers_every_row(metrics: Metrics) -> None:
    """A fault nobody foresaw fails the block as a whole; no state moves, and the next one works."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(3)]

    def broken() -> None:
        raise ZeroDivisionError("a fault nobody foresaw")

    async with serving(bench):
        bench.runner.before_run = broken
        assert await bench.block(slots, [[1], [2], [3]]) == [InferenceFailed] * 3
        assert standing(bench, slots) == [(0, 0)] * 3
        bench.runner.before_run = lambda: None
        assert await bench.block(slots, [[1], [2], [3]]) == [1, 2, 3]
    assert bench.value("queue_depth") == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_door_that_cannot_take_a_block_harms_nobody(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    """Its answers are logged and lost; what was applied counts, the rest is refused, and the loop lives."""
    bench = Bench(metrics)
    slots = [bench.acquire() for _ in range(2)]
    calls: list[Any] = []

    def broken(*outcome: Any) -> Any:
        calls.append(outcome)
        raise ZeroDivisionError("a door with a bug")

    async with serving(bench):
        await bench.block(slots, [[1], [2]])
        if fails:
            bench.runner.before_run = broken
        block = Block(np.array([[[3.0]], [[4.0]]]), ("y",), np.zeros(2, np.uint64))
        assert bench.batcher.submit_block(slots, block, broken, lambda _: broken)
        assert (await bench.turn(slots[0])).step == (1 if fails else 2)
        assert len(calls) == (3 if fails else 1)  # the runner's own, and one a row; or one for all
        bench.runner.before_run = lambda: None
        assert last(await bench.step(slots[1], 5)) == (25 if fails else 245)
    assert "a door with a bug" in caplog.text
    assert bench.value("queue_depth") == 0


async def test_random_blocks_in_flight_are_folded_exactly(metrics: Metrics) -> None:
    """Blocks of some of the same sessions, many at a time, with bad rows: each state spells its acknowledged digits."""
    rng = np.random.default_rng(2)
    bench, taken = Bench(metrics, max_batch_size=6, max_queue_bytes=2**20), 0
    async with serving(bench):
        for _ in range(20):
            slots = [bench.acquire() for _ in range(6)]
            seen: dict[Slot, list[float]] = {slot: [] for slot in slots}
            blocks = []
            for _ in range(8):
                picked = [slots[i] for i in rng.permutation(len(slots))[: rng.integers(1, 6)]]
                rows = rng.choice([1.0, 2.0, np.nan], (len(picked), 1), p=[0.5, 0.47, 0.03]).tolist()
                blocks.append((picked, rows, bench.block(picked, rows)))
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            for picked, rows, block in blocks:
                if block.taken:
                    taken += 1
                    for slot, row, fate in zip(picked, rows, await block, strict=True):
                        seen[slot] += row if not isinstance(fate, type) else []
            for slot in slots:
                assert bench.state(slot) == float("".join(str(int(digit)) for digit in seen[slot]) or 0)
                bench.batcher.release(slot)
    assert taken > 100


async def test_random_blocks_and_steps_are_folded_exactly(metrics: Metrics) -> None:
    """Blocks, steps, duplicates, deletions and bad rows in any order: each state spells its acknowledged digits."""
    rng = np.random.default_rng(1)
    bench = Bench(metrics, max_batch_size=6, max_run_steps=3, max_queue=10_000, max_session_queue=10_000)
    bench.runner.poison = 7
    slots = [bench.acquire() for _ in range(8)]
    seen: dict[Slot, list[float]] = {slot: [] for slot in slots}
    async with serving(bench):
        for turn in range(150):
            picked = [slots[i] for i in rng.permutation(len(slots))[: rng.integers(1, 6)]]
            rows = rng.choice(
                [0.0, 1.0, 2.0, 7.0, np.nan], (len(picked), rng.integers(1, 4)), p=[0.3, 0.3, 0.34, 0.03, 0.03]
            )
            first = [len(seen[slot]) + 1 if rng.random() < 0.7 else 0 for slot in picked]
            block = bench.block(picked, rows.tolist(), first=first)
            behind = None
            if rng.random() < 0.5:
                behind = picked[0], bench.step(picked[0], 1)
            if rng.random() < 0.2:
                bench.batcher.release(picked[-1])
            assert block.taken
            fates = await block
            for slot, row, fate in zip(picked, rows.tolist(), fates, strict=True):
                if not isinstance(fate, type):
                    seen[slot] += row
            if behind is not None:
                [outcome] = await asyncio.gather(behind[1], return_exceptions=True)
                if isinstance(outcome, SessionNotFound):
                    assert behind[0].row < 0
                else:
                    seen[behind[0]].append(1)
            for i, slot in enumerate(slots):
                if slot.row < 0 or len(seen[slot]) > 10:  # before the digits outgrow a float64
                    bench.batcher.release(slot)
                    slots[i] = bench.acquire()
                    seen[slots[i]] = []
                else:
                    assert bench.state(slot) == float("".join(str(int(digit)) for digit in seen[slot]) or 0), turn
                    assert bench.slab.step(slot) == len(seen[slot])
    assert bench.value("queue_depth") == 0
