"""Versions that come and go while the service runs, and a bad one that never takes the place of a good one."""

import asyncio
import gc
import logging
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from service.engine import Engine, load_engine, load_engines
from service.errors import (
    GoldenMismatch,
    LatchError,
    ManifestInvalid,
    ModelBroken,
    ModelChanged,
    ModelDraining,
    ModelInUse,
    ModelNotFound,
)
from service.ledger import Ledger
from service.metrics import Metrics
from service.registry import ModelFiles, ModelKey, load_all, stamps
from service.repository import Repository
from service.sessions import IdleLimits, Session, SessionManager
from service.stores import SessionStore
from service.stores.memory import MemoryStore
from service.wire import StepRequest
from tests.service import toys
from tests.service.conftest import OPTIONS
from tests.service.replicas import SharedStore

pytestmark = pytest.mark.anyio


class Watched:
    """A repository of one model `toy`, version 1, that is looked at when the test says so."""

    def __init__(self, root: Path, metrics: Metrics, store: SessionStore | None = None) -> None:
        self.root, self.metrics = root, metrics
        self.ledger = None if store is None else Ledger(store, metrics)
        toys.save_leaky(root)
        seen, found = stamps(root), load_all(root)
        self.options = replace(OPTIONS, max_sessions=100)
        self.engines = load_engines(found.found, found.broken, self.options, metrics, ledger=self.ledger)
        self.made: list[weakref.ref[Any]] = []
        self.repository = Repository(root, self.engines, seen, self.make, metrics, interval=0)
        idle = IdleLimits(60.0, 10.0, 100.0)
        store = store or MemoryStore(max_expired_ids=10)
        self.manager = SessionManager(self.engines, store, ledger=self.ledger, idle=idle, metrics=metrics)

    def make(self, files: ModelFiles) -> Engine:
        """As the app makes them."""
        self.made.append(weakref.ref(files))
        engine = load_engine(files, self.options, self.metrics, ledger=self.ledger)
        self.made.append(weakref.ref(engine))
        return engine

    def live(self, name: str = "toy") -> list[str]:
        """The versions that take new sessions."""
        return [engine.key.version for engine in self.engines.live(name)]

    def draining(self) -> list[str]:
        """The versions that go on for their sessions."""
        return [engine.key.version for engine in self.engines.draining()]

    def broken(self, version: str) -> LatchError | None:
        """Why a version of `toy` is not served as its files are."""
        return self.engines.broken.get(ModelKey("toy", version))

    async def session(self, version: str | None = None) -> Session:
        """A new session."""
        return (await self.manager.create("toy", version))[0]

    async def gone(self, version: str) -> None:
        """Waits until a draining version is, and closed."""
        name = f"removal toy/{version}"
        await asyncio.wait_for(asyncio.gather(*(t for t in asyncio.all_tasks() if t.get_name() == name)), 20)
        assert version not in self.draining()


