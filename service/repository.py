"""`Repository`: keeps the engines in step with the model repository while they serve.

Rule: what serves goes on as it was loaded, whatever becomes of its files; only a version that was read whole, checked
and proven joins the others. Files are read and models are loaded in a worker thread, one after the other; the engines
themselves change on the event loop alone.

A version's fate is decided once for the files that it has: it is live, broken, or was unloaded by a call. It is decided
anew when they are others, and that is all that a look at the folder asks.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from service.engine import Engine, Engines
from service.errors import LatchError, ManifestInvalid, ModelBroken, ModelChanged, ModelInUse, ModelNotFound
from service.metrics import Metrics
from service.registry import ModelFiles, ModelKey, Stamp, load, stamps

log = logging.getLogger(__name__)

_EMPTY_SECONDS = 0.2  # between two looks whether a draining version has rows left


class Repository:
    """The folder of models, watched.

    Args:
        root: `<name>/<version>/` folders.
        engines: what serves of it now.
        seen: `stamps(root)` as it was before they were read.
        make: an engine of checked files, in any thread; raises LatchError.
        metrics: forgets versions that are gone.
        interval: seconds between two looks; 0 for none: then versions come and go by `load` and `unload` alone.
    """

    def __init__(
        self,
        root: Path,
        engines: Engines,
        seen: dict[ModelKey, Stamp],
        make: Callable[[ModelFiles], Engine],
        metrics: Metrics,
        *,
        interval: float,
    ) -> None:
        self.engines = engines
        self._root = root
        self._make = make
        self._metrics = metrics
        self._interval = interval
        self._decided = {key: stamp for key, stamp in seen.items() if key not in engines.broken}
        self._seen = seen
        self._lock = asyncio.Lock()  # one fate is decided at a time: calls wait for a version that loads
        self._removals: dict[ModelKey, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the engines, and the looks."""
        for engine in self.engines:
            engine.start()
        if self._interval:
            self._watch = asyncio.create_task(self._serve(), name="repository")

    async def close(self) -> None:
        """Ends all of it."""
        tasks = [*filter(None, (self._watch, *self._removals.values()))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self.engines:
            await engine.close()

    async def look(self) -> None:
        """Looks at the folder once: loads what is new there, and drains what is gone.

        Raises:
            ManifestInvalid, OSError: the folder cannot be looked into; everything stays as it is.
        """
        found = await asyncio.to_thread(stamps, self._root)
        before, self._seen = self._seen, found
        known = {*self._decided, *self.engines.broken, *(engine.key for engine in self.engines)}
        for key in sorted(known - found.keys()):
            async with self._lock:
                self._gone(key)
        for key, stamp in found.items():
            async with self._lock:
                if self._decided.get(key) != stamp:
                    try:
                        await self._decide(key)
                    except LatchError as error:
                        self._report(key, error)
                        # A copy may still be under way, too quick for the clock of the files: try the same ones twice.
                        if before.get(key) != stamp:
                            continue
                    self._decided[key] = stamp

    async def load(self, name: str, version: str) -> Engine:
        """Loads a version, if it is not live already; a draining one is live again.

        Raises:
            ModelNotFound: there is no folder of it.
            ModelBroken: it does not load; its `reason` is the code of why. Or the repository cannot be looked into.
            ModelChanged: it serves, from other files than there are now.
        """
        key = ModelKey(name, version)
        async with self._lock:
            try:
                found = await asyncio.to_thread(stamps, self._root)
            except (LatchError, OSError) as error:
                reason = error.code if isinstance(error, LatchError) else ManifestInvalid.code
                raise ModelBroken(f"model {key} cannot be looked for: {error}", reason=reason) from None
            if key not in found:
                raise ModelNotFound(f"no folder {key} in the model repository")
            try:
                engine = await self._decide(key)
            except LatchError as error:
                self._report(key, error)
                if self._serving(key) is not None:
                    raise ModelChanged(str(self.engines.broken[key])) from None
                raise ModelBroken(f"model {key} cannot be served: {error}", reason=error.code) from None
            self._decided[key] = found[key]
            return engine

    async def unload(self, name: str, version: str, *, drain: bool) -> Engine | None:
        """Stops serving a version, and leaves its files alone. It stays away until `load`, or until they change.

        Args:
            name: of the model.
            version: of it.
            drain: it may go on for the sessions that it has.

        Returns:
            None where it is gone; the engine where it goes on for now.

        Raises:
            ModelInUse: it has sessions, and may not go on for them.
            ModelNotFound, ModelBroken: it is not served.
        """
        async with self._lock:
            engine = self.engines.serving(name, version)
            if engine.sessions and not drain:
                raise ModelInUse(
                    f"model {engine.key} has {engine.sessions} live sessions: end them, or ask with ?drain=true",
                    sessions=engine.sessions,
                )
            removal = self._drain(engine)
        if not len(engine.slab):
            await asyncio.wait([removal])
        return engine if engine in self.engines else None

    async def _serve(self) -> None:
        problem = ""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except (LatchError, OSError) as error:
                if str(error) != problem:
                    log.error("%s; what serves goes on", error)
                problem = str(error)
            except Exception:
                log.exception("a look at the model repository failed; the next one tries again")
            else:
                problem = ""

    async def _decide(self, key: ModelKey) -> Engine:
        """Reads a version, and loads it unless it is what serves already. Raises LatchError where it is neither."""
        files = await asyncio.to_thread(load, self._root / key.name / key.version)
        engine = self._serving(key)
        if engine is None:
            engine = await asyncio.to_thread(self._make, files)
            engine.start()
            log.info("model %s on %s", key, engine.device)
        elif files.digest != engine.digest:
            raise ModelChanged("its files are others than when it was loaded")
        if (removal := self._removals.pop(key, None)) is not None:
            removal.cancel()
        self.engines.add(engine)
        return engine

    def _report(self, key: ModelKey, error: LatchError) -> None:
        """Notes why a version is not served, or not as its files are."""
        if self._serving(key) is not None:
            error = ModelChanged(
                f"{key} goes on as it was loaded: {error}. Give new files a version of their own, or unload "
                "this one before"
            )
        if str(error) != str(self.engines.broken.get(key)):
            log.error("model %s is not loaded: %s", key, error)
        self.engines.report(key, error)

    def _serving(self, key: ModelKey) -> Engine | None:
        return next((engine for engine in self.engines if engine.key == key), None)

    def _gone(self, key: ModelKey) -> None:
        """The folder of a version is not there any more."""
        self._decided.pop(key, None)
        self.engines.broken.pop(key, None)
        engine = self._serving(key)
        if engine is not None and self.engines.is_live(engine):
            log.warning("model %s is gone from the repository: %d sessions stay on it", key, engine.sessions)
            self._drain(engine)

    def _drain(self, engine: Engine) -> asyncio.Task[None]:
        """Has a version take no new sessions, and go when it has no rows."""
        if self.engines.is_live(engine):
            self.engines.drain(engine)
            self._removals[engine.key] = asyncio.create_task(self._remove(engine), name=f"removal {engine.key}")
        return self._removals[engine.key]

    async def _remove(self, engine: Engine) -> None:
        while len(engine.slab):  # noqa: ASYNC110 - rows are given back in many places; who looks misses none
            await asyncio.sleep(_EMPTY_SECONDS)
        self.engines.remove(engine)
        del self._removals[engine.key]
        if self.engines.broken.pop(engine.key, None) is not None:
            self._decided.pop(engine.key, None)  # what its files became meanwhile may be loaded now
        self._metrics.forget(*engine.key)
        await engine.close()
        log.info("model %s is no longer served", engine.key)
