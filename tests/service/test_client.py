"""The clients, sync and async by the same tests, against a real service and through a network that breaks."""

import asyncio
import inspect
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import InvalidURI
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from service.client import (
    AsyncClient,
    Client,
    LostSteps,
    NotAllStepped,
    NotLatch,
    OtherProcess,
    PatienceExhausted,
    Reply,
)
from service.client.blocking import _let_go
from service.client.effects import Dial, Exchange, Later, Retry, Work
from service.client.transport import Target, failure
from service.errors import (
    InvalidInput,
    ModelNotFound,
    PayloadTooLarge,
    SessionExists,
    SessionNotFound,
    SnapshotInvalid,
    StepConflict,
    StepNotKept,
)
from tests.service.conftest import Server
from tests.service.networks import network, page, stranger
from tests.service.servers import free_port

ROWS = np.random.default_rng(5).normal(size=(200, 3)).astype(np.float32)


class Blocking:
    """Something async as if it were not: its calls run on a loop to their end, its generators are iterators."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._loop = inner, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            result = value(*arguments, **options)
            if inspect.isasyncgen(result):
                return self._each(result)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(result)
            return Blocking(result, self._loop) if hasattr(result, "step") and not isinstance(result, Reply) else result

        return call

    def _each(self, replies: Any) -> Iterator[Any]:
        try:
            while True:
                yield self._loop.run_until_complete(anext(replies))
        except StopAsyncIteration:
            return
        finally:
            self._loop.run_until_complete(replies.aclose())


@pytest.fixture(params=[Client, AsyncClient])
def client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients of one kind, with the interface of the sync one."""
    with asyncio.Runner() as runner:
        made = []

        def make(url: str, **options: Any) -> Any:
            inner = request.param(url, **options)
            made.append(inner if isinstance(inner, Client) else Blocking(inner, runner.get_loop()))
            return made[-1]

        yield make
        for each in made:
            each.close()


def expected(latch: Any, rows: np.ndarray = ROWS) -> np.ndarray:
    """What the model gives for the whole sequence, without a session."""
    outputs: np.ndarray = latch.predict("toy", [rows])[0]["y"]
    return outputs


def test_a_session_is_made_found_and_stepped(server: Server, client: Callable[..., Any]) -> None:
    """Asking again for the same id goes on from its step; what comes back are arrays of the outputs asked for."""
    latch = client(server.url)
    session = latch.session("found-again", model="toy", idle_ttl=60, metadata={"line": "4"})
    reply = session.step(ROWS[:3], outputs=["y", "h"])
    assert (reply.step, reply["y"].dtype, reply["h"].shape) == (3, np.float32, (3, 4))
    again = latch.session("found-again", model="toy", idle_ttl=7)  # which it keeps as it was made
    assert (again.id, again.model, again.version, again.at) == ("found-again", "toy", "1", 3)
    assert (again.idle_ttl, session.idle_ttl) == (60, 60)
    assert (again.step(ROWS[3])["y"] == expected(latch)[3]).all()
    page = server.http.get("/v1/sessions/found-again").json()
    assert (page["idle_ttl_ms"], page["metadata"]) == (60_000, {"line": "4"})
    session.delete()
    session.delete()
    with pytest.raises(SessionNotFound):
        latch.session("found-again")


@pytest.mark.parametrize("window", [1, 64])
@pytest.mark.parametrize("outputs", [None, ["h", "y"]], ids=["one session's socket", "a channel"])
def test_a_stream_is_the_whole_sequence(
    server: Server, client: Callable[..., Any], window: int, outputs: list[str] | None
) -> None:
    """Rows and chunks in, one reply an item, bit-equal to the prediction of all of it."""
    latch = client(server.url)
    session = latch.session(model="toy")
    items = [ROWS[0], ROWS[1:50], *ROWS[50:]]
    replies = list(session.stream(items, window=window, outputs=outputs))
    assert [reply.step for reply in replies] == [1, *range(50, 201)]
    assert (np.concatenate([reply["y"] for reply in replies]) == expected(latch)).all()
    assert session.at == 200