@pytest.fixture
async def watched(tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """With engines that run."""
    monkeypatch.setattr("service.repository._EMPTY_SECONDS", 0.01)
    watched = Watched(tmp_path, metrics)
    watched.repository.start()
    yield watched
    await watched.repository.close()


def ones() -> StepRequest:
    """A step for `toy`."""
    return StepRequest(np.ones((1, toys.INPUTS), np.float32).tobytes(), 1, ("y",), None)


async def test_a_new_version_is_the_default_and_old_sessions_stay_on_theirs(watched: Watched) -> None:
    """Version 2 takes new sessions; one that began on 1 goes on there and gives the bits that it would have given."""
    old, alone = await watched.session(), await watched.session()
    expected = [(await watched.manager.step(alone, ones())).data for _ in range(4)]
    got = [(await watched.manager.step(old, ones())).data for _ in range(2)]
    toys.save_leaky(watched.root, version="2", seed=1)
    await watched.repository.look()
    got += [(await watched.manager.step(old, ones())).data for _ in range(2)]
    assert (got, old.version, watched.live()) == (expected, "1", ["1", "2"])
    new = await watched.session()
    assert new.version == "2"
    assert (await watched.manager.step(new, ones())).data != expected[0]
    assert (await watched.session("1")).version == "1"


async def test_a_new_model_is_served_too(watched: Watched) -> None:
    """Another name needs no restart either."""
    toys.save_counter(watched.root)
    await watched.repository.look()
    assert watched.engines.names() == ["counter", "toy"]


async def test_what_is_unchanged_is_not_read_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look asks the system for names, sizes and times; it opens no file of a version that it knows."""
    toys.rewrite_golden(toys.save_leaky(watched.root, version="2"), output__z=None)
    for _ in range(2):
        await watched.repository.look()
    monkeypatch.setattr("service.repository.load", None)
    await watched.repository.look()
    assert watched.live() == ["1"]


def spoil_golden(folder: Path) -> None:
    """Golden outputs that the graph does not give, sealed."""
    toys.rewrite_golden(folder, output__y=np.zeros((2, 5, toys.HIDDEN), np.float32))


def spoil_graph(folder: Path) -> None:
    """A graph that was cut short."""
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-10])


@pytest.mark.parametrize(("spoil", "kind"), [(spoil_golden, GoldenMismatch), (spoil_graph, ManifestInvalid)])
async def test_a_bad_version_never_takes_the_place_of_a_good_one(
    watched: Watched, spoil: Callable[[Path], None], kind: type[LatchError], caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported, once, and whoever asks for it is told why; the default stays. Mended, it is picked up."""
    folder = toys.save_leaky(watched.root, version="2")
    spoil(folder)
    for _ in range(4):
        await watched.repository.look()
    assert watched.live() == ["1"]
    assert isinstance(watched.broken("2"), kind)
    assert (await watched.session()).version == "1"
    with pytest.raises(ModelBroken, match="toy/2") as told:
        await watched.session("2")
    assert told.value.extras == {"reason": kind.code}
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    shutil.rmtree(folder)
    toys.save_leaky(watched.root, version="2")
    await watched.repository.look()
    assert (watched.live(), watched.broken("2")) == (["1", "2"], None)


def copied(source: Path, target: Path) -> Iterator[None]:
    """Copies a version as a slow copy does: its folder, and then every file in two parts."""
    target.mkdir(parents=True)
    yield
    for path in sorted(source.iterdir()):
        content = path.read_bytes()
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            with (target / path.name).open("ab") as file:
                file.write(part)
            yield


async def test_a_version_that_is_copied_file_by_file_is_served_when_it_is_whole(
    watched: Watched, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However often it is looked at meanwhile: half a copy is broken, and is tried again when more of it is there."""
    source = toys.save_leaky(tmp_path_factory.mktemp("elsewhere"), version="2")
    for _ in copied(source, watched.root / "toy" / "2"):
        for _ in range(3):
            if watched.live() == ["1"]:
                assert watched.engines.get("toy").key.version == "1"
            await watched.repository.look()
    assert (watched.live(), watched.broken("2")) == (["1", "2"], None)


async def test_a_copy_too_quick_for_the_clock_of_the_files_is_tried_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure counts when the same files fail at two looks: the last write may leave size and times as they are."""
    folder = toys.save_leaky(watched.root, version="2")
    same = stamps(watched.root)
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(bytes(len(whole)))
    monkeypatch.setattr("service.repository.stamps", lambda _: same)
    await watched.repository.look()
    assert watched.live() == ["1"]
    (folder / "model.onnx").write_bytes(whole)
    await watched.repository.look()
    assert watched.live() == ["1", "2"]


async def test_hidden_and_unfinished_folders_are_left_alone(watched: Watched) -> None:
    """What an exporter or a synchroniser writes beside a version is none; renamed, it is."""
    partial_folder = toys.save_leaky(watched.root, version="2").rename(watched.root / "toy" / ".2.partial")
    (watched.root / "toy" / "_trash").mkdir()
    (watched.root / ".git" / "hooks").mkdir(parents=True)
    await watched.repository.look()
    assert (watched.live(), watched.engines.broken) == (["1"], {})
    partial_folder.rename(watched.root / "toy" / "2")
    await watched.repository.look()
    assert watched.live() == ["1", "2"]


async def test_a_folder_that_is_gone_takes_no_new_sessions_and_ends_with_its_last(watched: Watched) -> None:
    """Its sessions step on, a repeated create still finds its own, others are refused; then the engine is closed."""
    toys.save_leaky(watched.root, version="2")
    await watched.repository.look()
    session, _ = await watched.manager.create("toy", session_id="mine")
    engine = session.engine
    shutil.rmtree(watched.root / "toy" / "2")
    await watched.repository.look()
    assert (watched.live(), watched.draining()) == (["1"], ["2"])
    assert (await watched.manager.step(session, ones())).step == 1
    assert await watched.manager.create("toy", "2", session_id="mine") == (session, False)
    assert (await watched.session()).version == "1"
    for refused in (watched.session("2"), watched.manager.fork("mine"), watched.manager.create("toy", "2")):
        with pytest.raises(ModelDraining, match="toy/2"):
            await refused
    await watched.manager.delete("mine")
    await watched.gone("2")
    with pytest.raises(ModelNotFound):
        await watched.session("2")
    assert engine.batcher._queues._closed


async def test_a_folder_that_comes_back_is_live_again(watched: Watched) -> None:
    """The same files, the same engine, and its sessions still on it."""
    session = await watched.session()
    folder = watched.root / "toy" / "1"
    folder.rename(watched.root / "toy" / ".1")
    await watched.repository.look()
    assert (watched.live(), watched.draining()) == ([], ["1"])
    (watched.root / "toy" / ".1").rename(folder)
    await watched.repository.look()
    assert (watched.live(), watched.draining()) == (["1"], [])
    await watched.manager.delete(session.id)
    assert (await watched.session()).engine is session.engine


async def test_a_folder_that_comes_back_with_other_files_waits_for_the_old_to_end(watched: Watched) -> None:
    """Two engines never share a version: the new files are reported, and loaded when the last old session is gone."""
    session = await watched.session()
    folder = watched.root / "toy" / "1"
    shutil.rmtree(folder)
    await watched.repository.look()
    toys.save_leaky(watched.root, seed=1)
    for _ in range(3):
        await watched.repository.look()
    assert isinstance(watched.broken("1"), ModelChanged)
    assert watched.draining() == ["1"]
    await watched.manager.delete(session.id)
    await watched.gone("1")
    await watched.repository.look()
    assert (watched.live(), watched.broken("1")) == (["1"], None)
    assert (await watched.session()).engine is not session.engine


@pytest.mark.parametrize("spoil", [spoil_golden, spoil_graph])
async def test_a_live_version_whose_files_change_goes_on_as_it_was(
    watched: Watched, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Versions do not change: it is an error in the log and in readiness, until the files are as they were."""
    folder = watched.root / "toy" / "1"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    session = await watched.session()
    engine = session.engine
    spoil(folder)
    for _ in range(3):
        await watched.repository.look()
    assert isinstance(watched.broken("1"), ModelChanged)
    assert "goes on as it was loaded" in caplog.text
    assert (await watched.session()).engine is engine
    with pytest.raises(ModelChanged, match="toy/1"):
        await watched.repository.load("toy", "1")
    for path, content in kept.items():
        path.write_bytes(content)
    await watched.repository.look()
    assert (watched.broken("1"), watched.live()) == (None, ["1"])
    assert watched.engines.get("toy") is engine


async def test_files_that_were_only_touched_change_nothing(watched: Watched) -> None:
    """Another time and the same sha256 are the same version."""
    engine = watched.engines.get("toy")
    for path in (watched.root / "toy" / "1").iterdir():
        path.write_bytes(path.read_bytes())
    await watched.repository.look()
    assert (watched.engines.get("toy"), watched.engines.broken) == (engine, {})


async def test_a_repository_that_cannot_be_looked_into_ends_nothing(watched: Watched) -> None:
    """A folder that is unmounted for a moment takes no version with it."""
    watched.root.rename(watched.root.with_suffix(".away"))
    with pytest.raises(ManifestInvalid, match="not a folder"):
        await watched.repository.look()
    with pytest.raises(ModelBroken, match="toy/1 cannot be looked for: the model repository"):
        await watched.repository.load("toy", "1")
    assert watched.live() == ["1"]
    watched.root.with_suffix(".away").rename(watched.root)
    await watched.repository.look()
    assert watched.live() == ["1"]


async def test_the_looks_go_on_whatever_one_meets(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A problem is logged once while it lasts, a fault of ours with its traceback; then versions are found again."""
    problems = [OSError(5, "Input/output error")] * 3 + [TypeError("a fault")]

    def failing(root: Path) -> Any:
        if problems:
            raise problems.pop(0)
        return stamps(root)

    monkeypatch.setattr("service.repository.stamps", failing)
    monkeypatch.setattr(watched.repository, "_interval", 0.001)
    toys.save_leaky(watched.root, version="2")
    looks = asyncio.create_task(watched.repository._serve())
    async with asyncio.timeout(20):
        while watched.live() != ["1", "2"]:  # noqa: ASYNC110 - a version comes from the disk
            await asyncio.sleep(0.01)
    looks.cancel()
    assert caplog.text.count("Input/output error") == 1
    assert "TypeError: a fault" in caplog.text


async def test_a_version_in_use_is_not_removed(watched: Watched) -> None:
    """The refusal tells how many sessions there are, and changes nothing."""
    sessions = [await watched.session() for _ in range(2)]
    with pytest.raises(ModelInUse, match="2 live sessions") as refused:
        await watched.repository.unload("toy", "1", drain=False)
    assert refused.value.extras == {"sessions": 2}
    assert (watched.live(), watched.draining()) == (["1"], [])
    for session in sessions:
        await watched.manager.delete(session.id)
    assert await watched.repository.unload("toy", "1", drain=False) is None
    assert (watched.live(), watched.draining()) == ([], [])


async def test_a_version_in_use_is_drained_where_asked(watched: Watched) -> None:
    """It goes with its last session; asking again in the meantime tells the same."""
    session = await watched.session()
    for _ in range(2):
        assert await watched.repository.unload("toy", "1", drain=True) is session.engine
    with pytest.raises(ModelInUse):
        await watched.repository.unload("toy", "1", drain=False)
    assert (await watched.manager.step(session, ones())).step == 1
    assert watched.engines.serving("toy", "1") is session.engine
    await watched.repository.look()
    assert watched.draining() == ["1"]
    await watched.manager.delete(session.id)
    await watched.gone("1")
    with pytest.raises(ModelNotFound):
        await watched.repository.unload("toy", "1", drain=True)


async def test_predictions_in_flight_are_waited_for(watched: Watched) -> None:
    """A version without sessions, but with rows in a run, goes when they are through."""
    engine = watched.engines.get("toy")
    predicted = asyncio.create_task(watched.manager.predict(engine, [ones()] * 3))
    await asyncio.sleep(0)
    assert await watched.repository.unload("toy", "1", drain=False) is engine
    assert len(await predicted) == 3
    await watched.gone("1")


async def test_what_was_unloaded_stays_away_until_it_is_loaded_or_changed(watched: Watched) -> None:
    """A look does not undo a call; another call does, and so do new files."""
    await watched.repository.unload("toy", "1", drain=False)
    for _ in range(3):
        await watched.repository.look()
    assert watched.live() == []
    assert (await watched.repository.load("toy", "1")).key == ("toy", "1")
    assert (await watched.session()).version == "1"
    toys.save_leaky(watched.root, version="2")
    await watched.repository.look()
    await watched.repository.unload("toy", "2", drain=False)
    await watched.repository.look()
    assert watched.live() == ["1"]
    shutil.rmtree(watched.root / "toy" / "2")
    toys.save_leaky(watched.root, version="2", seed=1)
    await watched.repository.look()
    assert watched.live() == ["1", "2"]


async def test_a_draining_version_that_is_loaded_is_live_again(watched: Watched) -> None:
    """The call that asked for it to go is taken back, and the end of its sessions ends nothing."""
    session = await watched.session()
    await watched.repository.unload("toy", "1", drain=True)
    assert await watched.repository.load("toy", "1") is session.engine
    await watched.manager.delete(session.id)
    await asyncio.sleep(0.05)
    assert (watched.live(), watched.draining()) == (["1"], [])
    assert await watched.repository.load("toy", "1") is session.engine


@pytest.mark.parametrize(("name", "version"), [("toy", "9"), ("nope", "1"), ("..", "toy"), ("toy", ".hidden")])
async def test_only_versions_of_the_repository_can_be_loaded(watched: Watched, name: str, version: str) -> None:
    """No name leads anywhere else."""
    (watched.root / "toy" / ".hidden").mkdir()
    with pytest.raises(ModelNotFound, match="no folder"):
        await watched.repository.load(name, version)


async def test_a_version_that_a_call_cannot_load_is_told_and_reported(watched: Watched) -> None:
    """The caller learns why, readiness too, and the next call tries again."""
    folder = toys.save_leaky(watched.root, version="2")
    good = {path: path.read_bytes() for path in folder.iterdir()}
    spoil_golden(folder)
    with pytest.raises(ModelBroken, match="differs from golden") as told:
        await watched.repository.load("toy", "2")
    assert told.value.extras == {"reason": "golden_mismatch"}
    assert isinstance(watched.broken("2"), GoldenMismatch)
    for path, content in good.items():
        path.write_bytes(content)
    await watched.repository.load("toy", "2")
    assert (watched.live(), watched.broken("2")) == (["1", "2"], None)


async def test_a_broken_version_whose_folder_is_gone_is_forgotten(watched: Watched) -> None:
    """Readiness does not complain of what is not there."""
    folder = toys.save_leaky(watched.root, version="2")
    spoil_graph(folder)
    await watched.repository.look()
    shutil.rmtree(folder)
    await watched.repository.look()
    assert watched.engines.broken == {}


async def test_the_loop_serves_while_a_version_loads(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are answered, and sessions made, between the beginning and the end of a load."""
    entered, go = threading.Event(), threading.Event()
    make = watched.repository._make

    def slow(files: ModelFiles) -> Engine:
        entered.set()
        assert go.wait(20)
        return make(files)

    monkeypatch.setattr(watched.repository, "_make", slow)
    session = await watched.session()
    toys.save_leaky(watched.root, version="2")
    look = asyncio.create_task(watched.repository.look())
    await asyncio.to_thread(entered.wait, 20)
    assert (await watched.manager.step(session, ones())).step == 1
    assert (await watched.session()).version == "1"
    assert not look.done()
    go.set()
    await look
    assert (await watched.session()).version == "2"


async def test_a_sweep_outlives_versions_that_come_and_go(watched: Watched) -> None:
    """Engines may be walked through while others join or leave."""
    walk = iter(watched.engines)
    toys.save_counter(watched.root)
    await watched.repository.look()
    await watched.repository.unload("toy", "1", drain=False)
    assert [engine.key.name for engine in walk] == ["toy"]


async def test_stored_sessions_wait_for_their_version(
    tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are in the store alone hold no version back; their steps are refused while it is away, and go on where
    they stood when it is loaded again.
    """
    monkeypatch.setattr("service.repository._EMPTY_SECONDS", 0.01)
    store = SharedStore()
    watched = Watched(tmp_path, metrics, store)
    assert watched.ledger is not None
    watched.ledger.start()
    watched.repository.start()
    session, _ = await watched.manager.create("toy", session_id="mine")
    assert (await watched.manager.step(session, ones())).step == 1
    other = Watched(tmp_path / "other", Metrics(CollectorRegistry()), store)  # a replica that holds no copy of it
    other.repository.start()
    assert await other.repository.unload("toy", "1", drain=False) is None
    with pytest.raises(ModelNotFound, match="toy/1"):
        await other.manager.find("mine")
    await other.repository.load("toy", "1")
    assert (await other.manager.find("mine")).step == 1
    assert await other.repository.unload("toy", "1", drain=True) is not None
    assert (await watched.manager.step(session, ones())).step == 2
    for each in (other, watched):
        await each.repository.close()
    await watched.ledger.close()


async def test_a_draining_version_takes_its_stored_sessions_back(tmp_path: Path, metrics: Metrics) -> None:
    """A session that had to make room is no new one: it is loaded again while its version is still there."""
    watched = Watched(tmp_path, metrics, SharedStore())
    watched.repository.start()
    first, second = [(await watched.manager.create("toy", session_id=name))[0] for name in ("a", "b")]
    watched.manager._forget(first)
    assert await watched.repository.unload("toy", "1", drain=True) is second.engine
    assert (await watched.manager.find("a")).engine is second.engine
    assert second.engine.sessions == 2
    await watched.repository.close()


async def test_nothing_of_a_removed_version_stays(watched: Watched) -> None:
    """After fifty versions, good and bad, no engine, no file and no label is left; and not because the collector came:
    what is there when the service starts is frozen out of it.
    """
    before = generate_latest(watched.metrics.registry)
    gc.disable()
    try:
        for version in map(str, range(2, 52)):
            folder = toys.save_leaky(watched.root, version=version)
            if int(version) % 5 == 0:
                spoil_golden(folder)
            await watched.repository.look()
            if int(version) % 5:
                session = await watched.session()
                assert session.version == version
                await watched.manager.predict(session.engine, [ones()])
                await watched.manager.step(session, ones())  # the last run of the version is a session's
                await watched.manager.delete(session.id)
                del session
            if int(version) % 2 and int(version) % 5:
                await watched.repository.unload("toy", version, drain=False)
            shutil.rmtree(folder)
            await watched.repository.look()
            await watched.gone(version)
        await asyncio.sleep(0)
        assert len(watched.made) == 90
        assert [reference() for reference in watched.made if reference() is not None] == []
    finally:
        gc.enable()
    assert (watched.live(), watched.repository._removals) == (["1"], {})
    assert set(watched.repository._decided) == {ModelKey("toy", "1")}
    after = generate_latest(watched.metrics.registry)
    assert [line for line in after.splitlines() if b'version="' in line and b'version="1"' not in line] == []
    assert len(after.splitlines()) == len(before.splitlines())
