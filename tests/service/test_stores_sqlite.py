"""SQLite's own ways to fail: files that are something else, newer, locked, read-only or full, and clocks that jump."""

import asyncio
import os
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import (
    SessionCorrupt,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    SettingsInvalid,
    StoreInvalid,
    StoreUnavailable,
)
from service.stores import Save, Saved, SessionStore, Stored, open_store
from service.stores.sqlite import SqliteStore
from tests.service.test_stores import Record, made, saved, token

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is."""
    return tmp_path / "sessions.db"


def opened(path: Path, **options: int) -> SessionStore:
    """The store in that file."""
    return open_store(f"sqlite:///{path}", **({"keep_steps": 2, "max_expired_ids": 2} | options))


async def test_fewer_steps_may_be_kept_after_a_restart(path: Path) -> None:
    """Back is then as far as the store says, and what stays are the oldest of those."""
    store = opened(path, keep_steps=6)
    await made(store, "a", "b")
    for step in range(1, 6):
        await store.save([Save("a", token(step), token(step + 1), saved(step))])
    await store.close()
    store = opened(path, keep_steps=3)
    assert [each.step for each in await store.earlier("a")] == [2, 3, 4]
    await store.save([Save("a", token(6), token(7), saved(3), earlier=1), Save("b", token(1), token(2), saved(1))])
    assert [each.step for each in await store.earlier("a")] == [2]
    assert [each.step for each in await store.earlier("b")] == [0]
    await store.close()


async def test_a_move_where_none_are_kept_forgets_those_that_were(path: Path) -> None:
    """A later start that keeps some finds none from before it."""
    store = opened(path)
    await made(store, "a")
    await store.save([Save("a", token(1), token(2), saved(1))])
    await store.close()
    store = opened(path, keep_steps=0)
    await store.save([Save("a", token(2), token(3), saved(0), earlier=0)])
    await store.close()
    store = opened(path)
    assert await store.earlier("a") == []
    await store.close()


async def test_what_was_saved_is_there_after_a_restart(path: Path) -> None:
    """Sessions, their earlier saves, and who expired."""
    store = opened(path)
    await made(store, "a", "b")
    await store.save([Save("a", token(1), token(2), saved(4))])
    await store.expire({"b": token(1)})
    await store.close()
    again = opened(path)
    assert ((await again.load("a")).token, (await again.load("a")).saved) == (token(2), saved(4))
    assert await again.earlier("a") == [saved(0)]
    with pytest.raises(SessionExpired):
        await again.load("b")
    await again.close()


async def test_what_was_saved_survives_the_process(path: Path, tmp_path: Path) -> None:
    """The files as they are while the store is open, as after kill -9, hold all that was saved, and nothing torn."""
    store = opened(path)
    await made(store, "a")
    for i in range(1, 40):
        await store.save([Save("a", token(i), token(i + 1), saved(i))])
    for name in ("sessions.db", "sessions.db-wal"):
        shutil.copy(path.parent / name, tmp_path / name.replace("sessions", "copy"))
    wal = tmp_path / "copy.db-wal"
    wal.write_bytes(wal.read_bytes() + wal.read_bytes()[-3000:-1])  # a write that broke off
    copy = opened(tmp_path / "copy.db")
    assert (await copy.load("a")).saved == saved(39)
    for each in (store, copy):
        await each.close()


async def test_many_calls_are_few_transactions(path: Path) -> None:
    """Whatever comes while a commit is under way is in the next one; each call meets its own fate."""
    store = opened(path)
    statements: list[str] = []
    assert isinstance(store, SqliteStore)
    store._db.set_trace_callback(statements.append)
    results = await asyncio.gather(*(made(store, f"s{i % 90}") for i in range(100)), return_exceptions=True)
    assert results == [None] * 100
    await asyncio.gather(*(store.save([Save(f"s{i}", token(1), token(2), saved(i))]) for i in range(90)))
    other = await asyncio.gather(
        store.create(Record("s1"), token(9), saved(0)), made(store, "new"), return_exceptions=True
    )
    assert isinstance(other[0], SessionExists)
    assert other[1] is None
    assert statements.count("COMMIT") <= 6
    assert [(await store.load(f"s{i}")).step for i in range(90)] == [*range(90)]
    await store.close()


async def test_an_id_that_was_made_anew_has_another_row(path: Path) -> None:
    """Rows are remembered by number: that of a deleted session is nobody's."""
    store = opened(path)
    await made(store, "a", "b")
    assert await store.save([Save(each, token(1), token(2), saved(1)) for each in "ab"]) == [True] * 2
    await store.delete("a")
    assert await store.save([Save("a", token(2), token(3), saved(2))]) == [False]
    await made(store, "a")
    assert await store.save([Save("a", token(2), token(3), saved(2))]) == [False]
    assert await store.save([Save("a", token(1), token(2), saved(1))]) == [True]
    assert [(await store.load(each)).step for each in "ab"] == [1, 1]
    await store.close()


