"""A Redis Cluster of three nodes, one of which ends, or is out of the reach of a replica."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.conftest import ALWAYS, Ground
from tests.faults.processes import Replica, Wire, junction
from tests.faults.trial import Trial
from tests.service.servers import RedisServer, cluster

NODES, REPLICAS = 3, ("replica-a", "replica-b")


class Cluster(NamedTuple):
    """Two replicas, the nodes, and by node the wire of each replica to it, by the replica's name."""

    replicas: list[Replica]
    nodes: list[RedisServer]
    wires: list[dict[str, Wire]]

    @property
    def urls(self) -> list[str]:
        """Of the replicas."""
        return [replica.url for replica in self.replicas]


async def build(stack: AsyncExitStack, folder: Path, models: Path) -> Cluster:
    """Nodes that have every write on the disk before they answer, and send clients to the ports of the wires."""
    wires: list[dict[str, Wire]] = [{} for _ in range(NODES)]
    ports = [await stack.enter_async_context(junction(each)) for each in wires]
    users = folder / "users"
    users.write_text("".join(f"user {name} on nopass ~* &* +@all\n" for name in ("default", *REPLICAS)))
    options = ALWAYS | {"aclfile": str(users)}
    nodes = await asyncio.to_thread(stack.enter_context, cluster(folder / "nodes", NODES, ports, **options))
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    replicas = []
    for name in REPLICAS:
        for node, each in zip(nodes, wires, strict=True):
            each[name] = Wire(node.port)
        replicas.append(Replica(folder / name, models, f"redis+cluster://{name}:-@{addresses}?timeout_ms=800"))
        stack.push_async_callback(replicas[-1].kill)
    await asyncio.gather(*(replica.start() for replica in replicas))
    return Cluster(replicas, nodes, wires)


@pytest.fixture
def house(runner: asyncio.Runner, ground: Ground, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Two replicas and a cluster of three."""
    return ground.build("cluster", lambda stack: build(stack, tmp_path_factory.mktemp("cluster"), models))


def test_kill_9_of_a_node(runner: asyncio.Runner, house: Cluster, trial: Trial) -> None:
    """A node of a Redis Cluster with `appendfsync always` is killed and started again."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for _ in trial.rounds(1):
                await load.answers(trial.rng.randrange(10, 60))
                node = trial.rng.choice(house.nodes)
                killed = time.monotonic()
                await asyncio.to_thread(node.kill)
                trial.faults["kill -9"] += 1
                await asyncio.sleep(trial.rng.random() / 2)
                await asyncio.to_thread(node.start)
                await load.answers(30)
                trial.recoveries.append(time.monotonic() - killed)
        trial.took(load)

    runner.run(scenario())


def test_a_partition_between_a_replica_and_a_node(runner: asyncio.Runner, house: Cluster, trial: Trial) -> None:
    """A replica does not reach one of three nodes, which the other replica does; then what was held up arrives."""

    async def scenario() -> None:
        async with trial.load(house.urls) as load:
            for _ in trial.rounds(2):
                wire = trial.rng.choice(house.wires)[trial.rng.choice(REPLICAS)]
                await load.answers(trial.rng.randrange(10, 40))
                wire.hold()
                trial.faults["partition"] += 1
                await asyncio.sleep(0.3 + trial.rng.random())
                wire.heal()
        trial.took(load)

    runner.run(scenario())
