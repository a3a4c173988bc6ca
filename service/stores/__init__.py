"""Where sessions outlive their process: the `SessionStore` contract and `open_store(url)`.

Rule: a store keeps bytes and compares tokens; it knows neither states nor models. Every save of a session writes a
token that no other save ever had, and names the one that it replaces: whoever saves from an old copy loses, is told
so, and nothing of his is kept. A driver is imported only when its URL asks for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from service.errors import SessionExpired, SessionNotFound, SettingsInvalid


class SessionRecord(Protocol):
    """What a session is, apart from its state. Times are wall-clock seconds; `idle_ttl` is in seconds."""

    @property
    def id(self) -> str: ...  # noqa: D102 - a plain value, as all that follow
    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def idle_ttl(self) -> float: ...  # noqa: D102
    @property
    def created_at(self) -> float: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, Any]: ...  # noqa: D102


class Saved(msgspec.Struct, frozen=True, gc=False):
    """Where a session stood when it was saved.

    Attributes:
        step: its step.
        body: the snapshot (see `snapshot.py`) of that moment, without its header.
        header: the first bytes of the snapshot, which many sessions have in common: a store may keep them once, or give
            everything as the body.
    """

    step: int
    body: bytes
    header: bytes = b""

    @property
    def snapshot(self) -> bytes:
        """The snapshot, whole."""
        return self.header + self.body


class Stored(msgspec.Struct, frozen=True):
    """A session as a store has it (a `SessionRecord`).

    Attributes:
        token: 16 bytes, of the save that `saved` comes from.
        saved: where it stands; its snapshot is empty where `page` lists the session.
        time_left: seconds until it expires, if nobody saves it before; by the clock of the store.
    """

    id: str
    model: str
    version: str
    idle_ttl: float
    created_at: float
    metadata: Mapping[str, Any]
    token: bytes
    saved: Saved
    time_left: float

    @property
    def step(self) -> int:
        """Steps committed so far."""
        return self.saved.step


class Save(msgspec.Struct, frozen=True, gc=False):
    """A session to save.

    Attributes:
        id: of a session that was created before.
        expected: the token of the save that this one follows.
        token: the token that it shall have from now on.
        saved: where it stands now.
        earlier: None puts what it replaces with the earlier ones; a number leaves as many of those that
            `earlier` gives, the oldest.
    """

    id: str
    expected: bytes
    token: bytes
    saved: Saved
    earlier: int | None = None


class SessionStore(Protocol):
    """The contract that every back end passes the same tests for.

    Any call raises StoreUnavailable where the store cannot be asked; then nobody knows whether a write was done, and
    doing it again is safe: a token that is there already counts as saved.
    """

    is_durable: bool
    """Whether sessions outlive the process."""

    is_shared: bool
    """Whether other processes may change them."""

    async def create(self, record: SessionRecord, token: bytes, saved: Saved) -> None:
        """Adds a session, and forgets what an expired one of its id has left.

        Raises SessionExists where the id is taken, unless by this very token.
        """

    async def load(self, session: str) -> Stored:
        """Raises SessionExpired for an id that idled out, SessionNotFound for any other unknown one."""

    async def earlier(self, session: str) -> Sequence[Saved]:
        """Up to `keep_steps` saves before the last one, oldest first. None of an unknown session."""

    async def save(self, saves: Sequence[Save]) -> Sequence[bool]:
        """Writes all in one group commit, durable when it returns; each counts as use of its session.

        A session is in `saves` at most once.

        Returns:
            For each whether it was saved. False: `expected` is not its token, or it is not there any more.
        """

    async def delete(self, session: str, created_at: float | None = None) -> None:
        """Forgets a session; an unknown one is no error, and one that was made at another time than that is left alone:
        the call may come late.
        """

    async def expire(self, tokens: Mapping[str, bytes]) -> int:
        """Ends sessions that idled out, by id, unless their token is another one by now; remembers that they were.

        Returns:
            How many were ended.
        """

    async def touch(self, tokens: Mapping[str, bytes]) -> None:
        """Counts as use of sessions, by id, unless their token is another one by now; one that was ended stays so."""

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[Stored | SessionRecord]:
        """Up to `limit` live sessions with an id above `after`, in order of id, of `model` or of all."""

    async def sweep(self) -> None:
        """Called every now and then: forgets for good what expired long ago."""

    async def ping(self) -> None:
        """Raises StoreUnavailable where the store would refuse to save."""

    async def close(self) -> None:
        """Lets go of what the store holds."""


def missing(session: str, *, expired: bool) -> SessionExpired | SessionNotFound:
    """What `load` raises."""
    if expired:
        return SessionExpired(f"session {session!r} was idle for longer than its idle_ttl_ms and is gone")
    return SessionNotFound(f"no session {session!r}: create it with PUT /v1/sessions/{session}")


def open_store(url: str, *, keep_steps: int, max_expired_ids: int) -> SessionStore:
    """Opens the store that a URL names.

    Args:
        url: memory://, sqlite:///path, redis://, rediss:// or redis+cluster://.
        keep_steps: saves before the last one that `earlier` gives.
        max_expired_ids: expired ids remembered, where the store does not forget them by time.

    Raises:
        SettingsInvalid: no such kind of store, or an option that it does not know.
        StoreUnavailable: it cannot be reached, opened or written; the message says what to do.
        StoreInvalid: it was made by a newer version, or is something else; nothing was changed.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # which may quote a password
        raise SettingsInvalid(
            "session store: the address cannot be read: percent-encode what is no letter or digit in user and password"
        ) from None
    if "#" in url:
        raise SettingsInvalid("session store: the address has a #, which ends it: write %23")
    if scheme == "memory":
        from service.stores.memory import MemoryStore

        return MemoryStore(keep_steps=keep_steps, max_expired_ids=max_expired_ids)
    if scheme == "sqlite":
        from service.stores.sqlite import SqliteStore

        return SqliteStore(url, keep_steps=keep_steps, max_expired_ids=max_expired_ids)
    if scheme in ("redis", "rediss", "redis+cluster"):
        from service.stores.redis import RedisStore

        return RedisStore(url, keep_steps=keep_steps)
    raise SettingsInvalid(  # the rest of the address may hold a password
        f"session store: unknown kind {scheme!r}; "
        "known are memory://, sqlite:///path, redis://, rediss:// and redis+cluster://"
    )
