"""`Engine`: one live version of a model, and `Engines`: all of them by name.

Rule: an engine is not handed out before it has replayed its golden vectors. It puts a runner, a slab and a batcher
together and knows no session ids.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from service.batcher import Batcher
from service.errors import LatchError, ModelBroken, ModelDraining, ModelNotFound, ModelUnloadable, SettingsInvalid
from service.ledger import Ledger
from service.manifest import Manifest
from service.metrics import Metrics
from service.proof import prove_bits, replay_golden
from service.registry import ModelFiles, ModelKey
from service.runtime import OrtRunner
from service.slab import StateSlab
from service.snapshot import SnapshotCodec
from service.wire.native import NativeCodec
from service.wire.rows import RowFormat

log = logging.getLogger(__name__)

# Of one `predict`: the loop begins so many in one turn, and the others find room in the queue.
_SEQUENCES_AT_ONCE = 256


@dataclass(frozen=True)
class EngineOptions:
    """What every engine is made with, as plain values; `Settings` has the same fields and describes each."""

    device: str
    intra_op_threads: int
    max_sessions: int
    max_batch_size: int
    max_run_steps: int
    max_queue: int
    max_queue_bytes: int
    max_session_queue: int
    max_steps: int
    max_body_bytes: int
    keep_reply_bytes: int


class Engine:
    """Runs one model version for its sessions.

    Attributes:
        sessions: live ones of this process; who makes and ends them counts them here.

    Args:
        files: the checked files of the version.
        options: limits.
        metrics: where to count.
        clock: monotonic seconds, which idle time is measured on.
        ledger: what sessions are stored with; None where they live in this process alone.

    Raises:
        ModelUnloadable: the runtime cannot read the graph, or it does not fit the manifest.
        GoldenMismatch: it does not give the golden outputs.
    """

    def __init__(
        self,
        files: ModelFiles,
        options: EngineOptions,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
    ) -> None:
        self.manifest: Manifest = files.manifest
        self.key = files.key
        self.digest = files.digest
        self.sessions = 0
        self._runner = OrtRunner(files.manifest, files.graph, device=options.device, threads=options.intra_op_threads)
        self.device = self._runner.device
        self.slab = StateSlab(files.manifest.state, options.max_sessions, clock)
        self.bit_exact = prove_bits(self._runner, files)
        self.golden_error = replay_golden(self._runner, files)
        self._runner.warm_up(options.max_batch_size)
        self.rows = RowFormat.of(files.manifest)
        self.codec = NativeCodec(self.rows, max_steps=options.max_steps)
        self.snapshots = SnapshotCodec(
            str(self.key),
            files.manifest.files["model.onnx"],
            files.manifest.state,
            keep_reply_bytes=options.keep_reply_bytes,
        )
        self.batcher = Batcher(
            self._runner,
            self.slab,
            self.rows,
            self.snapshots,
            ledger,
            max_batch_size=options.max_batch_size,
            max_run_steps=options.max_run_steps,
            max_queue=options.max_queue,
            max_queue_bytes=options.max_queue_bytes,
            max_session_queue=options.max_session_queue,
            max_reply_bytes=options.max_body_bytes,
            keep_reply_bytes=options.keep_reply_bytes,
            metrics=metrics.model(*self.key, self.slab.__len__, lambda: self.sessions),
        )
        self.sequences_at_once = min(_SEQUENCES_AT_ONCE, options.max_queue, options.max_sessions)
        self.chunks = self._runner.chunks
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the batcher's task on the running loop."""
        self._task = asyncio.create_task(self.batcher.serve(), name=f"batcher {self.key}")
        self._task.add_done_callback(_report)

    async def close(self) -> None:
        """Ends the task; whoever still waits is told that the service is stopping."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])  # one that has failed was reported, and keeps nobody from ending
            self._task = None  # what it ended by holds this engine


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the %s has ended: this model answers no more", task.get_name(), exc_info=task.exception())


class Engines:
    """The engines by name and version: those that are live, those that drain, and why other versions are neither.

    A live version takes new sessions; a draining one goes on for those that it has.
    """

    def __init__(self, live: Iterable[Engine], broken: dict[ModelKey, LatchError]) -> None:
        self._live = {engine.key: engine for engine in live}
        self._draining: dict[ModelKey, Engine] = {}
        self.broken: dict[ModelKey, LatchError] = {}
        for key, error in broken.items():
            self.report(key, error)

    def __iter__(self) -> Iterator[Engine]:
        """All of them, as they are now: others may come and go meanwhile."""
        return iter([*self._live.values(), *self._draining.values()])

    def names(self) -> list[str]:
        """The models that take new sessions."""
        return sorted({key.name for key in self._live})

    def draining(self) -> list[Engine]:
        """Those that go when their last session ends."""
        return list(self._draining.values())

    def live(self, name: str) -> list[Engine]:
        """The live versions of a model, oldest first, the last one being the default; there may be none."""
        return sorted((e for e in self._live.values() if e.key.name == name), key=lambda e: int(e.key.version))

    def get(self, name: str, version: str | None = None) -> Engine:
        """The engine that new sessions of a version, or of the default one, run on.

        Raises:
            ModelNotFound: no such model, or version of it.
            ModelBroken: it is there, but does not load.
            ModelDraining: it takes no new sessions.
        """
        for engine in reversed(self.live(name)):
            if version in (None, engine.key.version):
                return engine
        raise self._absent(name, version)

    def serving(self, name: str, version: str) -> Engine:
        """The engine that the sessions of a version run on, live or draining. Raises as `get`."""
        return self._draining.get(ModelKey(name, version)) or self.get(name, version)

    def is_live(self, engine: Engine) -> bool:
        """Whether it takes new sessions."""
        return self._live.get(engine.key) is engine

    def check(self, engine: Engine) -> None:
        """Raises ModelDraining where an engine takes no new sessions any more since it was asked for."""
        if not self.is_live(engine):
            raise _draining(engine.key)

    def add(self, engine: Engine) -> None:
        """Has a version take new sessions, again too; it is the default where its number is the highest."""
        self._draining.pop(engine.key, None)
        self._live[engine.key] = engine
        self.broken.pop(engine.key, None)

    def drain(self, engine: Engine) -> None:
        """Has a version take no new sessions."""
        self._draining[engine.key] = self._live.pop(engine.key)

    def remove(self, engine: Engine) -> None:
        """Lets a draining version go."""
        del self._draining[engine.key]

    def report(self, key: ModelKey, error: LatchError) -> None:
        """Says why a version cannot be served, or not as its files are now."""
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold what was loaded of it
        self.broken[key] = error

    def _absent(self, name: str, version: str | None) -> LatchError:
        for key in self._draining:
            if key.name == name and version in (None, key.version):
                return _draining(key)
        for key, error in self.broken.items():
            if key.name == name and version in (None, key.version):
                return ModelBroken(f"model {key} cannot be served: {error}", reason=error.code)
        what = name if version is None else f"{name}/{version}"
        return ModelNotFound(f"no model {what!r}; loaded: {', '.join(self.names()) or 'none'}")


def _draining(key: ModelKey) -> ModelDraining:
    return ModelDraining(f"model {key} is being removed: it takes no new sessions")


def load_engine(
    files: ModelFiles,
    options: EngineOptions,
    metrics: Metrics,
    clock: Callable[[], float] = time.monotonic,
    ledger: Ledger | None = None,
) -> Engine:
    """Makes an engine of a version; in any thread.

    Raises:
        SettingsInvalid: the device is not there, for any model.
        LatchError: as `Engine`, however broken the version is.
    """
    try:
        return Engine(files, options, metrics, clock, ledger)
    except LatchError:
        raise
    except Exception as error:  # one broken model must not stop the others
        raise ModelUnloadable(f"cannot be loaded: {type(error).__name__}: {error}") from error


def load_engines(
    found: Iterable[ModelFiles],
    broken: dict[ModelKey, LatchError],
    options: EngineOptions,
    metrics: Metrics,
    clock: Callable[[], float] = time.monotonic,
    ledger: Ledger | None = None,
) -> Engines:
    """Makes an engine of every version that can be one; the others join `broken`.

    Raises:
        SettingsInvalid: the device is not there, for any model.
    """
    live, broken = [], dict(broken)
    for files in found:
        try:
            live.append(load_engine(files, options, metrics, clock, ledger))
        except SettingsInvalid:
            raise
        except LatchError as error:
            broken[files.key] = error
    return Engines(live, broken)
