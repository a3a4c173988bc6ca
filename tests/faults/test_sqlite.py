"""One process and its SQLite file: killed, without room, torn, and under a clock that jumps."""

import asyncio
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from pathlib import Path

import httpx
import pytest

from service.errors import LatchError
from service.snapshot import origin
from service.stores import open_store
from tests.faults.conftest import Ground
from tests.faults.history import Standing, read_snapshot
from tests.faults.load import Client, Doors, Load, http_client, persist
from tests.faults.processes import Replica
from tests.faults.trial import Trial

DAY = 86_400


class Alone(Replica):
    """A replica with a file of its own."""

    def __init__(self, folder: Path, models: Path, **settings: str) -> None:
        self.file = folder / "sessions.db"
        super().__init__(folder, models, f"sqlite:///{self.file}", settings)

    @property
    def wal(self) -> Path:
        """The write-ahead log."""
        return self.file.with_name(self.file.name + "-wal")


@pytest.fixture
def alone(runner: asyncio.Runner, ground: Ground, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A process whose file is on a disk."""

    async def start(stack: AsyncExitStack) -> Alone:
        replica = Alone(tmp_path_factory.mktemp("alone"), models)
        stack.push_async_callback(replica.kill)
        return await replica.start()

    return ground.build("alone", start)


def test_kill_9_of_the_only_process(runner: asyncio.Runner, alone: Alone, trial: Trial) -> None:
    """The process is killed at any moment and started again on its file."""

    async def scenario() -> None:
        async with trial.load([alone.url]) as load:
            for _ in trial.rounds(1):
                await load.answers(trial.rng.randrange(10, 60))
                killed = time.monotonic()
                await alone.kill()
                trial.faults["kill -9"] += 1
                await alone.start()
                await load.answers()
                trial.recoveries.append(time.monotonic() - killed)
        trial.took(load)

    runner.run(scenario())


def test_a_file_that_may_not_grow(runner: asyncio.Runner, alone: Alone, trial: Trial) -> None:
    """Writes fail where the file reaches the largest size that the process may write; then they may go on."""

    async def scenario() -> None:
        async with trial.load([alone.url]) as load:
            for _ in trial.rounds(1):
                await load.answers(20)
                _, hard = resource.prlimit(alone.pid, resource.RLIMIT_FSIZE)
                most = min(alone.wal.stat().st_size, 200_000) + 20_000  # SQLite soon comes by, even where it began anew
                resource.prlimit(alone.pid, resource.RLIMIT_FSIZE, (most, hard))
                await load.retried(5)
                trial.faults["times no larger file"] += 1
                resource.prlimit(alone.pid, resource.RLIMIT_FSIZE, (hard, hard))
                await load.answers(20)
        trial.took(load)

    runner.run(scenario())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(runner: asyncio.Runner, models: Path, small_disk: Path, trial: Trial) -> None:
    """Somebody fills the disk, and makes room again."""

    async def scenario() -> None:
        replica = await Alone(small_disk, models).start()
        ballast = small_disk / "ballast"
        try:
            async with trial.load([replica.url]) as load:
                for number in trial.rounds(1):
                    if number:  # with an empty log: one that is overwritten needs no room
                        await replica.stop()
                        await replica.start()
                    await load.answers(20)
                    with ballast.open("wb", buffering=0) as file:
                        try:
                            while True:
                                file.write(bytes(4096))
                        except OSError:
                            trial.faults["times full"] += 1
                    await load.retried(5)
                    ballast.unlink()
                    await load.answers(20)
            trial.took(load)
        finally:
            await replica.kill()

    runner.run(scenario())


def standings(file: Path, names: list[str]) -> dict[str, Standing | LatchError]:
    """Where the sessions of a file stand, or what is said instead. Raises LatchError where it cannot be opened."""

    async def look() -> dict[str, Standing | LatchError]:
        store, found = open_store(f"sqlite:///{file}", keep_steps=0, max_expired_ids=9), {}
        try:
            for name in names:
                try:
                    data = (await store.load(name)).saved.snapshot
                    origin(data)  # whether it is whole: what the service asks before it uses one
                    found[name] = read_snapshot(data)
                except LatchError as error:
                    found[name] = error
        finally:
            await store.close()
        return found

    with asyncio.Runner() as runner:
        return runner.run(look())


class Image:
    """A process's file as it was in one moment, with what was acknowledged until then, and until a moment before."""

    def __init__(self, replica: Alone, load: Load, folder: Path) -> None:
        self.clients = load.clients
        self.folder = folder
        self.acknowledged: list[int] = []
        self._replica = replica

    async def take(self, meanwhile: float) -> None:
        """While the process is stopped, a moment after its log was measured."""
        self.folder.mkdir()
        self.before = [client.step for client in self.clients]
        self.safe = self._log_size()
        await asyncio.sleep(meanwhile)
        self._replica.pause()
        try:
            self.acknowledged = [client.step for client in self.clients]
            for file in (self._replica.file, self._replica.wal):
                shutil.copy(file, self.folder / file.name)
        finally:
            self._replica.resume()
        with (self.folder / self._replica.wal.name).open("rb") as file:
            self.is_same_log = file.read(32) == self._head

    def _log_size(self) -> int:
        with self._replica.wal.open("rb") as file:
            self._head = file.read(32)
        return self._replica.wal.stat().st_size

    @property
    def log(self) -> bytes:
        """All of it."""
        return (self.folder / self._replica.wal.name).read_bytes()

    def check(self, log: bytes, least: list[int], name: str) -> None:
        """With this log, every session stands where a request of its client ended, not before `least`."""
        folder = self.folder / name
        folder.mkdir()
        shutil.copy(self.folder / self._replica.file.name, folder)
        (folder / self._replica.wal.name).write_bytes(log)
        found = standings(folder / self._replica.file.name, [client.doors.session for client in self.clients])
        for client, step in zip(self.clients, least, strict=True):
            standing = found[client.doors.session]
            if isinstance(standing, LatchError):
                assert not step, f"{client.doors.session}: {standing}"
                continue
            assert standing.step >= step, f"{client.doors.session} is at step {standing.step}, {step} were acknowledged"
            assert standing == at(client, standing.step), f"{client.doors.session} at step {standing.step} is wrong"


def at(client: Client, step: int) -> Standing:
    """Where the client's session stood at a step that one of its requests ended at."""
    rows, end = [], 0
    for request in client.rows:
        if end < step:
            rows.append(request)
            end += len(request)
    assert end == step, f"{client.doors.session} is at step {step}, where no request ended"
    return client.fold(rows)[1]


def test_a_torn_write(runner: asyncio.Runner, alone: Alone, trial: Trial, tmp_path: Path) -> None:
    """The log is cut or spoilt anywhere after what was acknowledged: that is whole, and nothing is half done."""

    async def take(folder: Path) -> Image:
        if alone.wal.exists() and alone.wal.stat().st_size > 2**20:  # begun anew, it is read in no time
            await alone.stop()
            await alone.start()
        async with trial.load([alone.url]) as load:
            await load.answers(30)
            image = Image(alone, load, folder)
            await image.take(trial.rng.random() / 5)
        trial.took(load)
        return image

    for number in trial.rounds(2):
        image = runner.run(take(tmp_path / str(number)))
        log = image.log
        image.check(log, image.acknowledged, "whole")
        for cut in range(4 if image.is_same_log else 0):  # or it was begun anew meanwhile
            place = trial.rng.randrange(image.safe, len(log) + 1)
            image.check(log[:place], image.before, f"cut{cut}")
            spoilt = log[:place] + trial.rng.randbytes(trial.rng.randrange(1, 5000))
            image.check(spoilt, image.before, f"torn{cut}")
            trial.faults["logs cut or spoilt"] += 2
        shutil.rmtree(image.folder)


def test_a_file_with_spoilt_bytes_never_gives_a_wrong_state(
    runner: asyncio.Runner, alone: Alone, trial: Trial, tmp_path: Path
) -> None:
    """Bytes of the file itself change: it is refused, or a session is, or everything that it gives is right."""

    async def scenario() -> Load:
        async with trial.load([alone.url]) as load:
            await load.answers(50)
        await alone.stop()
        shutil.copy(alone.file, tmp_path / "good.db")
        await alone.start()
        return load

    load = runner.run(scenario())
    good = (tmp_path / "good.db").read_bytes()
    wanted = {client.doors.session: client.fold(client.rows)[1] for client in load.clients}
    for number in trial.rounds(12):
        bad = bytearray(good)
        for _ in range(trial.rng.choice((1, 1, 30, 500))):
            bad[trial.rng.randrange(len(bad))] ^= 1 << trial.rng.randrange(8)
        file = tmp_path / f"bad{number}.db"
        file.write_bytes(bad)
        trial.faults["files spoilt"] += 1
        try:
            found = standings(file, list(wanted))
        except LatchError:
            trial.counts["files refused"] += 1
            continue
        for name, standing in found.items():
            assert isinstance(standing, LatchError) or standing == wanted[name]


def test_a_clock_that_jumps(runner: asyncio.Runner, models: Path, tmp_path: Path, trial: Trial) -> None:
    """The machine's clock goes a day forward and two days back: nobody expires, and nothing is lost."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("no libfaketime: apt-get install faketime")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    fake = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1"}
    replica = Alone(tmp_path / "alone", models, FAKETIME_DONT_FAKE_MONOTONIC="1", LATCH_IDLE_TTL_MS="3600000", **fake)

    async def scenario() -> None:
        await replica.start()
        try:
            async with trial.load([replica.url]) as load, http_client() as http:
                idle = Doors("idle", trial.models[0], http)
                ask = partial(idle.call, "PUT", replica.url, json={"model": "toy"})
                await persist(ask)
                for days in (1, -1):
                    await load.answers(20)
                    shown = clock.with_name("next")
                    shown.write_text(f"{days * DAY:+d}")
                    shown.replace(clock)
                    trial.faults["jumps"] += 1
                    while abs(await created(replica, trial, http) - time.time() - days * DAY) > DAY / 4:
                        await load.answers(1)
                    assert (await persist(ask)).status_code == 200, "expired"
                    await load.answers(20)
            trial.took(load)
        finally:
            await replica.kill()

    runner.run(scenario())


async def created(replica: Replica, trial: Trial, http: httpx.AsyncClient) -> float:
    """When a session was made that is made now, as the replica says: seconds since the epoch."""
    fresh = Doors(f"{trial.rng.getrandbits(64):x}", trial.models[0], http)
    made = await persist(partial(fresh.call, "PUT", replica.url, json={"model": "toy"}))
    return datetime.fromisoformat(made.json()["created_at"]).timestamp()
