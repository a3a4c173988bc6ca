"""`redis://`, `rediss://`, `redis+cluster://`: sessions in Redis or Valkey, for any number of services side by side.

Rule: what a save may change is decided on the server, by the token, in one script for all rows of a shard (of all
shards, where there is one server). How durable a save is, the server's own settings say; `?replicas=N` has N replicas
confirm it first.
"""

import asyncio
import logging
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any

import orjson

from service.errors import SessionCorrupt, SessionExists, StoreInvalid
from service.stores import Save, Saved, SessionRecord, Stored, missing
from service.stores.redis_link import Call, Link
from service.stores.redis_scripts import (
    CREATE,
    DELETE,
    EARLIER,
    EXPIRE,
    FORMAT,
    FORMAT_KEY,
    LOAD,
    PAGE,
    PING,
    REMEMBERED,
    SAVE,
    SHARDS,
    TOUCH,
    TRIM,
    earlier_key,
    ids_key,
    session_key,
    shard_of,
)

log = logging.getLogger(__name__)

_VERSION = 1
_HEAD = struct.Struct("<16sQ")  # token, step
# Expected token, how many earlier ones are left, head, bytes of the snapshot; then these.
_ROW = struct.Struct("<16si16sQI")
_STEP = struct.Struct("<Q")  # of an earlier save; then its snapshot
_KEEP = -1
_ROWS, _BYTES = 512, 2**24  # of a script: while it runs, the server does nothing else
_SEEN = 500  # ids that one look at a shard's index takes
_TRIMMED = 64  # likewise, of a sweep


