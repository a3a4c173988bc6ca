"""What is left where Redis keeps less than everything, and where a replica takes over."""

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import House, build
from tests.faults.load import Doors, Load, LostAnswerError, http_client, persist
from tests.faults.processes import Wire
from tests.faults.trial import Trial
from tests.service.servers import RedisServer, running, until

LESS = {
    "none": {},
    "snapshots": {},
    "appendfsync everysec": {"appendonly": "yes", "appendfsync": "everysec"},
}


@pytest.mark.parametrize("persistence", LESS)
def test_redis_with_less_persistence(
    runner: asyncio.Runner, house: House, trial: Trial, persistence: str, tmp_path: Path
) -> None:
    """Redis is killed and comes back with less than it had: sessions are at an earlier step, or gone, and say so.

    With `everysec` that is what it had not yet written because it waited for the disk: often nothing.
    """

    async def scenario() -> None:
        with running(tmp_path, **LESS[persistence]) as redis:
            lead(house, redis)
            async with trial.load(house.urls, may_lose=True, leaves=0.0, doubles=0.0) as load:
                for _ in trial.rounds(1):
                    await load.answers(30)
                    if persistence == "snapshots":
                        await asyncio.to_thread(redis, "SAVE")
                        await load.answers(30)
                    await asyncio.to_thread(redis.kill)
                    trial.faults["kill -9"] += 1
                    await asyncio.to_thread(redis.start)
                    await load.answers(30)
            trial.took(load)
        lead(house, house.redis)

    runner.run(scenario())
    if persistence != "appendfsync everysec":
        assert trial.counts["requests lost"]


def lead(house: House, redis: RedisServer) -> None:
    """Has the wires lead to another server."""
    for wire in house.wires:
        wire.cut()
        wire.target = redis.port
        wire.heal()


async def fail_over(trial: Trial, load: Load, house: House, pair: list[RedisServer], link: Wire) -> None:
    """A primary whose replica lags is killed; the replica takes over, and is followed by it."""
    primary, replica = pair
    link.hold()
    if load.may_lose:
        await load.answers(trial.rng.randrange(1, 20))
    else:
        await asyncio.sleep(0.3 + trial.rng.random())
    await asyncio.to_thread(primary.kill)
    link.cut()
    await asyncio.to_thread(replica, "REPLICAOF", "NO", "ONE")
    lead(house, replica)
    trial.faults["failover"] += 1
    link.target = replica.port
    link.heal()
    await asyncio.to_thread(primary.start)
    await asyncio.to_thread(follow, primary, replica, link)
    pair.reverse()
    await load.answers(20)


def follow(replica: RedisServer, primary: RedisServer, link: Wire) -> None:
    """Returns when the replica has what the primary has."""
    replica("REPLICAOF", "127.0.0.1", str(link.port))
    until(lambda: replica("INFO", "replication")["master_link_status"] == "up")


@pytest.mark.parametrize("replicas", [0, 1])
def test_failover(
    runner: asyncio.Runner, house: House, trial: Trial, replicas: int, models: Path, tmp_path: Path
) -> None:
    """A primary whose replica lags is killed, and the replica takes over: with `?replicas=1` nothing is lost."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            mine = house
            options = {"repl_diskless_sync_delay": "0", "repl_timeout": "600"}
            if replicas:
                query = "?timeout_ms=800&replicas=1"
                mine = await build(stack, tmp_path / "house", models, query, is_started=False, **options)
                first = mine.redis
            else:
                first = stack.enter_context(running(tmp_path / "first", **options))
                lead(mine, first)
            second = stack.enter_context(running(tmp_path / "second", **options))
            link = await stack.enter_async_context(Wire(first.port).open())
            await asyncio.to_thread(follow, second, first, link)
            if replicas:
                await asyncio.gather(*(replica.start() for replica in mine.replicas))
            pair = [first, second]
            async with trial.load(mine.urls, may_lose=not replicas, leaves=0.0, doubles=0.0) as load:
                for _ in trial.rounds(1):
                    await load.answers(30)
                    await fail_over(trial, load, mine, pair, link)
            trial.took(load)
        lead(house, house.redis)

    runner.run(scenario())
    assert bool(trial.counts["requests lost"]) == (not replicas)


def test_what_no_replica_has_is_not_answered(
    runner: asyncio.Runner, house: House, trial: Trial, models: Path, tmp_path: Path
) -> None:
    """With `?replicas=1`, a step that no replica has confirmed is not acknowledged by a retry either, anywhere."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack, http_client() as http:
            query = "?timeout_ms=800&replicas=1"
            mine = await build(stack, tmp_path / "house", models, query, is_started=False)
            second = stack.enter_context(running(tmp_path / "second"))
            link = await stack.enter_async_context(Wire(mine.redis.port).open())
            await asyncio.to_thread(follow, second, mine.redis, link)
            await asyncio.gather(*(replica.start() for replica in mine.replicas))
            model = trial.models[0]
            doors = [Doors(f"s{i}", model, http) for i in range(4)]
            for number, door in enumerate(doors):
                for url in mine.urls:
                    await persist(partial(door.call, "PUT", url, json={"model": model.name}))
                await persist(partial(door.packed, mine.urls[number % 2], model.rows(number, 3), 1))
            link.hold()
            answered = []

            async def insist(number: int, door: Doors) -> None:
                for url in [*mine.urls, *mine.urls]:
                    with suppress(LostAnswerError):
                        answered.append(await door.packed(url, model.rows(9 + number, 1), 4))

            await asyncio.gather(*(insist(number, door) for number, door in enumerate(doors)))
            assert not answered
            link.heal()

    runner.run(scenario())