async def test_not_all_rows_are_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were forgotten are looked for again."""
    monkeypatch.setattr("service.stores.sqlite._NUMBERS", 2)
    store = opened(path)
    assert isinstance(store, SqliteStore)
    await made(store, *"abc")
    for i in (1, 2, 3):
        assert await store.save([Save(each, token(i), token(i + 1), saved(i)) for each in "abc"]) == [True] * 3
        assert await store.save([Save("a", token(i + 1), token(i + 1), saved(i))]) == [True]
        assert len(store._numbers) == 1
    await store.close()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("sqlite://host/x.db", "relative/path"),
        ("sqlite:///", "relative/path"),
        ("sqlite:///x.db?synchronous=off", "full or normal"),
        ("sqlite:///x.db?sync=full", "full or normal"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, problem: str) -> None:
    """The message says how one looks."""
    with pytest.raises(SettingsInvalid, match=problem):
        open_store(url, keep_steps=0, max_expired_ids=0)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Nothing is made for somebody who mistyped a path."""
    with pytest.raises(StoreUnavailable, match="not a folder"):
        opened(tmp_path / "no" / "sessions.db")
    assert not (tmp_path / "no").exists()


def test_what_is_no_database_is_left_alone(path: Path) -> None:
    """A file of text, and another program's database."""
    path.write_text("Dear diary, " * 100)
    with pytest.raises(StoreInvalid, match="not an SQLite file"):
        opened(path)
    assert path.read_text() == "Dear diary, " * 100
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE poems (line TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreInvalid, match="something else"):
        opened(path)
    assert path.read_bytes() == before


def test_a_newer_format_is_left_alone(path: Path) -> None:
    """Both formats are in the message."""
    asyncio.run(opened(path).close())
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreInvalid, match=r"format 7.* up to 2"):
        opened(path)
    assert path.read_bytes() == before


async def test_a_file_of_the_first_format_goes_on(path: Path) -> None:
    """Its sessions and their earlier saves are there, and are saved as any others."""
    shape = "step INTEGER NOT NULL, snapshot BLOB NOT NULL) STRICT;"
    old = sqlite3.connect(path)
    old.executescript(f"""
        CREATE TABLE sessions (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, expires_at REAL NOT NULL, idle_ttl REAL NOT NULL,
            model TEXT NOT NULL, version TEXT NOT NULL, created_at REAL NOT NULL, metadata TEXT NOT NULL,
            token BLOB NOT NULL, {shape}
        CREATE TABLE earlier (number INTEGER PRIMARY KEY, session TEXT NOT NULL, {shape}
        CREATE INDEX earlier_of ON earlier (session, number);
        CREATE TABLE expired (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE) STRICT;
        PRAGMA journal_mode = WAL; PRAGMA application_id = {0x4C617463}; PRAGMA user_version = 1;
    """)
    old.execute(
        "INSERT INTO sessions VALUES (1, 'a', 9e9, 900.0, 'm', '1', 0.0, '{}', ?, 4, ?)", (token(2), saved(4).body)
    )
    old.execute("INSERT INTO earlier VALUES (1, 'a', 0, ?)", (saved(0).body,))
    old.commit()
    old.close()
    for _ in range(2):
        store = opened(path)
        assert ((await store.load("a")).token, (await store.load("a")).saved) == (token(2), saved(4))
        assert await store.earlier("a") == [saved(0)]
        await store.close()
    store = opened(path)
    assert await store.save([Save("a", token(2), token(3), Saved(5, b"body", b"header"))]) == [True]
    assert (await store.load("a")).saved == Saved(5, b"body", b"header")
    assert await store.earlier("a") == [saved(0), saved(4)]
    await store.close()


