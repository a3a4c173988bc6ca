"""The machine: which core serves and which loads, programs pinned to them, and rounds that others did not disturb.

Rule: contenders take turns within one run, and every round says how busy each side was.
"""

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Generic, NamedTuple, Self, TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")
Value = TypeVar("Value")

ROOT = Path(__file__).parents[1]
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
CORES = sorted(os.sched_getaffinity(0))
SERVER, LOAD = CORES[0], CORES[-1]

# A generator busier than this may be what is measured; a core that strangers use more than this tells us nothing.
SATURATED, DISTURBED, IDLE = 0.95, 0.05, 0.02
ATTEMPTS, PAUSE = 3, 0.5
UNSURE = "UNSURE"


class Program:
    """A server as a process of its own, pinned to the serving core; `port` is read from the address that it prints.

    Args:
        arguments: what follows `python -m`.
        environment: variables on top of ours.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own programs
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        os.sched_setaffinity(self.pid, {SERVER})  # before it has threads, which inherit it
        for line in self._process.stdout or ():
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise RuntimeError(f"{' '.join(arguments)} ended before it listened")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def kill(self) -> None:
        """As a crash does, without a last word."""
        self._process.kill()
        self._process.wait()

    def memory(self) -> int:
        """Bytes resident."""
        return resident(self.pid)


def resident(pid: int | str = "self") -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


@contextmanager
def pinned(core: int = LOAD) -> Iterator[None]:
    """Keeps this process on one core, without pauses of the garbage collector."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        os.sched_setaffinity(0, before)


@contextmanager
def aside() -> Iterator[ProcessPoolExecutor]:
    """A fresh process on the serving core, for what is measured without a server."""
    with ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, {SERVER})) as pool:
        yield pool


class Ticks(NamedTuple):
    """Seconds of processor time so far: of us and our helpers, of the servers, and of all on each of two cores."""

    load: float
    server: float
    load_core: float
    server_core: float

    @staticmethod
    def now(servers: Sequence[int], helpers: Sequence[int]) -> "Ticks":
        """Reads `/proc`; the kernel counts in ticks of 10 ms."""
        cores = {}
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu":
                user, nice, system, _, _, interrupt, soft, steal = map(int, values[:8])
                cores[int(name[3:])] = (user + nice + system + interrupt + soft + steal) / TICK
        load = time.process_time() + sum(map(Ticks.of, helpers))
        return Ticks(load, sum(map(Ticks.of, servers)), cores[LOAD], cores[SERVER])

    @staticmethod
    def of(pid: int) -> float:
        """Seconds of one process."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


@dataclass(frozen=True)
class Round(Generic[Value]):
    """A measured value, and who was how busy meanwhile, in shares of a core.

    `strangers` are other processes on the serving core, and on the loading one where that had work to do.
    """

    value: Value
    load: float
    server: float
    strangers: float


@dataclass(frozen=True)
class Contender(Generic[Value]):
    """Something to measure, and the processes on the serving core that do the work.

    `helpers` are processes on the loading core that it needs, such as a store: their time counts as the load's.
    """

    measure: Callable[[], Value]
    servers: Sequence[int]
    title: str = ""
    helpers: Sequence[int] = ()

    @staticmethod
    def of(
        pool: ProcessPoolExecutor, call: Callable[..., Value], *arguments: Any, title: str = ""
    ) -> "Contender[Value]":
        """A call made in a process aside."""
        return Contender(lambda: pool.submit(call, *arguments).result(), (pool.submit(os.getpid).result(),), title)

    def round(self) -> Round[Value]:
        """Measures, and watches the two cores."""
        before, start = Ticks.now(self.servers, self.helpers), time.perf_counter()
        value = self.measure()
        seconds = time.perf_counter() - start
        load, server, load_core, server_core = (
            (after - first) / seconds
            for after, first in zip(Ticks.now(self.servers, self.helpers), before, strict=True)
        )
        strangers = [0.0, server_core - server] + ([load_core - load] if load > IDLE else [])
        return Round(value, load, server, max(strangers))


def take_turns(contenders: Mapping[str, Contender[Value]], rounds: int) -> dict[str, list[Round[Value]]]:
    """A B A B ...: `rounds` of each; one that strangers disturbed is taken again, a few times."""
    taken: dict[str, list[Round[Value]]] = {name: [] for name in contenders}
    for _ in bar(range(rounds), " : ".join(contenders)):
        for name, contender in contenders.items():
            attempts: list[Round[Value]] = []
            while len(attempts) < ATTEMPTS and all(one.strangers > DISTURBED for one in attempts):
                time.sleep(len(attempts) * PAUSE)
                attempts.append(contender.round())
            taken[name].append(min(attempts, key=lambda one: one.strangers))
    return {name: quiet(found) for name, found in taken.items()}


def quiet(rounds: list[Round[Value]]) -> list[Round[Value]]:
    """The rounds that nobody disturbed, if they are two at least; else all, which `doubts` will tell."""
    undisturbed = [one for one in rounds if one.strangers <= DISTURBED]
    return undisturbed if len(undisturbed) > 1 else rounds


def bar(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The items, with a progress bar where somebody looks; drawn between two items only, never beside a measurement."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(items))
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, completed=done, refresh=100 * done // len(items) > 100 * (done - 1) // len(items))


def ratio(ours: Sequence[Round[float]], theirs: Sequence[Round[float]]) -> float:
    """Of the medians."""
    return median(one.value for one in ours) / median(one.value for one in theirs)


def describe(rounds: Sequence[Round[float]], unit: str) -> str:
    """The median, how busy the generator was, and what speaks against it."""
    load = max(one.load for one in rounds)
    text = f"{median(one.value for one in rounds):,.0f} {unit}" + (f", load {load:.0%} busy" if load > IDLE else "")
    return text + doubts(rounds, load)


def doubts(rounds: Sequence[Round[Any]], load: float = 0.0) -> str:
    """Why these rounds prove nothing; empty where they do."""
    strangers = max(one.strangers for one in rounds)
    text = f" ({UNSURE}: the generator was the limit)" if load > SATURATED else ""
    return text + (f" ({UNSURE}: others took {strangers:.0%} of a core)" if strangers > DISTURBED else "")