class RedisStore:
    """The store in Redis; see `stores.SessionStore` for what its calls do.

    Args:
        url: see `redis_link.Link`.
        keep_steps: as `open_store`.
    """

    is_durable = is_shared = True

    def __init__(self, url: str, *, keep_steps: int) -> None:
        self._keep_steps = keep_steps
        self._link = Link(url)
        self._trimmed = [""] * SHARDS
        with ThreadPoolExecutor(1, thread_name_prefix="redis") as aside:  # there may be a loop in this thread
            aside.submit(asyncio.run, _check(url)).result()

    async def create(self, record: SessionRecord, token: bytes, saved: Saved) -> None:
        """Adds a session."""
        fields: dict[str, Any] = {
            "model": record.model,
            "version": record.version,
            "idle_ttl": repr(record.idle_ttl),
            "created_at": repr(record.created_at),
            "metadata": orjson.dumps(dict(record.metadata)),
            "head": _HEAD.pack(token, saved.step),
            "snapshot": saved.snapshot,
        }
        arguments = [record.id, ceil(record.idle_ttl * 1000) + REMEMBERED, token]
        for pair in fields.items():
            arguments.extend(pair)
        if not await self._one(CREATE, [session_key(record.id), ids_key(shard_of(record.id))], arguments):
            raise SessionExists(f"session {record.id!r} exists already")

    async def load(self, session: str) -> Stored:
        """The session with its snapshot."""
        found = await self._one(LOAD, [session_key(session)])
        if found is None or found[-2] <= 0:
            raise missing(session, expired=found is not None)
        return _stored(session, found[:-1], found[-1] or b"")

    async def earlier(self, session: str) -> Sequence[Saved]:
        """Up to `keep_steps` saves before the last one, oldest first."""
        if not self._keep_steps:
            return ()
        found = await self._one(EARLIER, [earlier_key(session)], [self._keep_steps])
        return [Saved(_STEP.unpack_from(each)[0], each[_STEP.size :]) for each in found]

    async def save(self, saves: Sequence[Save]) -> Sequence[bool]:
        """Writes all, in one script a shard, and says for each whether it was saved."""
        longest = max((len(each.saved.header) + len(each.saved.body) for each in saves), default=0)
        parts = self._parts([each.id for each in saves], min(_ROWS, _BYTES // (longest + 1) + 1))
        calls = []
        for part in parts:
            keys: list[str] = []
            rows: list[bytes] = []
            for each in (saves[number] for number in part):
                keys.append(session_key(each.id))
                left = _KEEP if each.earlier is None else each.earlier
                header, body = each.saved.header, each.saved.body
                size = len(header) + len(body)
                rows += (_ROW.pack(each.expected, left, each.token, each.saved.step, size), header, body)
            calls.append(Call(keys, [self._keep_steps, b"".join(rows)]))
        done = [False] * len(saves)
        replies = await self._link.run(SAVE, calls, is_unsure=_lacks_one)
        for part, reply in zip(parts, replies, strict=True):
            for number, digit in zip(part, reply, strict=True):
                done[number] = digit == ord("1")
        return done

    async def delete(self, session: str, created_at: float | None = None) -> None:
        """Forgets a session."""
        made = "" if created_at is None else repr(created_at)
        await self._one(DELETE, [session_key(session), ids_key(shard_of(session))], [session, made])

    async def expire(self, tokens: Mapping[str, bytes]) -> int:
        """Ends sessions that idled out, unless somebody saved them since."""
        return sum(await self._link.run(EXPIRE, self._calls(tokens)))

    async def touch(self, tokens: Mapping[str, bytes]) -> None:
        """Counts as use of sessions, unless somebody saved them since."""
        await self._link.run(TOUCH, self._calls(tokens))

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[Stored]:
        """Live sessions in order of id: of each shard as many as may be needed, then the first of all."""
        if model == "":  # no model's name, and to the script that of all
            return []
        found: list[Stored] = []
        afters = dict.fromkeys(range(SHARDS), after)
        counts = dict.fromkeys(range(SHARDS), 0)
        while afters:
            calls = [Call([ids_key(shard)], [afters[shard], _SEEN, limit, model or ""]) for shard in afters]
            replies = await self._link.run(PAGE, calls)
            for shard, (last, rows) in zip(list(afters), replies, strict=True):
                for row in rows:
                    try:
                        found.append(_stored(row[0].decode(), row[1:], b""))
                    except SessionCorrupt:
                        log.exception("a list of sessions goes on without one")
                counts[shard] += len(rows)
                afters[shard] = last.decode()
                if not last or counts[shard] >= limit:
                    del afters[shard]
        return sorted(found, key=lambda each: each.id)[:limit]

    async def sweep(self) -> None:
        """Goes on through the indices, and drops the ids that are forgotten; the server itself forgets the sessions."""
        calls = [Call([ids_key(shard)], [self._trimmed[shard], _TRIMMED]) for shard in range(SHARDS)]
        self._trimmed = [last.decode() for last in await self._link.run(TRIM, calls)]

    async def ping(self) -> None:
        """Asks whether a script that writes may run, on every server."""
        await _ping(self._link)

    async def close(self) -> None:
        """Closes the connections."""
        await self._link.close()

    async def _one(self, script: str, keys: Sequence[str], arguments: Sequence[Any] = ()) -> Any:
        return (await self._link.run(script, [Call(keys, arguments)]))[0]

    def _calls(self, tokens: Mapping[str, bytes]) -> list[Call]:
        """Those of a script that takes sessions and their tokens."""
        ids = list(tokens)
        return [
            Call([session_key(ids[number]) for number in part], [tokens[ids[number]] for number in part])
            for part in self._parts(ids, _ROWS)
        ]

    def _parts(self, ids: Sequence[str], most: int) -> list[list[int]]:
        """The places of the ids that one script may take together, so many at most."""
        if self._link.is_cluster:
            shards: dict[int, list[int]] = defaultdict(list)
            for number, session in enumerate(ids):
                shards[shard_of(session)].append(number)
            wholes = list(shards.values())
        else:
            wholes = [list(range(len(ids)))]
        return [whole[start : start + most] for whole in wholes for start in range(0, len(whole), most)]


def _lacks_one(replies: Sequence[bytes]) -> bool:
    """Whether a save was not done: on a second try, because it lost, or because the first one won and was followed."""
    return any(b"0" in reply for reply in replies)


async def _check(url: str) -> None:
    """Marks an empty store as ours; raises where it is none of ours, or cannot be written."""
    link = Link(url)
    try:
        (found,) = await link.run(FORMAT, [Call([FORMAT_KEY], [_VERSION])])
        await _ping(link)
    finally:
        await link.close()
    if not found.isdigit():
        raise StoreInvalid(f"session store {link.address}: its key {FORMAT_KEY} is not Latch's; name another database")
    if int(found) > _VERSION:
        raise StoreInvalid(
            f"session store {link.address} has format {int(found)}, this version of Latch knows up to {_VERSION}: "
            "run the newer one, or name another database; it was left as it is"
        )


async def _ping(link: Link) -> None:
    """Also tells a node of a cluster from a server that has all shards."""
    await link.run(PING, [Call([ids_key(shard)]) for shard in range(SHARDS)])


def _stored(session: str, fields: Sequence[Any], snapshot: bytes) -> Stored:
    model, version, idle_ttl, created_at, metadata, head, milliseconds = fields
    try:
        token, step = _HEAD.unpack(head)
        return Stored(
            id=session,
            model=model.decode(),
            version=version.decode(),
            idle_ttl=float(idle_ttl),
            created_at=float(created_at),
            metadata=orjson.loads(metadata),
            token=token,
            saved=Saved(step, snapshot),
            time_left=milliseconds / 1000,
        )
    except (struct.error, ValueError, TypeError, AttributeError) as error:
        raise SessionCorrupt(f"session {session!r} cannot be read from Redis: {error}") from error