async def test_headers_are_kept_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sessions have them, over a restart too, and when there are more than are remembered."""
    monkeypatch.setattr("service.stores.sqlite._HEADERS_AT_HAND", 2)
    names = [str(number) for number in range(12)]
    for number in range(2):
        store = opened(path)
        if not number:
            await made(store, *names)
        for some in (names[:4], names[4:]):
            new = {name: Saved(number, name.encode(), b"header %d" % (int(name) % 3)) for name in some}
            saves = [Save(name, token(number + 1), token(number + 2), value) for name, value in new.items()]
            assert await store.save(saves) == [True] * len(some)
            assert {name: (await store.load(name)).saved for name in some} == new
        await store.close()
    file = sqlite3.connect(path)
    assert file.execute("SELECT count(*) FROM headers").fetchone() == (4,)  # three, and none for what `made` has made
    file.close()


async def test_a_header_of_what_was_undone_is_made_anew(path: Path) -> None:
    """A header that came with a transaction that failed is not there, and nobody's snapshot may lean on it."""
    store = opened(path)
    await made(store, "a")
    with pytest.raises(OverflowError):
        await store.save([Save("a", token(1), token(2), Saved(2**70, b"body", b"header"))])
    assert await store.save([Save("a", token(1), token(2), Saved(1, b"body", b"header"))]) == [True]
    assert (await store.load("a")).saved == Saved(1, b"body", b"header")
    await store.close()


@pytest.mark.parametrize(
    "statement", ["UPDATE sessions SET body = 1.5", "UPDATE headers SET bytes = 2.5 WHERE bytes != x''"]
)
async def test_a_snapshot_of_another_type_is_bytes_all_the_same(path: Path, statement: str) -> None:
    """Bytes that change by themselves may make a number of it; whoever reads it finds that it is none."""
    store = opened(path)
    await made(store, "a")
    await store.save([Save("a", token(1), token(2), Saved(1, b"body", b"header"))])
    await store.close()
    for change in ("UPDATE sqlite_master SET sql = replace(sql, ' STRICT', '')", statement):
        file = sqlite3.connect(path)
        file.execute("PRAGMA writable_schema = ON")
        file.execute(change)
        file.commit()
        file.close()
    store = opened(path)
    assert (await store.load("a")).saved.snapshot in (b"header1.5", b"2.5body")
    assert len(await store.earlier("a")) == 1
    await store.close()


async def test_a_header_that_is_lost_is_no_snapshot(path: Path) -> None:
    """What is left of the session is given as it is: whoever reads it finds that it is not whole."""
    store = opened(path)
    await made(store, "a")
    await store.save([Save("a", token(1), token(2), Saved(1, b"body", b"header"))])
    await store.close()
    file = sqlite3.connect(path)
    file.execute("DELETE FROM headers")
    file.commit()
    file.close()
    store = opened(path)
    assert (await store.load("a")).saved == Saved(1, b"body")
    await store.close()


async def test_a_second_process_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is one service's: the other is told that it is taken, and which store can be shared."""
    monkeypatch.setattr("service.stores.sqlite._BUSY_SECONDS", 0.05)
    store = opened(path)
    await made(store, "a")
    with pytest.raises(StoreUnavailable, match=r"another process.*redis"):
        opened(path)
    await store.close()
    await opened(path).close()


@pytest.fixture
def read_only(path: Path) -> Iterator[Path]:
    """A file on a volume that cannot be written to; permissions do not stop root, so SQLite is told."""
    path.touch()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    yield path
    path.parent.chmod(0o755)


