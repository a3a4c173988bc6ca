"""`memory://`: sessions that end with the process."""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from math import inf
from operator import attrgetter

from sortedcontainers import SortedKeyList

from service.errors import SessionExists
from service.stores import Save, Saved, SessionRecord, Stored, missing


class MemoryStore:
    """The sessions in order of id, and the last `max_expired_ids` ids that idled out.

    It holds the records that it is given, and no other index: the process that serves them has one by id, and their
    states. Of a session that is not saved it keeps nothing else; time is up to who serves it.
    """

    is_durable = is_shared = False

    def __init__(self, *, keep_steps: int = 0, max_expired_ids: int) -> None:
        self._records: SortedKeyList[SessionRecord, str] = SortedKeyList(key=attrgetter("id"))
        self._saved: dict[str, tuple[bytes, Saved]] = {}
        self._earlier: dict[str, deque[Saved]] = {}
        self._keep_steps = keep_steps
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._max_expired_ids = max_expired_ids

    async def create(self, record: SessionRecord, token: bytes, saved: Saved) -> None:
        """Adds a session. Raises SessionExists where the id is taken; an expired id is free again."""
        if self._find(record.id) is not None:
            if token and self._saved[record.id][0] == token:
                return
            raise SessionExists(f"session {record.id!r} exists already")
        self._expired.pop(record.id, None)
        self._records.add(record)
        if token:
            self._saved[record.id] = token, saved
            self._earlier[record.id] = deque(maxlen=self._keep_steps)

    async def load(self, session: str) -> Stored:
        """Raises SessionExpired for an id that idled out, SessionNotFound for any other unknown one."""
        record = self._find(session)
        if record is None:
            raise missing(session, expired=session in self._expired)
        token, saved = self._saved[session]
        return Stored(
            id=record.id,
            model=record.model,
            version=record.version,
            idle_ttl=record.idle_ttl,
            created_at=record.created_at,
            metadata=record.metadata,
            token=token,
            saved=saved,
            time_left=inf,
        )

    async def earlier(self, session: str) -> Sequence[Saved]:
        """Up to `keep_steps` saves before the last one, oldest first. None of an unknown session."""
        return list(self._earlier.get(session, ()))

    async def save(self, saves: Sequence[Save]) -> Sequence[bool]:
        """Says for each whether it was saved."""
        return [self._save(save) for save in saves]

    def _save(self, save: Save) -> bool:
        token, before = self._saved.get(save.id, (None, None))
        if before is None or token not in (save.expected, save.token):
            return False
        if token != save.token:
            earlier = self._earlier[save.id]
            if save.earlier is None:
                earlier.append(before)
            else:
                while len(earlier) > save.earlier:
                    earlier.pop()
            self._saved[save.id] = save.token, save.saved
        return True

    async def delete(self, session: str, created_at: float | None = None) -> None:
        """Forgets a session; an unknown one is no error."""
        if (record := self._find(session)) is not None and created_at in (None, record.created_at):
            self._records.remove(record)
            self._saved.pop(session, None)
            self._earlier.pop(session, None)

    async def expire(self, tokens: Mapping[str, bytes]) -> int:
        """Ends sessions that idled out, unless somebody saved them since."""
        count = 0
        for session, token in tokens.items():
            if self._find(session) is not None and token == self._saved.get(session, (b"",))[0]:
                await self.delete(session)
                self._expired[session] = None
                count += 1
        while len(self._expired) > self._max_expired_ids:
            self._expired.popitem(last=False)
        return count

    async def touch(self, tokens: Mapping[str, bytes]) -> None:
        """Time is up to who serves the sessions."""

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Up to `limit` sessions with an id above `after`, in order of id, of `model` or of all."""
        found = self._records.irange_key(min_key=after, inclusive=(False, False))
        return list(islice((record for record in found if model in (None, record.model)), limit))

    async def sweep(self) -> None:
        """Nothing expires by itself."""

    async def ping(self) -> None:
        """Always there."""

    async def close(self) -> None:
        """Nothing to let go of."""

    def _find(self, session: str) -> SessionRecord | None:
        return next(self._records.irange_key(session, session), None)
