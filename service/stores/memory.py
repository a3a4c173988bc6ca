"""`memory://`: sessions that end with the process."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from sortedcontainers import SortedDict

from service.errors import SessionExists, SessionExpired, SessionNotFound
from service.stores import SessionRecord


class MemoryStore:
    """A dictionary of sessions, and the last `max_expired_ids` ids that idled out."""

    def __init__(self, *, max_expired_ids: int) -> None:
        self._records: SortedDict[str, SessionRecord] = SortedDict()
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._max_expired_ids = max_expired_ids

    async def create(self, record: SessionRecord) -> None:
        """Adds a session. Raises SessionExists where the id is taken; an expired id is free again."""
        if record.id in self._records:
            raise SessionExists(f"session {record.id!r} exists already")
        self._expired.pop(record.id, None)
        self._records[record.id] = record

    async def load(self, session: str) -> SessionRecord:
        """Raises SessionExpired for an id that idled out, SessionNotFound for any other unknown one."""
        try:
            return self._records[session]
        except KeyError:
            pass
        if session in self._expired:
            raise SessionExpired(f"session {session!r} was idle for longer than its idle_ttl_ms and is gone")
        raise SessionNotFound(f"no session {session!r}: create it with PUT /v1/sessions/{session}")

    async def delete(self, session: str) -> None:
        """Forgets a session; an unknown one is no error."""
        self._records.pop(session, None)

    async def expire(self, session: str) -> None:
        """Forgets a session, but remembers that it was here."""
        self._records.pop(session, None)
        self._expired[session] = None
        while len(self._expired) > self._max_expired_ids:
            self._expired.popitem(last=False)

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Up to `limit` sessions with an id above `after`, in order of id, of `model` or of all."""
        ids = self._records.irange(minimum=after, inclusive=(False, False))
        found = (self._records[i] for i in ids)
        return list(islice((record for record in found if model in (None, record.model)), limit))

    async def close(self) -> None:
        """Nothing to let go of."""
