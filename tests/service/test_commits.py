"""The way of a run through the store: what comes up while others are still being saved."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.errors import Draining, InferenceFailed, SessionNotFound
from service.ledger import Ledger, StoredSlot, packed
from service.metrics import Metrics
from service.stores import Save, Saved
from tests.service.bench import SNAPSHOTS, Bench, last, serving
from tests.service.replicas import Record, SharedStore

pytestmark = pytest.mark.anyio


class Gate(SharedStore):
    """A store whose saves wait until they may go on."""

    is_shared = False

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()

    async def save(self, saves: Sequence[Save]) -> Sequence[bool]:
        """See `SharedStore`."""
        await self.open.wait()
        return await super().save(saves)


class StoredBench(Bench):
    """A bench whose slots are in a store."""

    def __init__(self, metrics: Metrics, **limits: int) -> None:
        self.store = Gate()
        self.ledger = Ledger(self.store, metrics)
        super().__init__(metrics, ledger=self.ledger, **limits)

    async def create(self, name: str) -> StoredSlot:
        """A new session's slot."""
        slot = StoredSlot(id=name, created_at=0.0, token=self.ledger.token())
        self.slab.acquire(slot)
        await self.store.create(Record(name, "m", "1", 9.0, 0.0, {}), slot.token, Saved(0, b""))
        return slot


@asynccontextmanager
async def stored(bench: StoredBench) -> AsyncIterator[None]:
    """Runs the batcher's task and the ledger's."""
    bench.ledger.start()
    async with serving(bench):
        yield
    await bench.ledger.close()


async def test_sessions_that_were_saved_before_their_batch_has_ended_go_on(metrics: Metrics) -> None:
    """Where a batch meets its fate row by row, the first rows are saved, answered and asked for more meanwhile."""
    bench = StoredBench(metrics)
    slots = [await bench.create(name) for name in "abc"]
    bench.runner.poison, bench.runner.short = 3, False
    async with stored(bench):
        replies = await asyncio.gather(
            *[bench.step(slot, i + 1) for i, slot in enumerate(slots)], return_exceptions=True
        )
        assert isinstance(replies[2], InferenceFailed)
        assert [last(reply) for reply in replies[:2]] == [1, 2]
        more = [bench.step(slot, digit) for slot in slots[:2] for digit in (4, 5)]
        assert [last(await reply) for reply in more] == [14, 145, 24, 245]


async def test_room_is_told_when_what_was_saved_leaves_it(metrics: Metrics) -> None:
    """Who waits for room of the model is let in after a save, although nobody stands in line."""
    bench = StoredBench(metrics, max_queue=2)
    slots = [await bench.create(name) for name in "abc"]
    bench.store.open.clear()
    async with stored(bench):
        first = [bench.step(slot, 1) for slot in slots[:2]]
        waiting = asyncio.create_task(bench.batcher.room(slots[2]))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        bench.store.open.set()
        await asyncio.gather(*first)
        await asyncio.wait_for(waiting, 5)


async def test_who_left_takes_no_room_from_who_still_waits(metrics: Metrics) -> None:
    """Two wait for the room of one; the first of them goes, and the second is let in."""
    bench = StoredBench(metrics, max_queue=1)
    slots = [await bench.create(name) for name in "abc"]
    bench.store.open.clear()
    async with stored(bench):
        step = bench.step(slots[0], 1)
        gone, waiting = [asyncio.create_task(bench.batcher.room(slot)) for slot in slots[1:]]
        await asyncio.sleep(0)
        gone.cancel()
        bench.store.open.set()
        await step
        await asyncio.wait_for(waiting, 5)


async def test_a_step_that_is_being_saved_at_the_end_is_answered_by_its_save(metrics: Metrics) -> None:
    """It may be applied: "stopping, nothing was done" is for those behind it."""
    bench = StoredBench(metrics)
    slot = await bench.create("a")
    bench.ledger.start()
    bench.store.open.clear()
    task = asyncio.create_task(bench.batcher.serve())
    saved, behind = bench.step(slot, 1), bench.step(slot, 2)
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(Draining):
        await behind
    assert not saved.done()
    bench.store.open.set()
    assert (await saved).step == 1
    with pytest.raises(Draining):
        bench.step(slot, 2)
    assert not bench.batcher.is_busy(slot)
    await bench.ledger.close()