def test_a_volume_that_is_read_only_is_said_to_be(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At start, with what to do."""
    connect = sqlite3.connect

    def unwritable(path: Path, **options: object) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", unwritable)
    with pytest.raises(StoreUnavailable, match="may write to"):
        opened(read_only)
    assert read_only.read_bytes() == b""


async def test_a_full_disk_loses_nothing(path: Path) -> None:
    """A save that does not fit is refused whole, what was saved stays, and when there is room again it goes on."""
    store = opened(path)
    assert isinstance(store, SqliteStore)
    await made(store, "a", "b")
    await store.save([Save("a", token(1), token(2), saved(1))])
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    large = saved(2, bytes(50_000))
    with pytest.raises(StoreUnavailable, match="full"):
        await store.save([Save("b", token(1), token(2), saved(1)), Save("a", token(2), token(3), large)])
    assert (await store.load("a")).saved == saved(1)
    assert (await store.load("b")).saved == saved(0)
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert await store.save([Save("a", token(2), token(3), large)]) == [True]
    assert (await store.load("a")).saved == large
    await store.close()


async def test_a_store_that_cannot_save_is_not_well_until_it_can(path: Path) -> None:
    """With sessions in it or without: it is asked with something in hand, for an empty commit needs no room."""
    store = opened(path)
    assert isinstance(store, SqliteStore)
    for name in ("a", "b"):
        await store.ping()
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="full"):
                await store.create(Record(name), token(1), saved(0, bytes(50_000)))
            with pytest.raises(StoreUnavailable, match="full"):
                await store.ping()
        store._db.execute("PRAGMA max_page_count = 1000000")
        await store.ping()
        await store.create(Record(name), token(1), saved(0, bytes(50_000)))
    assert [row[0] for row in store._db.execute("SELECT count(*) FROM expired")] == [0]
    await store.close()


async def test_a_file_behind_a_link_is_missed_too(path: Path, tmp_path: Path) -> None:
    """Its log lies beside what the link leads to."""
    (tmp_path / "link.db").symlink_to(path)
    store = opened(tmp_path / "link.db")
    await made(store, "a")
    move([path], "", ".away")
    with pytest.raises(StoreUnavailable, match="moved, replaced or removed"):
        await store.ping()
    move([path], ".away", "")
    await store.ping()
    await store.close()


def move(files: list[Path], suffix: str, ending: str) -> None:
    """Gives files other names."""
    for each in files:
        each.with_name(each.name + suffix).rename(each.with_name(each.name + ending))


@pytest.mark.parametrize("what", ["file", "log", "both", "another", "cut"])
async def test_a_file_that_is_taken_away_is_noticed(path: Path, what: str) -> None:
    """What would be saved to it, nobody would find: it is refused until it is back, and readiness is told."""
    store, log = opened(path), path.with_name(f"{path.name}-wal")
    await made(store, "a")
    gone = {"file": [path], "log": [log], "both": [path, log]}.get(what, [path])
    if what == "cut":
        os.truncate(path, 0)
    else:
        move(gone, "", ".away")
    if what == "another":
        os.mknod(path)
    for call in (store.save([Save("a", token(1), token(2), saved(1))]), store.ping(), store.load("a")):
        with pytest.raises(StoreUnavailable, match="moved, replaced or removed"):
            await call
    if what != "cut":
        move(gone, ".away", "")
        assert await store.save([Save("a", token(1), token(2), saved(1))]) == [True]
        await store.ping()
    await store.close()


async def test_a_copy_that_has_no_log_gets_one(path: Path, tmp_path: Path) -> None:
    """One that SQLite made itself: without, a commit takes several times as long, and the promises are about it."""
    store = opened(path)
    await made(store, "a")
    await store.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"VACUUM INTO '{tmp_path / 'copy.db'}'")
    store = opened(tmp_path / "copy.db")
    assert isinstance(store, SqliteStore)
    assert store._db.execute("PRAGMA journal_mode").fetchone() == (b"wal",)
    assert (await store.load("a")).saved == saved(0)
    await store.close()


async def test_of_what_was_kept_as_much_is_given_as_is_asked_now(path: Path) -> None:
    """The setting may be lower after a restart."""
    store = opened(path, keep_steps=5)
    await made(store, "a")
    for i in range(1, 6):
        await store.save([Save("a", token(i), token(i + 1), saved(i))])
    await store.close()
    for keep, kept in ((2, [saved(3), saved(4)]), (0, [])):
        store = opened(path, keep_steps=keep)
        assert await store.earlier("a") == kept
        await store.close()


async def test_nobody_lives_longer_because_the_clock_was_ahead(path: Path) -> None:
    """A session has its idle time left at most."""
    now = 1e9
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=2, wall=lambda: now)
    await made(store, "a")
    await store.close()
    now -= 1e6
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=2, wall=lambda: now)
    assert (await store.load("a")).time_left == 900
    await store.close()


async def test_a_log_that_has_taken_all_the_room_begins_anew(path: Path) -> None:
    """It is brought into the file, which has room for the same rows, and what is sent again is saved."""
    store, refused = opened(path), 0
    await made(store, "a")
    await store.close()
    store, (soft, hard) = opened(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        for i in range(1, 400):
            save = [Save("a", token(i), token(i + 1), saved(i))]
            try:
                assert await store.save(save) == [True]
            except StoreUnavailable:
                refused += 1
                assert await store.save(save) == [True]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused > 3
    assert (await store.load("a")).saved == saved(399)
    await store.close()


async def test_time_passes_whatever_the_clock_says(path: Path) -> None:
    """A clock that is set a year ahead, or back, while the service runs expires nobody and keeps nobody."""
    now = 1e9
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=2, wall=lambda: now)
    await made(store, "a")
    for jump in (3e7, -3e7):
        now += jump
        await store.sweep()
        assert 890 < (await store.load("a")).time_left <= 900
    await store.close()


async def test_a_session_expires_by_itself_and_is_swept(path: Path) -> None:
    """Nobody has to serve it for that; it is told from one that never was, as long as there is room to remember."""
    now = 1e9
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=2, wall=lambda: now)
    await made(store, "a", "b", "c")
    await store.close()
    now += 901
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=2, wall=lambda: now)
    with pytest.raises(SessionExpired):
        await store.load("a")
    assert not await store.page(None, "", 10)
    await store.sweep()
    assert store._db.execute("SELECT count(*) FROM sessions").fetchone() == (0,)
    assert store._db.execute("SELECT id FROM expired ORDER BY id").fetchall() == [(b"b",), (b"c",)]
    await store.close()


async def test_a_long_file_is_looked_through_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of few among many, and the end of many, are several transactions: others have their turn between them."""
    for name, rows in (("PAGE_ROWS", 4), ("SWEEP_ROWS", 4), ("ENDED_AT_ONCE", 3)):
        monkeypatch.setattr(f"service.stores.sqlite._{name}", rows)
    now = 1e9
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=99, wall=lambda: now)
    names = [f"{i:02}" for i in range(14)]
    await made(store, *names)
    store._db.execute("UPDATE sessions SET model = 'other' WHERE id IN ('03', '09', '10', '13')")
    for model, found in ((None, names), ("other", ["03", "09", "10", "13"]), ("none", [])):
        for after, limit in (("", 99), ("", 2), ("04", 2), ("09", 1), ("13", 9)):
            page = await store.page(model, after, limit)
            assert [each.id for each in page] == [name for name in found if name > after][:limit]
    await store.close()
    now += 901
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=99, wall=lambda: now)
    left = []
    for _ in range(6):
        await store.sweep()
        left.append(store._db.execute("SELECT count(*) FROM sessions").fetchone()[0])
    assert left == [11, 8, 5, 2, 0, 0]
    await store.close()


