"""`Queues`: who waits for a model: the requests of each session in order, and the sessions with work in line.

Rule: a session's queue moves on when its head is answered, whatever that took; everything is bounded. It knows slots
and tickets, not what a run is.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Container
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import msgspec

from service.errors import Draining, LatchError, Overloaded, SessionNotFound
from service.slab import Slot
from service.wire import StepReply

log = logging.getLogger(__name__)

Outcome = StepReply | LatchError
Answer = Callable[[Outcome], Any]


class Ticket(msgspec.Struct):
    """A place in the queue of a session, until `answer` was called. Without a request it needs no run: at its turn,
    when everything before it is applied or has failed, it is refused with `error`.

    `requests` and `size` (bytes of inputs) are what it counts for in the queue of the model, where what needs no run
    takes no room from what does; in that of its session it counts as every other.
    """

    slot: Slot
    answer: Answer | None
    submitted: float
    error: LatchError | None = None
    requests: int = 0
    size: int = 0

    def settle(self, outcome: Outcome) -> None:
        """Answers, unless that was done or the caller has gone."""
        if self.answer is not None:
            answer, self.answer = self.answer, None
            deliver(answer, outcome)

    def cancel(self) -> None:
        """The caller has gone: drops the request if no run has finished it, and harms nobody else."""
        self.answer = None

    def act(self) -> bool:
        """Its turn has come. False where the slot is not free for the next one yet."""
        self.settle(self.error)  # type: ignore[arg-type]  # a ticket has a request or an error
        return True


class Group:
    """Slots, none twice, that stand in line as one: when none of them is busy with a group before it any more.

    `size` is the bytes of inputs that it counts for, beside a request a slot; `missing` counts the busy slots.
    """

    slots: list[Slot]
    answer: Callable[..., Any]
    size: int
    missing: int = 0

    def refuse(self, error: LatchError) -> None:
        """Answers everybody."""
        raise NotImplementedError


G = TypeVar("G", bound=Group)


class Queues(Generic[G]):
    """The queues of one model.

    A slot is in here while it is busy: in line, or out of it because it is in a run, written to the store, or held.

    Args:
        max_queue, max_queue_bytes: requests waiting, and what their inputs may weigh.
        max_session_queue: requests waiting for one session.
    """

    def __init__(self, *, max_queue: int, max_queue_bytes: int, max_session_queue: int) -> None:
        self._max_queue = max_queue
        self._max_queue_bytes = max_queue_bytes
        self._max_session_queue = max_session_queue
        self._queues: dict[Slot, list[Ticket | G]] = {}  # of busy slots; a group that has its turn is in none
        self._line: deque[Slot | G] = deque()  # oldest first
        self._depth = self._bytes = 0
        self._outside: deque[asyncio.Future[None]] = deque()
        self._closed: LatchError | None = None  # what whoever waits is told
        self.work = asyncio.Event()
        """Set while somebody may stand in line."""

    @property
    def depth(self) -> int:
        """Requests waiting or running."""
        return self._depth

    @property
    def busy(self) -> Collection[Slot]:
        """The slots in here."""
        return self._queues.keys()

    def __contains__(self, slot: Slot) -> bool:
        """Whether the slot is busy."""
        return slot in self._queues

    def __len__(self) -> int:
        """How many slots are busy."""
        return len(self._queues)

    def check(self, slot: Slot) -> None:
        """Raises what keeps one more request of a session from being taken: Draining, Overloaded."""
        if self._closed is not None:
            raise Draining
        queue = self._queues.get(slot)
        if queue is not None and len(queue) >= self._max_session_queue:
            raise _full(len(queue), "requests wait for this session", self._max_session_queue)
        if self._depth >= self._max_queue:
            raise _full(self._depth, "requests wait for this model", self._max_queue)
        if self._bytes >= self._max_queue_bytes:
            raise _full(self._bytes, "bytes of inputs wait for this model", self._max_queue_bytes)

    def put(self, ticket: Ticket) -> Ticket:
        """Puts a ticket at the end of its session's queue. Raises Draining, SessionNotFound."""
        if self._closed is not None:
            raise Draining
        slot = ticket.slot
        if slot.row < 0:
            raise SessionNotFound("the session was deleted")
        queue = self._queues.get(slot)
        if queue is None:
            self._queues[slot] = [ticket]
            self._line.append(slot)
        else:
            queue.append(ticket)
        self._depth += ticket.requests
        self._bytes += ticket.size
        self.work.set()
        return ticket

    def put_first(self, ticket: Ticket) -> None:
        """Puts a ticket at the head of the queue of a slot that is out of line."""
        self._queues[ticket.slot].insert(0, ticket)
        self._depth += ticket.requests
        self._bytes += ticket.size

    def put_group(self, group: G) -> bool:
        """Puts slots in line as one, behind groups that have some of them, or does nothing where there is no room or a
        slot has a ticket: all the others would wait for what one session asked for.
        """
        slots, queues = group.slots, self._queues
        if (
            self._closed is not None
            or self._depth + len(slots) > self._max_queue
            or self._bytes >= self._max_queue_bytes
        ):
            return False
        busy = [] if queues.keys().isdisjoint(slots) else [slot for slot in slots if slot in queues]
        for slot in busy:
            queue = queues[slot]
            if len(queue) >= self._max_session_queue or any(isinstance(entry, Ticket) for entry in queue):
                return False
        for slot in slots:
            if slot in queues:
                queues[slot].append(group)
            else:
                queues[slot] = []
        self._depth += len(slots)
        self._bytes += group.size
        group.missing = len(busy)
        if not busy:
            self._line.append(group)
            self.work.set()
        return True

    def take(self, limit: int) -> list[Slot] | G:
        """Takes out of line, oldest first, a group or up to `limit` slots before the next group."""
        line = self._line
        slots: list[Slot] = []
        while line and len(slots) < limit:
            entry = line[0]
            if isinstance(entry, Slot):
                slots.append(entry)
            elif slots:
                break
            else:
                return cast("G", line.popleft())
            line.popleft()
        if not line:
            self.work.clear()
        return slots

    def began(self, group: G) -> None:
        """A group's requests count as waiting no longer."""
        self._depth -= len(group.slots)
        self._bytes -= group.size

    def head(self, slot: Slot) -> Ticket | G | None:
        """The first ticket that is not answered yet, or the group before it."""
        queue = self._queues[slot]
        while queue and queue[0].answer is None:
            ticket = cast("Ticket", queue.pop(0))
            self._depth -= ticket.requests
            self._bytes -= ticket.size
        return queue[0] if queue else None

    def resume(self, slots: Collection[Slot]) -> None:
        """Puts slots that are out of line at its back, where more waits for them; the others are busy no longer."""
        if self._closed is not None:
            for ticket in [each for slot in slots for each in self.waiting(slot)]:
                ticket.settle(self._closed)
        for slot in slots:
            entry = self.head(slot)
            if entry is None:
                del self._queues[slot]
                continue
            if isinstance(entry, Group):
                self._queues[slot].pop(0)
                entry.missing -= 1
                if entry.missing:
                    continue
            self._line.append(slot if isinstance(entry, Ticket) else entry)
            self.work.set()
        self._admit()

    def waiting(self, slot: Slot) -> list[Ticket]:
        """Whoever waits for a slot, without groups."""
        return [entry for entry in self._queues.get(slot, ()) if isinstance(entry, Ticket)]

    @asynccontextmanager
    async def hold(self, slot: Slot) -> AsyncIterator[None]:
        """Waits for the slot's turn, and keeps everybody behind it until the block ends.

        Raises:
            Draining, SessionNotFound: at once, or while it waits.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn = _Hold(slot, partial(resolve, future), time.perf_counter(), future=future)
        self.put(turn)
        try:
            await future
            yield
        finally:
            if turn.is_held:
                self.resume([slot])
            else:
                turn.cancel()

    async def room(self, slot: Slot) -> None:
        """Waits until another try is worth while for who met `Overloaded`: the slot's turn, or room for the model.

        Raises:
            Draining, SessionNotFound: as `put`.
        """
        if self._closed is not None:
            raise Draining
        if len(self._queues.get(slot, ())) >= self._max_session_queue:
            async with self.hold(slot):
                return
        if self._is_full:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._outside.append(future)
            try:
                await future
            finally:  # who was let in may have gone, or want less: the others are looked at again when that is known
                asyncio.get_running_loop().call_soon(self._admit)

    def close(self, error: LatchError, saving: Container[Slot] = ()) -> None:
        """Takes nothing more, and tells whoever waits; but not the first of the slots that are `saving`: what it has
        asked for may be done, and who saves it tells.
        """
        self._closed = error
        for future in self._outside:
            resolve(future)
        groups = {entry: None for entry in self._line if isinstance(entry, Group)}
        for slot, queue in self._queues.items():
            for entry in queue[1 if slot in saving else 0 :]:
                if isinstance(entry, Ticket):
                    entry.settle(error)
            groups |= {entry: None for entry in queue if isinstance(entry, Group)}
        for group in groups:
            group.refuse(error)

    def _admit(self) -> None:
        """Tells those who wait outside that there is room, as many as there is room for."""
        room = 0 if self._is_full else self._max_queue - self._depth
        while room and self._outside:
            future = self._outside.popleft()
            room -= not future.done()  # who has left needs none
            resolve(future)

    @property
    def _is_full(self) -> bool:
        return self._depth >= self._max_queue or self._bytes >= self._max_queue_bytes


class _Hold(Ticket, kw_only=True):
    """A ticket that keeps its slot out of line when its turn has come."""

    future: asyncio.Future[None]
    is_held: bool = False

    def act(self) -> bool:
        """Its turn has come, even where the caller is just leaving: the end of `hold` sees to that."""
        self.answer, self.is_held = None, True
        resolve(self.future)
        return False


def _full(waiting: int, what: str, limit: int) -> Overloaded:
    return Overloaded(f"{waiting} {what}: send again later", limit=limit, retry_after_ms=100)


def deliver(answer: Callable[[Any], Any], outcome: Any) -> None:
    """Answers; a door that fails must not take the batch with it."""
    try:
        answer(outcome)
    except Exception:
        log.exception("an answer could not be delivered")


def resolve(future: asyncio.Future[Any], outcome: Any = None) -> None:
    """Ends the wait of a caller who may have gone."""
    if future.done():
        return
    if isinstance(outcome, LatchError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def deleted() -> SessionNotFound:
    """What a request is told whose session ended under it."""
    return SessionNotFound("the session was deleted while this request was under way")
