"""What the fault tests share: models, a loop that their wires live in, trials, and the report."""

import asyncio
import os
import re
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.faults.history import Model
from tests.faults.processes import Replica, Wire
from tests.faults.trial import MINUTES, SEED, Trial
from tests.service import toys
from tests.service.servers import RedisServer, free_port, running

SHIPPED = "sensors"
TRIALS = pytest.StashKey[list[Trial]]()
SHARE = pytest.StashKey[float]()
FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, and shares the minutes out."""
    here = Path(__file__).parent
    mine = [item for item in items if item.path.is_relative_to(here)]
    trials = [item for item in mine if "trial" in getattr(item, "fixturenames", ())]
    for item in mine:
        item.add_marker(pytest.mark.faults)
        if MINUTES:
            item.add_marker(pytest.mark.timeout(60 * MINUTES + 300))
    config.stash[TRIALS] = []
    config.stash[SHARE] = 60 * MINUTES / max(1, len(trials))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Notes whether a test failed, and whether a trial passed."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    trial = getattr(item, "funcargs", {}).get("trial")
    if report.when == "call" and trial is not None:
        trial.passed = report.passed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The report, in the long form; also to the file that FAULTS_REPORT names."""
    trials = config.stash[TRIALS]
    if MINUTES and trials:
        text = report(trials)
        terminalreporter.write_line(text)
        if path := os.environ.get("FAULTS_REPORT"):
            Path(path).write_text(text)


def report(trials: list[Trial]) -> str:
    """What was tried, in a sentence and in a table for each part."""
    tried: Counter[str] = sum((trial.counts for trial in trials), Counter())
    kinds = {(trial.part, name) for trial in trials for name in trial.faults}
    faults = sum(sum(trial.faults.values()) for trial in trials)
    failed = [trial for trial in trials if not trial.passed]
    verdict = f"**{len(failed)} of {len(trials)} trials failed.**" if failed else "None was wrong, lost or doubled"
    lines = [
        "# What was tried, and what became of it\n",
        f"`make faults MINUTES={MINUTES:g} SEED={SEED}`: {faults:,} faults of {len(kinds)} kinds in {len(trials)} "
        f"trials, under {tried['sessions']:,} sessions that had {tried['steps']:,} steps acknowledged in "
        f"{tried['requests']:,} requests. {verdict}; "
        f"{tried['requests lost']:,} requests are gone where a store keeps less than it acknowledges, and each of "
        "their clients was told.\n",
        f"Sessions of a toy and of `{SHIPPED}`, over HTTP and WebSocket, in JSON and in bytes, on real processes. "
        "After each trial every session is held against an ONNX Runtime loop over what was acknowledged, at every "
        "replica, bit for bit, and every answer too. Times are those of a busy machine.\n",
    ]
    for part, members in groupby(trials, lambda trial: trial.part):
        lines += [
            f"## {part}\n",
            "| what happened | faults | sessions | steps | requests | sent again | longest request, s | back after, s "
            "| wrong, lost or doubled |",
            "|---|---|---:|---:|---:|---:|---:|---:|---|",
            *map(row, members),
            "",
        ]
    return "\n".join(lines)


