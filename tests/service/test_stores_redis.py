"""Redis on its bad days, and on a cluster; what every store does is in `test_stores.py`."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis

from service.errors import (
    SessionCorrupt,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    SettingsInvalid,
    StoreInvalid,
    StoreUnavailable,
)
from service.stores import Save, SessionStore, open_store, redis_scripts
from service.stores.redis import RedisStore
from service.stores.redis_link import Call, Link
from service.stores.redis_scripts import session_key
from tests.service.servers import RedisServer, cluster, cluster_url, free_port, is_whole, running, until
from tests.service.test_stores import Record, made, saved, token

pytestmark = pytest.mark.anyio

SHORT = "?timeout_ms=1500"
PATIENT = "?timeout_ms=20000"


def opened(url: str, keep_steps: int = 0) -> SessionStore:
    """A store to close."""
    return open_store(url, keep_steps=keep_steps, max_expired_ids=0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """A cluster of three."""
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, which writes every command to the disk before it answers."""
    options = {"appendonly": "yes", "appendfsync": "always", "repl_diskless_sync_delay": "0"}
    with running(tmp_path / "redis", **options) as one:
        yield one


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[SessionStore]:
    """An empty store in it."""
    store = opened(server.url + PATIENT)
    yield store
    await store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://", "no host"),
        ("redis://:secret@host:port", "address is"),
        ("redis://host/db", "address is"),
        ("redis://:sec/secret@host", "percent-encode"),
        ("redis://:sec?secret@host", "percent-encode"),
        ("redis://host?timeout_ms=0", "not in 1 to 600000"),
        ("redis://host?timeout_ms=soon", "soon"),
        ("redis://host?replicas=10", "not in 0 to 9"),
        ("redis://host?socket_timeout=3", "unknown option 'socket_timeout'"),
        ("redis://host?ca=file", "unknown option 'ca'"),
        ("rediss://host?ca=/no/such/file", "there is no file '/no/such/file'"),
        ("redis+cluster://host?tls=yes", "tls=yes: it is true or false"),
        ("redis://one,two", "one server one name"),
        ("redis+cluster://host/1", "no databases"),
    ],
)
def test_a_wrong_address_is_refused(url: str, message: str) -> None:
    """The error says what is wrong and how an address looks, and has no password."""
    with pytest.raises(SettingsInvalid, match=message) as refused:
        opened(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_an_unreachable_store_is_named(scheme: str) -> None:
    """With its address and what to do, but not with its password."""
    port = free_port()
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port} cannot be reached.*LATCH_STORE_URL") as refused:
        opened(f"{scheme}://someone:secret@127.0.0.1:{port}{SHORT}")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_told(tmp_path: Path, login: str) -> None:
    """Whether none is given, or the wrong one, or of an unknown user."""
    with running(tmp_path, requirepass="right") as server:
        with pytest.raises(StoreUnavailable, match=r"refuses the user or the password.*user:password@host") as refused:
            opened(server.url.replace("//", f"//{login}"))
        assert "wrong" not in str(refused.value).replace("WRONGPASS", "")


async def test_the_right_password_is_used(tmp_path: Path) -> None:
    """It may have any character, percent-encoded."""
    with running(tmp_path, requirepass="p@ss/w:rd") as server:
        store = opened(server.url.replace("//", "//:p%40ss%2Fw%3Ard@"))
        await store.ping()
        await store.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Of a server on 127.0.0.1, signed by itself; and its key."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(request, check=True, capture_output=True)
    return certificate, key


