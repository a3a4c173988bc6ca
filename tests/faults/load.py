"""Clients: each writes a session of its own, in numbered requests, over any door of any replica, until it is answered.

What they sent, and what they were answered, is all that is known of a session when it is checked.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.faults.history import Model, Standing, read_snapshot
from tests.service import peer

T = TypeVar("T")
TRY_SECONDS = 2.0
PATIENCE = 120.0


class LostAnswerError(Exception):
    """Nobody knows whether the call was done, or it was not: it may be sent again."""


@dataclass
class RefusedError(Exception):
    """An answer that does not invite to another try."""

    code: str
    body: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.code}: {self.body}"


@dataclass
class Reply:
    """An acknowledged request: the step that it led to, and its packed outputs."""

    step: int
    data: bytes


class Doors:
    """One session through every door of every replica.

    Args:
        session: its id.
        model: what it runs.
        http: a client that calls share.
        seconds: that one try may take.
    """

    def __init__(self, session: str, model: Model, http: httpx.AsyncClient, seconds: float = TRY_SECONDS) -> None:
        self.session = session
        self.model = model
        self._http = http
        self._seconds = seconds
        self._sockets: dict[tuple[str, str], ClientConnection] = {}
        self.kinds: Sequence[Callable[[str, np.ndarray, int | None], Awaitable[Reply]]] = (
            self.json,
            self.packed,
            self.json_socket,
            self.binary_socket,
        )

    async def call(self, method: str, url: str, path: str = "", **options: Any) -> httpx.Response:
        """A call of HTTP to the session. Raises LostAnswerError, RefusedError."""
        try:
            # Not `asyncio.timeout`: a request that it cuts may be closing connections of others, which then stay open.
            with anyio.fail_after(self._seconds):
                reply = await self._http.request(method, f"{url}/v1/sessions/{self.session}{path}", **options)
        except (httpx.HTTPError, TimeoutError) as error:
            raise LostAnswerError(repr(error)) from error
        if reply.is_success:
            return reply
        try:
            body = reply.json()
        except ValueError:  # of a proxy
            body = {"code": f"HTTP {reply.status_code}", "retryable": reply.status_code in (502, 503, 504)}
        raise _failure(body)

    async def json(self, url: str, rows: np.ndarray, first: int | None) -> Reply:
        """`POST .../steps` in JSON."""
        body = {"inputs": rows.tolist()} | ({} if first is None else {"step": first})
        return self._read((await self.call("POST", url, "/steps", json=body)).json())

    async def packed(self, url: str, rows: np.ndarray, first: int | None) -> Reply:
        """`POST .../steps` in packed rows."""
        query = {} if first is None else {"step": str(first)}
        headers = {"content-type": "application/octet-stream"}
        reply = await self.call("POST", url, "/steps", content=rows.tobytes(), params=query, headers=headers)
        return Reply(int(reply.headers["latch-step"]), reply.content)

    async def json_socket(self, url: str, rows: np.ndarray, first: int | None) -> Reply:
        """`latch.json`."""
        message = json.dumps({"inputs": rows.tolist()} | ({} if first is None else {"step": first}))
        body = json.loads(await self._ask(url, "latch.json", message))
        if body["type"] == "error":
            raise _failure(body)
        return self._read(body)

    async def binary_socket(self, url: str, rows: np.ndarray, first: int | None) -> Reply:
        """`latch.binary`."""
        message = await self._ask(url, "latch.binary", peer.step(0, rows, first or 0))
        assert isinstance(message, bytes)
        [frame] = peer.replies(message, lambda _: self.model.row_bytes)
        if frame.kind == peer.ERROR:
            raise _failure(frame.document)
        assert frame.kind == peer.STEPPED
        return Reply(frame.first + frame.count - 1, frame.payload)

    async def standing(self, url: str) -> Standing:
        """Where the session stands."""
        return read_snapshot((await self.call("GET", url, "/state")).content)

    def forget(self) -> None:
        """Drops the sockets: they are those of a session that is gone."""
        for socket in self._sockets.values():
            socket.transport.abort()
        self._sockets.clear()

    async def close(self) -> None:
        """Ends the sockets."""
        for socket in self._sockets.values():
            await socket.close()

    def _read(self, body: dict[str, Any]) -> Reply:
        return Reply(body["step"], np.array(body["outputs"][self.model.output], np.float32).tobytes())

    async def _ask(self, url: str, protocol: str, message: str | bytes) -> str | bytes:
        """The answer to the only message that waits for one on a socket; it ends where that does not come."""
        socket, answer = self._sockets.pop((url, protocol), None), None
        try:
            async with asyncio.timeout(self._seconds):
                if socket is None:
                    address = f"{url.replace('http', 'ws')}/v1/sessions/{self.session}/stream"
                    socket = await connect(address, subprotocols=[protocol], open_timeout=None, close_timeout=0.2)  # type: ignore[list-item]
                    self._greeted(await _receive(socket))
                await socket.send(message)
                answer = await _receive(socket)
        except ConnectionClosed as error:
            raise _closed(error) from error
        except (OSError, TimeoutError, InvalidHandshake, EOFError) as error:
            raise LostAnswerError(repr(error)) from error
        finally:
            if socket is not None and (answer is None or (url, protocol) in self._sockets):
                socket.transport.abort()  # nobody knows what comes next on it, or another try went the same way
        self._sockets[url, protocol] = socket
        return answer

    @staticmethod
    def _greeted(hello: str | bytes) -> None:
        """Raises what the hello says where it is an error."""
        if isinstance(hello, bytes):
            [frame] = peer.replies(hello, lambda _: 0)
            is_error, body = frame.kind == peer.ERROR, frame.document
        else:
            body = json.loads(hello)
            is_error = body["type"] == "error"
        if is_error:
            raise _failure(body)


async def _leave(call: Awaitable[T], seconds: float) -> T:
    """Dies between send and reply, if that does not come in time. Raises LostAnswerError."""
    with anyio.move_on_after(seconds):  # not `asyncio.timeout`, as above
        return await call
    raise LostAnswerError("left")


async def _receive(socket: ClientConnection) -> str | bytes:
    """The next message. Raises LostAnswerError where it is `going_away`: what has no answer by then was not read."""
    message = await socket.recv()
    kind = message[0] if isinstance(message, bytes) else json.loads(message)["type"]
    if kind in (peer.GOING_AWAY, "going_away"):
        raise LostAnswerError("going away")
    return message


async def persist(call: Callable[[], Awaitable[T]], counts: Counter[str] | None = None) -> T:
    """What a call gives that is made until it is answered; `counts` how often it had to be made again."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return await call()
        except LostAnswerError as lost:
            if counts is not None:
                counts["retries"] += 1
            if time.monotonic() > end:
                raise AssertionError(f"no answer for {PATIENCE} s: {lost}") from lost
            await asyncio.sleep(0.02 + 0.05 * random.random())  # noqa: S311 - so that not all come at once


