"""`sqlite:///path`: sessions in a file beside the service, which survive its crash and that of the machine.

Rule: one process, one connection. What is to be written while a commit is under way goes into the next transaction.
Statements run on the event loop's thread, where they take microseconds; the commit, which waits for the disk, in a
thread of its own. The write-ahead log makes a torn write at the end of the file one that never was; `synchronous=FULL`
has the disk confirm each commit (`?synchronous=normal` leaves that to the system: a crash of the process still loses
nothing, a power cut may lose the last commits).
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import orjson

from service.errors import LatchError, SessionCorrupt, SessionExists, SettingsInvalid, StoreInvalid, StoreUnavailable
from service.stores import Save, Saved, SessionRecord, Stored, missing

log = logging.getLogger(__name__)

_APPLICATION = 0x4C617463  # "Latc", in the header of the file
_VERSION = 2
_BUSY_SECONDS = 5.0
_CHECKPOINT_PAGES = 4000
_PAGE_ROWS, _SWEEP_ROWS, _ENDED_AT_ONCE = 250, 2000, 200  # of a transaction, whose work is on the loop
_NUMBERS = 100_000
_TRIED_BYTES = 8192
_HEADERS_AT_HAND = 1000

# The headers of snapshots, which are nearly half of each, are kept once: a commit writes half as many pages.
_HEADERS = "CREATE TABLE headers (number INTEGER PRIMARY KEY, bytes BLOB NOT NULL UNIQUE) STRICT;"
# The small columns stand first: who looks for what expired reads no snapshots.
_SCHEMA = f"""
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, expires_at REAL NOT NULL, idle_ttl REAL NOT NULL,
    model TEXT NOT NULL, version TEXT NOT NULL, created_at REAL NOT NULL, metadata TEXT NOT NULL,
    token BLOB NOT NULL, step INTEGER NOT NULL, header INTEGER NOT NULL, body BLOB NOT NULL
) STRICT;
CREATE TABLE earlier (
    number INTEGER PRIMARY KEY, session TEXT NOT NULL, step INTEGER NOT NULL, header INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX earlier_of ON earlier (session, number);
CREATE TABLE expired (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE) STRICT;
{_HEADERS}
"""
# Of format 1: what stands there has no header, and its whole snapshot as the body.
_UPGRADE = """
ALTER TABLE sessions RENAME COLUMN snapshot TO body;
ALTER TABLE sessions ADD COLUMN header INTEGER NOT NULL DEFAULT 0;
ALTER TABLE earlier RENAME COLUMN snapshot TO body;
ALTER TABLE earlier ADD COLUMN header INTEGER NOT NULL DEFAULT 0;
INSERT INTO headers VALUES (0, x'');
"""
# Whatever damage has made of them, they are bytes, or none: whoever reads the snapshot finds that it is not whole.
_SNAPSHOT = (
    "CAST(coalesce(body, x'') AS BLOB), "
    "CAST(coalesce((SELECT bytes FROM headers WHERE headers.number = header), x'') AS BLOB)"
)
# The driver decodes what SQLite says, which may quote spoilt bytes.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)
# The driver looks for an adapter of `bytes` at every value, in vain, which takes longer than a copy.
_blob = bytearray
_COLUMNS = "id, model, version, idle_ttl, created_at, metadata, token, step, expires_at"

T = TypeVar("T")


class SqliteStore:
    """The store in one file; see `stores.SessionStore` for what its calls do.

    Args:
        url: sqlite:///relative/path or sqlite:////absolute/path, with `?synchronous=full` or `normal`.
        keep_steps, max_expired_ids: as `open_store`.
        wall: seconds since the epoch, asked once: from then on time is what has passed, so that a clock that is set
            anew expires nobody.
    """

    is_durable = True
    is_shared = False

    def __init__(
        self, url: str, *, keep_steps: int, max_expired_ids: int, wall: Callable[[], float] = time.time
    ) -> None:
        parts = urlsplit(url)
        options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        synchronous = options.pop("synchronous", "full")
        if parts.netloc or len(parts.path) < 2 or options or synchronous not in ("full", "normal"):
            raise SettingsInvalid(
                f"store {url!r}: the address is sqlite:///relative/path or sqlite:////absolute/path, "
                "with ?synchronous=full or normal"
            )
        self._path = Path(unquote(parts.path[1:]))
        self._keep_steps = keep_steps
        self._max_expired_ids = max_expired_ids
        self._epoch = wall() - time.monotonic()
        self._swept = 0
        self._numbers: dict[str, int] = {}  # rows of sessions that were saved: found without the index, a fifth quicker
        self._headers: dict[bytes, int] = {}  # their rows, as far as they are committed, or about to be
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._must_fold = self._must_try = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._db = self._open(synchronous)
        self._log_path = os.path.realpath(self._path) + "-wal"  # where SQLite puts it, behind a link as well
        self._files = self._find_files()
        if not self._files:
            log.warning("session store %s: whether its files are moved cannot be noticed", self._path)

    def _open(self, synchronous: str) -> sqlite3.Connection:
        where = f"session store {self._path}"
        if not self._path.parent.is_dir():
            raise StoreUnavailable(f"{where}: {self._path.parent} is not a folder; make it, or set LATCH_STORE_URL")
        try:
            db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{where} cannot be opened: {error}; may this user write there?") from error
        try:
            self._prepare(db, synchronous, where)
        except _FAILURES as error:
            db.close()
            kind = getattr(error, "sqlite_errorname", "")
            if isinstance(error, UnicodeDecodeError):
                raise StoreInvalid(f"{where} is damaged: bring back a copy; it was left as it is") from error
            if kind == "SQLITE_NOTADB":
                raise StoreInvalid(f"{where} is not an SQLite file; it was left as it is") from error
            if kind == "SQLITE_BUSY":
                raise StoreUnavailable(
                    f"{where} is in use by another process: one service has a file for itself; services that share "
                    "their sessions need redis://"
                ) from error
            raise StoreUnavailable(
                f"{where} cannot be used: {error}; it needs a folder that this user may write to, with room on it"
            ) from error
        except BaseException:
            db.close()
            raise
        return db

    @staticmethod
    def _prepare(db: sqlite3.Connection, synchronous: str, where: str) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if (application, version) == (0, 0) and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.execute("PRAGMA journal_mode = WAL")  # before there is anything in the file
            db.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION};"
                f"PRAGMA user_version = {_VERSION}; COMMIT;"
            )
        elif application != _APPLICATION:
            raise StoreInvalid(f"{where} is a database of something else; it was left as it is: name another file")
        elif version > _VERSION:
            raise StoreInvalid(
                f"{where} has format {version}, this version of Latch knows up to {_VERSION}: run the newer one, "
                "or name another file; it was left as it is"
            )
        db.execute("PRAGMA journal_mode = WAL")  # a copy that SQLite made (VACUUM INTO) has another
        if version < _VERSION and application == _APPLICATION:
            db.executescript(f"BEGIN IMMEDIATE; {_HEADERS} {_UPGRADE} PRAGMA user_version = {_VERSION}; COMMIT;")
        db.text_factory = bytes  # a text that was spoilt is told of where it is decoded, with whose it is
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        db.execute("BEGIN IMMEDIATE")  # proves that it can be written to
        db.execute("COMMIT")

    @property
    def _now(self) -> float:
        return self._epoch + time.monotonic()

    async def create(self, record: SessionRecord, token: bytes, saved: Saved) -> None:
        """Adds a session."""

        def create() -> None:
            now = self._now
            found = self._one("SELECT token, expires_at FROM sessions WHERE id = ?", record.id)
            if found and found[1] > now:
                if found[0] == token:
                    return
                raise SessionExists(f"session {record.id!r} exists already")
            self._forget(record.id)
            self._db.execute(
                f"INSERT INTO sessions ({_COLUMNS}, header, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                (
                    record.id,
                    record.model,
                    record.version,
                    record.idle_ttl,
                    record.created_at,
                    orjson.dumps(dict(record.metadata)).decode(),
                    token,
                    saved.step,
                    now + record.idle_ttl,
                    self._header(saved.header),
                    saved.body,
                ),
            )

        await self._transact(create)

    async def load(self, session: str) -> Stored:
        """The session with its snapshot."""

        def load() -> Stored:
            # By number, so that the id is that of the row, too, and not that of the index.
            number = "(SELECT number FROM sessions WHERE id = ?)"
            row = self._one(f"SELECT {_COLUMNS}, {_SNAPSHOT} FROM sessions WHERE number = {number}", session)  # noqa: S608
            if row is None:
                raise missing(session, expired=self._one("SELECT 1 FROM expired WHERE id = ?", session) is not None)
            stored = self._stored(row[:-2], *row[-2:])
            if stored.id != session:  # an index with spoilt bytes leads to another row
                raise SessionCorrupt(
                    f"session {session!r} cannot be read from {self._path}: found another in its place"
                )
            if stored.time_left <= 0:
                raise missing(session, expired=True)
            return stored

        return await self._transact(load)

    async def earlier(self, session: str) -> Sequence[Saved]:
        """Up to `keep_steps` saves before the last one, oldest first."""

        def earlier() -> list[Saved]:
            statement = f"SELECT step, {_SNAPSHOT} FROM earlier WHERE session = ? ORDER BY number DESC LIMIT ?"  # noqa: S608
            return [Saved(*row) for row in self._db.execute(statement, (session, self._keep_steps))][::-1]

        return await self._transact(earlier)

    async def save(self, saves: Sequence[Save]) -> Sequence[bool]:
        """Writes all in one transaction, and says for each whether it was saved."""

        def save() -> Sequence[bool]:
            now = self._now
            if self._keep_steps or any(each.earlier is not None for each in saves):
                self._keep_earlier(saves)
            if len(self._numbers) > _NUMBERS:
                self._numbers.clear()
            number_of, find = self._numbers.get, self._number
            headers = {header: self._header(header) for header in {each.saved.header for each in saves}}
            done = self._db.executemany(
                "UPDATE sessions SET token = ?, step = ?, header = ?, body = ?, expires_at = ? + idle_ttl "
                "WHERE number = ? AND token = ?",
                [
                    (
                        _blob(each.token),
                        each.saved.step,
                        headers[each.saved.header],
                        _blob(each.saved.body),
                        now,
                        number_of(each.id) or find(each.id),
                        _blob(each.expected),
                    )
                    for each in saves
                ],
            ).rowcount
            if done == len(saves):
                return [True] * done
            tokens = "SELECT token FROM sessions WHERE id = ?"
            return [self._one(tokens, each.id) == (each.token,) for each in saves]

        return await self._transact(save)

    def _number(self, session: str) -> int | None:
        """The row of a session."""
        if found := self._one("SELECT number FROM sessions WHERE id = ?", session):
            self._numbers[session] = found[0]
        return self._numbers.get(session)

    def _header(self, header: bytes) -> int:
        """The row of a header, which is made where there is none. None is removed: they are one for each version of a
        model and length of reply.
        """
        if header not in self._headers:
            if len(self._headers) >= _HEADERS_AT_HAND:
                self._headers.clear()
            self._db.execute("INSERT OR IGNORE INTO headers (bytes) VALUES (?)", (header,))
            self._headers[header] = self._one("SELECT number FROM headers WHERE bytes = ?", header)[0]
        return self._headers[header]

    def _keep_earlier(self, saves: Sequence[Save]) -> None:
        """What these saves, those of them that will be done, make of the earlier ones."""
        owned = "(SELECT id FROM sessions WHERE id = ? AND token = ?)"
        if self._keep_steps:
            self._db.executemany(
                "INSERT INTO earlier (session, step, header, body) "
                "SELECT id, step, header, body FROM sessions WHERE id = ? AND token = ?",
                [(each.id, each.expected) for each in saves if each.earlier is None],
            )
            self._db.executemany(
                f"DELETE FROM earlier WHERE session = {owned} AND number <= "  # noqa: S608
                "(SELECT number FROM earlier WHERE session = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
                [(each.id, each.expected, each.id, self._keep_steps) for each in saves],
            )
        self._db.executemany(
            f"DELETE FROM earlier WHERE session = {owned} AND number >= "  # noqa: S608
            "(SELECT number FROM earlier WHERE session = ? ORDER BY number LIMIT 1 OFFSET ?)",
            [(each.id, each.expected, each.id, each.earlier) for each in saves if each.earlier is not None],
        )

    async def delete(self, session: str, created_at: float | None = None) -> None:
        """Forgets a session."""

        def forget() -> None:
            made = "SELECT 1 FROM sessions WHERE id = ? AND created_at = ?"
            if created_at is None or self._one(made, session, created_at):
                self._forget(session)

        await self._transact(forget)

    async def expire(self, tokens: Mapping[str, bytes]) -> int:
        """Ends sessions that idled out, unless somebody saved them since."""

        def expire() -> int:
            owned = "SELECT 1 FROM sessions WHERE id = ? AND token = ?"
            ended = [pair[0] for pair in tokens.items() if self._one(owned, *pair)]
            self._end(ended)
            return len(ended)

        return await self._transact(expire)

    async def touch(self, tokens: Mapping[str, bytes]) -> None:
        """Counts as use of sessions, unless somebody saved them since."""

        def touch() -> None:
            statement = "UPDATE sessions SET expires_at = ? + idle_ttl WHERE id = ? AND token = ?"
            self._db.executemany(statement, [(self._now, *pair) for pair in tokens.items()])

        await self._transact(touch)

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[Stored]:
        """Live sessions in order of id, from as many parts of the file as it takes."""
        found: list[Stored] = []
        last: bytes | None = after.encode()
        while last is not None and len(found) < limit:
            part, last = await self._transact(partial(self._page, model, last, limit - len(found)))
            found += part
        return found

    def _page(self, model: str | None, after: bytes, limit: int) -> tuple[list[Stored], bytes | None]:
        """Those of the next rows, and the id of the last of these, if there may be more."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS}, expires_at > ? AND (? IS NULL OR model = ?) FROM sessions "  # noqa: S608
            "WHERE id > CAST(? AS TEXT) ORDER BY id LIMIT ?",
            (self._now, model, model, after, _PAGE_ROWS),
        ).fetchall()
        found: list[Stored] = []
        for *row, is_wanted in rows:
            try:
                if is_wanted and len(found) < limit:
                    found.append(self._stored(tuple(row)))
            except SessionCorrupt:
                log.exception("a list of sessions goes on without one")
        last = rows[-1][0] if len(rows) == _PAGE_ROWS else after
        return found, last if last > after else None  # a spoilt index may lead backwards

    async def sweep(self) -> None:
        """Looks through the next part of the file for what expired, and forgets the oldest of that."""

        def sweep() -> None:
            rows = self._db.execute(
                "SELECT number, id, expires_at FROM sessions WHERE number > ? ORDER BY number LIMIT ?",
                (self._swept, _SWEEP_ROWS),
            ).fetchall()
            self._swept = rows[-1][0] if len(rows) == _SWEEP_ROWS else 0
            now, ended = self._now, []
            for number, session, expires_at in rows:
                if expires_at <= now:
                    with suppress(UnicodeDecodeError):  # a spoilt one is left as it is
                        ended.append(session.decode())
                    if len(ended) == _ENDED_AT_ONCE:
                        self._swept = number
                        break
            if ended:
                self._end(ended)

        await self._transact(sweep)

    async def ping(self) -> None:
        """Commits a transaction; after one that failed, with something in it that needs room, as a save does."""
        await self._transact(self._try if self._must_try else lambda: None)

    def _try(self) -> None:
        for statement in (
            "INSERT INTO expired (id) VALUES (hex(zeroblob(?)))",
            "DELETE FROM expired WHERE id = hex(zeroblob(?))",
        ):
            self._db.execute(statement, (_TRIED_BYTES,))

    async def close(self) -> None:
        """Closes the file, once what was asked is written."""
        while self._writing is not None:
            await self._writing
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()

    def _one(self, statement: str, *values: Any) -> Any:
        return self._db.execute(statement, values).fetchone()

    async def _transact(self, work: Callable[[], T]) -> T:
        """Calls `work` in the next transaction, which is read from, too: what a commit may undo, nobody has seen. It
        raises a LatchError before it has written anything, or not at all; it may be called again, after a rollback.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._commit())
        return await future

    async def _commit(self) -> None:
        """Transactions, until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            if self._must_fold:
                await loop.run_in_executor(self._thread, self._fold)
            waiting, self._waiting = self._waiting, []
            results: Sequence[Any]
            try:
                before = self._db.total_changes
                results = self._together([work for work, _ in waiting])
                await loop.run_in_executor(self._thread, self._commit_here)
                self._must_try &= self._db.total_changes == before
            except Exception as error:  # noqa: BLE001 - whatever it is, everybody is told
                self._undo()
                self._must_try = True
                self._must_fold |= isinstance(error, sqlite3.OperationalError)  # no room, mostly
                results = [self._failed(error)] * len(waiting)
            for (_, future), result in zip(waiting, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._writing = None

    def _commit_here(self) -> None:
        if self._find_files() != self._files:
            raise StoreUnavailable(
                f"the session store {self._path} was moved, replaced or removed while the service ran: nothing is "
                "saved to it; put it and its -wal back, or restart the service on what is there"
            )
        self._db.commit()

    def _find_files(self) -> list[tuple[int, int]]:
        """Which files the names lead to: what is written to others, nobody will find."""
        try:
            found = [os.stat(self._path), os.stat(self._log_path)]  # noqa: PTH116 - a path object takes as long again
        except OSError:
            return []
        return [(each.st_dev, each.st_ino) for each in found] if found[0].st_size else []

    def _together(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """What calls give, or how each of them fails, in a transaction that is left open.

        Who fails unforeseen may have written something: everything is undone, and the others are called again.

        Raises:
            sqlite3.OperationalError: it is the file that fails (no room, say), whoever calls.
        """
        failed: dict[int, Exception] = {}
        while True:
            self._db.execute("BEGIN IMMEDIATE")
            results: list[Any] = []
            for number, work in enumerate(works):
                try:
                    results.append(failed[number] if number in failed else work())
                except LatchError as error:
                    results.append(error)
                except sqlite3.OperationalError:
                    raise
                except Exception as error:  # noqa: BLE001 - it is told to whom it belongs
                    failed[number] = self._failed(error)
                    self._undo()
                    break
            else:
                return results

    def _fold(self) -> None:
        """Brings the log into the file, after which it is written over from its beginning: that takes no more room."""
        with suppress(sqlite3.Error):  # still no room for what is new in the file: again before the next transaction
            (is_busy, *_) = self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            self._must_fold = bool(is_busy)

    def _undo(self) -> None:
        self._headers.clear()  # some may have been new
        with suppress(sqlite3.Error):  # a full disk has ended the transaction already
            self._db.rollback()

    def _failed(self, error: Exception) -> Exception:
        if not isinstance(error, _FAILURES):
            return error
        return StoreUnavailable(f"the session store {self._path} failed: {error}; send the call again")

    def _stored(self, row: tuple[Any, ...], body: bytes = b"", header: bytes = b"") -> Stored:
        session, model, version, idle_ttl, created_at, metadata, token, step, expires_at = row
        try:
            return Stored(
                id=session.decode(),
                model=model.decode(),
                version=version.decode(),
                idle_ttl=idle_ttl,
                created_at=created_at,
                metadata=orjson.loads(metadata),
                token=token,
                saved=Saved(step, body, header),
                time_left=min(expires_at - self._now, idle_ttl),  # whatever the clock was when it was saved
            )
        except (ValueError, TypeError, AttributeError) as error:
            name = session.decode(errors="replace") if isinstance(session, bytes) else session
            raise SessionCorrupt(f"session {name!r} cannot be read from {self._path}: {error}") from error

    def _forget(self, session: str) -> None:
        self._numbers.pop(session, None)
        for table, column in (("sessions", "id"), ("earlier", "session"), ("expired", "id")):
            self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (session,))  # noqa: S608

    def _end(self, sessions: Sequence[str]) -> None:
        for session in sessions:
            self._forget(session)
            self._db.execute("INSERT INTO expired (id) VALUES (?)", (session,))
        self._db.execute(
            "DELETE FROM expired WHERE number <= (SELECT number FROM expired ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (self._max_expired_ids,),
        )