async def test_tls_checks_the_certificate(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """With the authority of the server it goes on, also to ask for a cluster; without, the error says so."""
    port, (authority, key) = free_port(), certificate
    options = {"tls_cert_file": str(authority), "tls_key_file": str(key), "tls_auth_clients": "no"}
    with running(tmp_path / "redis", tls_port=str(port), **options):
        store = opened(f"rediss://127.0.0.1:{port}?ca={authority}")
        await made(store, "a")
        assert (await store.load("a")).saved == saved(0)
        await store.close()
        with pytest.raises(StoreUnavailable, match=r"not trusted: name its authority with \?ca=file"):
            opened(f"rediss://127.0.0.1:{port}{SHORT}")
        with pytest.raises(StoreUnavailable, match="is no cluster"):
            opened(f"redis+cluster://127.0.0.1:{port}{SHORT}&tls=true&ca={authority}")
        with pytest.raises(StoreUnavailable, match="has a certificate for other names"):
            opened(f"rediss://localhost:{port}{SHORT}&ca={authority}")


async def test_a_server_that_wants_a_certificate_gets_one(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """As Redis does unless its settings say else."""
    port, (authority, key) = free_port(), certificate
    options = {name: str(authority) for name in ("tls_cert_file", "tls_ca_cert_file")} | {"tls_key_file": str(key)}
    with running(tmp_path / "redis", tls_port=str(port), **options):
        store = opened(f"rediss://127.0.0.1:{port}?ca={authority}&cert={authority}&key={key}")
        await store.ping()
        await store.close()
        with pytest.raises(StoreUnavailable):
            opened(f"rediss://127.0.0.1:{port}{SHORT}&ca={authority}")


async def test_a_user_who_may_not_is_told_what_he_needs(server: RedisServer) -> None:
    """Whether the scripts are refused him, or what they call."""
    for number, rules in enumerate((["+@all", "-eval"], ["+eval", "+ping"])):
        server("ACL", "SETUSER", f"u{number}", "on", ">right", "~*", *rules)
        with pytest.raises(StoreUnavailable, match=r"give it \+@all on keys latch:\*"):
            opened(server.url.replace("//", f"//u{number}:right@") + SHORT)


@pytest.mark.parametrize(("format_", "message"), [("2", "has format 2.*knows up to 1"), ("mine", "not Latch's")])
def test_what_is_newer_or_of_somebody_else_is_left_as_it_is(server: RedisServer, format_: str, message: str) -> None:
    """A store of a newer version, or a key of our name with something else in it, is refused and not changed."""
    server("SET", redis_scripts.FORMAT_KEY, format_)
    with pytest.raises(StoreInvalid, match=message):
        opened(server.url)
    assert server("GET", redis_scripts.FORMAT_KEY) == format_
    assert server("DBSIZE") == 1


def test_one_server_and_a_cluster_are_told_apart(server: RedisServer, servers: list[RedisServer]) -> None:
    """Whoever names the one as the other is told which it is."""
    with pytest.raises(StoreUnavailable, match="is no cluster: name it redis://"):
        opened(server.url.replace("redis", "redis+cluster") + SHORT)
    for node in servers:
        with pytest.raises(StoreUnavailable, match=r"belongs to a cluster: name it redis\+cluster://"):
            opened(node.url + SHORT)


async def test_a_killed_server_loses_nothing_that_was_saved(server: RedisServer, store: SessionStore) -> None:
    """With every command on its disk it comes back as it was, and the store finds it again by itself."""
    await made(store, "a", "b")
    assert await store.save([Save("a", token(1), token(2), saved(1))]) == [True]
    server.kill()
    restarted = asyncio.create_task(asyncio.to_thread(server.start))
    assert await store.save([Save("b", token(1), token(2), saved(2))]) == [True]
    await restarted
    assert [(await store.load(each)).saved.step for each in "ab"] == [1, 2]
    assert await store.save([Save("a", token(1), token(9), saved(9))]) == [False]


async def test_while_the_server_is_down_calls_fail_in_time(server: RedisServer) -> None:
    """With an error that may be retried, and it does not stay."""
    store = opened(server.url + SHORT)
    await made(store, "a")
    server.kill()
    save = Save("a", token(1), token(2), saved(1))
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"cannot be reached") as refused:
            await store.save([save])
        assert refused.value.retryable
    with pytest.raises(StoreUnavailable):
        await store.ping()
    server.start()
    assert await store.save([save]) == [True]
    await store.close()


async def test_a_server_that_says_nothing_is_given_up(server: RedisServer) -> None:
    """It has the connection and does not answer; afterwards the same save counts, whether it was done then or not."""
    store = opened(server.url + SHORT)
    await made(store, "a")
    save = Save("a", token(1), token(2), saved(1))
    server.pause()
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        await store.save([save])
    server.resume()
    assert await store.save([save]) == [True]
    assert (await store.load("a")).saved == saved(1)
    await store.close()


async def test_scripts_that_the_server_forgot_are_sent_again(server: RedisServer, store: SessionStore) -> None:
    """Each call works after SCRIPT FLUSH, and is done once."""
    await made(store, "a", "b")
    server("SCRIPT", "FLUSH")
    assert await store.save([Save("a", token(1), token(2), saved(1))]) == [True]
    server("SCRIPT", "FLUSH")
    assert await store.expire({"a": token(2), "b": token(1)}) == 2
    server("SCRIPT", "FLUSH")
    assert not await store.page(None, "", 9)


async def test_a_server_without_memory_refuses_what_is_new(server: RedisServer, store: SessionStore) -> None:
    """A save fails as a whole and the ping says so; what is there can be read, deleted and ended."""
    await made(store, "a", "b", "c")
    server("CONFIG", "SET", "maxmemory", "1")
    save = Save("a", token(1), token(2), saved(1))
    for call in (store.save([save]), store.ping(), store.create(Record("d"), token(1), saved(0))):
        with pytest.raises(StoreUnavailable, match="out of memory: raise its maxmemory"):
            await call
    with pytest.raises(StoreUnavailable, match="out of memory"):
        opened(server.url)
    assert (await store.load("a")).saved == saved(0)
    await store.delete("b")
    assert await store.expire({"c": token(1)}) == 1
    await store.sweep()
    assert [each.id for each in await store.page(None, "", 9)] == ["a"]
    server("CONFIG", "SET", "maxmemory", "0")
    assert await store.save([save]) == [True]


async def test_a_read_only_replica_is_refused(server: RedisServer, tmp_path: Path) -> None:
    """At the start and later, when the primary becomes one; it goes on when it is primary again."""
    store = opened(server.url + SHORT)
    await made(store, "a")
    with running(tmp_path / "other") as other:
        server("REPLICAOF", "127.0.0.1", str(other.port))
        with pytest.raises(StoreUnavailable, match="read-only replica: name the primary"):
            await store.save([Save("a", token(1), token(2), saved(1))])
        with pytest.raises(StoreUnavailable, match="read-only replica"):
            opened(server.url + SHORT)
        server("REPLICAOF", "NO", "ONE")
    await made(store, "b")
    await store.close()


async def test_replicas_confirm_before_a_save_counts(server: RedisServer, tmp_path: Path) -> None:
    """With ?replicas=1 an answer means that a replica has it too; without a replica there is none."""
    with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
        opened(server.url + SHORT + "&replicas=1")
    with running(tmp_path / "replica", replicaof=f"127.0.0.1 {server.port}") as replica:
        until(lambda: replica("INFO", "replication")["master_link_status"] == "up")
        server("SET", "streamed", "yes")
        until(lambda: replica("GET", "streamed") == "yes")
        store = opened(server.url + "?timeout_ms=2000&replicas=1")
        await made(store, "a")
        save = Save("a", token(1), token(2), saved(1))
        replica.pause()
        for _ in range(2):  # a save that is done already is no more confirmed than before
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                await store.save([save])
        replica.resume()
        assert await store.save([save]) == [True]
        server.kill()
        replica("REPLICAOF", "NO", "ONE")
        heir = opened(replica.url)
        assert (await heir.load("a")).token == token(2)
        await heir.close()
        await store.close()


async def test_sessions_spread_over_a_cluster(servers: list[RedisServer]) -> None:
    """Every node has a fair part of them, and one call saves them all."""
    store = opened(cluster_url(servers), keep_steps=2)
    names = [f"s{i:03}" for i in range(300)]
    await made(store, *names)
    assert all(await store.save([Save(each, token(1), token(2), saved(i)) for i, each in enumerate(names)]))
    assert [each.saved.step for each in await store.page(None, "", 999)] == list(range(300))
    assert await store.earlier("s007") == [saved(0)]
    parts = [len(server("KEYS", "latch:*}:*")) for server in servers]
    assert sum(parts) == 300
    assert min(parts) > 50
    await store.close()


async def test_a_shard_that_moved_is_followed(tmp_path: Path) -> None:
    """A call to the node that had its slot finds the one that has it now, while the slot moves and afterwards."""
    with cluster(tmp_path) as nodes:
        stores = [opened(cluster_url(nodes) + "?timeout_ms=4000") for _ in range(2)]
        names = [f"s{i}" for i in range(32)]
        await made(stores[0], *names)
        slot = nodes[0]("CLUSTER", "KEYSLOT", redis_scripts.session_key("s0"))
        before, after, _ = sorted(nodes, key=lambda node: -node("CLUSTER", "COUNTKEYSINSLOT", str(slot)))
        keys = before("CLUSTER", "GETKEYSINSLOT", str(slot), "1000")
        after("CLUSTER", "SETSLOT", str(slot), "IMPORTING", before("CLUSTER", "MYID"))
        before("CLUSTER", "SETSLOT", str(slot), "MIGRATING", after("CLUSTER", "MYID"))
        before("MIGRATE", "127.0.0.1", str(after.port), "", "0", "5000", "KEYS", *keys)
        assert await stores[0].save([Save("s0", token(1), token(2), saved(1))]) == [True]
        for node in (after, before):
            node("CLUSTER", "SETSLOT", str(slot), "NODE", after("CLUSTER", "MYID"))
        saves = [Save(each, token(1), token(3), saved(2)) for each in names[1:]]
        assert all(await stores[0].save(saves))
        assert (await stores[1].load("s0")).token == token(2)
        for store in stores:
            await store.close()


async def test_a_node_of_a_cluster_that_is_down_stops_its_sessions_only(tmp_path: Path) -> None:
    """The others go on if the cluster is told to; when it is back, all do, with nothing lost."""
    options = {"cluster_require_full_coverage": "no", "cluster_node_timeout": "1000"}
    with cluster(tmp_path, appendonly="yes", appendfsync="always", **options) as nodes:
        store = opened(cluster_url(nodes) + SHORT)
        names = [f"s{i}" for i in range(30)]
        await made(store, *names)
        nodes[1].kill()
        saves = [Save(each, token(1), token(2), saved(1)) for each in names]
        fates = await asyncio.gather(*(store.save([save]) for save in saves), return_exceptions=True)
        assert {type(fate) for fate in fates} == {list, StoreUnavailable}
        nodes[1].start()
        until(lambda: all(is_whole(node, 3) for node in nodes))
        assert all(await store.save(saves))
        await store.close()


def test_a_connection_that_was_closed_meanwhile_is_made_anew(servers: list[RedisServer]) -> None:
    """The service's loop refuses to write there with an error of its own, which the client hands on."""

    async def abort(store: SessionStore) -> None:
        assert isinstance(store, RedisStore)
        for node in store._link._client.get_nodes():
            for connection in node._connections:
                connection._writer.transport.abort()
        await asyncio.sleep(0.01)

    async def scenario() -> list[bool]:
        store, names = opened(cluster_url(servers) + PATIENT), [f"closed-{number}" for number in range(20)]
        try:
            await made(store, *names)
            await abort(store)
            found = [(await store.load(name)).step == 0 for name in names]
            await abort(store)
            return [*found, *await store.save([Save(name, token(1), token(2), saved(1)) for name in names])]
        finally:
            await store.close()

    assert uvloop.run(scenario()) == [True] * 40


async def test_time_is_that_of_the_server(server: RedisServer, store: SessionStore) -> None:
    """A session expires by it, its id is known for a while, and a save by its owner brings it back."""
    await store.create(Record("a", idle_ttl=0.05), token(1), saved(0))
    await store.create(Record("b", idle_ttl=60.0), token(1), saved(0))
    assert 59 < (await store.load("b")).time_left <= 60
    until(lambda: server("PTTL", redis_scripts.session_key("a")) <= redis_scripts.REMEMBERED)
    with pytest.raises(SessionExpired):
        await store.load("a")
    assert [each.id for each in await store.page(None, "", 9)] == ["b"]
    remembered = server("PTTL", redis_scripts.session_key("a"))
    assert redis_scripts.REMEMBERED - 60_000 < remembered <= redis_scripts.REMEMBERED
    assert await store.save([Save("a", token(1), token(2), saved(1))]) == [True]


async def test_ids_of_forgotten_sessions_leave_the_index(server: RedisServer, store: SessionStore) -> None:
    """The sweep drops the ids whose sessions the server has forgotten, and those of ended ones, and no others."""
    await made(store, "forgotten", "ended", "live")
    server("DEL", redis_scripts.session_key("forgotten"))
    await store.expire({"ended": token(1)})
    with pytest.raises(SessionNotFound):
        await store.load("forgotten")
    await store.sweep()
    indices = [server("ZRANGE", redis_scripts.ids_key(shard), "0", "-1") for shard in range(redis_scripts.SHARDS)]
    assert [each for each in indices if each] == [["live"]]


@pytest.mark.parametrize(("field", "value"), [("head", b"short"), ("metadata", b"{bad"), ("created_at", b"then")])
async def test_a_record_that_was_spoilt_is_one_session_s_trouble(
    server: RedisServer, store: SessionStore, field: str, value: bytes
) -> None:
    """The session says so, a list goes on without it, and it can be forgotten."""
    await made(store, "a", "b")
    async with Redis(port=server.port) as redis:
        await redis.hset(session_key("a"), field, value)  # type: ignore[misc]
        await redis.hdel(session_key("b"), "snapshot")  # type: ignore[misc]
    with pytest.raises(SessionCorrupt, match="'a'"):
        await store.load("a")
    assert [each.id for each in await store.page(None, "", 9)] == ["b"]
    assert (await store.load("b")).saved.snapshot == b""
    await store.delete("a")
    with pytest.raises(SessionNotFound):
        await store.load("a")


async def test_a_key_of_another_kind_is_one_session_s_trouble(server: RedisServer, store: SessionStore) -> None:
    """Whoever wrote over it: the session says so and can be forgotten, and the sweep and lists go on without it."""
    await made(store, "a", "b")
    server("SET", session_key("a"), "mine")
    assert [each.id for each in await store.page(None, "", 9)] == ["b"]
    await store.sweep()
    await store.touch({"a": token(1), "b": token(1)})
    assert await store.expire({"a": token(1)}) == 0
    saves = [Save(name, token(1), token(2), saved(1)) for name in ("b", "a", "c")]
    await made(store, "c")
    assert await store.save(saves) == [True, False, True]
    with pytest.raises(SessionCorrupt, match="'a'"):
        await store.load("a")
    with pytest.raises(SessionExists):
        await store.create(Record("a"), token(3), saved(0))
    await store.delete("a", 1.5)
    with pytest.raises(SessionNotFound):
        await store.load("a")


async def test_who_idled_out_where_no_service_has_it_leaves_its_state(server: RedisServer) -> None:
    """The sweep of any service ends it; that it was there is known as long as before."""
    store = opened(server.url + PATIENT, keep_steps=2)
    await made(store, "a", "b")
    await store.save([Save("a", token(1), token(2), saved(1))])
    server("PEXPIRE", session_key("a"), str(redis_scripts.REMEMBERED - 30_000))
    await store.sweep()  # it may have been used where that is not told yet
    assert (await store.earlier("a"))[0].step == 0
    server("PEXPIRE", session_key("a"), str(redis_scripts.REMEMBERED - 60_001))
    await store.sweep()
    assert server("HGET", session_key("a"), "snapshot") is None
    assert server("EXISTS", redis_scripts.earlier_key("a")) == 0
    assert 0 < int(server("PTTL", session_key("a"))) < redis_scripts.REMEMBERED
    with pytest.raises(SessionExpired):
        await store.load("a")
    assert await store.save([Save("a", token(2), token(3), saved(2))]) == [False]
    assert (await store.load("b")).saved == saved(0)
    await store.close()


async def test_who_takes_the_id_of_one_that_idled_out_has_nothing_of_it(server: RedisServer) -> None:
    """Nor what was kept of it, which no sweep has taken yet."""
    store = opened(server.url + PATIENT, keep_steps=2)
    await made(store, "a")
    await store.save([Save("a", token(1), token(2), saved(1))])
    server("PEXPIRE", session_key("a"), str(redis_scripts.REMEMBERED - 1))
    await store.create(Record("a"), token(3), saved(0))
    assert (await store.load("a")).token == token(3)
    assert not await store.earlier("a")
    await store.close()


async def test_a_sweep_goes_on_where_the_last_one_ended(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all ids of a shard, a few at a time, and from the first again."""
    monkeypatch.setattr("service.stores.redis._TRIMMED", 2)
    store = opened(server.url + PATIENT)
    names = [name for name in (f"s{i:03}" for i in range(999)) if redis_scripts.shard_of(name) == 0][:5]
    await made(store, *names)
    for name in (names[4], names[0]):
        server("PEXPIRE", session_key(name), str(redis_scripts.REMEMBERED - redis_scripts._UNHEARD - 1))
        for _ in range(3):
            await store.sweep()
        assert server("HGET", session_key(name), "snapshot") is None
    assert [each.id for each in await store.page(None, "", 9)] == names[1:4]
    await store.close()


async def test_connections_that_died_without_a_word_leave_time_for_a_fresh_one(server: RedisServer) -> None:
    """All that were there before, of which a call meets one: between them a firewall has forgotten them, say."""
    host, _, port = server.url.removeprefix("redis://").partition(":")
    ages: list[int] = []
    age = 0
    ends: list[asyncio.StreamWriter] = []

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, born: int) -> None:
        while data := await source.read(2**16):
            if born == age:
                sink.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ages.append(age)
        there, back = await asyncio.open_connection(host, int(port))
        ends.extend((writer, back))
        with suppress(ConnectionError):
            await asyncio.gather(pump(reader, back, age), pump(there, writer, age))

    between = await asyncio.start_server(relay, "127.0.0.1", 0)
    link = Link(f"redis://127.0.0.1:{between.sockets[0].getsockname()[1]}?timeout_ms=3000")
    calls = [Call([redis_scripts.ids_key(0)])]
    await asyncio.gather(*[link.run(redis_scripts.PING, calls) for _ in range(3)])
    age = 1
    assert await link.run(redis_scripts.PING, calls) == [1]
    assert ages == [0, 0, 0, 1]
    await link.close()
    between.close()
    for end in ends:
        end.close()
        with suppress(ConnectionError):
            await end.wait_closed()


async def test_fewer_steps_may_be_kept_after_a_restart(server: RedisServer) -> None:
    """Back is then as far as the store says, and what stays are the oldest of those."""
    stores = [opened(server.url + PATIENT, keep_steps=steps) for steps in (6, 3)]
    await made(stores[0], "a")
    for step in range(1, 6):
        await stores[0].save([Save("a", token(step), token(step + 1), saved(step))])
    assert [each.step for each in await stores[1].earlier("a")] == [2, 3, 4]
    await stores[1].save([Save("a", token(6), token(7), saved(3), earlier=1)])
    assert [each.step for each in await stores[0].earlier("a")] == [2]
    for store in stores:
        await store.close()


async def test_of_two_that_save_at_once_one_wins(server: RedisServer, servers: list[RedisServer]) -> None:
    """Two services on the same sessions, many calls in flight: of each pair of saves exactly one is kept."""
    for url in (server.url, cluster_url(servers)):
        stores = [opened(url), opened(url)]
        names = [f"race{i}" for i in range(40)]
        await made(stores[0], *names)
        expected = token(1)
        for step in range(1, 5):
            tokens = [token(10 * step + who) for who in (0, 1)]
            calls = [
                stores[who].save([Save(each, expected, tokens[who], saved(step)) for each in names[start : start + 8]])
                for start in range(0, 40, 8)
                for who in (0, 1)
            ]
            fates = await asyncio.gather(*calls)
            mine, theirs = ([fate for part in fates[who::2] for fate in part] for who in (0, 1))
            assert [one != other for one, other in zip(mine, theirs, strict=True)] == [True] * 40
            kept = [(await stores[1].load(each)).token for each in names]
            assert kept == [tokens[0] if won else tokens[1] for won in mine]
            expected = token(10 * step + 2)  # both agree again
            agreed = [Save(each, now, expected, saved(step)) for each, now in zip(names, kept, strict=True)]
            assert all(await stores[0].save(agreed))
        for store in stores:
            await store.close()


async def test_a_save_that_may_have_been_done_is_no_lost_one(server: RedisServer, store: SessionStore) -> None:
    """Its answer is lost, and before the second try another service has gone on from it: nobody may do it again."""
    assert isinstance(store, RedisStore)
    other = opened(server.url)
    await made(store, "a", "b")
    link, tries = store._link, 0
    attempt = link._try

    async def broken(script: str, calls: Sequence[Call]) -> list[Any]:
        nonlocal tries
        tries += 1
        replies = await attempt(script, calls)
        if tries == 1:
            assert await other.save([Save("a", token(2), token(3), saved(2))]) == [True]
            raise ConnectionError("the reply is lost")
        return replies

    link._try = broken  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="broke off"):
        await store.save([Save(name, token(1), token(2), saved(1)) for name in ("a", "b")])
    assert [(await store.load(name)).token for name in ("a", "b")] == [token(3), token(2)]
    assert await store.save([Save("a", token(2), token(4), saved(2))]) == [False]
    await other.close()


async def test_what_is_kept_of_a_session_lives_as_long_as_the_session(server: RedisServer) -> None:
    """Not for ever, and no shorter: a save and any other use move the end of both."""
    store = opened(server.url + PATIENT, keep_steps=2)
    await store.create(Record("a", idle_ttl=60.0), token(1), saved(0))
    keys = redis_scripts.session_key("a"), redis_scripts.earlier_key("a")
    whole = redis_scripts.REMEMBERED + 60_000
    await store.save([Save("a", token(1), token(2), saved(1))])
    assert all(whole - 30_000 < server("PTTL", key) <= whole for key in keys)
    for key in keys:
        server("PEXPIRE", key, str(redis_scripts.REMEMBERED + 20_000))
    await store.touch({"a": token(2)})
    assert all(whole - 30_000 < server("PTTL", key) <= whole for key in keys)
    await store.close()
