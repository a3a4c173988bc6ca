"""Where sessions are known: the `SessionStore` contract and `open_store(url)`.

Rule: a store answers who exists, who expired and who never was; the hidden states of live sessions are in the slabs.
A driver is imported only when its URL asks for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from service.errors import SettingsInvalid


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


class SessionStore(Protocol):
    """The contract that every back end passes the same tests for."""

    async def create(self, record: SessionRecord) -> None:
        """Adds a session. Raises SessionExists where the id is taken; an expired id is free again."""

    async def load(self, session: str) -> SessionRecord:
        """Raises SessionExpired for an id that idled out, SessionNotFound for any other unknown one."""

    async def delete(self, session: str) -> None:
        """Forgets a session; an unknown one is no error."""

    async def expire(self, session: str) -> None:
        """Forgets a session, but remembers that it was here."""

    async def page(self, model: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Up to `limit` sessions with an id above `after`, in order of id, of `model` or of all."""

    async def close(self) -> None:
        """Lets go of what the store holds."""


def open_store(url: str, *, max_expired_ids: int) -> SessionStore:
    """Opens the store that a URL names.

    Raises:
        SettingsInvalid: no such kind of store.
    """
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        from service.stores.memory import MemoryStore

        return MemoryStore(max_expired_ids=max_expired_ids)
    raise SettingsInvalid(f"store {url!r}: unknown kind {scheme!r}; this version knows memory://")