def _closed(error: ConnectionClosed) -> Exception:
    """What a close means: its reason is the code of an error."""
    code, reason = (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, "")
    if code in (1001, 1006, 1012) or reason in ("store_unavailable", "overloaded"):
        return LostAnswerError(f"closed with {code} {reason}")
    return RefusedError(reason, {"close": code})


def _failure(body: dict[str, Any]) -> Exception:
    return (
        LostAnswerError(body.get("error", body["code"])) if body.get("retryable") else RefusedError(body["code"], body)
    )


class Client:
    """A session's only writer.

    Attributes:
        rows: the inputs that were acknowledged.
        replies: to them, one after another.
        sending: the request that is on its way.
    """

    def __init__(self, load: "Load", doors: Doors, rng: random.Random) -> None:
        self._load = load
        self._rng = rng
        self.doors = doors
        self.rows: list[np.ndarray] = []
        self.replies: list[bytes] = []
        self.sending: np.ndarray | None = None
        self._is_made = False

    @property
    def step(self) -> int:
        """Steps acknowledged."""
        return sum(map(len, self.rows))

    async def run(self) -> None:
        """Until the load stops, and then one last request: whatever was lost, each client is told."""
        is_last = False
        try:
            while not is_last:
                is_last = self._load.stopping.is_set()
                self.sending = self.doors.model.rows(self._rng.randrange(2**32), self._rng.choice((1, 1, 1, 2, 5, 40)))
                start = time.monotonic()
                await persist(lambda: self._send(self._rng.choice(self._load.urls)), self._load.counts)
                self._load.longest = max(self._load.longest, time.monotonic() - start)
                await asyncio.sleep(self._rng.random() * self._load.pause)
        finally:
            await self.doors.close()

    async def _send(self, url: str) -> None:
        assert self.sending is not None
        if not self._is_made:
            await self.doors.call("PUT", url, json={"model": self.doors.model.name})
            self._is_made = True
        rows, first, rng = self.sending, self.step + 1, self._rng
        tries = [rng.choice(self.doors.kinds)(url, rows, first)]
        if rng.random() < self._load.leaves:
            self._load.counts["clients that left"] += 1
            tries = [_leave(tries[0], rng.random() * 0.01)]
        elif rng.random() < self._load.doubles:  # the same at another door, at the same time
            self._load.counts["sent twice at once"] += 1
            tries.append(rng.choice(self.doors.kinds)(rng.choice(self._load.urls), rows, first))
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
        if not replies or (wrong := [each for each in outcomes if isinstance(each, RefusedError)]):
            for outcome in outcomes:
                if isinstance(outcome, Exception) and not isinstance(outcome, LostAnswerError):
                    self._load.refused(self, outcome)
            if not replies:
                raise LostAnswerError(repr(outcomes))
            raise AssertionError(f"answered and refused: {wrong}")
        assert len({(reply.step, reply.data) for reply in replies}) == 1, "the same request was answered differently"
        self._acknowledge(replies[0])

    def _acknowledge(self, reply: Reply) -> None:
        assert self.sending is not None
        self.rows.append(self.sending)
        self.sending = None
        assert reply.step == self.step, f"{self.doors.session}: step {reply.step}, where {self.step} is the next"
        self.replies.append(reply.data)
        self._load.counts["requests"] += 1
        self._load.acknowledged.set()

    def rewind(self, step: int) -> int:
        """Goes on from an earlier step, because the store lost the later ones; how many requests those were."""
        if problems := self.problems(self.fold(self.rows)[1]):
            raise AssertionError(problems)
        before, count = self.step, len(self.rows)
        while self.step > step:
            self.rows.pop()
            self.replies.pop()
        assert self.step == step <= before, f"{self.doors.session} is back at step {step}, where no request ended"
        if not step:
            self._is_made = False
            self.doors.forget()
        return count - len(self.rows)

    def problems(self, standing: Standing) -> list[str]:
        """What is wrong with where the session stands, by what was acknowledged."""
        name, (outputs, wanted) = self.doors.session, self.fold(self.rows)
        found = []
        if standing.step != wanted.step:
            word = "lost" if standing.step < wanted.step else "doubled"
            found.append(f"{word}: {name} is at step {standing.step}, {wanted.step} were acknowledged")
        elif standing != wanted:
            found.append(f"wrong: the state of {name} at step {standing.step}")
        if b"".join(self.replies) != outputs:
            found.append(f"wrong: an answer of {name}")
        return found

    def fold(self, rows: Sequence[np.ndarray]) -> tuple[bytes, Standing]:
        """What the inputs of requests lead to."""
        empty = np.empty((0, *self.doors.model.inputs), np.float32)
        return self.doors.model.fold(np.concatenate([empty, *rows]))


