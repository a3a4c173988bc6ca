"""`deploy/haproxy.cfg` in front of replicas that come and go, and that comes and goes itself."""

import asyncio
import random
import time
from pathlib import Path

import numpy as np
import pytest

from service.client import AsyncClient
from tests.faults.conftest import House
from tests.faults.history import Model, Standing, read_snapshot
from tests.faults.processes import HAProxy, proxied
from tests.faults.trial import Trial


@pytest.mark.parametrize("routing", ["session", "random"])
def test_the_proxy_and_what_is_behind_it_come_and_go(
    runner: asyncio.Runner, house: House, trial: Trial, tmp_path: Path, routing: str
) -> None:
    """A replica behind HAProxy is killed, HAProxy too; both are started again, and another HAProxy takes over."""

    async def scenario() -> None:
        async with proxied(tmp_path, house.replicas, routing) as proxy:
            async with trial.load([proxy.url], looks=house.urls) as load:
                for _ in trial.rounds(1):
                    victim = trial.rng.choice(house.replicas)
                    await load.answers(trial.rng.randrange(10, 60))
                    await victim.kill()
                    trial.faults["kill -9"] += 1
                    await load.answers(20)
                    await proxy.kill()
                    trial.faults["kill -9 of HAProxy"] += 1
                    killed = time.monotonic()
                    await asyncio.gather(proxy.start(), victim.start())
                    await load.answers(20)
                    trial.recoveries.append(time.monotonic() - killed)
                    await proxy.reload()
                    trial.faults["reloads"] += 1
                    await load.answers(20)
            trial.took(load)

    runner.run(scenario())


class Caller:
    """A session of `service.client`, fed in steps and in a stream until it is told to stop. No error reaches it."""

    def __init__(self, model: Model, proxy: HAProxy, trial: Trial) -> None:
        self._model = model
        self._rng = random.Random(trial.rng.random())  # noqa: S311 - it shall be repeatable
        self._url = proxy.url
        self._trial = trial
        self.session = f"s{trial.rng.getrandbits(64):016x}"
        self.stopping = False
        self.rows: list[np.ndarray] = []
        self.answers = b""

    def _reading(self) -> np.ndarray:
        self.rows.append(self._model.rows(self._rng.randrange(2**32), self._rng.choice((1, 1, 3))))
        return self.rows[-1]

    async def run(self) -> None:
        """Request after request."""
        async with AsyncClient(self._url, patience=300.0) as client:
            session = await client.session(self.session, model=self._model.name)

            async def readings():  # noqa: ANN202
                while not self.stopping:
                    yield self._reading()
                    await asyncio.sleep(self._rng.random() / 100)

            async for reply in session.stream(readings()):
                self._take(reply[self._model.output])
                if self._rng.random() < 0.5:
                    self._take((await session.step(self._reading()))[self._model.output])

    def _take(self, outputs: np.ndarray) -> None:
        self.answers += outputs.tobytes()
        self._trial.counts["requests"] += 1

    def check(self, standing: Standing) -> None:
        """Every reply came once and in order, and the session is where they led."""
        outputs, wanted = self._model.fold(np.concatenate(self.rows))
        assert self.answers == outputs
        assert standing == wanted
        self._trial.counts["steps"] += standing.step
        self._trial.counts["sessions"] += 1


def test_a_rolling_restart_is_none_to_a_client_with_retries(
    runner: asyncio.Runner, house: House, trial: Trial, tmp_path: Path
) -> None:
    """Every replica behind HAProxy is stopped and started again: `service.client` gets each reply once, no error."""

    async def scenario() -> None:
        async with proxied(tmp_path, house.replicas, "session") as proxy:
            callers = [Caller(trial.models[i % len(trial.models)], proxy, trial) for i in range(6)]
            async with asyncio.TaskGroup() as tasks:
                for caller in callers:
                    tasks.create_task(caller.run())
                for _ in trial.rounds(1):
                    for replica in house.replicas:
                        await answered(callers, trial)
                        assert await replica.stop() == 0
                        trial.faults["SIGTERM"] += 1
                        await answered(callers, trial)
                        await replica.start()
                await answered(callers, trial)
                for caller in callers:
                    caller.stopping = True
            async with AsyncClient(proxy.url) as client:
                for caller in callers:
                    caller.check(read_snapshot(await (await client.session(caller.session)).snapshot()))

    runner.run(scenario())


async def answered(callers: list[Caller], trial: Trial) -> None:
    """Until each caller has had ten more replies, or so: sixty of all."""
    goal = trial.counts["requests"] + 10 * len(callers)
    while trial.counts["requests"] < goal:  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.02)