async def test_a_row_that_was_spoilt_is_one_session_s_trouble(path: Path) -> None:
    """The session says so; the others, even those that are asked for in the same moment, are well."""
    store = opened(path)
    assert isinstance(store, SqliteStore)
    await made(store, "a", "b")
    store._db.execute("UPDATE sessions SET metadata = '{\"wh' WHERE id = 'a'")
    spoilt, well = await asyncio.gather(store.load("a"), store.load("b"), return_exceptions=True)
    assert isinstance(spoilt, SessionCorrupt)
    assert isinstance(well, Stored)
    await store.close()


@pytest.mark.parametrize("column", ["id", "model", "version", "metadata"])
async def test_a_text_that_was_spoilt_is_one_session_s_trouble(
    path: Path, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are no UTF-8 any more are told with whose they are; lists and sweeps go on to the others."""
    now = 1e9
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=9, wall=lambda: now)
    await made(store, "a", "b")
    store._db.execute(f"UPDATE sessions SET {column} = CAST(x'61ff' AS TEXT) WHERE id = 'a'")  # noqa: S608
    assert [each.id for each in await store.page(None, "", 1)] == ["b"]
    assert "session 'a" in caplog.text
    assert (await store.load("b")).id == "b"
    if column != "id":  # nobody can ask for an id that is no text
        with pytest.raises(SessionCorrupt, match="session 'a'"):
            await store.load("a")
    await store.close()
    now += 901
    store = SqliteStore(f"sqlite:///{path}", keep_steps=0, max_expired_ids=9, wall=lambda: now)
    await store.sweep()
    with pytest.raises(SessionExpired):
        await store.load("b")
    await store.close()


async def test_a_schema_that_was_spoilt_is_refused(path: Path) -> None:
    """SQLite quotes bytes that are no UTF-8, on which the driver fails in its own way."""
    await opened(path).close()
    spoil(path, b"CREATE INDEX earlier_of", b"CREATE \xffNDEX earlier_of")
    with pytest.raises(StoreInvalid, match="damaged"):
        opened(path)


def spoil(path: Path, before: bytes, after: bytes) -> None:
    """Changes bytes that a file has in one place."""
    head, tail = path.read_bytes().split(before)
    path.write_bytes(head + after + tail)


async def test_an_index_that_leads_to_another_row_is_not_followed(path: Path) -> None:
    """A spoilt index must not hand out somebody else's session."""
    store = opened(path)
    await made(store, "alpha", "bravo", "charlie")
    await store.close()
    spoil(path, b"bravo\2", b"bravo\3")  # in the index an id is followed by the number of its row
    store = opened(path)
    with pytest.raises(SessionCorrupt, match=r"'bravo'.* found another in its place"):
        await store.load("bravo")
    assert (await store.load("charlie")).id == "charlie"
    await store.close()


async def test_a_call_that_fails_unforeseen_fails_alone(path: Path) -> None:
    """What it had written is undone; what came in the same moment is done, whether before or after it."""
    store = opened(path)
    await made(store, "a", "b", "c", "d")
    too_large = [Save("b", token(1), token(2), saved(1)), Save("c", token(1), token(2), Saved(2**70, b""))]
    before, failed, no_json, after = await asyncio.gather(
        store.save([Save("a", token(1), token(2), saved(1))]),
        store.save(too_large),
        store.create(Record("new", metadata={"what": object()}), token(1), saved(0)),  # type: ignore[dict-item]
        store.save([Save("d", token(1), token(2), saved(1))]),
        return_exceptions=True,
    )
    assert (before, after) == ([True], [True])
    assert isinstance(failed, OverflowError)
    assert isinstance(no_json, TypeError)
    assert [(await store.load(each)).token for each in "abcd"] == [token(2), token(1), token(1), token(2)]
    with pytest.raises(SessionNotFound):
        await store.load("new")
    assert await store.save(too_large[:1]) == [True]
    await store.close()


async def test_a_caller_who_leaves_keeps_nobody_else_waiting(path: Path) -> None:
    """Whoever it is of those in one transaction, and of those after it."""
    store = opened(path)
    await made(store, "a", "b")
    calls = [asyncio.create_task(store.load(name)) for name in "abab"]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert [(await asyncio.wait_for(call, 10)).id for call in calls[1:]] == ["b", "a", "b"]
    assert (await asyncio.wait_for(store.load("a"), 10)).id == "a"
    await store.close()


async def test_what_is_being_saved_is_saved_before_the_file_is_closed(path: Path) -> None:
    """And what waits behind it."""
    store = opened(path)
    await made(store, "a")
    first = asyncio.create_task(store.save([Save("a", token(1), token(2), saved(1))]))
    await asyncio.sleep(0)
    second = asyncio.create_task(store.save([Save("a", token(2), token(3), saved(2))]))
    await asyncio.sleep(0)
    await store.close()
    assert [await first, await second] == [[True], [True]]
    again = opened(path)
    assert (await again.load("a")).token == token(3)
    await again.close()
