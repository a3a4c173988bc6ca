"""`AsyncClient`, `AsyncSession`, `AsyncGroup`: for asyncio. Tasks may share them; calls of one session take turns.

Rule: as `blocking.py`, which documents every argument; it performs what `protocol.py` asks for, and decides nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, Self, TypeVar

import httpx
from websockets.asyncio.client import ClientConnection, connect

from service.client.effects import Answer, Call, Dial, Effect, Exchange, Retry, Sleep, Work
from service.client.groups import GroupLogic, replies_of
from service.client.protocol import ClientLogic, Reply, SessionLogic, Standing
from service.client.streams import StreamLogic
from service.client.transport import FAILURES, Process, Target, failure
from service.manifest import Array

T = TypeVar("T")


class AsyncClient:
    """As `Client`: close it, or use it in an `async with` block. It is of the event loop in which it is first used."""

    def __init__(
        self, url: str, *, patience: float = 60.0, timeout: float = 10.0, headers: Mapping[str, str] | None = None
    ) -> None:
        target = Target(url, headers or {})
        self._http = httpx.AsyncClient(**target.http())
        self._line = _Line(self._http, target)
        self._logic = ClientLogic(Retry(patience, timeout))

    async def session(
        self,
        session_id: str | None = None,
        *,
        model: str | None = None,
        version: str | None = None,
        idle_ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> "AsyncSession":
        """Creates a session, or finds the one of this id and goes on from its step."""
        work = self._logic.session(session_id, model, version, idle_ttl, metadata, state)
        return AsyncSession(self._line, await self._line.run(work))

    async def restore(
        self, snapshot: bytes, session_id: str | None = None, idle_ttl: float | None = None
    ) -> "AsyncSession":
        """A session from the bytes that `AsyncSession.snapshot` gave; one that has this id already is moved there."""
        return AsyncSession(self._line, await self._line.run(self._logic.restore(snapshot, session_id, idle_ttl)))

    async def predict(
        self, model: str, sequences: Iterable[Any], outputs: Iterable[str] | None = None
    ) -> list[dict[str, Array]]:
        """Runs whole sequences of rows, [T, *shape] each, from the initial state; nothing is kept."""
        return await self._line.run(self._logic.predict(model, sequences, outputs))

    def group(self, outputs: Iterable[str] | None = None) -> "AsyncGroup":
        """Steps many sessions together over one WebSocket; close it, or use it in an `async with` block."""
        return AsyncGroup(self._line.another(), GroupLogic(self._logic, outputs))

    async def close(self) -> None:
        """Lets go of the connections; sessions live on."""
        if self._line.process.is_this:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncSession(Standing):
    """As `Session`. A call that was cancelled may be repeated: what of it was applied is not applied again."""

    def __init__(self, line: "_Line", logic: SessionLogic) -> None:
        self._line = line
        self._logic = logic
        self._lock = asyncio.Lock()

    async def step(self, rows: Any, outputs: Iterable[str] | None = None) -> Reply:
        """Advances by one row or by T of them, [T, *shape]: all are applied, or none."""
        return await self._run(self._logic.step(rows, outputs))

    async def stream(
        self,
        readings: Iterable[Any] | AsyncIterable[Any],
        *,
        window: int = 1,
        outputs: Iterable[str] | None = None,
    ) -> AsyncGenerator[Reply]:
        """Sends what `readings` gives over one WebSocket: one reply for each item, in order, whatever breaks.

        Who leaves the loop early closes its socket with `contextlib.aclosing`, or leaves that to asyncio.
        """
        stream = StreamLogic(self._logic, outputs, window)
        line = self._line.another()
        try:
            async with aclosing(_batches(readings, window)) as batches:
                async for batch in batches:
                    for request in stream.requests.cut(batch):
                        for reply in await self._run(stream.exchange(request), line):
                            yield reply
        finally:
            await line.hang_up()

    async def refresh(self) -> None:
        """Goes on from the step at which the service says that the session is."""
        await self._run(self._logic.refresh())

    async def reset(self) -> None:
        """Back to the initial state and step 0."""
        await self._run(self._logic.reset())

    async def rollback(self, step: int) -> None:
        """Back to a step that the service keeps. Raises StepNotKept, which says of which it does."""
        await self._run(self._logic.rollback(step))

    async def fork(
        self,
        session_id: str | None = None,
        *,
        idle_ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> "AsyncSession":
        """Another session that goes on from here; this one stays as it is."""
        return AsyncSession(self._line, await self._run(self._logic.fork(session_id, idle_ttl, metadata)))

    async def snapshot(self) -> bytes:
        """The session as safetensors; `AsyncClient.restore` makes a session of it."""
        return await self._run(self._logic.snapshot())

    async def delete(self) -> None:
        """Ends the session; one that is gone is no error."""
        await self._run(self._logic.delete())

    async def _run(self, work: Work[T], line: "_Line | None" = None) -> T:
        self._line.process.check()  # before the lock, which somebody may have held as this process was forked
        async with self._lock:
            return await (line or self._line).run(work)


class AsyncGroup:
    """As `Group`. A step that was cancelled may be repeated: what of it was applied is not applied again."""

    def __init__(self, line: "_Line", logic: GroupLogic) -> None:
        self._line = line
        self._logic = logic
        self._lock = asyncio.Lock()

    async def step(self, rows: Mapping[AsyncSession, Any]) -> dict[AsyncSession, Reply]:
        """Advances each session by its own rows, and answers when all are through."""
        self._line.process.check()  # as in `AsyncSession._run`
        async with self._lock, AsyncExitStack() as held:
            for session in sorted(rows, key=id):  # two groups with the same sessions must not wait for each other
                await held.enter_async_context(session._lock)
            work = self._logic.step([(session._logic, row) for session, row in rows.items()])
            return replies_of(rows, await self._line.run(work))

    async def close(self) -> None:
        """Closes the WebSocket, after a step that is under way; another would open it again. The sessions live on."""
        if not self._line.process.is_this:
            return
        async with self._lock:
            self._logic.hung_up()
            await self._line.hang_up()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _batches(readings: Iterable[Any] | AsyncIterable[Any], window: int) -> AsyncGenerator[list[Any]]:
    batch: list[Any] = []
    async for item in readings if isinstance(readings, AsyncIterable) else _each(readings):
        batch.append(item)
        if len(batch) == window:
            yield batch
            batch = []
    if batch:
        yield batch


async def _each(readings: Iterable[Any]) -> AsyncIterator[Any]:
    for item in readings:
        yield item


class _Line:
    """Performs effects, over HTTP and over a WebSocket of its own."""

    def __init__(self, http: httpx.AsyncClient, target: Target) -> None:
        self._http = http
        self._target = target
        self.process = Process()
        self._dialled = AsyncExitStack()
        self._socket: ClientConnection | None = None

    def another(self) -> "_Line":
        """One with a WebSocket of its own."""
        return _Line(self._http, self._target)

    async def run(self, work: Work[T]) -> T:
        """Does what the work asks for until it has its result."""
        self.process.check()
        try:
            effect = next(work)
            while True:
                try:
                    outcome = await self._perform(effect)
                except FAILURES as error:
                    effect = work.throw(failure(error))
                else:
                    effect = work.send(outcome)
        except StopIteration as end:
            result: T = end.value
            return result

    async def hang_up(self) -> None:
        """Closes the WebSocket, if there is one."""
        socket, self._socket = self._socket, None
        if not self.process.is_this:
            self._dialled.pop_all()
            return
        try:
            await self._dialled.aclose()
        except BaseException:
            if socket is not None:  # interrupted: it would wait for the other end
                socket.transport.abort()
            raise

    async def _perform(self, effect: Effect) -> Any:
        match effect:
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Call():
                async with asyncio.timeout(effect.timeout):  # httpx's own limit is one for each read
                    reply = await self._http.request(**effect._asdict())
                return Answer(reply.status_code, reply.headers, reply.content)
            case Dial(path, timeout):
                await self.hang_up()
                self._socket = await self._dialled.enter_async_context(connect(**self._target.socket(path, timeout)))
            case Exchange(message, timeout) if self._socket is not None:
                async with asyncio.timeout(timeout):
                    if message is not None:
                        await self._socket.send(message)
                    return await self._socket.recv()
        return None