def row(trial: Trial) -> str:
    """Of a trial."""
    counts = trial.counts
    faults = ", ".join(f"{count:,} {name}" for name, count in trial.faults.items())
    numbers = [f"{counts[name]:,}" if counts[name] else "" for name in ("sessions", "steps", "requests", "retries")]
    longest = f"{trial.longest:.1f}" if trial.longest else ""
    back = f"{median(trial.recoveries):.1f}, most {max(trial.recoveries):.1f}" if trial.recoveries else ""
    lost = f"{counts['requests lost']:,} requests lost, each told" if counts["requests lost"] else "0"
    cells = [trial.promise, faults, *numbers, longest, back, lost if trial.passed else "**FAILED**"]
    return f"| {' | '.join(cells)} |"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a toy and a shipped model."""
    root = tmp_path_factory.mktemp("models")
    toys.save_leaky(root)
    shutil.copytree(Path(__file__).parents[2] / "models" / SHIPPED, root / SHIPPED)
    return root


@pytest.fixture
def trial(request: pytest.FixtureRequest, models: Path) -> Trial:
    """Of the test that asks."""
    config = request.config
    folds = [Model(models / name / "1") for name in ("toy", SHIPPED)]
    promise = re.sub(r"\s+", " ", request.function.__doc__.partition("\n\n")[0]).rstrip(". ")
    case = request.node.callspec.id if hasattr(request.node, "callspec") else ""
    part = request.module.__doc__.splitlines()[0].rstrip(".")
    made = Trial(request.node.name, part, f"{promise} ({case})" if case else promise, folds, config.stash[SHARE])
    config.stash[TRIALS].append(made)
    return made


class Ground:
    """The loop that wires live in, and what tests share on it, until one of them fails.

    Attributes:
        runner: of the loop; wires stand still between tests.
    """

    def __init__(self) -> None:
        self._lay()

    def _lay(self) -> None:
        self.runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._built: dict[str, Any] = {}

    def build(self, name: str, how: Callable[[AsyncExitStack], Awaitable[Any]]) -> Any:
        """What is shared under a name; made at the first time."""
        if name not in self._built:
            self._built[name] = self.runner.run(how(self._stack))  # type: ignore[arg-type]
        return self._built[name]

    def raze(self) -> None:
        """Ends every process, wire and task."""
        try:
            self.runner.run(self._stack.aclose())
        finally:
            self.runner.close()

    def renew(self) -> None:
        """Begins anew: the next test finds nothing that this one has left."""
        try:
            self.raze()
        finally:
            self._lay()


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    """What tests share."""
    one = Ground()
    yield one
    one.raze()


@pytest.fixture
def runner(request: pytest.FixtureRequest, ground: Ground) -> Iterator[asyncio.Runner]:
    """The loop; of a test that fails, nothing is left."""
    yield ground.runner
    if request.node.stash[FAILED]:
        ground.renew()


class House:
    """Replicas that share a Redis, each by a wire of its own.

    Attributes:
        redis: the server that the wires lead to.
    """

    def __init__(self, redis: RedisServer, wires: list[Wire], replicas: list[Replica]) -> None:
        self.redis = redis
        self.wires = wires
        self.replicas = replicas

    @property
    def urls(self) -> list[str]:
        """Of the replicas."""
        return [replica.url for replica in self.replicas]

    def heal(self) -> None:
        """Every wire is whole."""
        for wire in self.wires:
            wire.heal()


async def build(
    stack: AsyncExitStack,
    folder: Path,
    models: Path,
    query: str = "?timeout_ms=800",
    *,
    is_started: bool = True,
    **options: str,
) -> House:
    """Two replicas and a Redis with these options, until the stack is closed."""
    redis = stack.enter_context(running(folder / "redis", **options))
    wires = [await stack.enter_async_context(Wire(redis.port).open()) for _ in range(2)]
    port = free_port()
    replicas = [
        Replica(
            folder / f"replica{i}", models, f"redis://127.0.0.1:{wire.port}{query}", host=f"127.0.0.{i + 2}", port=port
        )
        for i, wire in enumerate(wires)
    ]
    for replica in replicas:
        stack.push_async_callback(replica.kill)
    if is_started:
        await asyncio.gather(*(replica.start() for replica in replicas))
    return House(redis, wires, replicas)


KEEP = 5
ALWAYS = {"appendonly": "yes", "appendfsync": "always"}


@pytest.fixture
def house(runner: asyncio.Runner, ground: Ground, models: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    """Two replicas and a Redis that has every write on the disk before it answers."""
    return ground.build("house", lambda stack: build(stack, tmp_path_factory.mktemp("house"), models, **ALWAYS))
