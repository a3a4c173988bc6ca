"""The contract of a store, the same tests for every back end."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.errors import SessionExists, SessionExpired, SessionNotFound, SettingsInvalid
from service.stores import Save, Saved, SessionStore, open_store
from tests.service.servers import RedisServer, cluster, cluster_url, running

pytestmark = pytest.mark.anyio

KEEP = 3


@pytest.fixture(scope="module")
def redis_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """One server."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield [server]


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """A cluster of three."""
    with cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture(params=["memory", "sqlite", "redis", "cluster"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SessionStore]:
    """An empty store of each kind, that keeps 3 earlier saves and 3 expired ids."""
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/sessions.db"}
    if request.param in ("redis", "cluster"):
        is_cluster = request.param == "cluster"
        servers = request.getfixturevalue("redis_cluster" if is_cluster else "redis_servers")
        for server in servers:
            server("FLUSHALL")
        urls[request.param] = (cluster_url(servers) if is_cluster else servers[0].url) + "?timeout_ms=20000"
    opened = open_store(urls[request.param], keep_steps=KEEP, max_expired_ids=3)
    yield opened
    await opened.close()


@dataclass(frozen=True)
class Record:
    """A session as its maker sees it."""

    id: str
    model: str = "m"
    version: str = "1"
    idle_ttl: float = 900.0
    created_at: float = 1.5
    metadata: Mapping[str, str] = field(default_factory=lambda: {"what": "a string\0with \U0001f3b5"})


def token(number: int) -> bytes:
    """16 bytes."""
    return number.to_bytes(16, "little")


def saved(step: int, text: bytes = b"") -> Saved:
    """Where a session stands; its snapshot has every byte value."""
    return Saved(step, text + bytes(range(256)) + b"\0" * 3 + bytes([step % 256]))


async def made(store: SessionStore, *names: str, model: str = "m") -> None:
    """Creates sessions at step 0 with token 1."""
    for name in names:
        await store.create(Record(name, model), token(1), saved(0))


async def test_what_was_created_is_found(store: SessionStore) -> None:
    """Record, token and snapshot come back whole."""
    await made(store, "a")
    found = await store.load("a")
    record = Record("a")
    assert {name: getattr(found, name) for name in vars(record)} == vars(record)
    assert (found.token, found.saved) == (token(1), saved(0))
    assert found.time_left > 890
    assert not await store.earlier("a")


async def test_a_header_comes_back_in_front(store: SessionStore) -> None:
    """Whether a store keeps it apart or not, the snapshot is the same, and so are the earlier ones."""
    await store.create(Record("a"), token(1), Saved(0, b"values", b"header of all"))
    await store.save([Save("a", token(1), token(2), Saved(1, b"others", b"header of all"))])
    assert (await store.load("a")).saved.snapshot == b"header of allothers"
    assert [each.snapshot for each in await store.earlier("a")] == [b"header of allvalues"]


async def test_an_id_is_taken_once(store: SessionStore) -> None:
    """A second create is refused and changes nothing, but the first one sent again is not refused."""
    await made(store, "a")
    with pytest.raises(SessionExists):
        await store.create(Record("a", "second"), token(2), saved(5))
    await made(store, "a")
    found = await store.load("a")
    assert (found.model, found.token, found.saved) == ("m", token(1), saved(0))


async def test_expired_deleted_and_unknown_are_told_apart(store: SessionStore) -> None:
    """410 for what idled out, 404 for what was deleted or never there."""
    await made(store, "idle", "ended")
    assert await store.expire({"idle": token(1)}) == 1
    await store.delete("ended")
    with pytest.raises(SessionExpired):
        await store.load("idle")
    for name in ("ended", "never"):
        with pytest.raises(SessionNotFound):
            await store.load(name)
        assert not await store.earlier(name)
    assert await store.save([Save("ended", token(1), token(2), saved(1))]) == [False]


async def test_an_expired_id_is_free_again(store: SessionStore) -> None:
    """It can be created anew, with nothing left of before, and then deleted without a memory of having expired."""
    await made(store, "a")
    await store.save([Save("a", token(1), token(2), saved(1))])
    await store.expire({"a": token(2)})
    await store.create(Record("a", "other"), token(3), saved(0))
    assert (await store.load("a")).model == "other"
    assert not await store.earlier("a")
    await store.delete("a")
    with pytest.raises(SessionNotFound):
        await store.load("a")


async def test_who_was_saved_since_does_not_expire(store: SessionStore) -> None:
    """Another process may have the session by now; only its last owner may end it."""
    await made(store, "a", "b")
    await store.save([Save("a", token(1), token(2), saved(1))])
    assert await store.expire({"a": token(1), "b": token(1), "never": token(1)}) == 1
    assert (await store.load("a")).saved == saved(1)
    with pytest.raises(SessionExpired):
        await store.load("b")


async def test_use_without_a_save_counts_too(store: SessionStore) -> None:
    """From there on the time runs anew; not for one that was saved since, and not for one that has ended."""
    await made(store, "a", "b")

    async def left(session: str) -> float:
        return (await store.load(session)).time_left

    await asyncio.sleep(0.05)
    before = await left("a"), await left("b")
    await store.touch({"a": token(1), "b": token(9), "nobody": token(1)})
    assert (await left("a") > before[0] + 0.04) is (before[0] != float("inf"))  # in memory, no store counts
    assert await left("b") <= before[1]
    await store.expire({"a": token(1)})
    await store.touch({"a": token(1)})
    with pytest.raises(SessionExpired):
        await store.load("a")


async def test_deleting_what_is_not_there_is_no_error(store: SessionStore) -> None:
    """Delete is idempotent."""
    await store.delete("never")
    await store.delete("never", 1.5)


async def test_a_delete_that_comes_late_leaves_who_was_made_since(store: SessionStore) -> None:
    """It says which session of the id it means, by when that was made."""
    await made(store, "a")
    created_at = (await store.load("a")).created_at
    await store.delete("a", created_at + 0.001)
    assert (await store.load("a")).saved == saved(0)
    await store.delete("a", created_at)
    with pytest.raises(SessionNotFound):
        await store.load("a")


async def test_pages_are_in_order_and_complete(store: SessionStore) -> None:
    """Walking by cursor sees every live session of a model once, in order of id."""
    for i in (5, 3, 1, 4, 2, 0):
        await made(store, f"s{i}", model="even" if i % 2 == 0 else "odd")
    await made(store, "gone")
    await store.expire({"gone": token(1)})
    assert [r.id for r in await store.page(None, "", 4)] == ["s0", "s1", "s2", "s3"]
    assert [r.id for r in await store.page(None, "s3", 4)] == ["s4", "s5"]
    assert [r.id for r in await store.page("odd", "s1", 4)] == ["s3", "s5"]
    assert [r.id for r in await store.page("", "", 4)] == []


async def test_a_page_tells_what_a_session_is(store: SessionStore) -> None:
    """Everything but the snapshot."""
    await made(store, "a")
    (found,) = await store.page(None, "", 4)
    record = Record("a")
    assert {name: getattr(found, name) for name in vars(record)} == vars(record)


async def test_a_save_replaces_the_one_that_it_names(store: SessionStore) -> None:
    """Compare and set on the token: the first wins, whoever saves from an old copy is told so and nothing is kept."""
    await made(store, "a", "b")
    won = Save("a", token(1), token(2), saved(1, b"first"))
    lost = Save("a", token(1), token(3), saved(1, b"second"))
    assert await store.save([won, Save("b", token(1), token(2), saved(7))]) == [True, True]
    assert await store.save([lost]) == [False]
    found = await store.load("a")
    assert (found.token, found.saved) == (token(2), saved(1, b"first"))
    assert (await store.load("b")).saved == saved(7)
    assert await store.earlier("a") == [saved(0)]


async def test_a_save_sent_again_counts_once(store: SessionStore) -> None:
    """Whoever does not know whether a save was done does it again: it counts as done, and was done once."""
    await made(store, "a")
    save = Save("a", token(1), token(2), saved(1))
    for _ in range(3):
        assert await store.save([save]) == [True]
    assert await store.earlier("a") == [saved(0)]


async def test_in_one_commit_each_meets_its_own_fate(store: SessionStore) -> None:
    """Losers and strangers among many do not harm the others."""
    await made(store, *(f"s{i}" for i in range(9)))
    await store.save([Save(f"s{i}", token(1), token(2), saved(1)) for i in (2, 5)])
    await store.delete("s7")
    saves = [Save(f"s{i}", token(1), token(3), saved(2)) for i in range(9)] + [
        Save("never", token(1), token(3), saved(2))
    ]
    assert await store.save(saves) == [i not in (2, 5, 7, 9) for i in range(10)]
    assert [(await store.load(f"s{i}")).saved.step for i in (0, 2, 5, 8)] == [2, 1, 1, 2]


async def test_many_and_large_are_saved_at_once(store: SessionStore) -> None:
    """More rows, and more bytes, than a store may take in one go."""
    names = [f"s{i}" for i in range(1100)]
    await asyncio.gather(*(made(store, each) for each in names))
    assert await store.save([Save(each, token(1), token(2), saved(1)) for each in names]) == [True] * 1100
    large = [Save(each, token(2), token(3), saved(i, bytes(9_000_000))) for i, each in enumerate(names[:5])]
    assert await store.save([*large, Save("s5", token(1), token(3), saved(9))]) == [True] * 5 + [False]
    assert [(await store.load(each)).saved.step for each in names[:6]] == [0, 1, 2, 3, 4, 1]
    assert (await store.load("s4")).saved == saved(4, bytes(9_000_000))


async def test_as_many_earlier_ones_are_kept_as_asked(store: SessionStore) -> None:
    """The last 3 before the last, oldest first."""
    await made(store, "a")
    for i in range(1, 6):
        await store.save([Save("a", token(i), token(i + 1), saved(i * 10))])
    assert await store.earlier("a") == [saved(20), saved(30), saved(40)]


async def test_earlier_ones_are_given_up(store: SessionStore) -> None:
    """After a return to an earlier one, those before it are left, and it is not among them."""
    await made(store, "a")
    for i in range(1, 4):
        await store.save([Save("a", token(i), token(i + 1), saved(i))])
    assert await store.save([Save("a", token(4), token(5), saved(1), earlier=1)]) == [True]
    assert (await store.load("a")).saved == saved(1)
    assert await store.earlier("a") == [saved(0)]
    assert await store.save([Save("a", token(5), token(6), saved(9))]) == [True]
    assert await store.earlier("a") == [saved(0), saved(1)]
    assert await store.save([Save("a", token(6), token(7), saved(0), earlier=0)]) == [True]
    assert not await store.earlier("a")


async def test_a_store_that_is_well_says_nothing(store: SessionStore) -> None:
    """Ping and sweep raise nothing and change nothing."""
    await made(store, "a")
    await store.ping()
    await store.sweep()
    assert (await store.load("a")).saved == saved(0)


@pytest.mark.parametrize("url", ["redis://:s3cret[ab]c@host", "redis://:s3\u2100cret@h", "redis://:s3cret#x@h"])
def test_an_address_that_cannot_be_read_is_not_repeated(url: str) -> None:
    """It may hold a password."""
    with pytest.raises(SettingsInvalid) as caught:
        open_store(url, keep_steps=0, max_expired_ids=1)
    assert "s3" not in str(caught.value)
    assert "ab" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_the_memory_of_expired_ids_is_bounded() -> None:
    """The oldest are forgotten first."""
    store = open_store("memory://", keep_steps=0, max_expired_ids=3)
    for name in "abcde":
        await made(store, name)
        await store.expire({name: token(1)})
    with pytest.raises(SessionNotFound):
        await store.load("b")
    with pytest.raises(SessionExpired):
        await store.load("c")


@pytest.mark.parametrize("url", ["postgres://me:secret@x", "nonsense", "", "redis://[::1"])
async def test_an_unknown_kind_of_store_is_refused(url: str) -> None:
    """The error has what this version knows, and never the address, which may hold a password."""
    with pytest.raises(SettingsInvalid, match=r"memory://|cannot be read") as caught:
        open_store(url, keep_steps=0, max_expired_ids=1)
    assert "secret" not in str(caught.value)
