"""`Engine`: one live version of a model, and `Engines`: all of them by name.

Rule: an engine is not handed out before it has replayed its golden vectors. It puts a runner, a slab and a batcher
together and knows no session ids.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from service.batcher import Batcher
from service.errors import LatchError, ModelBroken, ModelNotFound, ModelUnloadable, SettingsInvalid
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
    keep_reply_bytes: int


class Engine:
    """Runs one model version for its sessions.

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
        self.key = ModelKey(files.manifest.name, files.manifest.version)
        self._runner = OrtRunner(files.manifest, files.graph, device=options.device, threads=options.intra_op_threads)
        self.device = self._runner.device
        self.slab = StateSlab(files.manifest.state, options.max_sessions, clock)
        self.bit_exact = prove_bits(self._runner, files)
        self.golden_error = replay_golden(self._runner, files)
        self._runner.warm_up(options.max_batch_size)
        self.rows = RowFormat.of(files.manifest)
        self.codec = NativeCodec(self.rows, max_steps=options.max_steps)
        self.snapshots = SnapshotCodec("/".join(self.key), files.manifest.files["model.onnx"], files.manifest.state)
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
            keep_reply_bytes=options.keep_reply_bytes,
            metrics=metrics.model(*self.key, self.slab.__len__),
        )
        self.max_sequences = min(options.max_queue, options.max_sessions)
        self.chunks = self._runner.chunks
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the batcher's task on the running loop."""
        self._task = asyncio.create_task(self.batcher.serve(), name=f"batcher {self.key.name}/{self.key.version}")
        self._task.add_done_callback(_report)

    def stop(self) -> None:
        """Ends the task; whoever still waits is told that the service is stopping."""
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """`stop`, and waits until it has."""
        self.stop()
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the %s has ended: this model answers no more", task.get_name(), exc_info=task.exception())


class Engines:
    """The live engines, and why the other versions are not among them."""

    def __init__(self, live: Iterable[Engine], broken: dict[ModelKey, LatchError]) -> None:
        self._live = {engine.key: engine for engine in live}
        self.broken = broken

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._live.values())

    def versions(self, name: str) -> list[Engine]:
        """The live versions of a model, oldest first; its last one is the default.

        Raises:
            ModelNotFound: no such model.
            ModelBroken: it is there, but no version of it loads.
        """
        engines = sorted((e for e in self._live.values() if e.key.name == name), key=lambda e: int(e.key.version))
        if not engines:
            raise self._absent(name, None)
        return engines

    def get(self, name: str, version: str | None = None) -> Engine:
        """The engine of a version, or of the default one. Raises as `versions`."""
        if version is None:
            return self.versions(name)[-1]
        try:
            return self._live[ModelKey(name, version)]
        except KeyError:
            raise self._absent(name, version) from None

    def _absent(self, name: str, version: str | None) -> LatchError:
        for key, error in self.broken.items():
            if key.name == name and version in (None, key.version):
                return ModelBroken(f"model {key.name}/{key.version} cannot be served: {error}")
        what = name if version is None else f"{name}/{version}"
        known = ", ".join(sorted({key.name for key in self._live})) or "none"
        return ModelNotFound(f"no model {what!r}; loaded: {known}")


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
            live.append(Engine(files, options, metrics, clock, ledger))
        except SettingsInvalid:
            raise
        except LatchError as error:
            broken[ModelKey(files.manifest.name, files.manifest.version)] = error
        except Exception as error:  # noqa: BLE001 - one broken model must not stop the others, however it is broken
            reason = ModelUnloadable(f"cannot be loaded: {type(error).__name__}: {error}")
            broken[ModelKey(files.manifest.name, files.manifest.version)] = reason
    return Engines(live, broken)
