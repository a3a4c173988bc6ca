"""Redis that ends, hangs, is slow and full."""

import asyncio

import pytest

from tests.faults.conftest import House
from tests.faults.trial import Trial


async def disturb(house: House, trial: Trial, fault: str) -> None:
    """One fault of a kind, over when it returns."""
    redis, time = house.redis, 0.2 + trial.rng.random()
    if fault in ("killed", "restarted"):
        await asyncio.to_thread(redis.kill if fault == "killed" else redis.stop)
        await asyncio.sleep(time / 2)
        await asyncio.to_thread(redis.start)
    elif fault == "paused":
        redis.pause()
        await asyncio.sleep(time)
        redis.resume()
    elif fault == "full":
        await asyncio.to_thread(redis, "CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(time)
        await asyncio.to_thread(redis, "CONFIG", "SET", "maxmemory", "0")
    elif fault == "cut":
        for wire in house.wires:
            wire.cut()
        await asyncio.sleep(time / 2)
        house.heal()
    else:
        for wire in house.wires:
            wire.delay = 0.02
        await asyncio.sleep(time)
        for wire in house.wires:
            wire.delay = 0.0
    trial.faults[f"times {fault}"] += 1


@pytest.mark.parametrize("fault", ["killed", "restarted", "paused", "slow", "full", "cut"])
def test_redis_with_every_write_on_the_disk(runner: asyncio.Runner, house: House, trial: Trial, fault: str) -> None:
    """Redis with `appendfsync always` fails for a moment, and nothing that was acknowledged is lost."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for _ in trial.rounds(1):
                await load.answers(trial.rng.randrange(10, 60))
                await disturb(house, trial, fault)
            await load.answers(20)
        trial.took(load)

    runner.run(scenario())
