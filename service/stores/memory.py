"""`memory://`: sessions that end with the process."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from sortedcontainers import SortedKeyList

from service.errors import SessionExists, SessionExpired, SessionNotFound
from service.stores import SessionRecord


def _id(record: SessionRecord) -> str:
    return record.id


class MemoryStore:
    """The sessions in order of id, and the last `max_expired_ids` ids that idled out.

    It holds the records that it is given, and no other index: the process that serves them has one by id.
    """

    def __init__(self, *, max_expired_ids: int) -> None:
        self._records: SortedKeyList[SessionRecord, str] = SortedKeyList(key=_id)
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._max_expired_ids = max_expired_ids

    async def create(self, record: SessionRecord) -> None:
        """Adds a session. Raises SessionExists where the id is taken; an expired id is free again."""
        if self._find(record.id) is not None:
            raise SessionExists(f"session {record.id!r} exists already")
        self._expired.pop(record.id, None)
        self._records.add(record)

    async def load(self, session: str) -> SessionRecord:
        """Raises SessionExpired for an id that idled out, SessionNotFound for any other unknown one."""
        if (record := self._find(session)) is not None:
            return record
        if session in self._expired:
            raise SessionExpired(f"session {session!r} was idle for longer than its idle_ttl_ms and is gone")
        raise SessionNotFound(f"no session {session!r}: create it with PUT /v1/sessions/{session}")

    async def delete(self, session: str) -> None:
        """Forgets a session; an unknown one is no error."""
        if (record := self._find(session)) is not None:
            self._records.remove(record)

    async def expire(self, session: str) -> None:
        """Forgets a session, but remembers that it was here."""
        await self.delete(session)
        self._expired[session] = None
        while len(self._expired) > self._max_expired_ids:
            self._expired.popitem(last=False)

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Up to `limit` sessions with an id above `after`, in order of id, of `model` or of all."""
        found = self._records.irange_key(min_key=after, inclusive=(False, False))
        return list(islice((record for record in found if model in (None, record.model)), limit))

    async def close(self) -> None:
        """Nothing to let go of."""

    def _find(self, session: str) -> SessionRecord | None:
        return next(self._records.irange_key(session, session), None)
