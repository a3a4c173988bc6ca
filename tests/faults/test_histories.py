"""Many writers of one session at once: some order of their calls explains every answer."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import pytest

from tests.faults.conftest import KEEP, House
from tests.faults.history import Call, Checker, Model, shorten
from tests.faults.load import Doors, LostAnswerError, RefusedError, http_client, persist
from tests.faults.processes import Replica
from tests.faults.trial import Trial


class Writer:
    """One of those who call the same session."""

    def __init__(self, history: list[Call], doors: Doors, urls: Sequence[str], rng: random.Random) -> None:
        self._history = history
        self._doors = doors
        self._urls = urls
        self._rng = rng
        self.step = 0

    async def call(self, kind: str, goal: int = 0) -> None:
        """One call at any replica, over any door, and what became of it."""
        url, model, rng = self._rng.choice(self._urls), self._doors.model, self._rng
        call = Call(kind, time.monotonic(), goal=goal)
        if kind == "step":
            call.rows = model.rows(rng.randrange(2**32), rng.choice((1, 2, 3)))
            call.first = rng.choice((None, self.step + 1))
        self._history.append(call)
        try:
            if call.rows is not None:
                reply = await rng.choice(self._doors.kinds)(url, call.rows, call.first)
                call.step, call.reply = reply.step, reply.data
            elif kind == "rollback":
                body = (await self._doors.call("POST", url, "/rollback", json={"step": goal})).json()
                call.step = body["step"]
            else:
                call.state = await self._doors.standing(url)
                call.step = call.state.step
        except LostAnswerError:
            return
        except RefusedError as error:
            if error.code not in ("step_conflict", "step_not_kept"):
                raise
            call.refused = True
            call.step = error.body.get("expected_step", 1) - 1
        call.answered = time.monotonic()
        self.step = call.step


def test_writers_of_one_session(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """Steps with and without a number, rollbacks and looks, all at once at two replicas that lose their store."""
    histories: list[tuple[Model, list[Call]]] = []

    async def disturb() -> None:
        while True:
            await asyncio.sleep(trial.rng.random() / 3)
            wire = trial.rng.choice(house.wires)
            (wire.hold if trial.rng.random() < 0.5 else wire.cut)()
            trial.faults["partitions"] += 1
            await asyncio.sleep(trial.rng.random() / 3)
            wire.heal()

    async def write(writer: Writer, calls: int) -> None:
        for _ in range(calls):
            kind = trial.rng.choice(("step", "step", "step", "rollback", "look"))
            await writer.call(kind, goal=max(0, writer.step - trial.rng.randrange(4)))
            await asyncio.sleep(trial.rng.random() / 20)

    async def scenario() -> None:
        async with http_client() as http:
            for number in trial.rounds(1):
                writers: list[Writer] = []
                for session in range(3):
                    model, history = trial.models[session % len(trial.models)], []
                    histories.append((model, history))
                    for _ in range(3):
                        doors = Doors(f"history{number}-{session}", model, http, seconds=0.5)
                        rng = random.Random(trial.rng.random())  # noqa: S311 - it shall be repeatable
                        writers.append(Writer(history, doors, house.urls, rng))
                    await persist(partial(doors.call, "PUT", house.urls[0], json={"model": model.name}))
                faults = asyncio.create_task(disturb())
                await asyncio.gather(*(write(writer, 8) for writer in writers))
                faults.cancel()
                house.heal()
                await asyncio.sleep(1.0)  # for what nobody waits for any more
                for writer in writers:
                    for url in house.urls:
                        writer._urls = [url]
                        await writer.call("look")
                    await writer._doors.close()

    runner.run(scenario())
    for model, history in histories:
        trial.counts["sessions"] += 1
        trial.counts["requests"] += len(history)
        trial.counts["retries"] += sum(call.answered == inf for call in history)
        trial.counts["steps"] += sum(len(call.rows) for call in history if call.rows is not None and call.reply)
        assert Checker(model, KEEP).explains(history), shorten(history)


async def forks_and_rollbacks(urls: list[str], trial: Trial) -> None:
    """A hundred at once, on ten sessions; each fork then goes its own way."""
    async with http_client() as http:

        async def fork(history: list[Call], writer: Writer, name: str, rows: int) -> None:
            call = Call("look", time.monotonic())
            history.append(call)
            url = trial.rng.choice(urls)
            try:
                reply = await writer._doors.call("POST", url, "/fork", json={"id": name})
            except LostAnswerError:
                return
            call.answered, call.step = time.monotonic(), reply.json()["step"]
            doors = Doors(name, writer._doors.model, http, seconds=20.0)
            call.state = await persist(lambda: doors.standing(trial.rng.choice(urls)))
            more = doors.model.rows(rows, 2)
            stepped = await persist(lambda: doors.packed(trial.rng.choice(urls), more, call.step + 1))
            forks.append((doors, stepped.step))

        for number in trial.rounds(1):
            forks: list[tuple[Doors, int]] = []
            histories: list[tuple[Model, list[Call]]] = []
            work = []
            for session in range(10):
                model, history = trial.models[session % len(trial.models)], []
                histories.append((model, history))
                doors = Doors(f"{trial.rng.getrandbits(64):x}", model, http, seconds=20.0)
                await persist(partial(doors.call, "PUT", urls[0], json={"model": model.name}))
                writer = Writer(history, doors, urls, trial.rng)
                for _ in range(4):
                    await writer.call("step")
                ends = [0, *(call.step for call in history if call.answered < inf)]
                work += [fork(history, writer, f"{doors.session}-{i}", number) for i in range(5)]
                work += [writer.call("rollback", goal=trial.rng.choice(ends)) for _ in range(5)]
                trial.rng.shuffle(work)
            await asyncio.gather(*work)
            trial.faults["forks and rollbacks at once"] += len(work)
            trial.counts["sessions"] += len(forks) + len(histories)
            trial.counts["requests"] += len(work)
            for doors, step in forks:
                assert {(await persist(partial(doors.standing, url))).step for url in urls} == {step}
            for model, history in histories:
                assert Checker(model, KEEP).explains(history), shorten(history)


def test_a_hundred_forks_and_rollbacks_on_two_replicas(runner: asyncio.Runner, house: House, trial: Trial) -> None:
    """A hundred forks and rollbacks at once, anywhere: each is done at some moment, as a whole."""
    runner.run(forks_and_rollbacks(house.urls, trial))


def test_a_hundred_forks_and_rollbacks_on_one_server(
    runner: asyncio.Runner, models: Path, trial: Trial, tmp_path: Path
) -> None:
    """The same on one process with its SQLite file."""

    async def scenario() -> None:
        replica = await Replica(tmp_path, models, f"sqlite:///{tmp_path}/sessions.db").start()
        try:
            await forks_and_rollbacks([replica.url], trial)
        finally:
            await replica.kill()

    runner.run(scenario())


@pytest.fixture
def told(models: Path) -> tuple[Checker, list[Call]]:
    """A history that is right: two steps at once, a third one after them, a look, and a rollback."""
    model = Model(models / "toy" / "1")
    one, two, three = (model.rows(seed, 2) for seed in range(3))

    def after(*rows: object) -> tuple[bytes, object]:
        import numpy as np

        return model.fold(np.concatenate(rows))  # type: ignore[arg-type]

    replies = [after(two)[0], after(two, one)[0][-32:], after(two, one, three)[0][-32:]]
    state = after(two, one, three)[1]
    return Checker(model, KEEP), [
        Call("step", 1.0, one, answered=4.0, step=4, reply=replies[1]),
        Call("step", 2.0, two, answered=3.0, step=2, reply=replies[0]),
        Call("step", 5.0, three, first=5, answered=6.0, step=6, reply=replies[2]),
        Call("look", 7.0, answered=8.0, step=6, state=state),  # type: ignore[arg-type]
        Call("rollback", 9.0, goal=4, answered=10.0, step=4),
        Call("step", 11.0, three, first=9, answered=12.0, refused=True, step=4),
    ]


def test_the_checker_knows_a_right_history(told: tuple[Checker, list[Call]]) -> None:
    """Whichever of those who are at it at once went first, and with a call that nobody knows the end of."""
    checker, history = told
    assert checker.explains(history)
    lost = replace(history[2], answered=inf, reply=b"")
    assert checker.explains([*history[:2], lost, *history[3:]])
    unknown = Call("step", 0.0, checker.model.rows(9, 1))
    assert checker.explains([*history, unknown])


@pytest.mark.parametrize(
    ("number", "wrong"),
    [
        (0, {"answered": 1.5}),  # it was over before the one that it follows began
        (0, {"step": 2}),  # both say that they were the first
        (2, {"reply": bytes(32)}),  # another output
        (2, {"step": 8}),  # done twice
        (2, {"refused": True, "step": 4}),  # refused without a reason
        (3, {"step": 4, "state": None}),  # it looks back
        (4, {"goal": 3, "step": 3}),  # no request ended there
        (5, {"step": 6}),  # not where the rollback led
        (5, {"first": 5}),  # refused, and it was next
    ],
)
def test_the_checker_knows_a_wrong_history(
    told: tuple[Checker, list[Call]], number: int, wrong: dict[str, object]
) -> None:
    """With one answer that no order explains."""
    checker, history = told
    history[number] = replace(history[number], **wrong)  # type: ignore[arg-type]
    assert not checker.explains(history)