def test_integers_stay_integers(server: Server, client: Callable[..., Any]) -> None:
    """Ids go in as they are, and a fraction is no id."""
    session = client(server.url).session(model="counter")
    assert session.step([1, 2, 3])["y"].tolist() == [1.5, 5.5, 14.5]
    assert [reply["y"].tolist() for reply in session.stream([3, np.int32(2)])] == [[23.5], [27.5]]
    with pytest.raises(InvalidInput):
        session.step([1.5])


def test_a_session_that_is_stepped_between_two_replies_goes_on(server: Server, client: Callable[..., Any]) -> None:
    """A step, a reset or another stream inside of the loop: each takes the number that is next."""
    latch = client(server.url)
    session = latch.session(model="toy")
    whole = expected(latch, ROWS[[0, 9, 1, 9, 2, 9]])
    got = []
    for reply in session.stream(ROWS[:3]):
        got += [reply["y"], session.step(ROWS[9])["y"]]
    assert (np.concatenate(got) == whole).all()
    replies = session.stream(ROWS)
    next(replies)
    session.reset()
    assert (next(replies)["y"] == expected(latch, ROWS[1:2])).all()
    replies.close()
    assert session.at == 1


def test_what_the_service_refuses_is_typed(server: Server, client: Callable[..., Any]) -> None:
    """Errors are those of `service.errors`, over HTTP and over a socket; a refused step changes nothing."""
    latch = client(server.url)
    with pytest.raises(ModelNotFound):
        latch.session(model="nope")
    with pytest.raises(InvalidInput):
        latch.session()
    session = latch.session("refused", model="toy")
    with pytest.raises(SessionExists):
        latch.session("refused", model="counter")
    bad = ROWS[:5].copy()
    bad[3, 1] = np.nan
    with pytest.raises(InvalidInput) as caught:
        session.step(bad)
    assert caught.value.extras["path"] == "$.inputs[3][1]"
    with pytest.raises(InvalidInput):
        list(session.stream(bad))
    assert session.at == 3
    with pytest.raises(InvalidInput):
        list(session.stream(bad, outputs=["nope"]))
    with pytest.raises(InvalidInput):
        next(session.stream(bad, window=0))
    server.http.delete("/v1/sessions/refused")
    with pytest.raises(SessionNotFound):
        session.step(ROWS)
    with pytest.raises(SessionNotFound):
        list(session.stream(ROWS))


def test_two_clients_of_one_session_are_told_of_each_other(server: Server, client: Callable[..., Any]) -> None:
    """Whoever comes second learns which step is next, and goes on from there when he has looked."""
    one, other = (client(server.url).session("shared", model="toy") for _ in range(2))
    one.step(ROWS[:2])
    one.step(ROWS[2])
    with pytest.raises(StepConflict) as caught:
        other.step(ROWS[5])
    assert caught.value.extras["expected_step"] == 4
    with pytest.raises(StepConflict):
        list(other.stream(ROWS[5:6]))
    other.refresh()
    assert other.step(ROWS[3]).step == 4
    one.delete()


def test_a_session_that_fell_behind_is_never_gone_on_with(server: Server, client: Callable[..., Any]) -> None:
    """Fewer steps than were acknowledged raise, over HTTP and over a socket, before anything is applied."""
    session = client(server.url).session("fallen", model="toy")
    session.step(ROWS[:5])
    server.http.post("/v1/sessions/fallen/reset")
    with pytest.raises(LostSteps) as caught:
        session.step(ROWS[5])
    assert (caught.value.acknowledged, caught.value.found) == (5, 0)
    with pytest.raises(LostSteps):
        list(session.stream(ROWS[5:]))
    session.refresh()
    assert session.step(ROWS[0]).step == 1
    session.delete()


