"""The contract of a store, the same tests for every back end."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from service.errors import SessionExists, SessionExpired, SessionNotFound, SettingsInvalid
from service.stores import SessionStore, open_store

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory://"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    """An empty store of each kind."""
    opened = open_store(request.param, max_expired_ids=3)
    yield opened
    await opened.close()


@dataclass(frozen=True)
class SessionRecord:
    """A session as a store sees it."""

    id: str
    model: str
    version: str
    idle_ttl: float
    created_at: float
    metadata: dict[str, str]


def record(name: str, model: str = "m") -> SessionRecord:
    """A session of that id."""
    return SessionRecord(name, model, "1", 900.0, 1.0, {"who": name})


async def test_what_was_created_is_found(store: SessionStore) -> None:
    """The record comes back whole."""
    await store.create(record("a"))
    assert await store.load("a") == record("a")


async def test_an_id_is_taken_once(store: SessionStore) -> None:
    """A second create is refused and changes nothing."""
    await store.create(record("a", "first"))
    with pytest.raises(SessionExists):
        await store.create(record("a", "second"))
    assert (await store.load("a")).model == "first"


async def test_expired_deleted_and_unknown_are_told_apart(store: SessionStore) -> None:
    """410 for what idled out, 404 for what was deleted or never there."""
    for name in ("idle", "ended"):
        await store.create(record(name))
    await store.expire("idle")
    await store.delete("ended")
    with pytest.raises(SessionExpired):
        await store.load("idle")
    for name in ("ended", "never"):
        with pytest.raises(SessionNotFound):
            await store.load(name)


async def test_an_expired_id_is_free_again(store: SessionStore) -> None:
    """It can be created anew, and then deleted without a memory of having expired."""
    await store.create(record("a"))
    await store.expire("a")
    await store.create(record("a"))
    assert await store.load("a") == record("a")
    await store.delete("a")
    with pytest.raises(SessionNotFound):
        await store.load("a")


async def test_the_memory_of_expired_ids_is_bounded(store: SessionStore) -> None:
    """The oldest are forgotten first."""
    for name in "abcde":
        await store.create(record(name))
        await store.expire(name)
    with pytest.raises(SessionNotFound):
        await store.load("b")
    with pytest.raises(SessionExpired):
        await store.load("c")


async def test_deleting_what_is_not_there_is_no_error(store: SessionStore) -> None:
    """Delete is idempotent."""
    await store.delete("never")


async def test_pages_are_in_order_and_complete(store: SessionStore) -> None:
    """Walking by cursor sees every session of a model once, in order of id."""
    for i in (5, 3, 1, 4, 2, 0):
        await store.create(record(f"s{i}", "even" if i % 2 == 0 else "odd"))
    assert [r.id for r in await store.page(None, "", 4)] == ["s0", "s1", "s2", "s3"]
    assert [r.id for r in await store.page(None, "s3", 4)] == ["s4", "s5"]
    assert [r.id for r in await store.page("odd", "s1", 4)] == ["s3", "s5"]


@pytest.mark.parametrize("url", ["postgres://x", "nonsense", ""])
async def test_an_unknown_kind_of_store_is_named(url: str) -> None:
    """The error has the URL and what this version knows."""
    with pytest.raises(SettingsInvalid, match="memory://"):
        open_store(url, max_expired_ids=1)
