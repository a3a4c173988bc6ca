"""Replicas that end, hang and lose their store, while clients go from one to the other."""

import asyncio
import time
from functools import partial

from tests.faults.conftest import House
from tests.faults.load import Doors, http_client, persist
from tests.faults.trial import Trial


def test_kill_9_of_a_replica(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """A replica is killed at any moment; the others go on with its sessions."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for _ in trial.rounds(1):
                victim = trial.rng.choice(house.replicas)
                await load.answers(trial.rng.randrange(10, 60))
                await victim.kill()
                trial.faults["kill -9"] += 1
                killed = time.monotonic()
                await load.answers(20)
                await victim.start()
                trial.recoveries.append(time.monotonic() - killed)
        trial.took(load)

    runner.run(scenario())


def test_rolling_restart(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """Replicas are stopped with SIGTERM and started again, one after the other; each ends with 0."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for number in trial.rounds(2):
                replica = house.replicas[number % len(house.replicas)]
                await load.answers(20)
                assert await replica.stop() == 0
                trial.faults["SIGTERM"] += 1
                await load.answers(10)
                await replica.start()
        trial.took(load)

    runner.run(scenario())


def test_a_replica_that_hangs(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """A replica is stopped in the middle of its work and goes on later, with copies of sessions that have moved."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for _ in trial.rounds(2):
                replica = trial.rng.choice(house.replicas)
                await load.answers(trial.rng.randrange(10, 40))
                replica.pause()
                trial.faults["SIGSTOP"] += 1
                await asyncio.sleep(0.2 + trial.rng.random() / 2)
                replica.resume()
        trial.took(load)

    runner.run(scenario())


def test_a_partition_between_a_replica_and_the_store(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """A replica does not reach its store, for longer than a call may take; then what was held up arrives."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for _ in trial.rounds(2):
                wire = trial.rng.choice(house.wires)
                await load.answers(trial.rng.randrange(10, 40))
                wire.hold()
                trial.faults["partition"] += 1
                await asyncio.sleep(0.3 + trial.rng.random())
                wire.heal()
        trial.took(load)

    runner.run(scenario())


def test_clients_that_leave_and_requests_that_come_twice(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """A third of the requests is dropped between send and reply, and another third sent to two doors at once."""

    async def scenario() -> None:
        async with trial.load(house.urls, leaves=0.33, doubles=0.5) as load:
            for _ in trial.rounds(1):
                await load.answers(250)
        trial.took(load)

    runner.run(scenario())
    for name in ("clients that left", "sent twice at once"):
        assert trial.counts[name] > 40
        trial.faults[name] = trial.counts[name]


def test_an_id_made_anew(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """A session that one replica deleted and made anew is the new one at the other, which has a copy of the old."""

    async def scenario() -> None:
        model = trial.models[0]
        async with http_client() as http:
            for number, kind in enumerate(("json", "packed", "json_socket", "binary_socket", "standing")):
                one, other = house.urls
                doors = Doors(f"anew{number}", model, http)
                for life in range(2):
                    await persist(partial(doors.call, "PUT", one, json={"model": model.name}))
                    rows = model.rows(life, 3)
                    if kind == "standing":
                        assert (await persist(partial(doors.standing, other))).step == 0
                        await persist(partial(doors.packed, one, rows, 1))
                    else:
                        reply = await persist(partial(getattr(doors, kind), other, rows, 1))
                        assert reply.data == model.fold(rows)[0]
                    assert await persist(partial(doors.standing, one)) == model.fold(rows)[1]
                    if not life:
                        await persist(partial(doors.call, "DELETE", one))
                        doors.forget()
                await doors.close()

    runner.run(scenario())