def test_threads_and_tasks_may_share_a_session(server: Server) -> None:
    """Steps of one session wait for each other, so that each has a number of its own."""
    with Client(server.url) as latch:
        session = latch.session(model="toy")
        threads = [threading.Thread(target=session.step, args=(row,)) for row in ROWS[:8]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.at == 8

    async def together() -> int:
        async with AsyncClient(server.url) as latch:
            session = await latch.session(model="toy")
            await asyncio.gather(*(session.step(row) for row in ROWS[:8]))
            return session.at

    assert asyncio.run(together()) == 8


def test_an_async_source_is_read_as_it_comes(server: Server) -> None:
    """With a window of 1 each reading is answered before the next one is asked for."""
    log: list[str] = []

    async def live() -> AsyncIterator[np.ndarray]:
        for i, row in enumerate(ROWS):
            log.append(f"reading {i}")
            yield row

    async def follow() -> None:
        async with AsyncClient(server.url) as latch:
            session = await latch.session(model="toy")
            replies = session.stream(live())
            async for reply in replies:
                log.append(f"reply {reply.step}")
                if reply.step == 2:
                    break
            await replies.aclose()

    asyncio.run(follow())
    assert log == ["reading 0", "reply 1", "reading 1", "reply 2"]


def test_the_client_imports_none_of_the_service() -> None:
    """Neither the web framework nor the runtime is loaded with it, nor what needs them."""
    heavy = {"fastapi", "starlette", "uvicorn", "pydantic", "onnx", "onnxruntime", "service.app", "service.sessions"}
    program = f"import sys, service.client; print(*sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "\n"


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_through_a_network_that_breaks_anywhere(server: Server, client: Callable[..., Any], seed: int) -> None:
    """Whatever byte a connection ends at, the loop sees each reply once, in order, with the bits of the prediction."""
    rng = np.random.default_rng(seed)
    with network(server.url, rng.integers(1, 3000, 20).tolist()) as proxy:
        latch = client(proxy.url)
        session = latch.session(model="toy")
        replies = list(session.stream(ROWS, window=int(rng.choice([1, 1, 3, 40]))))
        assert [reply.step for reply in replies] == [*range(1, 201)]
        assert (np.concatenate([reply["y"] for reply in replies]) == expected(client(server.url))).all()
        assert proxy.cuts > 2
    assert client(server.url).session(session.id).at == 200


def test_calls_through_a_network_that_breaks_anywhere(server: Server, client: Callable[..., Any]) -> None:
    """Steps over HTTP, each of them with a connection that may end: none is doubled, none is lost."""
    with network(server.url, np.random.default_rng(11).integers(200, 4000, 8).tolist()) as proxy:
        latch = client(proxy.url)
        session = latch.session(model="toy")
        replies = [session.step(row)["y"] for row in ROWS[:60]]
        assert (np.concatenate(replies) == expected(client(server.url), ROWS[:60])).all()
        assert proxy.cuts > 2
    assert client(server.url).session(session.id).at == 60


def test_a_group_steps_many_sessions_together(server: Server, client: Callable[..., Any]) -> None:
    """Of two models, one row or more of each, some by themselves in between: each has the bits of being alone."""
    latch = client(server.url)
    sessions = [latch.session(f"member-{i}", model="toy") for i in range(300)]
    counter = latch.session(model="counter")
    group, rich = latch.group(), latch.group(outputs=["h"])
    replies = group.step({session: ROWS[i % 200] for i, session in enumerate(sessions)} | {counter: [1, 2]})
    assert replies[counter]["y"].tolist() == [1.5, 5.5]
    assert sessions[7].step(ROWS[3:5])["y"].shape == (2, 4)
    second = group.step({session: ROWS[5 : 6 + i % 3] for i, session in enumerate(sessions)})
    assert [session.at for session in sessions] == [2 + i % 3 + 2 * (i == 7) for i in range(300)]
    for i in (0, 199, 299):
        whole = expected(latch, np.concatenate([ROWS[i % 200][None], ROWS[5 : 6 + i % 3]]))
        assert (np.concatenate([replies[sessions[i]]["y"], second[sessions[i]]["y"]]) == whole).all()
    states = rich.step({sessions[0]: ROWS[6]})[sessions[0]]
    assert states["h"].shape == (1, 4)
    group.close()
    assert group.step({sessions[0]: ROWS[7]})[sessions[0]].step == states.step + 1
    for each in (group, rich):
        each.close()
    for session in sessions:
        session.delete()


@pytest.mark.parametrize("seed", range(3))
def test_a_group_through_a_network_that_breaks_anywhere(server: Server, client: Callable[..., Any], seed: int) -> None:
    """Whatever byte a connection ends at, every session sees each reply once, with the bits of the prediction."""
    rng = np.random.default_rng(seed)
    with network(server.url, [None, *rng.integers(1, 9000, 8).tolist()]) as proxy:  # the first makes the sessions
        latch = client(proxy.url)
        sessions = [latch.session(model="toy") for _ in range(8)]
        group = latch.group()
        replies = [group.step({session: ROWS[i + k] for i, session in enumerate(sessions)}) for k in range(60)]
        group.close()
        for i, session in enumerate(sessions):
            given = np.concatenate([each[session]["y"] for each in replies])
            assert (given == expected(client(server.url), ROWS[i : i + 60])).all()
        assert proxy.cuts > 2


def test_one_session_of_a_group_is_refused_and_the_others_go_on(server: Server, client: Callable[..., Any]) -> None:
    """A value that is none, a session that is gone, one that somebody moved: the error has all replies and errors."""
    latch = client(server.url)
    fine, bad, gone, moved = (latch.session(model="toy") for _ in range(4))
    group = latch.group()
    group.step(dict.fromkeys((fine, bad, gone, moved), ROWS[0]))
    latch.session(gone.id).delete()
    other = latch.session(moved.id)
    other.step(ROWS[1])
    other.step(ROWS[2])
    with pytest.raises(NotAllStepped, match="3 of 4") as caught:
        group.step({fine: ROWS[1], bad: [1.0, np.nan, 2.0], gone: ROWS[1], moved: ROWS[1]})
    assert [reply.step for reply in caught.value.replies.values()] == [2]
    assert [*map(type, caught.value.errors.values())] == [InvalidInput, SessionNotFound, StepConflict]
    moved.refresh()
    assert [reply.step for reply in group.step({moved: ROWS[3], bad: ROWS[1]}).values()] == [4, 2]
    with pytest.raises(InvalidInput, match=f"session '{fine.id}': rows of shape"):
        group.step({bad: ROWS[2], fine: [1.0]})
    assert (bad.at, server.http.get(f"/v1/sessions/{bad.id}").json()["step"]) == (2, 2)
    group.close()


def test_a_group_is_closed_between_steps(server: Server) -> None:
    """Threads may share it, also while one of them closes it."""
    with Client(server.url) as latch:
        sessions = [latch.session(model="toy") for _ in range(20)]
        group = latch.group()
        closing = threading.Event()

        def close() -> None:
            while not closing.is_set():
                group.close()

        closer = threading.Thread(target=close)
        closer.start()
        try:
            for k in range(20):
                replies = group.step(dict.fromkeys(sessions, ROWS[k]))
                assert [reply.step for reply in replies.values()] == [k + 1] * 20
        finally:
            closing.set()
            closer.join()
        group.close()


def test_locks_are_let_go_wherever_an_interrupt_came() -> None:
    """Those that were taken, whichever these are; another thread's stay with it."""
    locks = [threading.RLock() for _ in range(4)]
    theirs, go = threading.Event(), threading.Event()

    def hold() -> None:
        with locks[3]:
            theirs.set()
            go.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    theirs.wait(20)
    for lock in locks[:2]:
        lock.acquire()
    _let_go([*locks])
    free: list[bool] = []
    prober = threading.Thread(target=lambda: free.extend(lock.acquire(blocking=False) for lock in locks))
    prober.start()
    prober.join()
    go.set()
    holder.join()
    assert free == [True, True, True, False]


def test_what_another_try_would_not_mend_is_final() -> None:
    """A certificate that is not trusted, an address that is none; a broken connection may pass."""
    refused = httpx.ConnectError("no")
    refused.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")
    refused.__cause__.verify_message = "self-signed certificate"  # type: ignore[attr-defined]
    error = failure(refused)
    assert isinstance(error, NotLatch)
    assert "self-signed certificate; SSL_CERT_FILE" in str(error)
    assert isinstance(failure(InvalidURI("xs://a", "scheme")), NotLatch)
    assert isinstance(failure(httpx.ConnectError("no")), Later)
    assert Target("HTTPS://a:1/b/").socket("/v1/stream", 1.0)["uri"] == "wss://a:1/b/v1/stream"


def test_a_cancelled_step_of_a_group_may_be_repeated(server: Server) -> None:
    """Whatever of it was applied is not applied again, and the answers that nobody read are nobody else's."""

    async def follow() -> None:
        async with AsyncClient(server.url) as latch, latch.group() as group:
            sessions = [await latch.session(model="toy") for _ in range(8)]
            for k in range(20):
                rows = {session: ROWS[i + k] for i, session in enumerate(sessions)}
                task = asyncio.create_task(group.step(rows))
                await asyncio.sleep(0.0003 * k)
                task.cancel()
                await asyncio.wait([task])
                replies = task.result() if not task.cancelled() else await group.step(rows)
                assert [reply.step for reply in replies.values()] == [k + 1] * 8
            whole = (await latch.predict("toy", [ROWS[7:27]]))[0]["y"]
            assert (replies[sessions[7]]["y"] == whole[-1]).all()

    asyncio.run(follow())


def test_a_session_that_did_not_survive_is_told(
    server: Server, start: Callable[..., Server], client: Callable[..., Any]
) -> None:
    """After a restart without a durable store the loop ends with the reason; nothing is made anew behind its back."""
    with network(server.url, []) as proxy:
        session = client(proxy.url).session("volatile", model="toy")
        replies = session.stream(ROWS)
        next(replies)
        proxy.move(int(start().url.rpartition(":")[2]))
        with pytest.raises(SessionNotFound):
            list(replies)


class Mortal:
    """`latch serve` in a process of its own, on one port and one file, through all its lives."""

    def __init__(self, models: Path, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--models", str(models)]
        self._command += ["--store", f"sqlite:///{folder / 'sessions.db'}", "--device", "cpu"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and does not wait."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Ends it: as a crash does, or with its own goodbye."""
        assert self._process is not None
        assert self._process.poll() is None, "it has ended by itself"
        self._process.send_signal(how)
        self._process.wait(60)


def test_a_service_that_dies_in_the_middle_of_a_stream_costs_time_only(
    repository: Path, tmp_path: Path, client: Callable[..., Any]
) -> None:
    """Killed and stopped, at moments of nobody's choice: each reply once, in order, with the bits of no death."""
    server = Mortal(repository, tmp_path)
    server.start()
    due, dead = ([threading.Event(), threading.Event()] for _ in range(2))

    def reap() -> None:
        for asked, done, how in zip(due, dead, (signal.SIGKILL, signal.SIGTERM), strict=True):
            asked.wait(60)
            server.end(how)
            done.set()
            server.start()

    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        session = client(server.url).session("survivor", model="toy")
        replies = []
        rows = np.tile(ROWS, (4, 1))
        for reply in session.stream(rows):
            replies.append(reply)
            if len(replies) in (100, 450):
                due[len(replies) // 450].set()
            if len(replies) in (400, 750):  # a slow reaper must not come after the last step
                assert dead[len(replies) // 750].wait(60)
        assert [reply.step for reply in replies] == [*range(1, 801)]
        whole = client(server.url).predict("toy", [rows])[0]["y"]
        assert (np.concatenate([reply["y"] for reply in replies]) == whole).all()
        assert client(server.url).session("survivor").at == 800
    finally:
        for asked in due:
            asked.set()
        reaper.join()
        server.end()


def test_a_service_that_dies_between_and_in_the_steps_of_a_group_costs_time_only(
    repository: Path, tmp_path: Path, client: Callable[..., Any]
) -> None:
    """Killed in the middle of a step: each reply once, with the bits of no death."""
    server = Mortal(repository, tmp_path)
    server.start()

    def again() -> None:
        server.end()
        server.start()

    latch = client(server.url)
    try:
        sessions = [latch.session(f"survivor-{i}", model="toy") for i in range(30)]
        group = latch.group()
        replies = []
        for k in range(60):
            if k in (20, 40):
                reaper = threading.Timer(0.002, again)
                reaper.start()
            replies.append(group.step({session: ROWS[i + k] for i, session in enumerate(sessions)}))
            if k in (20, 40):
                reaper.join()
        group.close()
        for i, session in enumerate(sessions):
            whole = latch.predict("toy", [ROWS[i : i + 60]])[0]["y"]
            assert (np.concatenate([each[session]["y"] for each in replies]) == whole).all()
            assert latch.session(session.id).at == 60
    finally:
        server.end()


def test_sessions_branch_return_and_move(start: Callable[..., Server], client: Callable[..., Any]) -> None:
    """A fork, a rollback, a reset and a snapshot each go on from where they should, with the bits of that sequence."""
    server = start(keep_steps=4)
    latch = client(server.url)
    whole = expected(latch)
    session = latch.session("trunk", model="toy")
    for row in ROWS[:4]:
        session.step(row)
    branch, named = session.fork(), session.fork("named", idle_ttl=60, metadata={"a": "b"})
    snapshot = session.snapshot()
    assert (branch.at, named.at, named.id) == (4, 4, "named")
    with pytest.raises(SessionExists):
        session.fork("named")
    session.rollback(2)
    session.rollback(2)
    assert session.at == 2
    assert (session.step(ROWS[2:6])["y"] == whole[2:6]).all()
    assert (branch.step(ROWS[4])["y"] == whole[4]).all()
    with pytest.raises(StepNotKept) as caught:
        branch.rollback(0)
    assert caught.value.extras["kept_steps"]
    session.reset()
    assert (next(iter(session.stream(ROWS)))["y"] == whole[0]).all()
    moved = latch.restore(snapshot, "moved", idle_ttl=7)
    assert (moved.at, moved.id, latch.restore(snapshot).at) == (4, "moved", 4)
    assert server.http.get("/v1/sessions/moved").json()["idle_ttl_ms"] == 7000
    assert (moved.step(ROWS[4])["y"] == whole[4]).all()
    begun = latch.session(model="toy", state={"h": np.zeros(4)})
    assert (begun.step(ROWS[0])["y"] == whole[0]).all()
    with pytest.raises(SnapshotInvalid):
        latch.restore(snapshot[:-9], "moved")


def test_patience_ends(client: Callable[..., Any]) -> None:
    """With nobody there, the error says so and what was last."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PatienceExhausted, match=r"0\.1 s") as caught:
        client(f"http://127.0.0.1:{port}", patience=0.1).session(model="toy")
    assert caught.value.__cause__ is not None


def silent(listener: socket.socket, done: threading.Event) -> None:
    """Opens one WebSocket, and reads nothing from it."""
    peer, _ = listener.accept()
    with peer:
        protocol = ServerProtocol(subprotocols=[Subprotocol("latch.binary")])
        protocol.receive_data(peer.recv(4096))
        [asked] = protocol.events_received()
        assert isinstance(asked, Request)
        protocol.send_response(protocol.accept(asked))
        peer.sendall(b"".join(protocol.data_to_send()))
        done.wait(30)


def test_a_large_message_to_who_reads_nothing_is_given_up() -> None:
    """It fills the network on its way, so that the sending waits, which websockets lets it do for ever."""

    def work() -> Work[bytes]:
        yield Dial("/v1/stream", 0.5)
        return (yield Exchange(bytes(2**24), 0.5))

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = threading.Thread(target=silent, args=(listener, done))
        peer.start()
        try:
            with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as latch, pytest.raises(Later):
                latch._line.run(work())
        finally:
            done.set()
            peer.join()


@pytest.mark.parametrize(
    ("answer", "error"),
    [(b"", PatienceExhausted), (page("502 Bad Gateway"), PatienceExhausted), (page("403 Forbidden"), NotLatch)],
    ids=["nothing", "a proxy without a service", "somebody else"],
)
def test_what_answers_instead_of_the_service(
    server: Server, client: Callable[..., Any], answer: bytes, error: type[Exception]
) -> None:
    """Silence and a proxy's 502 may pass, so they are waited for as long as patience has it; a 403 will not."""
    hasty = Retry(patience=1.0, timeout=0.5) if error is PatienceExhausted else Retry()
    with stranger(answer) as port, network(server.url, []) as proxy:
        with pytest.raises(error):
            client(f"http://127.0.0.1:{port}", timeout=hasty.timeout, patience=hasty.patience).session(model="toy")
        session = client(proxy.url).session(model="toy")
        replies = session.stream(ROWS)
        next(replies)
        session._logic.client.retry = hasty
        proxy.move(port)
        with pytest.raises(error) as caught:
            next(replies)
        if isinstance(caught.value, PatienceExhausted):
            assert caught.value.unacknowledged == range(2, 3)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http:///a",
        "http://a:99999",
        "http://a:x",
        "http://a:1 ",
        "http://a/?b=c",
    ],
)
def test_an_address_that_is_none_is_refused(client: Callable[..., Any], url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidInput, match="http://"):
        client(url)


def test_a_header_that_is_none_is_refused_and_not_tried_for_ever(server: Server, client: Callable[..., Any]) -> None:
    """It will not be one the next time."""
    with pytest.raises(InvalidInput, match="no HTTP"):
        client(server.url, headers={"a": "b\nc"}).session(model="toy")


def test_an_answer_that_comes_byte_by_byte_is_given_up_in_time(client: Callable[..., Any]) -> None:
    """Each of them comes soon enough, and all of them would take for ever."""
    with stranger(page("200 OK", "{}" * 1000), pause=0.05) as port:
        begun = time.monotonic()
        with pytest.raises(PatienceExhausted):
            client(f"http://127.0.0.1:{port}", patience=1.0, timeout=0.4).session(model="toy")
        assert time.monotonic() - begun < 20  # 100 s for one answer


def test_a_client_of_another_process_is_refused(
    server: Server, client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that read from one connection would take each other's answers."""
    latch = client(server.url)
    session, group = latch.session(model="toy"), latch.group()
    group.step({session: ROWS[0]})
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: 0)
        for call in (lambda: session.step(ROWS[1]), lambda: group.step({session: ROWS[1]}), lambda: latch.session("a")):
            with pytest.raises(OtherProcess, match="one in each process"):
                call()
        group.close()  # which leaves the other's connections alone
        latch.close()
    assert session.step(ROWS[1]).step == 2
    assert group.step({session: ROWS[2]})[session].step == 3
    group.close()


def test_a_fork_while_a_step_is_under_way_is_told_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is never let go in the other process."""
    with Client(server.url) as latch:
        session, group = latch.session(model="toy"), latch.group()
        monkeypatch.setattr(session, "_lock", threading.Lock())
        monkeypatch.setattr(group, "_lock", session._lock)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        with session._lock:
            for call in (session.refresh, lambda: group.step({session: ROWS[0]})):
                with pytest.raises(OtherProcess):
                    call()
            group.close()
        monkeypatch.undo()


def test_the_end_of_a_forked_process_leaves_the_connections_alone(server: Server) -> None:
    """It says no goodbye on the socket that both have."""
    program = f"""
import os
from service.client import Client
with Client({server.url!r}) as latch:
    replies = latch.session(model="toy").stream([[1, 2, 3]] * 5)
    next(replies)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print(*(reply.step for reply in replies), all(not reply.replayed for reply in replies))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert run.stdout == "2 3 4 5 True\n"


def test_a_process_ends_while_a_stream_is_held(server: Server) -> None:
    """Its end does not wait for a thread that is gone."""
    program = f"""
from service.client import Client
latch = Client({server.url!r})
replies = latch.session(model="toy").stream([[1, 2, 3]] * 5)
print(next(replies).step)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert run.stdout == "1\n"


def test_the_handler_of_a_signal_may_end_a_pause(server: Server) -> None:
    """What it raises is the caller's, though it looks like a network that is slow."""

    def ring(*_: object) -> None:
        raise TimeoutError("enough")

    with Client(f"http://127.0.0.1:{free_port()}", patience=30.0) as latch:
        before = signal.signal(signal.SIGALRM, ring)
        latch._logic.retry = replace(latch._logic.retry, jitter=lambda least, most: 5.0)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(TimeoutError, match="enough"):
                latch.session(model="toy")
        finally:
            signal.signal(signal.SIGALRM, before)


def test_a_message_larger_than_the_service_takes(start: Callable[..., Server], client: Callable[..., Any]) -> None:
    """Over a socket, which closes with 1009, and over HTTP: refused for good, and nothing is tried again."""
    session = client(start(max_body_bytes=1024).url).session(model="toy")
    with pytest.raises(PayloadTooLarge):
        session.step(ROWS)
    with pytest.raises(PayloadTooLarge):
        list(session.stream([ROWS]))
    assert session.step(ROWS[:5]).step == 5
