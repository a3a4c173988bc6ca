"""What is left where Redis keeps less than everything, and where a replica takes over."""

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.conftest import Ground, House, build
from tests.faults.load import Doors, Load, LostAnswerError, http_client, persist
from tests.faults.processes import Wire
from tests.faults.trial import Trial
from tests.service.servers import RedisServer, running, until

REPLICATION = {"repl_diskless_sync_delay": "0", "repl_timeout": "600"}
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


class Pair:
    """Two servers of Redis, one of which follows the other through a wire.

    Attributes:
        primary, replica: now.
        link: what the replica hears.
    """

    def __init__(self, primary: RedisServer, replica: RedisServer, link: Wire) -> None:
        self.primary = primary
        self.replica = replica
        self.link = link

    async def follow(self) -> None:
        """Returns when the replica has what the primary has."""
        self.link.target = self.primary.port
        self.link.heal()

        def follow() -> None:
            self.replica("REPLICAOF", "127.0.0.1", str(self.link.port))
            until(lambda: self.replica("INFO", "replication")["master_link_status"] == "up")

        await asyncio.to_thread(follow)


async def pair_up(stack: AsyncExitStack, folder: Path, first: RedisServer | None = None) -> Pair:
    """A server, and one that follows it."""
    first = first or stack.enter_context(running(folder / "first", **REPLICATION))
    second = stack.enter_context(running(folder / "second", **REPLICATION))
    pair = Pair(first, second, await stack.enter_async_context(Wire(first.port).open()))
    await pair.follow()
    return pair


class Sure(NamedTuple):
    """Replicas with `?replicas=1`, and their pair."""

    house: House
    pair: Pair


@pytest.fixture
def sure(runner: asyncio.Runner, ground: Ground, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Sure:
    """Replicas of the service that answer what a replica of Redis has."""

    async def lay(stack: AsyncExitStack) -> Sure:
        folder = tmp_path_factory.mktemp("sure")
        house = await build(stack, folder, models, "?timeout_ms=800&replicas=1", is_started=False, **REPLICATION)
        pair = await pair_up(stack, folder, house.redis)
        await asyncio.gather(*(replica.start() for replica in house.replicas))
        return Sure(house, pair)

    return ground.build("sure", lay)


async def fail_over(trial: Trial, load: Load, house: House, pair: Pair) -> None:
    """A primary whose replica lags is killed; the replica takes over, and is followed by it."""
    pair.link.hold()
    if load.may_lose:
        await load.answers(trial.rng.randrange(1, 20))
    else:
        await asyncio.sleep(0.3 + trial.rng.random())
    await asyncio.to_thread(pair.primary.kill)
    pair.link.cut()
    await asyncio.to_thread(pair.replica, "REPLICAOF", "NO", "ONE")
    lead(house, pair.replica)
    trial.faults["failover"] += 1
    pair.primary, pair.replica = pair.replica, pair.primary
    await asyncio.to_thread(pair.replica.start)
    await pair.follow()
    await load.answers(20)


def test_failover_without_replicas_that_confirm(
    runner: asyncio.Runner, house: House, trial: Trial, tmp_path: Path
) -> None:
    """A primary whose replica lags is killed, and the replica takes over: what it lacks is lost, and told."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            pair = await pair_up(stack, tmp_path)
            lead(house, pair.primary)
            async with trial.load(house.urls, may_lose=True, leaves=0.0, doubles=0.0) as load:
                for _ in trial.rounds(1):
                    await load.answers(30)
                    await fail_over(trial, load, house, pair)
            trial.took(load)
        lead(house, house.redis)

    runner.run(scenario())
    assert trial.counts["requests lost"]


def test_failover_with_a_replica_that_confirms(runner: asyncio.Runner, sure: Sure, trial: Trial) -> None:
    """A primary whose replica lags is killed, and the replica takes over: with `?replicas=1` nothing is lost."""

    async def scenario() -> None:
        async with trial.load(sure.house.urls) as load:
            for _ in trial.rounds(1):
                await load.answers(30)
                await fail_over(trial, load, *sure)
        trial.took(load)

    runner.run(scenario())


def test_what_no_replica_has_is_not_answered(runner: asyncio.Runner, sure: Sure, trial: Trial) -> None:
    """With `?replicas=1`, a step that no replica has confirmed is not acknowledged by a retry either, anywhere."""

    async def scenario() -> None:
        urls, model = sure.house.urls, trial.models[0]
        async with http_client() as http:
            doors = [Doors(f"{trial.rng.getrandbits(64):x}", model, http) for _ in range(4)]
            for number, door in enumerate(doors):
                for url in urls:
                    await persist(partial(door.call, "PUT", url, json={"model": model.name}))
                await persist(partial(door.packed, urls[number % 2], model.rows(number, 3), 1))
            sure.pair.link.hold()
            answered = []

            async def insist(number: int, door: Doors) -> None:
                for url in [*urls, *urls]:
                    with suppress(LostAnswerError):
                        answered.append(await door.packed(url, model.rows(9 + number, 1), 4))

            await asyncio.gather(*(insist(number, door) for number, door in enumerate(doors)))
            assert not answered
            sure.pair.link.heal()

    runner.run(scenario())