async def test_a_block_waits_behind_one_that_is_being_saved(metrics: Metrics) -> None:
    """It runs once that is saved, from where it left the sessions; a third that shares one of them comes after."""
    bench = StoredBench(metrics)
    slots = [await bench.create(name) for name in "abc"]
    bench.store.open.clear()
    async with stored(bench):
        blocks = [bench.block(slots[:2], [[1], [2]])]
        for _ in range(10):
            await asyncio.sleep(0)
        blocks += [bench.block(slots[:2], [[3], [4]]), bench.block(slots[1:], [[5], [6]])]
        for _ in range(10):
            await asyncio.sleep(0)
        assert [block.taken for block in blocks] == [True] * 3
        assert bench.runner.runs == [(2, 1)]
        bench.store.open.set()
        assert [await block for block in blocks] == [[1, 2], [13, 24], [245, 6]]
        assert bench.runner.runs == [(2, 1)] * 3
        assert [stored.step for stored in [await bench.store.load(name) for name in "abc"]] == [2, 3, 1]


async def test_who_is_being_saved_is_not_told_that_the_batch_has_failed(metrics: Metrics) -> None:
    """A batch that meets its fate row by row fails outside the runtime at the second: the first is saved, and told."""
    bench = StoredBench(metrics)
    slots = [await bench.create(name) for name in "ab"]
    run = bench.runner.run

    def breaks(inputs: Any, state: Sequence[Any], outputs: Sequence[str]) -> Any:
        if len(inputs) == 2:
            raise InferenceFailed("poison")
        if (inputs == 2).any():
            raise ValueError("nobody thought of this")
        return run(inputs, state, outputs)

    bench.runner.run = breaks  # type: ignore[method-assign]
    async with stored(bench):
        bench.store.open.clear()
        one, two = bench.step(slots[0], 1), bench.step(slots[1], 2)
        with pytest.raises(InferenceFailed):
            await two
        bench.store.open.set()
        assert last(await one) == 1
        assert last(await bench.step(slots[0], 3)) == 13


async def test_who_was_overtaken_at_the_end_is_told(metrics: Metrics) -> None:
    """Its step would be run again; but nothing runs any more."""
    bench = StoredBench(metrics)
    slot = await bench.create("a")
    bench.ledger.start()
    bench.store.open.clear()
    task = asyncio.create_task(bench.batcher.serve())
    step = bench.step(slot, 1)
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    [standing] = packed(SNAPSHOTS, *SNAPSHOTS.start({}).commits(slot))
    assert await SharedStore.save(bench.store, [Save("a", slot.token, b"another's".ljust(16), standing)]) == [True]
    bench.store.open.set()
    with pytest.raises(Draining):
        await asyncio.wait_for(step, 5)
    assert not bench.batcher.is_busy(slot)
    await bench.ledger.close()


async def test_what_waits_for_a_save_when_the_ledger_closes_is_saved(metrics: Metrics) -> None:
    """Behind the group commit that is under way: it was run, and its caller is still there."""
    bench = StoredBench(metrics)
    slots = [await bench.create(name) for name in "ab"]
    bench.ledger.start()
    bench.store.open.clear()
    async with serving(bench):
        steps = []
        for slot in slots:
            steps.append(bench.step(slot, 1))
            for _ in range(10):
                await asyncio.sleep(0)
        closing = asyncio.create_task(bench.ledger.close())
        await asyncio.sleep(0)
        bench.store.open.set()
        await closing
        assert [(await asyncio.wait_for(step, 5)).step for step in steps] == [1, 1]
    assert bench.store.saves == [1, 1]
    assert [(await bench.store.load(name)).step for name in "ab"] == [1, 1]


async def test_who_leaves_while_a_move_is_saved_leaves_no_copy_in_doubt(metrics: Metrics) -> None:
    """It may be done: who waits behind it is told, and the next call loads the session as it is."""
    bench = StoredBench(metrics)
    slot = await bench.create("a")
    dropped: list[StoredSlot] = []
    bench.ledger.on_drop = dropped.append

    async def reset() -> None:
        async with bench.batcher.hold(slot):
            await bench.batcher.move(slot, SNAPSHOTS.start({}))

    async with stored(bench):
        await bench.step(slot, 1)
        bench.store.open.clear()
        moving = asyncio.create_task(reset())
        for _ in range(10):
            await asyncio.sleep(0)
        behind = bench.step(slot, 2)
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        with pytest.raises(SessionNotFound):
            await asyncio.wait_for(behind, 5)
        bench.store.open.set()
    assert (slot.is_live, dropped) == (False, [slot])
    assert (await bench.store.load("a")).step == 0