@dataclass
class Load:
    """Clients that work until the block ends; then every session is checked at every replica.

    Args:
        urls: of the replicas, or of what is in front of them.
        models: which sessions run, in turn.
        rng: decides everything that is left to chance.
        sessions: how many.
        looks: where the check looks; at `urls` if it is empty.
        leaves, doubles: how likely it is that a client leaves before it is answered, or sends a request twice at once.
        pause: longest time between two requests of a client, in seconds.
        may_lose: whether the store may lose what was acknowledged, as long as it says so.

    Attributes:
        counts: what happened.
        longest: seconds that a request took, with all its tries.
        acknowledged: set whenever a request is.
    """

    urls: list[str]
    models: Sequence[Model]
    rng: random.Random
    sessions: int = 8
    looks: Sequence[str] = ()
    leaves: float = 0.05
    doubles: float = 0.05
    pause: float = 0.01
    may_lose: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    acknowledged: asyncio.Event = field(default_factory=asyncio.Event)
    clients: list[Client] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._http = http_client()
        for _ in range(self.sessions):
            model = self.models[len(self.clients) % len(self.models)]
            doors = Doors(f"s{self.rng.getrandbits(64):016x}", model, self._http)
            self.clients.append(Client(self, doors, random.Random(self.rng.random())))  # noqa: S311 - it shall be repeatable
        self._tasks = [asyncio.create_task(client.run()) for client in self.clients]
        await self.answers()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        try:
            if kind is not None:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                return
            outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
            if failures := [outcome for outcome in outcomes if outcome is not None]:
                raise failures[0]
            await self._check()
        finally:
            await self._http.aclose()
            await asyncio.sleep(0.01)  # for connections to end

    def refused(self, client: Client, error: Exception) -> None:
        """A request was refused for good. Where nothing may be lost, that fails; else the client goes back."""
        if self.may_lose and isinstance(error, RefusedError):
            if error.code == "step_conflict":
                self.counts["requests lost"] += client.rewind(error.body["expected_step"] - 1)
                return
            if error.code == "session_not_found":
                self.counts["sessions lost"] += 1
                self.counts["requests lost"] += client.rewind(0)
                return
        raise AssertionError(f"{client.doors.session} at step {client.step}: {error}") from error

    async def answers(self, count: int = 1) -> None:
        """Waits until so many more requests are acknowledged."""
        goal = self.counts["requests"] + count
        async with asyncio.timeout(PATIENCE):
            while self.counts["requests"] < goal:
                for task in self._tasks:
                    if task.done():
                        task.result()
                self.acknowledged.clear()
                await asyncio.wait(
                    [*self._tasks, wait := asyncio.ensure_future(self.acknowledged.wait())],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                wait.cancel()

    async def retried(self, count: int) -> None:
        """Waits until so many more requests had to be sent again."""
        goal = self.counts["retries"] + count
        async with asyncio.timeout(PATIENCE):
            while self.counts["retries"] < goal:  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.02)

    async def _check(self) -> None:
        problems = []
        for client in self.clients:
            for url in self.looks or self.urls:
                problems += client.problems(await persist(partial(client.doors.standing, url)))
        self.counts["sessions"] += len(self.clients)
        self.counts["steps"] += sum(client.step for client in self.clients)
        assert not problems, problems


def http_client() -> httpx.AsyncClient:
    """For any number of calls at once."""
    return httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None))
